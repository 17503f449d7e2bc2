"""One process of `bench training`: prepares one way to train one model, says so, and times it when it is told to.

Preparing is compiling and a few steps; it may go on in many processes at once. Timing is for one at a time: the parent
writes a line to the standard input when it is this one's turn. Every answer is one line of JSON.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lra.bench_cases import Case, case_of, data_of, read_examples
from lra.bench_padded import PaddedClassifier
from lra.config import RunConfig
from lra.distributed import World
from lra.evaluate import autocast
from lra.feed import batch_feed, make_batches
from lra.learner import make_learner
from lra.run_dir import RunDir, Stopwatch
from lra.step import Numbers, check_arrived, update
from lra.train import MAX_UNREAD
from tasks.registry import get

Step = Callable[[], None]
_QUIET_STEPS, _MOST_WARM_UP_STEPS = 12, 80
_PROFILED_STEPS = 6
_INPUTS_S = 120.0


class Ours:
    """Steps of the suite's own training loop, its data and its reading of numbers included."""

    def __init__(self, config: RunConfig, case: Case, tokens: np.ndarray, lengths: np.ndarray, world: World) -> None:
        self.config, self.world, self.run = config, world, RunDir(Path("memory"))
        self.learner = make_learner(config, world)
        self.data_watch = Stopwatch()
        self.batches = make_batches(config, data_of(case, tokens, lengths), world)
        self.feed = batch_feed(self.batches, 0, config.train.steps, world.device)
        self.unread: deque[Numbers] = deque()
        self.tokens: list[int] = []

    def step(self) -> None:
        """Do one step; read the numbers of an earlier one."""
        with self.data_watch.measure("data"):
            micro_batches = next(self.feed)
        self.tokens.append(sum(b.num_tokens for b in micro_batches))
        self.unread.append(update(self.learner, self.config, micro_batches, self.world, self.run))
        while len(self.unread) > (0 if self.learner.gate is None else MAX_UNREAD):
            check_arrived(self.learner, self.config, self.unread.popleft(), self.world, self.run)

    def recorded(self) -> int:
        """Return how many sizes of batch have a CUDA graph."""
        return 0 if self.learner.graphs is None else len(self.learner.graphs.recorded)


class Padded:
    """Steps of the padded baseline: one batch that lies on the device, no reading of numbers at all."""

    def __init__(
        self, config: RunConfig, case: Case, lengths: np.ndarray, world: World, method: dict[str, Any]
    ) -> None:
        task, model, pieces = get(config.task.name), config.model, method["pieces"]
        torch.manual_seed(0)
        vocab = model.vocab_size or task.vocab_size
        sizes = (case.padded_length, vocab, task.num_classes, task.documents)
        self.model = PaddedClassifier(model, *sizes, method["sdpa"]).to(world.device)
        self.forward = torch.compile(self.model) if method["compiled"] else self.model
        on_gpu = world.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=on_gpu or None)
        count = config.train.batch_size
        shape = (count * task.documents, case.padded_length)
        self.inputs = torch.randint(0, vocab, shape, device=world.device).chunk(pieces)
        self.labels = torch.randint(0, task.num_classes, (count,), device=world.device).chunk(pieces)
        self.config, self.device = config, world.device
        self.data_watch = Stopwatch()
        # The tokens that a batch really has, were these rectangles filled with the case's sequences.
        self.tokens = [int(lengths.mean() * shape[0])]

    def step(self) -> None:
        """Do one step."""
        for tokens_BL, labels_B in zip(self.inputs, self.labels, strict=True):
            with autocast(self.config, self.device):
                loss = F.cross_entropy(self.forward(tokens_BL), labels_B) / len(self.inputs)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def recorded(self) -> int:
        """Return 0: it uses no CUDA graphs."""
        return 0


def build(spec: dict[str, Any], world: World) -> Ours | Padded:
    """Return what the parent's line asks for."""
    case, method = case_of(spec["case"]), spec["method"]
    tokens, lengths = read_examples(Path(spec["data"]), _INPUTS_S)
    config = case.config(*spec["overrides"])
    if method["kind"] == "ours":
        return Ours(config, case, tokens, lengths, world)
    return Padded(config, case, lengths, world, method)


def warm_up(trainer: Ours | Padded) -> None:
    """Run steps until no new size of batch has been recorded for a while: in a long training nearly all have been."""
    last_new = 0
    for number in range(_MOST_WARM_UP_STEPS):
        before = trainer.recorded()
        trainer.step()
        if trainer.recorded() > before:
            last_new = number
        if number - last_new >= (_QUIET_STEPS if trainer.recorded() else 3):
            return


def time_steps(trainer: Ours | Padded, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time steps one after another for about so many seconds, at least four, without a pause between them."""
    step = trainer.step
    warm_up(trainer)
    _wait(device)
    waited, first = trainer.data_watch["data"], len(trainer.tokens)
    marks: list[Any] = [_mark(device)]
    start = time.perf_counter()
    while len(marks) < 5 or (time.perf_counter() - start < seconds and len(marks) < 400):
        step()
        marks.append(_mark(device))
    _wait(device)
    whole_ms = (time.perf_counter() - start) * 1e3
    spans = [_between(a, b) for a, b in pairwise(marks)]
    tokens = statistics.mean(trainer.tokens[first:] or trainer.tokens)
    ms = statistics.median(spans)
    return {
        "ms": ms,
        "mean_ms": whole_ms / len(spans),
        "steps": len(spans),
        "tokens": tokens,
        "tokens_per_s": tokens / ms * 1e3,
        "data_wait_ms": (trainer.data_watch["data"] - waited) * 1e3 / len(spans),
        "graphs": trainer.recorded(),
    }


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(a: Any, b: Any) -> float:
    return (b - a) * 1e3 if isinstance(a, float) else float(a.elapsed_time(b))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def where_time_goes(step: Step, device: torch.device) -> dict[str, float] | None:
    """Return ms a step of the GPU by kind of kernel, and in which it does nothing; None off the GPU."""
    if device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    _wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        for _ in range(_PROFILED_STEPS):
            step()
        _wait(device)
        whole = (time.perf_counter() - start) * 1e3 / _PROFILED_STEPS
    spent = dict.fromkeys(("attention forward", "attention backward", "matrix products", "copies", "the rest"), 0.0)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA:
            spent[kind_of(event.key)] += event.self_device_time_total / 1e3 / _PROFILED_STEPS
    return {**spent, "idle": max(whole - sum(spent.values()), 0.0), "profiled": whole}


def kind_of(kernel: str) -> str:
    """Name the kind of work that a kernel's name stands for."""
    name = kernel.lower()
    if name.startswith("mem"):
        return "copies"
    if name.startswith("attention_") or any(part in name for part in ("fmha", "flash_", "sdpa", "cudnn_generated")):
        backward = any(part in name for part in ("backward", "bwd", "dgrad", "preprocess", "postprocess", "dot_do_o"))
        return "attention backward" if backward else "attention forward"
    if any(part in name for part in ("gemm", "nvjet", "cutlass", "splitkreduce", "triton_tem", "_mm_")):
        return "matrix products"
    return "the rest"


def main(line: str) -> None:
    """Prepare, wait for the turn, time; one JSON line after each."""
    spec = json.loads(line)
    device = torch.device(spec["device"])
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    world = World(0, 1, device)
    answers = _stages(spec, world)
    for turn in ("prepare", "measure"):
        try:
            answer = next(answers)
        except torch.OutOfMemoryError as e:
            answer = {"status": "does not fit", "reason": str(e).splitlines()[0]}
        except Exception as e:
            answer = {"status": "failed", "reason": f"{type(e).__name__}: {' '.join(str(e).split())[:400]}"}
        print(json.dumps(answer), flush=True)
        if answer["status"] != "ready" or turn == "measure" or not sys.stdin.readline():
            return


def _stages(spec: dict[str, Any], world: World) -> Iterator[dict[str, Any]]:
    device, start = world.device, time.perf_counter()
    trainer = build(spec, world) if spec["prepare"] else None
    if trainer is not None:
        trainer.step()
    else:
        torch.zeros(1, device=device)
    _wait(device)
    _free(device)
    yield {"status": "ready", "prepare_s": time.perf_counter() - start}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = trainer or build(spec, world)
    answer = time_steps(trainer, device, spec["seconds"])
    if device.type == "cuda":
        answer["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        answer["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    try:
        answer["where"] = where_time_goes(trainer.step, device) if spec["profile"] else None
    except RuntimeError as e:
        # No profiler is no reason to lose the times.
        answer["where"], answer["where_not"] = None, str(e).splitlines()[0]
    yield {"status": "timed", **answer}


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.stdin.readline())
