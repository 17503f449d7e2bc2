"""What a training run tells while it runs: metrics.jsonl, TensorBoard, a warning when it learns nothing."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import Any

from lra.base.console import info, warn
from lra.base.files import disk_errors
from lra.compiling import compiler_seconds
from lra.config import RunConfig
from lra.distributed import World
from lra.evaluate import Scores
from lra.learner import Learner, Window
from lra.optim import learning_rate
from lra.restarts import watch_stuck
from lra.run_dir import RunDir
from tasks.batches import Batch
from tasks.registry import get

LN2 = math.log(2.0)
STUCK_WINDOWS = 10


class StartUp:
    """Where the time goes until the first step is done, told once; and all that compiling took."""

    def __init__(self) -> None:
        self.begin, self.compiled = time.perf_counter(), compiler_seconds()
        self.ready = self.begin
        self.data_before = 0.0
        self.over = False

    def model_is_there(self, learner: Learner) -> None:
        """Call when model, optimizer and weights are made."""
        self.ready, self.data_before = time.perf_counter(), learner.watch["data"]

    def after_step(self, learner: Learner, world: World) -> None:
        """Call when a step's numbers have been read; the first one is told."""
        if self.over:
            return
        self.over = True
        if not world.is_main:
            return
        now, data_s = time.perf_counter(), learner.watch["data"] - self.data_before
        made, compiled = self.ready - self.begin, compiler_seconds() - self.compiled
        rest = max(now - self.ready - data_s - compiled, 0.0)
        info(
            f"The first step was done after {now - self.begin:.1f} s: model {made:.1f}, first batch {data_s:.1f}, "
            f"compiling {compiled:.1f}, the step itself with loading of kernels {rest:.1f}."
        )

    def note_compiling(self, learner: Learner) -> None:
        """Add what was compiled since the last call to the learner's watch."""
        spent = compiler_seconds()
        seconds = learner.watch.seconds
        seconds["compile"] = seconds.get("compile", 0.0) + max(spent - self.compiled, 0.0)
        self.compiled = spent


class Logger:
    """Writes metrics.jsonl and TensorBoard, and warns when a binary task sticks at ln 2."""

    def __init__(self, config: RunConfig, run: RunDir, world: World, learner: Learner) -> None:
        self.config, self.run, self.learner, self.is_main = config, run, learner, world.is_main
        self.processes = world.size
        self.warned = False
        self.board: Any = None
        if self.is_main:
            from torch.utils.tensorboard import SummaryWriter

            with disk_errors(run.path):
                self.board = SummaryWriter(str(run.path), purge_step=learner.step + 1 if learner.step else None)

    def after_step(self, step: int, loss: float, grad_norm: float, micro_batches: list[Batch]) -> None:
        """Collect what the step before `step` found; every `log_every` steps write one line with the window's means.

        The learner may be further on by now: a GPU's numbers are read late.
        """
        window = self.learner.window
        window.losses.append(loss)
        window.num_examples += sum(b.labels_B.shape[0] for b in micro_batches)
        window.num_tokens += sum(b.num_tokens for b in micro_batches)
        if step % self.config.train.log_every:
            return
        train_s = self.learner.watch["train"]
        elapsed = max(train_s - window.start_s, 1e-9)
        mean_loss = sum(window.losses) / len(window.losses)
        record = {
            "kind": "train",
            "step": step,
            "loss": mean_loss,
            "learning_rate": learning_rate(step - 1, self.config.train),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            # Of all processes, of which each has its share.
            "examples_per_s": self.processes * window.num_examples / elapsed,
            "tokens_per_s": self.processes * window.num_tokens / elapsed,
            "train_s": train_s,
            "train_gpu_s": self.learner.watch.of_all("train"),
        }
        self.write(record)
        self.watch_chance(mean_loss)
        watch_stuck(self.learner, self.config, step, mean_loss)
        self.learner.window = Window(start_s=train_s, num_stuck=window.num_stuck, stuck_steps=window.stuck_steps)

    def after_validation(self, scores: Scores) -> None:
        """Write one line for a validation."""
        record = {"kind": "eval", "step": self.learner.step, "split": "val", "checkpoint": "last", **scores.summary()}
        self.write(record)
        if self.is_main:
            info(
                f"step {self.learner.step:,}: validation accuracy {100 * scores.accuracy:.2f}%, loss {scores.loss:.4f}"
            )

    def write(self, record: dict[str, Any]) -> None:
        """Append to metrics.jsonl and to TensorBoard."""
        if not self.is_main:
            return
        self.run.log(record)
        with disk_errors(self.run.path):
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def watch_chance(self, mean_loss: float) -> None:
        """Warn once when ten windows in a row lie at ln 2 on a two-class image task (Pathfinder's seed lottery)."""
        task = get(self.config.task.name)
        if task.num_classes != 2 or task.grid is None:
            return
        window = self.learner.window
        window.num_stuck = window.num_stuck + 1 if abs(mean_loss - LN2) < 2e-3 else 0
        if window.num_stuck >= STUCK_WINDOWS and not self.warned and self.is_main:
            self.warned = True
            num_steps = STUCK_WINDOWS * self.config.train.log_every
            warn(
                f"The loss has stayed at ln 2 = 0.6931 for {num_steps:,} steps: the model answers at chance. "
                "Some seeds never leave; another seed= or a lower train.learning_rate may."
            )

    def close(self) -> None:
        """Flush TensorBoard. On a full disk its last points are lost; what led here matters more."""
        if self.board is not None:
            with suppress(OSError):
                self.board.close()
