"""What a report knows about chains of stages (`run_lra.py reproduce`): found, read, sorted into groups of seeds.

Called by the report. Reads files only: chain.json, and of a chain that is not finished its stages' metrics.jsonl. A
chain that is unfinished, failed, stopped or damaged becomes a record that says so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lra import statistics
from lra.json_values import count, mapping, number, read_object, score, text
from lra.records import Score
from lra.runs import CHAIN_FILE, MAX_DEPTH, MAX_LINE_BYTES, is_bare_chain
from lra.tables import clean

VIEW_FILE = "attention.safetensors"
MINUTES = ("training", "evaluation", "compilation", "given_up")
CHANCE = 0.5
"""All tasks of chains have two labels of equal chance."""
CHAIN_FORMAT = 1
STATUSES = ("finished", "stopped", "failed", "unfinished")
TRACKS = ("paper", "sequence", "open")
STUCK_BAND, STUCK_LINES = (0.6925, 0.6945), 5


@dataclass(frozen=True)
class Point:
    """A validation: the stage's GPU minutes of training until then, and the accuracy as a fraction."""

    gpu_minutes: float
    accuracy: float


@dataclass(frozen=True)
class StageRecord:
    """One stage. `minutes` are GPU minutes by kind of work, of all GPUs together."""

    name: str
    task: str
    status: str
    steps: int
    step: int
    images: int
    attention: str
    limit_eval: int | None
    test: Score | None
    restarts: int
    minutes: Mapping[str, float]
    images_per_s: float | None
    curve: tuple[Point, ...]
    options: str = ""
    """Where the stage's set is not the task's own: the generator's options that differ."""
    at_ln2: bool = False
    """Its newest lines of the log all have a loss of ln 2."""

    @property
    def total_minutes(self) -> float:
        """GPU minutes of every kind."""
        return sum(self.minutes.values())


@dataclass(frozen=True)
class ChainRecord:
    """All that a report says about one chain."""

    path: Path
    name: str
    status: str
    reason: str = ""
    recipe: str = "unknown"
    task: str = "unknown"
    track: str = "unknown"
    seed: int | None = None
    test: Score | None = None
    probes: Mapping[str, Score] = field(default_factory=dict)
    stages: tuple[StageRecord, ...] = ()
    epochs_share: float | None = None
    device: str | None = None
    commit: str | None = None
    date: str | None = None
    view: Path | None = None
    digest: str = ""

    @property
    def counted(self) -> bool:
        """Whether it enters a mean: its last stage was tested, whatever extra sets are still to come."""
        return self.test is not None

    @property
    def at_chance(self) -> bool:
        """Whether the last test cannot be told from chance."""
        return self.test is not None and statistics.stuck_at_chance(self.test.correct, self.test.total, CHANCE)

    @property
    def outcome(self) -> str:
        """The status; "at chance" for a tested chain that learned nothing, "stuck" for one that sits at ln 2."""
        if self.counted:
            return "at chance" if self.at_chance else "finished"
        return "stuck" if self.status == "unfinished" and any(s.at_ln2 for s in self.stages) else self.status

    @property
    def restarts(self) -> int:
        """Attempts that were given up, over all stages."""
        return sum(s.restarts for s in self.stages)

    def minutes(self, kind: str) -> float:
        """GPU minutes of one kind of work, or `total`."""
        return sum(s.total_minutes if kind == "total" else s.minutes.get(kind, 0.0) for s in self.stages)

    @property
    def curve(self) -> list[tuple[StageRecord, list[tuple[float, float]]]]:
        """(GPU minutes of the whole chain, accuracy) of each stage's validations, stages in order.

        A stage begins where all the work of those before it ends; attempts given up come before what succeeded.
        """
        begun, lines = 0.0, []
        for stage in self.stages:
            start = begun + stage.minutes.get("given_up", 0.0)
            lines.append((stage, [(start + p.gpu_minutes, p.accuracy) for p in stage.curve]))
            begun += stage.total_minutes
        return lines


@dataclass(frozen=True)
class ChainGroup:
    """Chains that differ in their seed alone, counted or not."""

    task: str
    track: str
    chains: tuple[ChainRecord, ...]

    @property
    def counted(self) -> list[ChainRecord]:
        """The chains that enter the mean."""
        return [c for c in self.chains if c.counted]

    @property
    def summary(self) -> statistics.Summary | None:
        """Mean accuracy over seeds; several chains of one seed are averaged first."""
        by_seed: dict[object, list[float]] = defaultdict(list)
        for index, chain in enumerate(self.counted):
            assert chain.test is not None
            by_seed[("unknown", index) if chain.seed is None else chain.seed].append(chain.test.accuracy)
        means = [sum(values) / len(values) for values in by_seed.values()]
        return statistics.mean_interval(means) if means else None


def find_chains(roots: Iterable[Path]) -> list[ChainRecord]:
    """Read every chain beneath `roots`, sorted by path; copies of one chain count once."""
    found: dict[str, ChainRecord] = {}
    places = {place.resolve(): place for root in roots for place in _places(Path(root))}
    for _, place in sorted(places.items()):
        record = read_chain(place)
        found.setdefault(record.digest or str(place), record)
    return list(found.values())


def _places(root: Path) -> list[Path]:
    """Every chain.json beneath a root, and chains kept alone under another name, as in `results/`."""
    if not root.is_dir():
        return [root] if root.is_file() and is_bare_chain(root) else []
    found: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        here = Path(folder)
        if CHAIN_FILE in files:
            found.append(here / CHAIN_FILE)
            subfolders.clear()
            continue
        depth = len(here.relative_to(root).parts)
        is_run = "config.yaml" in files
        subfolders[:] = (
            sorted(s for s in subfolders if not s.startswith(".")) if depth < MAX_DEPTH and not is_run else []
        )
        found += [here / f for f in sorted(files) if f.endswith(".json") and is_bare_chain(here / f)]
    return found


def read_chain(path: Path) -> ChainRecord:
    """Read a chain.json and what lies beside it; never raises for what they hold."""
    name = clean(path.parent.name if path.name == CHAIN_FILE else path.stem)
    try:
        value = read_object(path)
        record = _from_json(path, name, value)
    except ValueError as e:
        return ChainRecord(path, name, "corrupt", f"{path.name}: {e}")
    return record if record.status == "finished" else _with_state(record)


def _from_json(path: Path, name: str, value: Mapping[str, Any]) -> ChainRecord:
    status = text(value.get("status")) or "corrupt"
    stages = value.get("stages")
    if (count(value.get("format")) or 1) > CHAIN_FORMAT:
        raise ValueError(f"It has format {count(value['format'])}, newer than {CHAIN_FORMAT}: update the suite.")
    if status not in STATUSES or not isinstance(stages, list) or not stages:
        raise ValueError("It names no status and stages of a chain.")
    test = None if value.get("test") is None else score("the test", value["test"])
    if status == "finished" and test is None:
        raise ValueError("It is finished and has no test.")
    view = path.parent / VIEW_FILE
    return ChainRecord(
        path=path.parent if path.name == CHAIN_FILE else path,
        name=text(value.get("name")) or name,
        status=status,
        reason=text(value.get("reason")) or "",
        recipe=text(value.get("recipe")) or name,
        task=text(value.get("task")) or "unknown",
        track=text(value.get("track")) or "unknown",
        seed=count(value.get("seed")),
        test=test,
        probes={clean(k): score(k, v) for k, v in mapping(value.get("probes")).items()},
        stages=tuple(_stage(mapping(s)) for s in stages),
        epochs_share=number(value.get("epochs_share")),
        device=_device(value),
        commit=text(value.get("commit")),
        date=text(value.get("date")),
        view=view if path.name == CHAIN_FILE and view.is_file() else None,
        digest=hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "replace")).hexdigest(),
    )


def _device(value: Mapping[str, Any]) -> str | None:
    gpu = text(mapping(value.get("environment")).get("gpu"))
    number_of = count(value.get("num_processes")) or 1
    return (f"{number_of} x {gpu}" if gpu else f"{number_of} CPU process{'es' if number_of > 1 else ''}") or None


def _stage(value: Mapping[str, Any]) -> StageRecord:
    minutes = mapping(value.get("gpu_minutes"))
    points = [mapping(p) for p in value.get("curve") or [] if isinstance(p, dict)]
    curve = [(number(p.get("gpu_minutes")), number(p.get("accuracy"))) for p in points]
    steps = count(value.get("steps")) or 0
    return StageRecord(
        name=text(value.get("name")) or "unknown",
        task=text(value.get("task")) or "unknown",
        status=text(value.get("status")) or "unknown",
        steps=steps,
        step=steps if value.get("status") == "finished" else 0,
        images=count(value.get("images")) or 0,
        attention=text(value.get("attention")) or "unknown",
        limit_eval=count(value.get("limit_eval")),
        test=None if value.get("test") is None else score("a stage", value["test"]),
        restarts=count(value.get("restarts")) or 0,
        minutes={kind: number(minutes.get(kind)) or 0.0 for kind in MINUTES},
        images_per_s=number(value.get("images_per_s")),
        curve=tuple(Point(m, a) for m, a in curve if m is not None and a is not None),
        options=", ".join(f"{clean(k)}={clean(v)}" for k, v in sorted(mapping(value.get("options")).items())),
    )


def _with_state(record: ChainRecord) -> ChainRecord:
    """Bring a chain that is not finished up to what its stages' folders say: a killed one could not write it down."""
    stages = [s if s.status == "finished" else _live(s, record.path / s.name) for s in record.stages]
    reason, at = record.reason, next((s for s in stages if s.status != "finished"), None)
    if at is not None and record.status != "failed":
        where = f"Stage {at.name} is at step {at.step:,} of {at.steps:,}."
        running = " It is still running, or it was killed and the same command goes on."
        reason = where + (running if record.status == "unfinished" else f" {reason}".rstrip())
    if any(s.at_ln2 for s in stages):
        reason += " Its loss is at ln 2: the model answers at chance."
    return replace(record, stages=tuple(stages), reason=reason)


def _live(stage: StageRecord, folder: Path) -> StageRecord:
    """Return a stage with step, minutes and curve as its log has them."""
    spent_s, points, losses, step = 0.0, [], [], 0
    for line in _log_lines(folder / "metrics.jsonl"):
        step = max(step, count(line.get("step")) or 0)
        if line.get("kind") == "train":
            spent_s = number(line.get("train_gpu_s")) or spent_s
            losses.append(number(line.get("loss")) or 0.0)
        elif (accuracy := number(line.get("accuracy"))) is not None:
            points.append(Point(spent_s / 60.0, accuracy))
    low, high = STUCK_BAND
    at_ln2 = len(losses) >= STUCK_LINES and all(low <= loss <= high for loss in losses[-STUCK_LINES:])
    spent = stage.minutes["training"] + stage.minutes["compilation"]
    minutes = {**stage.minutes, "training": stage.minutes["training"] + max(spent_s / 60.0 - spent, 0.0)}
    return replace(stage, step=step, minutes=minutes, curve=tuple(points) or stage.curve, at_ln2=at_ln2)


def _log_lines(path: Path) -> list[Mapping[str, Any]]:
    found = []
    try:
        with open(path, "rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES):
                try:
                    found.append(mapping(json.loads(line)))
                except (ValueError, RecursionError):
                    continue
    except OSError:
        return []
    return found


def chain_groups(chains: Sequence[ChainRecord]) -> list[ChainGroup]:
    """Sort readable chains into groups: tasks together, tracks apart, and whatever else their stages differ in."""
    groups: dict[tuple[Any, ...], list[ChainRecord]] = defaultdict(list)
    for chain in chains:
        if chain.status == "corrupt":
            continue
        stages = tuple((s.name, s.task, s.steps, s.images, s.attention, s.limit_eval, s.options) for s in chain.stages)
        track = TRACKS.index(chain.track) if chain.track in TRACKS else len(TRACKS)
        key = (chain.task, track, chain.track, chain.recipe, chain.epochs_share or 0.0, stages)
        groups[key].append(chain)
    keys = sorted(groups, key=lambda k: (k[0] != "pathx", *map(str, k[:-1])))
    return [ChainGroup(k[0], k[2], tuple(sorted(groups[k], key=lambda c: c.seed or 0))) for k in keys]
