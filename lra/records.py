"""What a report knows about one run: its scores, curves and settings, typed and frozen.

Made by lra/runs.py, read by the summary, the plots and the pages. Knows no file format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["finished", "stopped", "failed", "unfinished", "corrupt", "missing"]


@dataclass(frozen=True)
class Score:
    """A test result as integer counts, at the optimizer step of its checkpoint."""

    step: int
    correct: int
    total: int
    loss: float | None

    @property
    def accuracy(self) -> float:
        """Fraction 0..1, always from the counts."""
        return self.correct / self.total


@dataclass(frozen=True)
class Evaluation:
    """A later test of a run's checkpoint by `eval`, perhaps under another backend; shown, never in a mean."""

    backend: str
    checkpoint: str
    score: Score


@dataclass(frozen=True)
class Curve:
    """Values over optimizer steps, both of equal length, steps ascending."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, points: Mapping[int, float]) -> Curve:
        """Sort points by step."""
        steps = tuple(sorted(points))
        return cls(steps, tuple(points[s] for s in steps))


@dataclass(frozen=True)
class Curves:
    """What metrics.jsonl holds for plotting; `bad_lines` counts lines that could not be read."""

    train_loss: Curve = Curve()
    val_loss: Curve = Curve()
    val_accuracy: Curve = Curve()
    bad_lines: int = 0

    @property
    def last_step(self) -> int:
        """The last step that any line names."""
        return max((c.steps[-1] for c in (self.train_loss, self.val_accuracy) if c.steps), default=0)


@dataclass(frozen=True)
class RunRecord:
    """All that a report says about one run. None means that the files do not tell."""

    path: Path
    name: str
    status: Status
    reason: str = ""
    task: str = "unknown"
    recipe: str | None = None
    protocol: str = "unknown"
    track: str = "unknown"
    backend: str = "unknown"
    layout: str | None = None
    seed: int | None = None
    num_parameters: int | None = None
    steps: int | None = None
    step: int | None = None
    batch_size: int | None = None
    precision: str | None = None
    split_rule: str | None = None
    checkpoint_choice: str | None = None
    source: str | None = None
    tests: Mapping[str, Score] = field(default_factory=dict)
    evaluations: tuple[Evaluation, ...] = ()
    val_accuracy: float | None = None
    expected: float | None = None
    expected_source: str = ""
    confusion: tuple[tuple[int, ...], ...] = ()
    what_ran: Mapping[str, str] = field(default_factory=dict)
    train_s: float | None = None
    eval_s: float | None = None
    wall_s: float | None = None
    steps_per_s: float | None = None
    steady_steps_per_s: float | None = None
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    device: str | None = None
    num_gpus: int | None = None
    software: str | None = None
    command: str | None = None
    commit: str | None = None
    dirty: bool = False
    date: str | None = None
    resumed: int = 0
    restarts: int = 0
    short_of_memory: bool = False
    fingerprint: str = ""
    curves: Curves = Curves()

    @property
    def outcome(self) -> str:
        """The status, or "out of memory" where that is why a run failed: what a table's cell says."""
        return "out of memory" if self.status == "failed" and self.short_of_memory else self.status

    @property
    def chosen(self) -> Score | None:
        """The test score of the checkpoint that the protocol reports; the last one where there was no validation."""
        return self.tests.get(self.checkpoint_choice or "best_val") or self.tests.get("last")

    @property
    def counted(self) -> bool:
        """Whether the run enters a mean: finished, with the test of the chosen checkpoint."""
        return self.status == "finished" and self.chosen is not None

    @property
    def official_data(self) -> bool:
        """Whether the data are a task's own; False when not stated."""
        return is_official(self.source)


def is_official(source: str | None) -> bool:
    """Whether data from this source are a task's own: its release, or made by its generator."""
    return (source or "").lower().startswith(("generated", "official"))
