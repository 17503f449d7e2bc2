"""The report's part about chains of stages: the same tables and figures for the page, Markdown and LaTeX.

Called by the report. Decides what stands there and in which order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lra import chain_figures, plots
from lra.chain_figures import OWNERS, View, read_view
from lra.chain_records import ChainGroup, ChainRecord, chain_groups
from lra.chain_tables import cost_table, overview, probe_table, seeds_table, stages_table, unfinished_chains
from lra.figures import Picture
from lra.report_tables import title
from lra.tables import Column, Table, Value, escape_html, escape_latex, escape_markdown, html_table, latex, markdown

NOTE = (
    "A chain trains the same model on one set after another, ends at full length and is tested there with every pixel "
    "a token. Paper: a published protocol as it was. Sequence: one-dimensional positions, the set's own training "
    "images only. Open: two-dimensional positions, flips and turns, easier sets as a curriculum."
)
CURVES = (
    "Validation accuracy over GPU minutes: all work of earlier stages, and training until then; a line a seed. Solid: "
    "the task itself; dotted: smaller images of an earlier stage; star: the final test. Dotted line: chance; dashed: "
    "published"
)
GRID = (
    "Where the first marker (circle) looks, layer by layer; orange: the root of the attention. Percent: how much of "
    "their attention all points of the path spend on it"
)
ARROWS = "From the marker (circle) along the path: an arrow from each point to the pixel that it looks at most"


@dataclass(frozen=True)
class ChainPart:
    """All about the chains of one task."""

    task: str
    groups: tuple[ChainGroup, ...]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    shown: ChainRecord | None = None
    """The chain whose attention is drawn."""

    @property
    def heading(self) -> str:
        """Title of the part."""
        return f"{title(self.task)} by chains of stages"


def chain_parts(chains: Sequence[ChainRecord]) -> list[ChainPart]:
    """Return the parts of the report about chains, a part a task."""
    groups = chain_groups(chains)
    return [_part(task, [g for g in groups if g.task == task]) for task in dict.fromkeys(g.task for g in groups)]


def _part(task: str, groups: Sequence[ChainGroup]) -> ChainPart:
    tables: list[Table | None] = [overview(groups), probe_table(groups)]
    stem = f"chain-{re.sub(r'[^A-Za-z0-9]+', '-', task)[:40]}"
    pictures = []
    curves = chain_figures.accuracy_over_minutes(task, groups)
    if curves is not None:
        pictures.append(Picture(f"{stem}-minutes", CURVES, task, curves))
    shown, view = _view(groups)
    if shown is not None and view is not None:
        about = chain_figures.view_caption(shown, view)
        grid, arrows = chain_figures.attention_grid(view), chain_figures.looks_along_path(view)
        pictures.append(Picture(f"{stem}-attention", f"{GRID}. {about}", task, grid))
        pictures.append(Picture(f"{stem}-along-path", f"{ARROWS}. {about}", task, arrows))
        tables.append(shares_table(shown, view))
    tables += [seeds_table(groups), stages_table(groups), cost_table(task, groups)]
    return ChainPart(task, tuple(groups), tuple(t for t in tables if t and t.rows), tuple(pictures), shown)


def _view(groups: Sequence[ChainGroup]) -> tuple[ChainRecord | None, View | None]:
    """The view of the most accurate chain that has one."""
    chains = [c for g in groups for c in g.counted if c.view is not None]
    for chain in sorted(chains, key=lambda c: -(c.test.accuracy if c.test else 0.0)):
        view = read_view(chain.view) if chain.view else None
        if view is not None:
            return chain, view
    return None, None


def shares_table(chain: ChainRecord, view: View) -> Table:
    """Return on what the points of the path spend their attention, a row a layer and head."""
    rows: tuple[tuple[Value, ...], ...] = tuple(
        (f"layer {layer + 1}, head {head + 1}", *(100 * float(share) for share in view.shares[layer, head]))
        for layer in range(view.shares.shape[0])
        for head in range(view.shares.shape[1])
    )
    columns = (Column("Where", "left"), *(Column(f"{owner} (%)") for owner in OWNERS))
    note = f"{chain.name}: mean over the points along the path of the image drawn above; pixels within 1.5 of a paddle."
    return Table("On what a path's points spend their attention", columns, rows, note)


def links(parts: Sequence[ChainPart]) -> list[tuple[str, str]]:
    """Return anchors and titles for the page's contents."""
    return [(f"chains-{index}", part.heading) for index, part in enumerate(parts)]


def lost_html(chains: Sequence[ChainRecord]) -> str:
    """Return the alert about chains that are not counted, or ""."""
    lost = unfinished_chains(chains)
    if lost is None:
        return ""
    count = f"{len(lost.rows)} chain{'' if len(lost.rows) == 1 else 's'} not counted"
    table = html_table(Table("", lost.columns, lost.rows))
    return f'<section class="alert" id="chains-not-counted"><h2>{count}</h2>{table}</section>'


def part_html(index: int, part: ChainPart) -> str:
    """Return a part as a section of the page."""
    parts = [f'<section id="chains-{index}"><h2>{escape_html(part.heading)}</h2><p>{NOTE}</p>']
    parts.append(f'<div class="main">{html_table(part.tables[0])}</div>')
    for number, picture in enumerate(part.pictures):
        image = plots.svg(picture.figure, f"c{index}-{number}", picture.caption)
        parts.append(f'<figure class="wide">{image}<figcaption>{escape_html(picture.caption)}</figcaption></figure>')
    parts += [html_table(t) for t in part.tables[1:]]
    return "\n".join([*parts, "</section>"])


def markdown_parts(chains: Sequence[ChainRecord], parts: Sequence[ChainPart]) -> list[str]:
    """Return the parts for report.md."""
    lost = unfinished_chains(chains)
    texts = [markdown(lost)] if lost else []
    for part in parts:
        texts += [f"## {escape_markdown(part.heading)}", NOTE, markdown(part.tables[0])]
        texts += [f"![{escape_markdown(p.caption)}](plots/{p.name}.png)" for p in part.pictures]
        texts += [markdown(t) for t in part.tables[1:]]
    return texts


def latex_parts(chains: Sequence[ChainRecord], parts: Sequence[ChainPart]) -> list[str]:
    """Return the parts for results.tex: accuracy and cost, probes, what is not counted."""
    texts = []
    for part in parts:
        texts.append(f"% {escape_latex(part.heading)}")
        probes = probe_table(part.groups)
        for table in (part.tables[0], *([probes] if probes else [])):
            texts.append(latex(Table(f"{part.heading}: {table.title}.", table.columns, table.rows, table.note)))
    lost = unfinished_chains(chains)
    return [*texts, *([latex(lost)] if lost else [])]
