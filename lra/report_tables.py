"""The report's tables over groups of runs: methods by tasks, every number of a group, published numbers.

Called by the report's writers of Markdown, LaTeX and HTML. Pure: what they show is decided here once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lra import statistics
from lra.comparison import TABLE_3_PROTOCOL, paired, step_speed_up
from lra.published import FLASH_SPEED_UPS, LRA_TASKS, METHOD_OF_BACKEND, published
from lra.records import RunRecord, is_official
from lra.summary import BASELINE, Group, Method, Section, Setting
from lra.tables import Cell, Column, Table, Tone, Value, without_empty_columns

TITLES = {
    "listops": "ListOps",
    "text": "Text",
    "retrieval": "Retrieval",
    "image": "Image",
    "pathfinder": "Pathfinder",
    "pathx": "Path-X",
    "path256": "Path-256",
    "path64": "Path-64",
}


def title(task: str) -> str:
    """Return a task's name as the literature writes it."""
    return TITLES.get(task, task)


def section_title(section: Section) -> str:
    """Return a section's heading."""
    if section.protocol == TABLE_3_PROTOCOL:
        return "FlashAttention's Table 3"
    heading = f"{section.track.capitalize()} track, {section.protocol} protocol"
    return heading if section.official else f"{heading}: stand-in data"


def percent(fraction: float | None) -> str | None:
    """Return an accuracy in percent with one digit."""
    return None if fraction is None else f"{100 * fraction:.1f}"


def duration(seconds: float | None) -> str | None:
    """Return a duration in its two largest units."""
    if seconds is None:
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def size(num_bytes: float | None) -> str | None:
    """Return a size in GB or MB (powers of ten)."""
    if num_bytes is None:
        return None
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def plural(count: int, word: str) -> str:
    """Return "1 run", "2 runs"."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def overview(section: Section) -> Table:
    """Return methods x settings: mean accuracy, interval, seeds, failures and the published number of each."""
    settings, methods = section.settings, section.methods
    averaged = section.mean_settings()
    faster = [g for g in section.groups if section.official and g.method.backend != BASELINE]
    with_speed = any(section.speed_up(g) for g in faster)
    with_steps = any(step_speed_up(section, g) for g in faster)
    columns = [Column("Method", "left"), *(Column(t, best="max") for t in _setting_titles(settings))]
    if averaged:
        columns.append(Column(f"Mean of {len(averaged)}", best="max"))
    if with_speed:
        columns.append(Column("Speed-up", best="max"))
    if with_steps:
        columns.append(Column("Speed-up a step", best="max"))
    rows = []
    for method in methods:
        row: list[Value] = [method.label]
        row += [_accuracy_cell(section.group(method, setting)) for setting in settings]
        if averaged:
            row.append(_mean_cell(section, method, averaged))
        if with_speed:
            row.append(_speed_up_cell(section, method))
        if with_steps:
            row.append(_step_speed_up_cell(section, method))
        rows.append(tuple(row))
    return Table("Test accuracy (%)", tuple(columns), tuple(rows), _overview_note(section, averaged, with_speed))


def _overview_note(section: Section, averaged: Sequence[Setting], with_speed: bool) -> str:
    notes = ["Brackets hold the 95 % interval: over seeds, or of the test set where there is one seed."]
    if not section.official:
        notes.append("These are not the benchmark's own data: no mean holds them and no published number fits them.")
    if averaged:
        notes.append(f"The mean is over {', '.join(title(s.task) for s in averaged)}.")
    if with_speed:
        notes.append(
            "Speed-up: training time of standard attention over the method's, same machine, compilation included, "
            "evaluation apart; geometric mean over tasks. A step: the same by the median window of steps."
        )
    return " ".join(notes)


def _setting_titles(settings: Sequence[Setting]) -> list[str]:
    """Task names, with what differs where a task has several settings, and with data that are not its own."""
    titles = []
    for setting in settings:
        rivals = [s for s in settings if s.task == setting.task]
        parts = []
        names = ("recipe", "source", "split_rule", "checkpoint_choice", "steps", "batch_size")
        for name in names:
            value = getattr(setting, name)
            if len({getattr(s, name) for s in rivals}) > 1:
                unit = {"steps": " steps", "batch_size": " a batch"}.get(name, "")
                parts.append(f"{value:,}{unit}" if isinstance(value, int) else f"{value or 'not stated'}{unit}")
        source = setting.source or ""
        if source and not is_official(source) and source not in parts:
            parts.insert(0, source)
        titles.append(f"{title(setting.task)} ({', '.join(parts)})" if parts else title(setting.task))
    return titles


def _accuracy_cell(group: Group | None) -> Cell:
    if group is None:
        return Cell("-", note=("not run",), tone="muted")
    lost = _lost(group.not_counted)
    known = group.published
    beside = (f"published {known.text}",) if known else ()
    summary, interval = group.summary, group.interval
    if summary is None or interval is None:
        return Cell(lost[0] if lost else "-", note=(*lost[1:], *beside), tone="bad")
    seeds = plural(summary.count, "seed")
    if group.num_stuck:
        seeds += f", {group.num_stuck} at chance"
    low, high, _ = interval
    notes = (f"[{percent(low)}, {percent(high)}]", seeds, *lost, *beside)
    return Cell(f"{100 * summary.mean:.1f}", notes, 100 * summary.mean)


def _lost(runs: Iterable[RunRecord]) -> list[str]:
    """Counts of the runs that are not counted, by status, as ["2 failed", "1 stopped"]."""
    statuses = [r.outcome for r in runs]
    return [f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)]


def _mean_cell(section: Section, method: Method, averaged: Sequence[Setting]) -> Cell:
    groups = [section.group(method, s) for s in averaged]
    means = [g.summary.mean for g in groups if g and g.summary]
    if len(means) < len(averaged):
        return Cell("-", note=("incomplete",), tone="muted")
    known = [g.published.percent for g in groups if g and g.published and g.published.percent is not None]
    note = (f"published {sum(known) / len(known):.1f}",) if len(known) == len(averaged) else ()
    mean = 100 * sum(means) / len(means)
    return Cell(f"{mean:.1f}", note, mean)


def _speed_up_cell(section: Section, method: Method) -> Cell:
    groups = [g for g in section.groups if g.method == method]
    ratios = [s for g in groups if (s := section.speed_up(g)) is not None]
    if not ratios:
        return Cell("-", tone="muted")
    value = statistics.geometric_mean(ratios)
    notes = [plural(len(ratios), "task")]
    paper = FLASH_SPEED_UPS.get(METHOD_OF_BACKEND.get(method.backend, ""))
    comparable = section.track == "paper" and section.protocol != "smoke" and method.backend != BASELINE
    if comparable and paper is not None:
        notes.append(f"published {paper:g}x")
    return Cell(f"{value:.2f}x", tuple(notes), value)


def _step_speed_up_cell(section: Section, method: Method) -> Cell:
    ratios = [s for g in section.groups if g.method == method and (s := step_speed_up(section, g)) is not None]
    if not ratios:
        return Cell("-", tone="muted")
    value = statistics.geometric_mean(ratios)
    return Cell(f"{value:.2f}x", (plural(len(ratios), "task"),), value)


def comparison(section: Section) -> Table:
    """Return a row for every method and setting that has standard attention beside it: what the method changes."""
    columns = (
        Column("Task", "left"),
        Column("Method", "left"),
        Column("Minus standard (points)", digits=2),
        Column("95 % interval"),
        Column("Common seeds"),
        Column("Speed-up"),
        Column("Speed-up a step"),
        Column("Memory of standard"),
    )
    rows = []
    for group, task in _titled(section):
        difference = paired(section, group)
        if difference is None:
            continue
        low, high = difference.low, difference.high
        speed, step = section.speed_up(group), step_speed_up(section, group)
        base = section.group(Method(BASELINE), group.setting)
        own_bytes, base_bytes = peak_memory(group), peak_memory(base)
        rows.append(
            (
                task,
                group.method.label,
                100 * difference.mean,
                None if low is None or high is None else f"{100 * low:+.2f} to {100 * high:+.2f}",
                difference.count,
                None if speed is None else Cell(f"{speed:.2f}x", value=speed),
                None if step is None else Cell(f"{step:.2f}x", value=step),
                None if not own_bytes or not base_bytes else f"{base_bytes / own_bytes:.1f}x",
            )
        )
    note = "Accuracy differences are paired by seed; their interval is Student's t over the common seeds."
    return without_empty_columns(Table("Against standard attention", columns, tuple(rows), note))


def peak_memory(group: Group | None) -> int | None:
    """Return the largest peak memory of a group's counted runs, in bytes."""
    runs = () if group is None else group.counted
    return max((r.peak_memory_bytes for r in runs if r.peak_memory_bytes is not None), default=None)


def section_tables(section: Section) -> list[Table]:
    """Return the tables that follow a section's overview; the mix of protocols leaves to others what is theirs."""
    tables = [comparison(section)]
    if section.protocol != TABLE_3_PROTOCOL:
        tables += [details(section), costs(section)]
    return [table for table in tables if table.rows]


def details(section: Section) -> Table:
    """Return a row a group with what its accuracy rests on."""
    columns = (
        Column("Task", "left"),
        Column("Method", "left"),
        Column("Accuracy (%)"),
        Column("Std over seeds"),
        Column("95 % interval"),
        Column("Interval of", "left"),
        Column("Seeds"),
        Column("At chance"),
        Column("Not counted"),
        Column("Published (%)"),
        Column("Recipe expects (%)"),
    )
    rows = tuple(_detail_row(group, task) for group, task in _titled(section))
    return without_empty_columns(Table("Accuracy by task", columns, rows))


def _titled(section: Section) -> list[tuple[Group, str]]:
    titles = dict(zip(section.settings, _setting_titles(section.settings), strict=True))
    return [(group, titles[group.setting]) for group in section.groups]


def _detail_row(group: Group, task: str) -> tuple[Value, ...]:
    summary, interval, known = group.summary, group.interval, group.published
    expected = next((r.expected for r in group.counted if r.expected is not None), None)
    return (
        task,
        group.method.label,
        None if summary is None else 100 * summary.mean,
        None if summary is None or summary.std is None else 100 * summary.std,
        f"{percent(interval[0])} to {percent(interval[1])}" if interval else None,
        interval[2] if interval else None,
        summary.count if summary else 0,
        group.num_stuck,
        Cell(", ".join(_lost(group.not_counted)) or "0", value=len(group.not_counted), tone=_tone(group)),
        None if known is None else Cell(known.text, value=known.percent),
        None if expected is None else 100 * expected,
    )


def costs(section: Section) -> Table:
    """Return a row a group with its training speed, time and memory; means over the counted runs, largest memory."""
    columns = (
        Column("Task", "left"),
        Column("Method", "left"),
        Column("Steps"),
        Column("Steps/s", digits=2),
        Column("Tokens/s", digits=0),
        Column("Training time"),
        Column("Peak memory"),
        Column("Speed-up"),
        Column("Machine", "left"),
    )
    rows = tuple(_cost_row(section, g, task) for g, task in _titled(section) if g.counted)
    return without_empty_columns(Table("Speed and memory by task", columns, rows))


def _cost_row(section: Section, group: Group, task: str) -> tuple[Value, ...]:
    train_s, speed_up = group.mean("train_s"), section.speed_up(group)
    memory = peak_memory(group)
    return (
        task,
        group.method.label,
        group.setting.steps,
        group.mean("steps_per_s"),
        group.mean("tokens_per_s"),
        None if train_s is None else Cell(duration(train_s) or "", value=train_s),
        None if memory is None else Cell(size(memory) or "", value=memory),
        None if speed_up is None else Cell(f"{speed_up:.2f}x", value=speed_up),
        group.device or "several or not stated",
    )


def _tone(group: Group) -> Tone:
    return "bad" if group.not_counted else ""


def published_table(tasks: Sequence[str]) -> Table | None:
    """Return every published number of these tasks, a row a method and source, for context."""
    tasks = [t for t in (*LRA_TASKS, "pathx", "path256") if t in tasks]
    numbers = [row for task in tasks for row in published(task)]
    keys = dict.fromkeys((row.method, row.source) for row in numbers)
    if not keys:
        return None
    by_key = {(row.method, row.source, row.task): row for row in numbers}
    rows = []
    for method, source in keys:
        found = [by_key.get((method, source, task)) for task in tasks]
        cells: list[Value] = [None if f is None else Cell(f.text, value=f.percent) for f in found]
        rows.append((method, *cells, source))
    columns = (Column("Method", "left"), *(Column(title(t), best="max") for t in tasks), Column("Source", "left"))
    return Table(
        "Published accuracies (%)",
        columns,
        tuple(rows),
        "As printed; fail: chance level or out of memory. Protocols differ between sources: compare within one.",
    )
