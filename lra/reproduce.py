"""Run a chain: every stage a run of its own, then the finished model on other sets; the next call goes on anywhere.

The folders are the only memory: a stage with a finished result is passed over, one with a config is resumed. What the
whole chain found stands in chain.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from lra.attention_view import VIEW_FILE, write_view
from lra.base.console import info
from lra.base.errors import LraError, RunError, Stopped
from lra.base.files import write_json_atomic
from lra.chain import Chain, chain_path, load_chain
from lra.chain_records import CHAIN_FORMAT
from lra.config import RunConfig
from lra.distributed import World, join_world
from lra.experiment import build_on_meta, run_training
from lra.export import export_weights
from lra.memory import check_fits
from lra.model import num_parameters
from lra.recipes import differences
from lra.restarts import attempts, lost_seconds
from lra.robustness import probe_model
from lra.run_dir import RunDir, environment, now, read_json

GO_ON = "Give the same command again: it goes on from there, on any machine that has the folder."


class Budget:
    """The minutes that a call may take."""

    def __init__(self, minutes: float | None) -> None:
        self.deadline = None if minutes is None else time.monotonic() + 60.0 * minutes

    @property
    def left(self) -> float | None:
        """Minutes left, None without a limit. Raises Stopped when they are over."""
        if self.deadline is None:
            return None
        left = (self.deadline - time.monotonic()) / 60.0
        if left <= 0:
            raise Stopped("Stopped between two stages: the time given by --minutes is over.", GO_ON)
        return left


def reproduce(
    task: str, track: str, overrides: Sequence[str], seed: int, minutes: float | None, out: Path | None
) -> dict[str, Any]:
    """Run the shipped chain of a task and track from wherever its folder stands; return the content of chain.json.

    Raises Stopped (exit code 75) when the time is over, ConfigError, MemoryShortError or RunError before the first
    step if a stage cannot run.
    """
    return run_chain(load_chain(chain_path(task, track), overrides, seed, out, task), minutes)


def run_chain(chain: Chain, minutes: float | None = None) -> dict[str, Any]:
    """Run what is left of a chain; see `reproduce`."""
    budget = Budget(minutes)
    with join_world() as world:
        claim = RunDir(chain.folder).claimed("chain", "give another --out") if world.is_main else nullcontext()
        with claim:
            check_ready(chain, world)
            known = all(is_finished(RunDir(chain.stage_folder(i))) for i in range(len(chain.configs)))
            try:
                for index, config in enumerate(chain.configs):
                    if not is_finished(RunDir(chain.stage_folder(index))):
                        keep(chain, world, "unfinished")
                    run_stage(chain, index, config, world, budget)
                last = RunDir(chain.stage_folder(len(chain.configs) - 1))
                probes = probe_model(last, chain.configs[-1], chain.file.probe, chain.folder, world, budget.left)
            except Stopped as e:
                keep(chain, world, "stopped", e.cause)
                raise Stopped(e.cause, GO_ON) from e
            except LraError as e:
                keep(chain, world, "failed", e.cause)
                raise
            result = keep(chain, world, "finished", probes=probes)
            if world.is_main:
                export_weights(last, chain.folder / "weights")
                write_json_atomic(chain.folder / "weights" / "chain.json", result)
                if not (known and (chain.folder / "weights" / VIEW_FILE).is_file()):
                    write_view(last, chain.configs[-1], world, [chain.folder, chain.folder / "weights"])
    return result


def keep(
    chain: Chain, world: World, status: str, reason: str | None = None, probes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write what is known of a chain into chain.json and return it: also a killed chain is one that a report finds.

    What is known already keeps its date: a finished chain that is called again stays as it was.
    """
    result = describe(chain, world, status, reason, probes or {})
    path = chain.folder / "chain.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    if result | {"date": known.get("date")} == known:
        return known
    if world.is_main:
        write_json_atomic(path, result)
    return result


def check_ready(chain: Chain, world: World) -> None:
    """Raise before the first step where a stage has another config than its folder or cannot fit in memory."""
    for index, config in enumerate(chain.configs):
        run = RunDir(chain.stage_folder(index))
        if (run.path / "config.yaml").is_file():
            changed = differences(run.config(), config)
            if changed:
                raise RunError(
                    f"Stage {config.name} in {chain.folder} was begun under another config ({'; '.join(changed)}).",
                    "Drop these overrides, or begin another chain with --out.",
                )
        if not is_finished(run):
            check_fits(config, num_parameters(build_on_meta(config)), world.device, world.size)


def is_finished(run: RunDir) -> bool:
    """Whether a stage has been trained and tested."""
    return (run.result() or {}).get("status") == "finished"


def run_stage(chain: Chain, index: int, config: RunConfig, world: World, budget: Budget) -> None:
    """Train and test one stage, or go on with it, unless it is finished."""
    run = RunDir(chain.stage_folder(index))
    # One process looks and all do the same: another might look while the first already writes.
    if world.any(world.is_main and is_finished(run)):
        return
    begun = world.any(world.is_main and (run.path / "config.yaml").is_file())
    info(f"Stage {index + 1} of {len(chain.configs)}, {config.name}: {config.task.name}, {config.train.steps:,} steps.")
    result = run_training(config, budget.left, run.path if begun else None)
    world.barrier()
    chosen = chosen_test(result)
    low, high = chosen["interval"]
    info(
        f"Stage {config.name}: test accuracy {100 * chosen['accuracy']:.2f}% [{100 * low:.2f}, {100 * high:.2f}] on "
        f"{chosen['total']:,} images, {result['restarts']} restarts."
    )


def chosen_test(result: dict[str, Any]) -> dict[str, Any]:
    """Return the test of the checkpoint that the recipe reports."""
    tests = result["test"]
    found: dict[str, Any] = tests.get(result["checkpoint_choice"]) or tests["last"]
    return found


def describe(chain: Chain, world: World, status: str, reason: str | None, probes: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a chain: accuracy, GPU minutes by kind of work, restarts, every stage."""
    stages = [stage_summary(chain, index) for index in range(len(chain.configs))]
    last = RunDir(chain.stage_folder(len(stages) - 1)).result() or {}
    here = environment()
    minutes = {kind: sum(s["gpu_minutes"][kind] for s in stages) for kind in stages[0]["gpu_minutes"]}
    published = chain.file.published_epochs
    return {
        "format": CHAIN_FORMAT,
        "name": chain.folder.name,
        "recipe": chain.file.name,
        "task": chain.task,
        "track": chain.file.track,
        "seed": chain.seed,
        "status": status,
        "reason": reason,
        "test": chosen_test(last) if last.get("status") == "finished" else None,
        "probes": probes,
        "gpu_minutes": minutes,
        "restarts": sum(s["restarts"] for s in stages),
        "epochs_share": chain.file.epochs / published if chain.file.epochs and published else None,
        "stages": stages,
        "environment": {key: here[key] for key in ("python", "torch", "gpu", "gpu_count")},
        "num_processes": world.size,
        **{key: here[key] for key in ("commit", "dirty", "code")},
        "date": now(),
    }


def stage_summary(chain: Chain, index: int) -> dict[str, Any]:
    """Return what is known of one stage; minutes are those of all its GPUs together."""
    config, run = chain.configs[index], RunDir(chain.stage_folder(index))
    result = run.result() or {}
    seconds = {kind: float(result.get(key, 0.0)) for kind, key in TIMES.items()}
    given_up = attempts(run)
    seconds["given_up"] = lost_seconds(given_up, of_all=True)
    steps_per_s = result.get("steady_steps_per_s")
    seconds["compilation"] = start_up_seconds(run)
    seconds["training"] = max(seconds["training"] - seconds["compilation"], 0.0)
    minutes = {kind: value / 60.0 for kind, value in seconds.items()}
    minutes["total"] = sum(minutes.values())
    finished = result.get("status") == "finished"
    return {
        "name": config.name,
        "task": config.task.name,
        "status": result.get("status", "waiting"),
        "steps": config.train.steps,
        "images": config.train.steps * config.train.batch_size,
        "num_parameters": result.get("num_parameters"),
        "test": chosen_test(result) if finished else None,
        "restarts": len(given_up),
        "attempts": given_up,
        "limit_eval": config.data.limit_eval,
        "options": changed_options(config),
        "attention": config.attention.backend,
        "images_per_s": None if not steps_per_s else steps_per_s * config.train.batch_size,
        "gpu_minutes": minutes,
        "curve": validation_curve(run),
    }


TIMES = {"training": "train_gpu_s", "evaluation": "eval_gpu_s"}


def changed_options(config: RunConfig) -> dict[str, Any]:
    """Return the options of a stage's set that are not the task's own: another contour length is another test."""
    fields = type(config.task).model_fields
    return {key: value for key, value in config.task.model_dump().items() if value != fields[key].default}


def start_up_seconds(run: RunDir) -> float:
    """Return the GPU seconds of training that went into compiling and recording rather than into steps.

    Windows of the log that took more than twice the median one count with what they took beyond it.
    """
    ends = [(record["step"], record["train_gpu_s"]) for record in run.metrics() if record["kind"] == "train"]
    spans = [(s1 - s0, t1 - t0) for (s0, t0), (s1, t1) in pairwise([(0, 0.0), *ends]) if s1 > s0]
    if len(spans) < 3:
        return 0.0
    usual = median(seconds / steps for steps, seconds in spans)
    return sum(seconds - steps * usual for steps, seconds in spans if seconds > 2 * steps * usual)


def validation_curve(run: RunDir) -> list[dict[str, float]]:
    """Return validation accuracy against the stage's GPU minutes of training."""
    spent_s, points = 0.0, []
    for record in run.metrics():
        if record["kind"] == "train":
            spent_s = record["train_gpu_s"]
        else:
            point = {"step": record["step"], "gpu_minutes": spent_s / 60.0}
            points.append(point | {key: record[key] for key in ("accuracy", "loss", "total")})
    return points


def read_chain(folder: Path) -> dict[str, Any] | None:
    """Read a chain's chain.json, or None if there is none."""
    return read_json(folder / "chain.json")
