"""From run folders to a report: report.md, results.csv, results.tex, index.html and the figures as PNG.

Called by `run_lra.py report`. Reads files only: no torch, no model, no task.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from lra import plots
from lra.base.files import disk_errors, write_bytes_atomic, write_text_atomic
from lra.chain_page import ChainPart, chain_parts, latex_parts, markdown_parts
from lra.chain_records import ChainRecord, find_chains
from lra.chain_tables import seeds_table
from lra.comparison import table_3
from lra.figures import Picture, pictures
from lra.page import METHOD_NOTES, page, section_note
from lra.records import RunRecord
from lra.report_tables import overview, plural, published_table, section_tables, section_title
from lra.run_tables import all_runs, class_table, confusion_table, facts, not_counted
from lra.runs import find_runs
from lra.summary import Section, sections
from lra.tables import csv_text, escape_latex, escape_markdown, latex, markdown


def build_report(run_roots: Sequence[Path], out: Path, *, now: datetime | None = None) -> list[Path]:
    """Write the report of every run beneath `run_roots` into the folder `out`; return the files, the page first.

    A root may be a run's or a chain's folder, a folder of such folders, or a result.json or chain.json kept under
    another name. Runs and chains that are missing, failed, unfinished or damaged are shown as such. Each file appears
    whole or not at all, and index.html needs none of the others. Raises RunError when there is neither run nor chain or
    `out` cannot be written, DiskFullError.
    """
    chains = find_chains(run_roots)
    records = find_runs(run_roots, may_be_none=bool(chains))
    parts = chain_parts(chains)
    groups = sections(records)
    mixed = table_3(groups)
    # First of all: the table that the suite exists to reproduce.
    groups = [*([mixed] if mixed else []), *groups]
    taken: set[str] = set()
    figures = {index: pictures(section, taken) for index, section in enumerate(groups)}
    made = (now or datetime.now(UTC)).strftime("%Y-%m-%d %H:%M UTC")
    texts = {
        "index.html": page(records, groups, figures, made, chains, parts),
        "report.md": markdown_report(records, groups, figures, made, chains, parts),
        "results.csv": csv_text(all_runs(records, groups)) if records else "",
        "results.tex": "\n".join([latex_report(records, groups, made), *latex_parts(chains, parts)]),
        "chains.csv": csv_text(seeds_table([g for part in parts for g in part.groups])) if chains else "",
    }
    texts = {name: text for name, text in texts.items() if text}
    with disk_errors(out):
        (out / "plots").mkdir(parents=True, exist_ok=True)
    written = []
    for picture in [p for found in (*figures.values(), *(part.pictures for part in parts)) for p in found]:
        written.append(out / "plots" / f"{picture.name}.png")
        write_bytes_atomic(written[-1], plots.png(picture.figure))
    for name, text in texts.items():
        write_text_atomic(out / name, text)
    return [*(out / name for name in texts), *written]


def markdown_report(
    records: Sequence[RunRecord],
    groups: Sequence[Section],
    figures: dict[int, list[Picture]],
    made: str,
    chains: Sequence[ChainRecord] = (),
    chain_sections: Sequence[ChainPart] = (),
) -> str:
    """Return the report for reading on a code host: the page's content, figures as links to plots/."""
    counted = sum(r.counted for r in records)
    whole = sum(c.counted for c in chains)
    tally = f" {plural(counted, 'run')} counted, {len(records) - counted} not." if records else ""
    tally += f" {plural(whole, 'chain')} counted, {len(chains) - whole} not." if chains else ""
    parts = ["# Long-Range Arena report", f"{made}.{tally}"]
    lost = not_counted(records)
    if lost:
        parts.append(markdown(lost))
    parts += markdown_parts(chains, chain_sections)
    for index, section in enumerate(groups):
        parts.append(f"## {escape_markdown(section_title(section))}")
        parts += [section_note(section)] if section_note(section) else []
        parts.append(markdown(overview(section)))
        parts += [f"![{escape_markdown(f'{p.task}: {p.caption}')}](plots/{p.name}.png)" for p in figures.get(index, [])]
        parts += [markdown(t) for t in section_tables(section)]
    parts.append("## Runs")
    for run in records:
        parts.append(f"### {escape_markdown(run.name)}")
        parts.append("\n".join(f"- {k}: {escape_markdown(v)}" for k, v in facts(run)))
        parts += [markdown(t) for t in (confusion_table(run), class_table(run)) if t]
    papers = published_table(list(dict.fromkeys(r.task for r in records)))
    if papers:
        parts += ["## Published results", markdown(papers)]
    parts += ["## How to read the numbers", "\n".join(f"- {n}" for n in METHOD_NOTES)]
    return "\n\n".join(p.rstrip() for p in parts) + "\n"


def latex_report(records: Sequence[RunRecord], groups: Sequence[Section], made: str) -> str:
    """Return the tables for \\input in a paper: each section's overview, and the runs that are not counted."""
    parts = [f"% Made by run_lra.py report, {made}. Needs \\usepackage{{booktabs,textcomp}} and T1 fonts."]
    for section in groups:
        parts.append(f"% {escape_latex(section_title(section))}")
        table = overview(section)
        heading = f"{section_title(section)}: {table.title}."
        parts.append(latex(type(table)(heading, table.columns, table.rows, table.note)))
    lost = not_counted(records)
    if lost:
        parts.append(latex(lost))
    return "\n".join(parts)
