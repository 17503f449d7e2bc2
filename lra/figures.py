"""Which figures a section of the report gets, from its groups of runs.

Called by the report. Decides and builds; lra/plots.py draws.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lra import plots
from lra.comparison import TABLE_3_PROTOCOL, whole_rows
from lra.report_tables import peak_memory, section_title, title
from lra.statistics import geometric_mean
from lra.summary import Group, Section, chance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure with the name of its file, what it shows in words, and the task whose row of the page it joins."""

    name: str
    caption: str
    task: str
    figure: Figure


def pictures(section: Section, taken: set[str]) -> list[Picture]:
    """Return the section's figures: all tasks at once; then, setting by setting, accuracy, speed and curves.

    Those without data are left out.

    `taken` holds the file stems that other sections use already; this section's are added.
    """
    found = _over_all_tasks(section, taken)
    if section.protocol == TABLE_3_PROTOCOL:
        return found
    seen: dict[str, int] = {}
    for setting in section.settings:
        number = seen[setting.task] = seen.get(setting.task, 0) + 1
        stem = _file_name(section, setting.task, taken)
        task = title(setting.task) + (f" ({number})" if number > 1 else "")
        groups = [g for g in section.groups if g.setting == setting]
        where = f"{task}, {section_title(section)}"
        points = [p for g in groups if (p := _accuracy_point(section, g))]
        if points:
            odds = max(100 * chance(r) for g in groups for r in g.counted)
            caption = "Test accuracy with its 95 % interval; dotted: chance"
            if any(p.published is not None for p in points):
                caption += "; diamond: published"
            found.append(Picture(f"{stem}-accuracy", caption, where, plots.accuracy_figure(points, odds)))
        bubbles = [b for g in groups if (b := _bubble(section, g))]
        if len(bubbles) > 1 and len({g.device for g in groups if g.counted}) == 1:
            caption = "Accuracy against training speed; area: peak memory"
            if not any(b.memory_bytes for b in bubbles):
                caption = "Accuracy against training speed; no peak memory was measured"
            found.append(
                Picture(f"{stem}-speed", caption, where, plots.bubble_figure(bubbles, "training steps a second"))
            )
        lines = [
            plots.RunCurves(g.method.label, section.methods.index(g.method), r.curves)
            for g in groups
            for r in g.runs
            if r.curves.last_step
        ]
        if lines:
            caption = "Training loss and validation accuracy, a line a run"
            found.append(Picture(f"{stem}-curves", caption, where, plots.curves_figure(lines)))
    return found


def _over_all_tasks(section: Section, taken: set[str]) -> list[Picture]:
    """The LRA paper's figure: mean score over the tasks against speed, the area is memory; methods with every task."""
    rows = whole_rows(section)
    if len(rows) < 2 or len({g.device for _, groups in rows for g in groups}) != 1:
        return []
    bubbles = []
    for method, groups in rows:
        speeds = [g.mean("steps_per_s") for g in groups]
        known = [speed for speed in speeds if speed]
        if len(known) < len(speeds):
            continue
        score = sum(100 * g.summary.mean for g in groups if g.summary) / len(groups)
        memory = max((b for g in groups if (b := peak_memory(g)) is not None), default=None)
        index = section.methods.index(method)
        bubbles.append(plots.Bubble(method.label, index, geometric_mean(known), score, memory))
    if len(bubbles) < 2:
        return []
    stem = _file_name(section, "all", taken)
    where = f"All {len(rows[0][1])} tasks, {section_title(section)}"
    caption = "Mean score over the tasks against training speed (geometric mean); area: largest peak memory"
    return [Picture(f"{stem}-speed", caption, where, plots.bubble_figure(bubbles, "training steps a second"))]


def _accuracy_point(section: Section, group: Group) -> plots.AccuracyPoint | None:
    if group.summary is None or group.interval is None:
        return None
    low, high, _ = group.interval
    known = group.published
    return plots.AccuracyPoint(
        group.method.label,
        section.methods.index(group.method),
        100 * group.summary.mean,
        100 * low,
        100 * high,
        known.percent if known else None,
    )


def _bubble(section: Section, group: Group) -> plots.Bubble | None:
    speed = group.mean("steps_per_s")
    if group.summary is None or speed is None:
        return None
    index = section.methods.index(group.method)
    return plots.Bubble(group.method.label, index, speed, 100 * group.summary.mean, peak_memory(group))


def _file_name(section: Section, task: str, taken: set[str]) -> str:
    """A new name that is safe as a file name, whatever the run files call their task."""
    words = [section.track, section.protocol, *([] if section.official else ["standin"]), task]
    name = stem = "-".join(re.sub(r"[^A-Za-z0-9]+", "-", w).strip("-")[:40] or "x" for w in words)
    number = 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name
