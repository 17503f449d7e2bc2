"""The report as one HTML page that needs nothing else: styles and figures inline, no script, no network.

Called by the report. Takes records, sections and figures; decides the page's order and marks it up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lra import plots
from lra.chain_page import ChainPart, lost_html, part_html
from lra.chain_page import links as chain_links
from lra.chain_records import ChainRecord
from lra.comparison import TABLE_3_PROTOCOL
from lra.figures import Picture
from lra.records import RunRecord
from lra.report_tables import overview, percent, plural, published_table, section_tables, section_title, title
from lra.run_tables import class_table, confusion_table, facts, not_counted
from lra.summary import Method, Section
from lra.tables import Table, escape_html, html_table

OPEN_RUNS = 4

TRACK_NOTES = {
    "paper": "A published protocol as it was: its model, its optimiser, learned one-dimensional positions.",
    "sequence": "One token a pixel or byte, one-dimensional positions, the task's own training set only.",
    "open": "Two-dimensional positions, label-preserving augmentation and easier sets as a curriculum are allowed.",
}

TABLE_3_NOTE = (
    "The published settings that come closest to FlashAttention's rows: Nystromformer's for ListOps, Text, Retrieval "
    "and Pathfinder, google's for Image. The runs stand in their own sections too."
)

SMOKE_NOTE = "A smoke recipe tests the machinery in minutes; its accuracy compares with nothing published."

METHOD_NOTES = (
    "Accuracies come from integer counts over the whole test set, with the checkpoint that the protocol names.",
    "With several seeds the interval is Student's t over seeds; with one it is Wilson's for the finite test set alone "
    "and says nothing about other seeds.",
    "A seed is at chance when the lower end of its Wilson interval does not exceed the share of the commonest label. "
    "It stays in the mean and is counted beside it.",
    "Runs that failed, stopped or are damaged enter no mean. Runs share a mean only if they differ in nothing but the "
    "seed; several runs of one seed count as one.",
    "Tracks, protocols, split rules and data sources never share a column. Data that are neither a task's release nor "
    "made by its generator stand apart and enter no mean.",
)


def page(
    records: Sequence[RunRecord],
    sections: Sequence[Section],
    figures: Mapping[int, Sequence[Picture]],
    made: str,
    chains: Sequence[ChainRecord] = (),
    chain_parts: Sequence[ChainPart] = (),
) -> str:
    """Return the page. `figures` holds the pictures of each section by its index, `made` says when it was made."""
    lost = not_counted(records)
    papers = published_table(list(dict.fromkeys(r.task for r in records)))
    links = [("not-counted", "Not counted")] if lost else []
    links += [("chains-not-counted", "Chains not counted")] if not all(c.counted for c in chains) else []
    links += chain_links(chain_parts)
    links += [(f"section-{i}", section_title(s)) for i, s in enumerate(sections)] + (
        [("runs", "Runs")] if records else []
    )
    links += [("published", "Published results")] if papers else []
    links.append(("method", "How to read the numbers"))
    parts = [_header(records, links, made, chains)]
    if lost:
        parts.append(f'<section class="alert" id="not-counted"><h2>{plural(len(lost.rows), "run")} not counted</h2>')
        parts.append(html_table(Table("", lost.columns, lost.rows)) + "</section>")
    parts.append(lost_html(chains))
    parts += [part_html(index, part) for index, part in enumerate(chain_parts)]
    for index, section in enumerate(sections):
        parts.append(_section(index, section, figures.get(index, ())))
    parts += [_runs(records)] if records else []
    if papers:
        parts.append('<section class="sources" id="published"><h2>Published results</h2>')
        parts.append(html_table(Table("", papers.columns, papers.rows, papers.note)) + "</section>")
    notes = "".join(f"<li>{escape_html(n)}</li>" for n in METHOD_NOTES)
    parts.append(f'<section id="method"><h2>How to read the numbers</h2><ul>{notes}</ul></section>')
    parts.append(f"<footer>Made by <code>run_lra.py report</code> from run folders, {escape_html(made)}.</footer>")
    css = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    # Pictures of attention lie in the page itself, as data.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Long-Range Arena report</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def section_note(section: Section) -> str:
    """Return what may be said of a section's rules in a sentence or two, or ""."""
    if section.protocol == TABLE_3_PROTOCOL:
        return TABLE_3_NOTE
    notes = [TRACK_NOTES.get(section.track, ""), SMOKE_NOTE if section.protocol == "smoke" else ""]
    return " ".join(n for n in notes if n)


def _header(
    records: Sequence[RunRecord], links: Sequence[tuple[str, str]], made: str, chains: Sequence[ChainRecord]
) -> str:
    counted = sum(r.counted for r in records)
    tally = [
        ("", counted, "run counted" if counted == 1 else "runs counted"),
        ("bad" if counted < len(records) else "", len(records) - counted, "not counted"),
    ]
    for name, known in (("task", {r.task for r in records}), ("backend", {r.backend for r in records})):
        count = len(known - {"unknown"})
        tally.append(("", count, name if count == 1 else f"{name}s"))
    whole = sum(c.counted for c in chains)
    tally = tally if records else []
    tally += [("", whole, "chain counted" if whole == 1 else "chains counted")] if chains else []
    tally += [("bad", len(chains) - whole, "chains not counted")] if whole < len(chains) else []
    numbers = "".join(f'<div class="{c}"><dt>{name}</dt><dd>{value:,}</dd></div>' for c, value, name in tally)
    items = "".join(f'<li><a href="#{anchor}">{escape_html(text)}</a></li>' for anchor, text in links)
    return (
        f'<header><h1>Long-Range Arena report</h1><p class="lead">{escape_html(made)}</p>'
        f'<dl class="tally">{numbers}</dl><nav aria-label="Contents"><ul>{items}</ul></nav></header>'
    )


def _section(index: int, section: Section, pictures: Sequence[Picture]) -> str:
    parts = [f'<section id="section-{index}"><h2>{escape_html(section_title(section))}</h2>']
    if section_note(section):
        parts.append(f"<p>{section_note(section)}</p>")
    parts.append(f'<div class="main">{html_table(overview(section))}</div>')
    for task in dict.fromkeys(p.task for p in pictures):
        parts.append(f'<h3>{escape_html(task.split(",")[0])}</h3><div class="plots">')
        parts += [_figure(f"s{index}-{i}", p) for i, p in enumerate(pictures) if p.task == task]
        parts.append("</div>")
    parts += [html_table(t) for t in section_tables(section)]
    parts.append("</section>")
    return "\n".join(parts)


def _figure(prefix: str, picture: Picture) -> str:
    image = plots.svg(picture.figure, prefix, f"{picture.caption}. {picture.task}.")
    return f"<figure>{image}<figcaption>{escape_html(picture.caption)}</figcaption></figure>"


def _runs(records: Sequence[RunRecord]) -> str:
    is_open = " open" if len(records) <= OPEN_RUNS else ""
    parts = ['<section id="runs"><h2>Runs</h2>']
    for run in records:
        pairs = "".join(f"<dt>{escape_html(k)}</dt><dd>{escape_html(v)}</dd>" for k, v in facts(run))
        parts.append(f'<details{is_open}><summary>{_summary(run)}</summary><div class="run">')
        parts.append(f'<dl class="facts">{pairs}</dl><div>')
        confusion, classes = confusion_table(run), class_table(run)
        if confusion:
            parts.append(_heat(run, confusion))
        if classes:
            parts.append(html_table(classes))
        parts.append("</div></div></details>")
    return "\n".join([*parts, "</section>"])


def _summary(run: RunRecord) -> str:
    seed = "" if run.seed is None else f", seed {run.seed}"
    what = f"{title(run.task)}, {Method(run.backend, run.layout).label}{seed}"
    score = run.chosen
    if run.counted and score:
        result = f'<span class="result">{escape_html(what)}: {percent(score.accuracy)} %</span>'
    else:
        result = f'<span class="result">{escape_html(what)}:</span> <span class="bad">{run.status}</span>'
    return f"<b>{escape_html(run.name)}</b> {result}"


def _heat(run: RunRecord, table: Table) -> str:
    """The confusion matrix with each cell tinted by its share of its row; the tint stays light under dark text."""
    head = "".join(f'<th scope="col" class="num">{escape_html(c.title)}</th>' for c in table.columns[1:])
    body = []
    for label, row in enumerate(run.confusion):
        total = max(1, sum(row))
        cells = "".join(
            f'<td class="num" style="background:rgba(0,114,178,{0.55 * count / total:.2f})">{count:,}</td>'
            for count in row
        )
        body.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    return (
        '<figure class="table heat"><figcaption>Confusion matrix</figcaption><div class="scroll" tabindex="0" '
        'role="region" aria-label="Confusion matrix"><table><thead><tr><th scope="col">True \\ predicted</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></figure>"
    )
