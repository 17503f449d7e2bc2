"""Results of `bench training` as tables, ratios and JSON. Reads and writes files; measures nothing, needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lra.base.errors import DataError
from lra.base.files import write_json_atomic
from lra.statistics import geometric_mean

FORMAT = 1
BASELINES = ("SDPA, compiled", "SDPA, eager", "standard, compiled", "standard, eager")
DROPPED = "flash, black left out"
OURS = ("flash", DROPPED, "block_sparse")
KINDS = ("attention forward", "attention backward", "matrix products", "copies", "the rest", "idle")

Report = dict[str, Any]
Cell = dict[str, Any]


def write_report(report: Report, path: Path) -> None:
    """Write the JSON, with the ratios as they are by now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, report | {"ratios": ratios(report), "means": means(report)})


def read_report(path: Path) -> Report:
    """Read what write_report wrote. Raises DataError for anything else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["format"] != FORMAT or not isinstance(report["cases"], list):
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} holds no results of bench training ({e}).", "Give a file that --json wrote.") from e
    return dict(report)


def cell(entry: dict[str, Any], method: str) -> Cell | None:
    """Return the result of a method in a case, timed or not."""
    return next((m for m in entry["methods"] if m["name"] == method), None)


def ms_of(entry: dict[str, Any], method: str) -> float | None:
    """Return a method's median ms a step, or None where it was not timed."""
    found = cell(entry, method)
    return found["ms"] if found is not None and found["status"] == "timed" else None


def ratio(entry: dict[str, Any], baseline: str, ours: str) -> float | None:
    """Return how many times as long the baseline's step takes."""
    above, below = ms_of(entry, baseline), ms_of(entry, ours)
    return above / below if above is not None and below is not None else None


def ratios(report: Report) -> list[dict[str, Any]]:
    """Return one row a case and form of ours: the speed-up over each baseline, and what is asked for."""
    rows = []
    for entry in report["cases"]:
        for ours in OURS:
            if ms_of(entry, ours) is None or entry["case"].get("alone"):
                continue
            floor = {"flash": entry["case"]["floor"], DROPPED: entry["case"]["dropped_floor"]}.get(ours)
            over = {baseline: ratio(entry, baseline, ours) for baseline in BASELINES}
            rows.append({"case": entry["case"]["name"], "ours": ours, "over": over, "floor": floor})
    return rows


def means(report: Report) -> list[dict[str, Any]]:
    """Return geometric means over the cases of each protocol: flash over the standard baselines and SDPA.

    A mean says which cases it is over; one that has no number is left out and named.
    """
    rows = []
    for protocol in ("google", "nystrom"):
        entries = [e for e in report["cases"] if e["case"]["name"].endswith(protocol) and e["in_table"]]
        for ours in ("flash", "protocol", "block_sparse"):
            for baseline in BASELINES:
                found = {e["case"]["name"]: best_ratio(e, baseline, ours) for e in entries}
                known = {name: value for name, value in found.items() if value is not None}
                if known:
                    mean = geometric_mean(list(known.values()))
                    missing = sorted(set(found) - set(known))
                    row = {"protocol": protocol, "ours": ours, "baseline": baseline, "mean": mean}
                    rows.append(row | {"over": sorted(known), "missing": missing})
    return rows


def best_ratio(entry: dict[str, Any], baseline: str, ours: str) -> float | None:
    """Return a case's ratio; `protocol` is flash as the protocol has it: black left out where it leaves black out."""
    if ours == "protocol":
        ours = DROPPED if ms_of(entry, DROPPED) is not None else "flash"
    return ratio(entry, baseline, ours)


def describe_result(result: Cell) -> str:
    """Return one line about a method's result."""
    if result["status"] != "timed":
        return f"{result['name']:24} {result['status']}: {result['reason']}"
    peak = result.get("peak_bytes")
    memory = "" if peak is None else f", {peak / 2**30:.2f} GiB"
    return (
        f"{result['name']:24} {result['ms']:9.2f} ms ({result['mean_ms']:.2f} mean of {result['steps']}), "
        f"{result['tokens_per_s'] / 1e6:.2f} M tokens/s{memory}, data {result['data_wait_ms']:.2f} ms"
    )


def markdown(report: Report) -> str:
    """Return the tables for docs/results.md."""
    parts = [_heading(report), _times(report), _ratio_table(report), _mean_table(report), _where_table(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(report: Report) -> str:
    machine = report["environment"]
    clock = report["clocks"]
    clocks = ", ".join(f"{when} {state['clocks.sm']:.0f} MHz" for when, state in clock.items() if state)
    return (
        f"`{' '.join(report['command'])}`, {report['date']}, {machine.get('gpu') or machine['device']}"
        f"{f' (SM clock {clocks})' if clocks else ''}, torch {machine['torch']}, Python {machine['python']}, bf16; "
        f"medians of steps run one after another, every method in a process of its own."
    )


def _times(report: Report) -> str:
    methods = [m for m in (*BASELINES[::-1], *OURS) if any(cell(e, m) for e in report["cases"])]
    lines = [_row(["ms a step (peak GiB)", "batch", *methods]), _row(["---"] * (len(methods) + 2))]
    for entry in report["cases"]:
        size = f"{entry['sequences']} x {entry['case']['padded_length']}"
        lines.append(_row([entry["case"]["name"], size, *(_time_cell(cell(entry, m)) for m in methods)]))
    return "\n".join(lines)


def _time_cell(result: Cell | None) -> str:
    if result is None:
        return "-"
    if result["status"] != "timed":
        estimate = result.get("estimated_bytes")
        return result["status"] + ("" if estimate is None else f" (about {estimate / 2**30:.0f} GiB)")
    peak = result.get("peak_bytes")
    pieces = f", {result['pieces']} pieces" if result.get("pieces", 1) > 1 else ""
    return f"{result['ms']:.2f}" + ("" if peak is None else f" ({peak / 2**30:.1f}{pieces})")


def _ratio_table(report: Report) -> str:
    lines = [_row(["speed-up a step", "ours", *BASELINES, "asked"]), _row(["---"] * (len(BASELINES) + 3))]
    for row in ratios(report):
        values = ["-" if row["over"][b] is None else f"{row['over'][b]:.2f}" for b in BASELINES]
        asked = "" if row["floor"] is None else f"{row['floor']:g} over SDPA, compiled"
        lines.append(_row([row["case"], row["ours"], *values, asked]))
    return "\n".join(lines) if len(lines) > 2 else ""


def _mean_table(report: Report) -> str:
    lines = [_row(["geometric mean", "ours", "over", "speed-up", "cases"]), _row(["---"] * 5)]
    for row in means(report):
        cases = ", ".join(row["over"]) + (f"; without {', '.join(row['missing'])}" if row["missing"] else "")
        lines.append(_row([row["protocol"], row["ours"], row["baseline"], f"{row['mean']:.2f}", cases]))
    return "\n".join(lines) if len(lines) > 2 else ""


def _where_table(report: Report) -> str:
    lines = [_row(["where a step goes, ms", "method", *KINDS]), _row(["---"] * (len(KINDS) + 2))]
    for entry in report["cases"]:
        for result in entry["methods"]:
            where = result.get("where")
            if where:
                lines.append(
                    _row([entry["case"]["name"], result["name"], *(f"{where.get(k, 0.0):.2f}" for k in KINDS)])
                )
    return "\n".join(lines) if len(lines) > 2 else ""


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
