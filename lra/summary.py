"""From runs to groups of comparable runs, and from groups to sections that may stand in one table.

Called by the report. Pure: records in, groups out. Two runs share a group only if they differ in the seed alone; two
groups share a table column only if track, protocol, task, data, split, steps and batch are the same. A run that is
not counted stays in its group and is named there; it enters no mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lra import statistics
from lra.published import LONG_TASKS, LRA_TASKS, Published, beside
from lra.records import RunRecord, Score, is_official

TRACKS = ("paper", "sequence", "open")
PROTOCOLS = ("google", "nystrom", "fly", "best", "own", "smoke")
BACKENDS = ("standard", "sdpa", "flash", "block_sparse")
TASKS = LRA_TASKS + LONG_TASKS
BASELINE = "standard"
SETTING_FIELDS = ("recipe", "source", "split_rule", "checkpoint_choice", "steps", "batch_size")
METHOD_FIELDS = ("layout", "precision", "fingerprint")


@dataclass(frozen=True)
class Setting:
    """What runs in one table column have in common, besides track and protocol."""

    task: str
    recipe: str | None
    source: str | None
    split_rule: str | None
    checkpoint_choice: str | None
    steps: int | None
    batch_size: int | None


@dataclass(frozen=True)
class Method:
    """A table row: the backend, its layout, and what else sets apart groups that share both."""

    backend: str
    layout: str | None = None
    variant: str = ""

    @property
    def label(self) -> str:
        """The method in words, as `block_sparse (butterfly)`."""
        inner = ", ".join(part for part in (self.layout, self.variant) if part)
        return f"{self.backend} ({inner})" if inner else self.backend


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, counted or not."""

    track: str
    protocol: str
    setting: Setting
    method: Method
    runs: tuple[RunRecord, ...]

    @property
    def counted(self) -> tuple[RunRecord, ...]:
        """The runs that enter the mean."""
        return tuple(r for r in self.runs if r.counted)

    @property
    def not_counted(self) -> tuple[RunRecord, ...]:
        """The runs that do not, with their reasons."""
        return tuple(r for r in self.runs if not r.counted)

    @property
    def summary(self) -> statistics.Summary | None:
        """Mean accuracy over seeds; several runs of one seed are averaged first, so that no seed weighs double."""
        by_seed: dict[object, list[float]] = defaultdict(list)
        for index, run in enumerate(self.counted):
            by_seed[("unknown", index) if run.seed is None else run.seed].append(_score(run).accuracy)
        values = [sum(v) / len(v) for v in by_seed.values()]
        return statistics.mean_interval(values) if values else None

    @property
    def interval(self) -> tuple[float, float, str] | None:
        """Lower end, upper end, and over what: "seeds" (t), or "test set" (Wilson) where there is one seed."""
        summary = self.summary
        if summary is None:
            return None
        if summary.low is not None and summary.high is not None:
            return max(0.0, summary.low), min(1.0, summary.high), "seeds"
        total = _score(self.counted[0]).total
        low, high = statistics.wilson_interval(round(summary.mean * total), total)
        return low, high, "test set"

    @property
    def num_stuck(self) -> int:
        """How many counted runs the test set cannot tell from chance."""
        return sum(stuck(r) for r in self.counted)

    @property
    def published(self) -> Published | None:
        """The published number to stand beside; none for stand-in data, which nobody published on."""
        if self.counted and not self.counted[0].official_data:
            return None
        return beside(self.setting.task, track=self.track, protocol=self.protocol, backend=self.method.backend)

    @property
    def device(self) -> str | None:
        """The machine that all counted runs used, or None where they differ or do not say."""
        devices = {(r.device, r.num_gpus) for r in self.counted}
        name, count = devices.pop() if len(devices) == 1 else (None, None)
        return f"{count} x {name}" if name and count and count > 1 else name

    def mean(self, name: str) -> float | None:
        """Mean of a numeric field of RunRecord over the counted runs that have it."""
        values = [float(v) for r in self.counted if (v := getattr(r, name)) is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Section:
    """Groups that may stand in one table: one track, one protocol, official data or stand-ins."""

    track: str
    protocol: str
    official: bool
    groups: tuple[Group, ...]

    @property
    def settings(self) -> list[Setting]:
        """The columns, in the order of the tasks."""
        return list(dict.fromkeys(g.setting for g in self.groups))

    @property
    def methods(self) -> list[Method]:
        """The rows, exact attention first."""
        return sorted({g.method for g in self.groups}, key=_method_order)

    def group(self, method: Method, setting: Setting) -> Group | None:
        """The group of a table cell."""
        for group in self.groups:
            if (group.method, group.setting) == (method, setting):
                return group
        return None

    def mean_settings(self) -> list[Setting]:
        """The settings that a mean over LRA's five tasks may hold: official data, one setting a task."""
        if not self.official:
            return []
        settings = [s for s in self.settings if s.task in LRA_TASKS]
        return settings if len({s.task for s in settings}) == len(settings) > 1 else []

    def speed_up(self, group: Group) -> float | None:
        """Training time of standard attention over this group's: same setting, same machine, no evaluation."""
        base = self.group(Method(BASELINE), group.setting)
        if base is None or base.device is None or base.device != group.device:
            return None
        base_s, own_s = base.mean("train_s"), group.mean("train_s")
        return base_s / own_s if base_s and own_s else None


def chance(run: RunRecord) -> float:
    """Accuracy of chance on the run's test set: its commonest label's share, else LRA's number of classes."""
    counts = [sum(row) for row in run.confusion]
    if counts and sum(counts) > 0:
        return statistics.chance_level(counts)
    return {"listops": 0.175, "image": 0.1}.get(run.task, 0.5)


def stuck(run: RunRecord) -> bool:
    """Whether the run's test accuracy cannot be told from chance."""
    score = run.chosen
    return score is not None and statistics.stuck_at_chance(score.correct, score.total, chance(run))


def sections(records: Iterable[RunRecord]) -> list[Section]:
    """Sort runs into sections; runs whose task, track or protocol is unknown are in none."""
    placed = [r for r in records if "unknown" not in (r.task, r.track, r.protocol)]
    groups = _groups([r for r in placed if r.counted])
    for run in (r for r in placed if not r.counted):
        _attach(run, groups)
    by_section: dict[tuple[str, str, bool], list[Group]] = defaultdict(list)
    for group in groups:
        # A run that never got to say where its data came from does not make them stand-ins.
        stated = [r for r in group.runs if r.counted or r.source is not None]
        official = all(r.official_data for r in stated) if stated else is_official(group.setting.source or "generated")
        by_section[(group.track, group.protocol, official)].append(group)
    return [
        Section(track, protocol, official, tuple(sorted(members, key=group_order)))
        for (track, protocol, official), members in sorted(
            by_section.items(), key=lambda i: (*_rank(i[0][0], TRACKS), *_rank(i[0][1], PROTOCOLS), not i[0][2])
        )
    ]


def _score(run: RunRecord) -> Score:
    score = run.chosen
    if score is None:
        raise ValueError(f"{run.name} has no test score.")
    return score


def _setting(run: RunRecord) -> Setting:
    return Setting(run.task, run.recipe, run.source, run.split_rule, run.checkpoint_choice, run.steps, run.batch_size)


def _groups(runs: Sequence[RunRecord]) -> list[Group]:
    """Group whole runs by all but the seed; name the variant where backend and layout alone do not tell."""
    members: dict[tuple[object, ...], list[RunRecord]] = defaultdict(list)
    shared: dict[tuple[object, ...], set[tuple[object, ...]]] = defaultdict(set)
    for run in runs:
        place = (run.track, run.protocol, _setting(run), run.backend, run.layout)
        detail = (run.num_parameters, run.precision, run.fingerprint)
        members[(*place, detail)].append(run)
        shared[place].add(detail)
    groups = []
    for key, group_runs in members.items():
        first = group_runs[0]
        variant = _variant(first, shared[key[:-1]])
        method = Method(first.backend, first.layout, variant)
        ordered = tuple(sorted(group_runs, key=lambda r: (r.seed is None, r.seed or 0, r.name)))
        groups.append(Group(first.track, first.protocol, _setting(first), method, ordered))
    return groups


def _variant(run: RunRecord, details: set[tuple[object, ...]]) -> str:
    """Name what differs among groups that share backend and layout; "" for a single one."""
    if len(details) == 1:
        return ""
    parameters, precisions, _ = (len(set(column)) > 1 for column in zip(*details, strict=True))
    parts = []
    if parameters:
        parts.append(f"{run.num_parameters:,} parameters" if run.num_parameters else "parameters not stated")
    if precisions:
        parts.append(run.precision or "precision not stated")
    told = {d[:2] for d in details}
    if len(told) < len(details):
        parts.append(f"config {run.fingerprint}" if run.fingerprint else "config not kept")
    return ", ".join(parts)


def _attach(run: RunRecord, groups: list[Group]) -> None:
    """Put a run that knows little of its setting into the first group that it does not contradict.

    Failing that it gets a group of its own: in the column of the first setting that it does not contradict, else
    in a new one.
    """
    near = [g for g in groups if (g.track, g.protocol, g.setting.task) == (run.track, run.protocol, run.task)]
    near = [g for g in near if _agrees(run, g.runs[0], SETTING_FIELDS)]
    for group in near:
        same = group.method.backend == run.backend and _agrees(run, group.runs[0], METHOD_FIELDS)
        if same:
            groups[groups.index(group)] = replace(group, runs=(*group.runs, run))
            return
    setting = near[0].setting if near else _setting(run)
    groups.append(Group(run.track, run.protocol, setting, Method(run.backend, run.layout), (run,)))


def _agrees(run: RunRecord, other: RunRecord, names: Sequence[str]) -> bool:
    pairs = [(getattr(run, n) or None, getattr(other, n) or None) for n in names]
    return all(a == b for a, b in pairs if a is not None and b is not None)


def _rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _method_order(method: Method) -> tuple[object, ...]:
    return (*_rank(method.backend, BACKENDS), method.layout or "", method.variant)


def group_order(group: Group) -> tuple[object, ...]:
    """Sort key: tasks in the literature's order, then settings, then methods."""
    s = group.setting
    words = (s.recipe or "", s.source or "", s.split_rule or "", s.checkpoint_choice or "")
    return (*_rank(s.task, TASKS), *words, s.steps or 0, s.batch_size or 0, *_method_order(group.method))
