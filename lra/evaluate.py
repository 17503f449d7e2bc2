"""Accuracy from integer counts over a whole split, resumable in slices and exact under any number of processes."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lra.attention import backend_class
from lra.base.console import progress
from lra.base.errors import Stopped
from lra.base.files import write_json_atomic
from lra.config import RunConfig
from lra.distributed import World
from lra.model import Classifier
from lra.preempt import StopRequest
from lra.statistics import wilson_interval
from tasks.batches import Batch, collate, prefetch, rounded
from tasks.cache import Cache

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Tokens of an evaluation batch on a GPU, about: more of them are no quicker.
TOKENS_AT_ONCE = 1 << 19
# Batches that the GPU may be behind the host; each keeps its page-locked memory.
MAX_UNREAD = 4


@dataclass(frozen=True)
class Scores:
    """What a split's evaluation found. `predictions` and `labels` follow the split's order."""

    predictions: np.ndarray
    labels: np.ndarray
    loss: float
    earlier: tuple[float, float] = (0.0, 0.0)
    """Seconds of earlier slices that a stop ended: of the clock, and of all processes together."""

    @property
    def correct(self) -> int:
        """Number of right answers."""
        return int((self.predictions == self.labels).sum())

    @property
    def total(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def accuracy(self) -> float:
        """Fraction of right answers."""
        return self.correct / self.total

    def summary(self) -> dict[str, float | int | list[float]]:
        """Return counts, accuracy, its 95% Wilson interval and the mean loss as plain numbers."""
        interval = wilson_interval(self.correct, self.total)
        return {
            "correct": self.correct,
            "total": self.total,
            "accuracy": self.accuracy,
            "interval": [float(interval[0]), float(interval[1])],
            "loss": self.loss,
        }


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Return the mixed-precision context of the recipe."""
    return torch.autocast(device.type, AUTOCAST.get(config.train.precision), enabled=config.train.precision != "fp32")


def eval_batches(
    config: RunConfig, cache: Cache, indices: np.ndarray, world: World, start: int
) -> Iterator[tuple[int, np.ndarray, Batch | None]]:
    """Yield (place after the batch, this process's places, its Batch); None where the last batch has none for it.

    On a GPU every batch has one number of sequences and one of few numbers of rows, for compiled code's sake.
    """
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.device)
    size = batch_size(config, cache.documents, on_gpu)
    for first in range(start, len(indices), size):
        places = np.arange(first, min(first + size, len(indices)))[world.rank :: world.size]
        batch = _eval_batch(config, cache, indices[places], -(-size // world.size), on_gpu) if len(places) else None
        yield min(first + size, len(indices)), places, batch


def _eval_batch(config: RunConfig, cache: Cache, examples: np.ndarray, full: int, on_gpu: bool) -> Batch:
    """Return the batch of these examples, on a GPU with `full` ones: what is there beside them has the label -100.

    Where all sequences have one length the last example is repeated: the last batch then has the form of all others.
    """
    cls, bound = config.model.pooling == "cls", config.max_length + int(config.model.pooling == "cls")
    form: dict[str, Any] = {
        "max_length": config.max_length, "cls": cls, "black_pixels": config.data.black_pixels,
    }  # fmt: skip
    batch = collate(cache, examples, **form)
    missing = full - len(examples)
    if not on_gpu:
        return batch
    if missing and batch.uniform and batch.max_length == bound:
        batch = collate(cache, np.concatenate([examples, np.repeat(examples[-1:], missing)]), **form)
        batch.labels_B[len(examples) :] = -100
    return rounded(batch, bound, full)


def batch_size(config: RunConfig, documents: int, on_gpu: bool) -> int:
    """Return the examples of an evaluation batch, over all processes."""
    train = config.train
    if train.eval_batch_size is not None:
        return train.eval_batch_size
    micro_batch = max(train.batch_size // train.accumulate, 1)
    if not on_gpu or not backend_class(config.attention.backend).linear_memory:
        return micro_batch
    return max(micro_batch, TOKENS_AT_ONCE // (documents * config.max_length))


def evaluate(
    model: Classifier,
    config: RunConfig,
    cache: Cache,
    indices: np.ndarray,
    world: World,
    *,
    stop: StopRequest | None = None,
    partial: Path | None = None,
    title: str = "evaluate",
) -> Scores:
    """Score `model` on the examples `indices`.

    The host reads nothing until the end (or a stop), so a GPU computes without a pause. With `stop`, a stop request
    writes what was done to `partial` and raises Stopped; the next call with the same `partial` goes on from there. The
    file is removed at the end; its name must tell model and split apart.
    """
    key = _partial_key(config, len(indices))
    predictions, loss_sum, start, earlier = _read_partial(partial, key, len(indices), world)
    begun = time.perf_counter()
    device, was_training = world.device, model.training
    found: list[tuple[np.ndarray, Tensor]] = []
    loss = torch.tensor(loss_sum, dtype=torch.float64, device=device)
    model.eval()
    pace = Pace(device)
    feed = prefetch(eval_batches(config, cache, indices, world, start), pin=device.type == "cuda")
    try:
        with progress(len(indices), title, "examples", start) as bar, torch.no_grad(), autocast(config, device):
            done = start
            for after, places, batch in feed:
                if batch is not None:
                    batch = batch.to(device)
                    logits_BC = model(batch)
                    found.append((places, logits_BC.argmax(1)[: len(places)]))
                    loss += F.cross_entropy(logits_BC, batch.labels_B, reduction="sum")
                    pace.step()
                bar.advance(after - done)
                done = after
                if stop is not None and done < len(indices) and world.any(stop.reason is not None):
                    predictions, loss_sum = _merge(world, *_read(predictions, found, loss))
                    spent = time.perf_counter() - begun
                    spent_in_all = (earlier[0] + spent, earlier[1] + spent * world.size)
                    _write_partial(world, partial, key, predictions, loss_sum, done, spent_in_all)
                    raise Stopped(f"Stopped after evaluating {done:,} of {len(indices):,} examples: {stop.why}.")
    finally:
        feed.close()
        model.train(was_training)
    predictions, loss_sum = _merge(world, *_read(predictions, found, loss))
    if partial is not None and world.is_main:
        partial.unlink(missing_ok=True)
    labels = np.asarray(cache.labels[indices], dtype=np.int64)
    return Scores(predictions, labels, loss_sum / max(len(indices), 1), earlier)


class Pace:
    """Keeps the host at most MAX_UNREAD batches ahead of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.events: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """Call after each batch."""
        if not self.on_gpu:
            return
        event = torch.cuda.Event(blocking=True)
        event.record()
        self.events.append(event)
        if len(self.events) > MAX_UNREAD:
            self.events.popleft().synchronize()


def _read(predictions: np.ndarray, found: list[tuple[np.ndarray, Tensor]], loss: Tensor) -> tuple[np.ndarray, float]:
    """Bring what the device found to the host; `predictions` is filled in."""
    if found:
        guesses = torch.cat([guess for _, guess in found]).cpu().numpy()
        predictions[np.concatenate([places for places, _ in found])] = guesses
    return predictions, float(loss.item())


def _merge(world: World, predictions: np.ndarray, loss_sum: float) -> tuple[np.ndarray, float]:
    """Bring the processes' parts together: places not scored here hold -1."""
    if world.size == 1:
        return predictions, loss_sum
    shared = torch.from_numpy(predictions + 1).to(world.device)
    loss = torch.tensor([loss_sum], dtype=torch.float64, device=world.device)
    return world.sum(shared).cpu().numpy() - 1, float(world.sum(loss).item())


def _partial_key(config: RunConfig, total: int) -> str:
    """Say what a partial evaluation belongs to: under other settings its numbers must not be mixed in."""
    values = config.model_dump(mode="json", include={"data": True, "attention": True, "train": {"precision"}})
    values["data"].pop("folder")
    return hashlib.sha256(json.dumps([values, total], sort_keys=True).encode()).hexdigest()[:16]


def _read_partial(
    partial: Path | None, key: str, total: int, world: World
) -> tuple[np.ndarray, float, int, tuple[float, float]]:
    predictions, none = np.full(total, -1, dtype=np.int64), (0.0, 0.0)
    if partial is None or not partial.exists():
        return predictions, 0.0, 0, none
    saved = json.loads(partial.read_text(encoding="utf-8"))
    if saved["key"] != key:
        return predictions, 0.0, 0, none
    done, seconds = int(saved["done"]), (float(saved["seconds"][0]), float(saved["seconds"][1]))
    if not world.is_main:
        # The parts are summed at the end: only one process brings in what is already known.
        return predictions, 0.0, done, seconds
    predictions[:done] = saved["predictions"]
    return predictions, float(saved["loss_sum"]), done, seconds


def _write_partial(
    world: World,
    partial: Path | None,
    key: str,
    predictions: np.ndarray,
    loss_sum: float,
    done: int,
    seconds: tuple[float, float],
) -> None:
    if partial is not None and world.is_main:
        saved = {
            "key": key,
            "done": done,
            "loss_sum": loss_sum,
            "seconds": seconds,
            "predictions": predictions[:done].tolist(),
        }
        write_json_atomic(partial, saved)
