"""The report's tables over single runs: all their fields, the runs that are not counted, classes and confusion.

Called by the report's writers of Markdown, CSV, LaTeX and HTML. Pure, as lra/report_tables.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from lra import statistics
from lra.records import RunRecord
from lra.report_tables import duration, percent, plural, size, title
from lra.summary import Method, Section, stuck
from lra.tables import Cell, Column, Table, Value

MAX_SHOWN_CLASSES = 20


def not_counted(records: Iterable[RunRecord]) -> Table | None:
    """Return the runs that enter no mean, each with its reason, or None when all are counted."""
    rows = tuple(
        (
            *(r.name, Cell(r.outcome, tone="bad"), r.reason, title(r.task), Method(r.backend, r.layout).label),
            *(r.seed, r.step, r.steps),
        )
        for r in records
        if not r.counted
    )
    columns = (
        *(Column(name, "left") for name in ("Run", "Status", "Reason", "Task", "Method")),
        *(Column(name) for name in ("Seed", "Step", "of steps")),
    )
    return Table("Runs that are not counted", columns, rows) if rows else None


def all_runs(records: Iterable[RunRecord], sections: Iterable[Section]) -> Table:
    """Return a row a run with every field, for CSV: accuracies are fractions, durations seconds, sizes bytes."""
    published = {id(r): g.published for s in sections for g in s.groups for r in g.runs}
    rows = []
    for r in records:
        paper = published.get(id(r))
        beside = None if paper is None else "fail" if paper.percent is None else paper.percent / 100
        rows.append({**_identity(r), **_scores(r), "published": beside, "expected": r.expected, **_costs(r)})
    columns = tuple(Column(name) for name in rows[0]) if rows else ()
    return Table("", columns, tuple(tuple(row.values()) for row in rows))


def _identity(run: RunRecord) -> dict[str, Value]:
    names = "status reason track protocol task source recipe split_rule checkpoint_choice backend layout seed"
    return {"run": run.name, **{name: getattr(run, name) or None for name in names.split()}, "seed": run.seed}


def _scores(run: RunRecord) -> dict[str, Value]:
    score = run.chosen
    low, high = statistics.wilson_interval(score.correct, score.total) if score else (None, None)
    return {
        "test_accuracy": score.accuracy if score else None,
        "test_low": low,
        "test_high": high,
        "test_correct": score.correct if score else None,
        "test_total": score.total if score else None,
        "test_loss": score.loss if score else None,
        **{f"{c}_accuracy": run.tests[c].accuracy if c in run.tests else None for c in ("best_val", "last")},
        "val_accuracy": run.val_accuracy,
        "at_chance": str(stuck(run)).lower() if score else None,
    }


def _costs(run: RunRecord) -> dict[str, Value]:
    names = (
        "step steps batch_size num_parameters precision steps_per_s steady_steps_per_s tokens_per_s train_s eval_s "
        "wall_s peak_memory_bytes device software commit date command resumed restarts"
    )
    costs: dict[str, Value] = {name: getattr(run, name) for name in names.split()}
    return {**costs, "what_ran": what_ran(run), "path": str(run.path)}


def what_ran(run: RunRecord) -> str | None:
    """Return which code computed the attention, as the run recorded it."""
    return "; ".join(f"{k}: {v}" if k != "attention" else v for k, v in run.what_ran.items()) or None


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return what is to be said of one run, as pairs of name and text; what is unknown is left out."""
    score = run.chosen
    accuracy = None
    if score:
        low, high = statistics.wilson_interval(score.correct, score.total)
        accuracy = (
            f"{percent(score.accuracy)} % [{percent(low)}, {percent(high)}], {score.correct:,} of {score.total:,}"
            + (", not above chance" if stuck(run) else "")
        )
    others = [f"{percent(s.accuracy)} % at step {s.step:,} ({name.replace('_', ' ')})" for name, s in run.tests.items()]
    again = [
        f"{percent(e.score.accuracy)} % with {e.backend} ({e.checkpoint.replace('_', ' ')}, {e.score.correct:,} of "
        f"{e.score.total:,})"
        for e in run.evaluations
    ]
    choice = (run.checkpoint_choice or "").replace("_", " ")
    if score and choice and run.checkpoint_choice not in run.tests:
        choice += "; there was none, so the last one"
    speed = [f"{run.steps_per_s:,.2f} steps/s"] if run.steps_per_s is not None else []
    speed += [f"{run.tokens_per_s:,.0f} tokens/s"] if run.tokens_per_s is not None else []
    times = [("training", run.train_s), ("evaluation", run.eval_s), ("in all", run.wall_s)]
    resumed = [plural(n, w) for n, w in ((run.resumed, "resume"), (run.restarts, "restart")) if n]
    pairs: list[tuple[str, str | None]] = [
        ("Status", run.status if not run.reason else f"{run.status}: {run.reason}"),
        ("Test accuracy", accuracy),
        ("By checkpoint", "; ".join(others)),
        ("Tested again by eval", "; ".join(again)),
        ("Best validation accuracy", f"{percent(run.val_accuracy)} %" if run.val_accuracy is not None else None),
        ("Checkpoint choice", choice),
        ("Recipe", run.recipe),
        ("Expected by the recipe", f"{percent(run.expected)} % ({run.expected_source})" if run.expected else None),
        ("Data", run.source),
        ("Split rule", run.split_rule),
        ("Attention", Method(run.backend, run.layout).label),
        ("What ran", what_ran(run)),
        ("Seed", None if run.seed is None else str(run.seed)),
        ("Steps", None if run.step is None else f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else "")),
        ("Batch", None if run.batch_size is None else plural(run.batch_size, "example")),
        ("Parameters", None if run.num_parameters is None else f"{run.num_parameters:,}"),
        ("Precision", run.precision),
        ("Time", ", ".join(f"{duration(s)} {name}" for name, s in times if s is not None)),
        ("Speed", ", ".join(speed)),
        ("Peak memory", size(run.peak_memory_bytes)),
        ("Machine", run.device),
        ("Software", run.software),
        ("Command", run.command),
        ("Interruptions", ", ".join(resumed)),
        ("Commit", f"{run.commit} (with uncommitted changes)" if run.commit and run.dirty else run.commit),
        ("Date", run.date),
        ("Folder", str(run.path)),
    ]
    if run.curves.bad_lines:
        pairs.append(("Warning", f"{plural(run.curves.bad_lines, 'line')} of metrics.jsonl could not be read."))
    return [(name, text) for name, text in pairs if text]


def class_table(run: RunRecord) -> Table | None:
    """Return precision, recall, F1 and support of each class, computed from the confusion matrix."""
    if not 0 < len(run.confusion) <= MAX_SHOWN_CLASSES:
        return None
    scores = statistics.class_scores(run.confusion)
    rows = tuple((str(s["label"]), s["precision"], s["recall"], s["f1"], s["support"]) for s in scores)
    columns = (
        Column("Class", "left"),
        Column("Precision", digits=3),
        Column("Recall", digits=3),
        Column("F1", digits=3),
        Column("Examples"),
    )
    return Table("Scores by class", columns, rows)


def confusion_table(run: RunRecord) -> Table | None:
    """Return the confusion matrix: true classes down, predicted classes across."""
    if not 0 < len(run.confusion) <= MAX_SHOWN_CLASSES:
        return None
    columns = (Column("True \\ predicted", "left"), *(Column(str(c)) for c in range(len(run.confusion))))
    rows: tuple[tuple[Value, ...], ...] = tuple((str(c), *row) for c, row in enumerate(run.confusion))
    return Table("Confusion matrix", columns, rows)
