"""One run from config to result.json: data, training or evaluation, both checkpoints tested, everything written."""

from __future__ import annotations

import csv
import gc
import io
import os
import shutil
import statistics
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import attention_kernels as ak
from lra import checkpoint as checkpoints
from lra.base.console import info
from lra.base.errors import ConfigError, DataError, LraError, MemoryShortError, Stopped
from lra.base.files import write_json_atomic, write_text_atomic
from lra.board import write_examples_and_hparams
from lra.config import RunConfig
from lra.distributed import World, join_world
from lra.evaluate import Scores, batch_size, evaluate
from lra.feed import Data
from lra.learner import Learner, load_weights
from lra.memory import check_evaluation_fits, check_fits, estimate
from lra.model import Classifier, num_parameters
from lra.preempt import StopRequest, catch_signals
from lra.recipes import differences
from lra.restarts import StuckError, attempt_config, attempts, lost_seconds, set_aside
from lra.run_dir import RunDir, environment, now
from lra.statistics import class_scores, confusion
from lra.train import train
from lra.transfer import checkpoint_of, saved_weights
from tasks.cache import build_cache, find_cache, open_cache
from tasks.registry import get

RESULT_FORMAT = 1
EVAL_CHANGES = ("attention.", "train.eval_batch_size", "train.precision", "data.limit_eval")


def open_data(config: RunConfig) -> Data:
    """Open the task's cache and split it; a generated task is generated first if it is not there.

    Raises DataError with the `prepare` command if the task's files have not been converted yet.
    """
    task, folder = get(config.task.name), Path(config.data.folder)
    path = find_cache(task, config.task, folder)
    if path is None and task.generated:
        path = build_cache(task, config.task, None, folder)
    if path is None:
        raise DataError(
            f"The data of {task.name} have not been prepared in {folder}.",
            f"Run: run_lra.py prepare {task.name} --source FOLDER (or without --source to download).",
        )
    cache = open_cache(path)
    rule = config.data.split_rule or next(iter(task.split_rules))
    splits = dict(cache.split(task, rule))
    few = config.data.limit_eval
    limits = {"train": config.data.limit_train, "val": config.data.limit_val or few, "test": few}
    splits = {name: evenly_spaced(indices, limits[name]) for name, indices in splits.items()}
    return Data(cache, splits, rule)


def evenly_spaced(indices: np.ndarray, limit: int | None) -> np.ndarray:
    """Return `limit` of the indices from all over: the first ones may be of one class (IMDB is stored by class)."""
    if limit is None or limit >= len(indices):
        return indices
    return indices[np.linspace(0, len(indices) - 1, limit).round().astype(np.int64)]


def run_training(config: RunConfig, minutes: float | None = None, resume: Path | None = None) -> dict[str, Any]:
    """Train, test the best and the last checkpoint, write result.json; return it.

    Raises Stopped (resumable) on a signal or after `minutes`, and every LraError of the parts; a failed run keeps a
    result.json that says why.
    """
    stop = StopRequest(minutes)
    run = RunDir(resume or Path(config.runs_folder) / config.run_name)
    with catch_signals(stop), join_world() as world:
        set_determinism(config)
        check_compiler(config, world)
        claim = run.claimed() if world.is_main else nullcontext()
        with claim:
            if resume is not None:
                run.check_resume(config)
            elif world.is_main:
                run.start(config)
            world.barrier()
            return _train_and_test(config, run, world, stop)


def _train_and_test(config: RunConfig, run: RunDir, world: World, stop: StopRequest) -> dict[str, Any]:
    learner: Learner | None = None
    with stop.at_once():
        data = open_data(config)
    parameters = num_parameters(build_on_meta(config))
    try:
        check_fits(config, parameters, world.device, world.size)
        learner = train_to_the_end(config, data, run, world, stop)
        result = final_result(learner, config, data, run, world, stop)
    except torch.OutOfMemoryError as e:
        short = MemoryShortError(
            f"The GPU's memory did not suffice ({str(e).splitlines()[0]}) Estimated: "
            f"{estimate(config, parameters, world.size)}.",
            "Raise train.accumulate, or use attention=flash.",
        )
        _write_unfinished(config, data, run, world, short, parameters)
        raise short from e
    except Stopped as e:
        _write_unfinished(config, data, run, world, e, parameters)
        raise Stopped(e.cause, run.how_to_resume) from e
    except LraError as e:
        _write_unfinished(config, data, run, world, e, parameters)
        raise
    if world.is_main:
        run.write_result(result)
    return result


def forget_earlier_runs(world: World) -> None:
    """Free what a run before this one in the same process (a chain's stage, a stuck attempt) has left behind.

    Compiled code counts by function and not by model: without this a chain meets the compiler's limit of versions.
    """
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def train_to_the_end(config: RunConfig, data: Data, run: RunDir, world: World, stop: StopRequest) -> Learner:
    """Train, beginning again with another seed where the recipe's rule says that the run is stuck."""
    while True:
        forget_earlier_runs(world)
        try:
            return train(attempt_config(config, len(attempts(run))), data, run, world, stop)
        except StuckError as e:
            if world.is_main:
                set_aside(run, e)
            world.barrier()


def final_result(
    learner: Learner, config: RunConfig, data: Data, run: RunDir, world: World, stop: StopRequest
) -> dict[str, Any]:
    """Test the last and the best-validated weights; return the content of result.json."""
    best, tests = learner.best, test_weights(learner, config, data, run, world, stop)
    result = describe(config, data, run, num_parameters(learner.model))
    chosen = tests.get(config.train.checkpoint_choice) or tests["last"]
    steps = {"last": learner.step, "best_val": best.step if best else learner.step}
    matrix = confusion(chosen.labels.tolist(), chosen.predictions.tolist(), get(config.task.name).num_classes)
    seconds = max(learner.watch["train"], 1e-9)
    windows = [r for r in run.metrics() if r["kind"] == "train" and "examples_per_s" in r]
    rates, size = [r["tokens_per_s"] for r in windows], config.train.batch_size
    result |= {
        "status": "finished",
        "step": learner.step,
        "test": {name: {"step": steps[name], **scores.summary()} for name, scores in tests.items()},
        "val": {"best": None if best is None else {"step": best.step, **best.summary}},
        "train_s": learner.watch["train"],
        "eval_s": learner.watch["eval"],
        # Of all processes together, which need not have been equally many all the time.
        "train_gpu_s": learner.watch.of_all("train"),
        "eval_gpu_s": learner.watch.of_all("eval"),
        "compile_s": learner.watch["compile"],
        "wall_s": learner.watch["train"] + learner.watch["eval"],
        "steps_per_s": learner.step / seconds,
        # The median window: neither compilation nor a slow disk once is in it.
        "steady_steps_per_s": statistics.median(r["examples_per_s"] for r in windows) / size if windows else None,
        "tokens_per_s": sum(rates) / len(rates) if rates else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None,
        "confusion": matrix,
        "per_class": [dict(score) for score in class_scores(matrix)],
        "resumed": learner.num_resumed,
        "what_ran": {"attention": what_ran(config)},
    }
    if world.is_main:
        write_examples_and_hparams(run, config, data, chosen, result)
    return result


def test_weights(
    learner: Learner, config: RunConfig, data: Data, run: RunDir, world: World, stop: StopRequest
) -> dict[str, Scores]:
    """Test the last and the best-validated weights, or the recipe's choice alone."""
    best, choice = learner.best, config.train.checkpoint_choice if config.train.test == "chosen" else None
    best_is_last = best is not None and best.step == learner.step
    tests: dict[str, Scores] = {}
    if choice != "best_val" or best_is_last:
        with learner.evaluated_weights():
            tests["last"] = _timed_test(learner, config, data, run, world, stop, f"last-step{learner.step}")
    if best_is_last:
        tests["best_val"] = tests["last"]
    elif best is not None and choice != "last":
        saved = checkpoints.load(saved_weights(run, best.step))
        load_weights(learner.model, saved.tensors, averaged=True)
        tests["best_val"] = _timed_test(learner, config, data, run, world, stop, f"best-step{best.step}")
    return tests


def _timed_test(
    learner: Learner, config: RunConfig, data: Data, run: RunDir, world: World, stop: StopRequest, name: str
) -> Scores:
    """Test the learner's model and count the time, that of slices before a stop too."""
    with learner.watch.measure("eval"):
        scores = _test(learner.model, config, data, run, world, stop, name)
    learner.watch.add("eval", *scores.earlier)
    return scores


def _test(
    model: Classifier,
    config: RunConfig,
    data: Data,
    run: RunDir,
    world: World,
    stop: StopRequest,
    name: str,
) -> Scores:
    partial = run.path / f"partial-test-{config.attention.backend}-{name}.json"
    title, indices = f"test {name}", data.splits["test"]
    return evaluate(model, config, data.cache, indices, world, stop=stop, partial=partial, title=title)


def run_evaluation(
    path: Path, config: RunConfig, minutes: float | None, which: str, predictions: bool
) -> dict[str, Any]:
    """Test a finished run's checkpoint under `config`, which may differ in its attention backend and batch size.

    Writes eval-<backend>-<which>.json (and predictions-....csv) into the run's folder; returns its content.
    """
    run = RunDir(path)
    changed = [d for d in differences(run.config(), config) if not d.startswith(EVAL_CHANGES)]
    if changed:
        raise ConfigError(
            f"eval cannot change {'; '.join(changed)}.", "It may change attention, precision and batch size."
        )
    stop = StopRequest(minutes)
    with catch_signals(stop), join_world() as world, run.claimed() if world.is_main else nullcontext():
        set_determinism(config)
        with stop.at_once():
            data = open_data(config)
        saved = checkpoint_of(run, which)
        model = Classifier(config).to(world.device)
        load_weights(model, saved.tensors, averaged=True)
        at_once = -(-batch_size(config, data.cache.documents, world.device.type == "cuda") // world.size)
        check_evaluation_fits(config, num_parameters(model), world.device, at_once)
        try:
            scores = _test(model, config, data, run, world, stop, f"{which}-step{saved.step}")
        except Stopped as e:
            raise Stopped(e.cause, "Give the same command again: it goes on from there.") from e
        name = f"{config.attention.backend}-{which}"
        result: dict[str, Any] = {"checkpoint": which, "step": saved.step, "backend": config.attention.backend}
        result |= scores.summary()
        result |= {"split_rule": data.split_rule, "what_ran": {"attention": what_ran(config)}, "date": now()}
        if world.is_main:
            write_json_atomic(run.path / f"eval-{name}.json", result)
            if predictions:
                write_text_atomic(run.path / f"predictions-{name}.csv", predictions_csv(data, scores))
    return result


def predictions_csv(data: Data, scores: Scores) -> str:
    """Return one line an example: its index in the cache, label, prediction."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["example", "label", "prediction"])
    writer.writerows(
        zip(data.splits["test"].tolist(), scores.labels.tolist(), scores.predictions.tolist(), strict=True)
    )
    return out.getvalue()


def describe(config: RunConfig, data: Data | None, run: RunDir, parameters: int) -> dict[str, Any]:
    """Return what is known of a run whatever became of it."""
    here, lost = environment(), attempts(run)
    return describe_config(config, data, run.path.name, parameters) | {
        "environment": {key: here[key] for key in ("python", "torch", "gpu", "gpu_count")},
        **{key: here[key] for key in ("commit", "dirty", "code")},
        "date": now(),
        "restarts": len(lost),
        "lost_s": lost_seconds(lost),
    }


def describe_config(config: RunConfig, data: Data | None, name: str, parameters: int) -> dict[str, Any]:
    """Return what is known of a run before anything of it has run."""
    sparse = config.attention.backend == "block_sparse"
    return {
        "format": RESULT_FORMAT,
        "name": name,
        "reason": None,
        "task": config.task.name,
        "recipe": f"{config.task.name}/{config.protocol}",
        "protocol": config.protocol,
        "track": config.track,
        "backend": config.attention.backend,
        "layout": f"{config.attention.layout or 'butterfly'}-{config.attention.block or 64}" if sparse else None,
        "seed": config.seed,
        "num_parameters": parameters,
        "steps": config.train.steps,
        "batch_size": config.train.batch_size,
        "precision": config.train.precision,
        "split_rule": data.split_rule if data else config.data.split_rule,
        "checkpoint_choice": config.train.checkpoint_choice,
        "source": data.cache.manifest.source if data else None,
        "expected": config.expected.model_dump() if config.expected else None,
    }


def _write_unfinished(
    config: RunConfig, data: Data, run: RunDir, world: World, error: LraError, parameters: int
) -> None:
    if not world.is_main:
        return
    status = "stopped" if isinstance(error, Stopped) else "failed"
    saved = checkpoints.published(run.checkpoints)
    step = checkpoints.step_of(saved[-1]) if saved else 0
    # What went wrong is worth more than that it could not be written down too.
    with suppress(LraError):
        known = describe(config, data, run, parameters)
        run.write_result(known | {"status": status, "reason": error.cause, "exit_code": error.exit_code, "step": step})


def what_ran(config: RunConfig) -> str:
    """Say which implementation computed the attention of this process."""
    ran = "; ".join(f"{operator}: {what}" for operator, what in sorted(ak.what_ran().items()))
    return ran if config.attention.backend in ("flash", "block_sparse") else "PyTorch operations, padded"


def build_on_meta(config: RunConfig) -> Classifier:
    """Build the model without memory or random numbers, to count its parameters."""
    with torch.device("meta"):
        return Classifier(config)


def dry_run(config: RunConfig) -> str:
    """Return parameter count, memory estimate and steps in words."""
    parameters = num_parameters(build_on_meta(config))
    tokens = config.train.batch_size * config.max_length * get(config.task.name).documents
    return (
        f"parameters: {parameters:,}\n"
        f"memory, at most: {estimate(config, parameters)}\n"
        f"steps: {config.train.steps:,} of {config.train.batch_size} examples, at most {tokens:,} tokens each"
    )


def check_compiler(config: RunConfig, world: World) -> None:
    """Raise ConfigError if the recipe wants torch.compile on the CPU and the machine has no C++ compiler for it."""
    compiler = os.environ.get("CXX", "g++")
    if config.train.compile is True and world.device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile=true needs a C++ compiler on the CPU, and {compiler} is not there.",
            "Install g++, name another in CXX, or leave train.compile=false.",
        )


def set_determinism(config: RunConfig) -> None:
    """Switch deterministic algorithms on or off as the recipe says."""
    # Asked only for a change: the call imports torch's compiler, which takes seconds.
    if config.train.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(config.train.deterministic)
    if config.train.deterministic:
        torch.backends.cudnn.benchmark = False
        info("Deterministic algorithms are on: the same machine gives the same bits.")
