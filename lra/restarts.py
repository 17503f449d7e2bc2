"""Runs that stick at chance: recognised by a rule on the loss, set aside, begun again with the next seed.

A run's folder counts its attempts: attempt-1/, attempt-2/ ... each hold what is known of one that was given up. The
count is made by one rename, so a kill at any moment leaves a folder that goes on correctly.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import Any

from lra.base.console import warn
from lra.base.errors import LraError
from lra.base.files import disk_errors, write_json_atomic
from lra.base.seeds import torch_seed
from lra.config import RunConfig
from lra.learner import Learner
from lra.run_dir import RunDir, read_json


class StuckError(LraError):
    """The rule of train.restart gave up an attempt; carries what is known of it."""

    def __init__(self, cause: str, attempt: dict[str, Any]) -> None:
        super().__init__(cause, "The run begins again with another seed.")
        self.attempt = attempt


def watch_stuck(learner: Learner, config: RunConfig, step: int, mean_loss: float) -> None:
    """Count the steps of the window before `step` if its mean loss lies in the band; StuckError if the rule is met."""
    rule, window = config.train.restart, learner.window
    if rule is None:
        return
    counts = step > rule.after and rule.low <= mean_loss <= rule.high
    window.stuck_steps = window.stuck_steps + config.train.log_every if counts else 0
    if window.stuck_steps < rule.steps:
        return
    attempt = {"seed": config.seed, "step": step, "loss": mean_loss, "seconds": dict(learner.watch.seconds)}
    raise StuckError(
        f"Stuck at chance: for {window.stuck_steps:,} steps up to step {step:,} the loss was between "
        f"{rule.low} and {rule.high}.",
        attempt,
    )


def attempts(run: RunDir) -> list[dict[str, Any]]:
    """Return what is known of the attempts that were given up, in order."""
    found: list[dict[str, Any]] = []
    while (folder := run.path / f"attempt-{len(found) + 1}").is_dir():
        found.append(read_json(folder / "attempt.json") or {})
    return found


def lost_seconds(given_up: list[dict[str, Any]], *, of_all: bool = False) -> float:
    """Return the seconds of training and evaluation in attempts that were given up, or of all processes together."""
    # Other kinds of work in the stopwatch lie within these.
    kinds = ("train_of_all", "eval_of_all") if of_all else ("train", "eval")
    return sum(attempt.get("seconds", {}).get(kind, 0.0) for attempt in given_up for kind in kinds)


def attempt_config(config: RunConfig, number: int) -> RunConfig:
    """Return the config of attempt `number`, counted from 0: the same with a seed of its own.

    After the last restart that the rule allows, the attempt goes on to the end.
    """
    rule = config.train.restart
    if rule is None or number == 0:
        return config
    changes: dict[str, Any] = {"seed": torch_seed(config.seed, "restart", number) >> 32}
    if number >= rule.limit:
        changes["train"] = config.train.model_copy(update={"restart": None})
    return config.model_copy(update=changes)


def set_aside(run: RunDir, error: StuckError) -> None:
    """Move a stuck attempt's checkpoints and metrics out of the way; from the rename on it counts as given up."""
    aside = run.path / f"attempt-{len(attempts(run)) + 1}"
    warn(f"{error.cause} {error.remedy}")
    with disk_errors(run.path):
        run.checkpoints.mkdir(exist_ok=True)
        write_json_atomic(run.checkpoints / "attempt.json", error.attempt)
        os.rename(run.checkpoints, aside)
        for doomed in aside.glob("step_*"):
            shutil.rmtree(doomed, ignore_errors=True)
        with suppress(FileNotFoundError):
            os.rename(run.metrics_path, aside / run.metrics_path.name)
