"""The report's tables over chains of stages: accuracy and cost, seeds and failures, stages, probes, published cost.

Called by the report's writers. Pure: what they show is decided here once.
"""

from __future__ import annotations

from collections.abc import Sequence

from lra import statistics
from lra.chain_records import CHANCE, MINUTES, ChainGroup, ChainRecord
from lra.records import Score
from lra.report_tables import percent, plural, title
from lra.rivals import marks, rivals
from lra.tables import Cell, Column, Table, Value, without_empty_columns

OWN_SETS = "Ours are on our own generated sets, published ones on the release."
PROBE_TITLES = {"contour_length": "contour length", "num_distractors": "distractors"}


def unfinished_chains(chains: Sequence[ChainRecord]) -> Table | None:
    """Return the chains that enter no mean, each with its reason, or None when all are counted."""
    rows = tuple(
        (c.name, Cell(c.outcome, tone="bad"), c.reason or "No reason is recorded.", title(c.task), c.track, c.seed)
        for c in chains
        if not c.counted
    )
    names = ("Chain", "Status", "Reason", "Task", "Track")
    columns = (*(Column(name, "left") for name in names), Column("Seed"))
    return Table("Chains that are not counted", columns, rows) if rows else None


def overview(groups: Sequence[ChainGroup]) -> Table:
    """Return a row a group of seeds: accuracy, cost, restarts, what is not counted, the published marks beside it."""
    columns = (
        Column("Track", "left"),
        Column("Test accuracy (%)"),
        Column("GPU minutes"),
        Column("Restarts"),
        Column("Lost (GPU min)"),
        Column("At chance"),
        Column("Not counted"),
        Column("Published (%)", "left"),
    )
    note = (
        "Brackets: 95 % interval, Student's t over seeds, or Wilson's of the test set with one seed. GPU minutes: all "
        f"stages, tests and attempts given up; mean over counted seeds. Restarts and losses: all seeds. {OWN_SETS}"
    )
    return Table("Test accuracy and cost", columns, tuple(_overview_row(g) for g in groups), note)


def _overview_row(group: ChainGroup) -> tuple[Value, ...]:
    counted, lost = group.counted, [c for c in group.chains if not c.counted]
    first = group.chains[0]
    share = f", {100 * first.epochs_share:g} % of the epochs" if first.epochs_share else ""
    outcomes = [c.outcome for c in lost]
    text = ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes))
    known = [f"{row.text} {row.method}" for row in marks(group.task, group.track)]
    num_chance = sum(c.at_chance for c in counted)
    return (
        Cell(f"{group.track}{share}", (first.recipe, *stage_lines(first))),
        _accuracy(group),
        sum(c.minutes("total") for c in counted) / len(counted) if counted else None,
        Cell(f"{sum(c.restarts for c in group.chains)} in {plural(len(group.chains), 'seed')}"),
        sum(c.minutes("given_up") for c in group.chains),
        Cell(str(num_chance), value=num_chance, tone="bad" if num_chance else ""),
        Cell(text or "0", value=len(lost), tone="bad" if lost else ""),
        Cell(known[0] if known else "-", tuple(known[1:])),
    )


def stage_lines(chain: ChainRecord) -> list[str]:
    """Return a chain's stages, a line each."""
    others = [f" ({s.options})" if s.options else "" for s in chain.stages]
    return [f"{title(s.task)}{o}, {s.steps:,} steps, {s.attention}" for s, o in zip(chain.stages, others, strict=True)]


def _accuracy(group: ChainGroup) -> Cell:
    summary, counted = group.summary, group.counted
    if summary is None:
        return Cell("-", ("none finished",), tone="bad")
    score = counted[0].test
    assert score is not None
    low, high = summary.low, summary.high
    if low is None or high is None:
        low, high = statistics.wilson_interval(score.correct, score.total)
    seeds = sorted((c.test.accuracy for c in counted if c.test), reverse=True)
    notes = [f"[{100 * max(low, 0.0):.2f}, {100 * min(high, 1.0):.2f}]", f"{plural(len(counted), 'seed')}"]
    if len(seeds) > 1:
        notes.append(", ".join(f"{100 * a:.2f}" for a in seeds))
    notes.append(f"{score.total:,} images each")
    return Cell(f"{100 * summary.mean:.2f}", tuple(notes), 100 * summary.mean)


def seeds_table(groups: Sequence[ChainGroup]) -> Table:
    """Return a row a chain: how it ended, its accuracy, its minutes by kind of work, its restarts."""
    columns = (
        Column("Chain", "left"),
        Column("Track", "left"),
        Column("Seed"),
        Column("Outcome", "left"),
        Column("Test accuracy (%)"),
        *(Column(f"{kind.replace('_', ' ').capitalize()} (GPU min)") for kind in ("total", *MINUTES)),
        Column("Restarts"),
        Column("Machine", "left"),
    )
    rows = tuple(
        (
            *(c.name, c.track, c.seed),
            Cell(c.outcome, tone="" if c.outcome == "finished" else "bad"),
            _score(c.test),
            *(c.minutes(kind) for kind in ("total", *MINUTES)),
            *(c.restarts, c.device),
        )
        for group in groups
        for c in group.chains
    )
    note = "Given up: attempts that the restart rule ended at a loss of ln 2; they count in the total."
    return without_empty_columns(Table("Seeds and failures", columns, rows, note))


def _score(score: Score | None) -> Cell | None:
    if score is None:
        return None
    low, high = statistics.wilson_interval(score.correct, score.total)
    note = (f"[{100 * low:.2f}, {100 * high:.2f}]", f"{score.correct:,} of {score.total:,}")
    return Cell(f"{100 * score.accuracy:.2f}", note, 100 * score.accuracy)


def stages_table(groups: Sequence[ChainGroup]) -> Table:
    """Return a row a stage of every chain."""
    columns = (
        Column("Chain", "left"),
        Column("Stage", "left"),
        Column("Task", "left"),
        Column("Status", "left"),
        Column("Steps"),
        Column("Images a second", digits=0),
        Column("GPU minutes"),
        Column("Restarts"),
        Column("Test accuracy (%)"),
    )
    rows = tuple(
        (
            *(c.name, s.name, title(s.task)),
            Cell(s.status, tone="" if s.status == "finished" else "muted"),
            Cell(f"{s.step:,} of {s.steps:,}", value=s.step),
            *(s.images_per_s, s.total_minutes, s.restarts, _score(s.test)),
        )
        for group in groups
        for c in group.chains
        for s in c.stages
    )
    note = "A stage's own test, on its own task; images a second by the median window of training."
    return without_empty_columns(Table("Stages", columns, rows, note))


def probe_table(groups: Sequence[ChainGroup]) -> Table | None:
    """Return accuracy on sets that differ from the training set in one number, a row a set, a column a chain."""
    chains = [c for g in groups for c in g.counted if c.probes]
    names = sorted({name for c in chains for name in c.probes}, key=_probe_order)
    if not names:
        return None
    rows = []
    for name in names:
        cells = [_probe_cell(c.probes.get(name)) for c in chains]
        kind, _, value = name.partition("=")
        rows.append((f"{PROBE_TITLES.get(kind, kind)} {value}", *cells))
    columns = (Column("Set", "left"), *(Column(f"{c.name} (%)") for c in chains))
    note = (
        "The finished model on generated sets that differ from its own in the one number named; its own have contour "
        "length 14. Tracing keeps its accuracy; counting, or one learned length, falls to chance or below (red)."
    )
    return Table("Does it trace or count? Accuracy on other sets", columns, tuple(rows), note)


def _probe_order(name: str) -> tuple[str, float]:
    kind, _, value = name.partition("=")
    return kind, float(value) if value.replace(".", "", 1).isdigit() else 0.0


def _probe_cell(score: Score | None) -> Cell | None:
    if score is None:
        return None
    low, high = statistics.wilson_interval(score.correct, score.total)
    chance = statistics.stuck_at_chance(score.correct, score.total, CHANCE)
    note = (f"[{percent(low)}, {percent(high)}] of {score.total:,}",)
    return Cell(f"{100 * score.accuracy:.1f}", note, 100 * score.accuracy, "bad" if chance else "")


def cost_table(task: str, groups: Sequence[ChainGroup]) -> Table:
    """Return our chains and published results by accuracy, each with its GPU hours and what they rest on."""
    rows: list[tuple[float, tuple[Value, ...]]] = []
    for group in groups:
        counted, summary = group.counted, group.summary
        if summary is None:
            continue
        hours = sum(c.minutes("total") for c in counted) / len(counted) / 60.0
        machine = ", ".join(dict.fromkeys(c.device for c in counted if c.device))
        basis = f"measured, mean of {plural(len(counted), 'seed')}; attempts given up and tests included"
        name = Cell(f"This suite, {group.track} track", (group.chains[0].recipe,))
        cell = Cell(f"{100 * summary.mean:.2f}", value=100 * summary.mean)
        rows.append((summary.mean, (name, cell, Cell(f"{hours:.2f}", value=hours), machine, basis)))
    for row, cost in rivals(task):
        source = f"{cost.basis}; {row.source}" if cost.basis else row.source
        accuracy = Cell(row.text, value=row.percent)
        hours_cell = Cell(cost.text, value=cost.gpu_hours, tone="muted" if cost.gpu_hours is None else "")
        rows.append(((row.percent or 0.0) / 100, (row.method, accuracy, hours_cell, cost.machine, source)))
    columns = (
        Column("Method", "left"),
        Column("Test accuracy (%)"),
        Column("GPU hours"),
        Column("GPU", "left"),
        Column("Basis and source", "left"),
    )
    ordered = tuple(row for _, row in sorted(rows, key=lambda pair: -pair[0]))
    note = f"Hours of different GPUs do not compare one to one; tracks and models differ. {OWN_SETS}"
    return Table(f"What {title(task)} costs", columns, ordered, note)
