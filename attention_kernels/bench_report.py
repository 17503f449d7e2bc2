"""Results of the benchmark as text, JSON and pictures. Reads and writes files; measures nothing, needs no GPU."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attention_kernels.bench_cases import Case

__all__ = [
    "CaseReport",
    "Report",
    "Result",
    "check_drawable",
    "draw",
    "read_json",
    "summary",
    "table",
    "write_json",
    "write_values",
]

FORMAT = 1
Pair = tuple[float | None, float | None]  # forward, forward + backward
_MIB = 2**20
_NOTE_LENGTH = 160
# Okabe and Ito's colours; methods differ by marker too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = "osD^vPX*"
# Whom a contest's floors are measured against (bench_peers.methods_of names them).
_PEERS = {"density": "ours, dense", "flex": "FlexAttention", "runtime": "standard"}


@dataclass
class Result:
    """One method in one case.

    status is "timed", "forward only", "wrong", "failed", "unsupported" or "not run"; reason says why. graph_reason says
    what could not be recorded in a CUDA graph.
    """

    method: str
    group: str
    status: str = "timed"
    reason: str = ""
    forward_ms: float | None = None
    both_ms: float | None = None
    peak_bytes: int | None = None
    # Largest relative distance to ours over output and gradients; of ours to a run of its own.
    error: float | None = None
    forward_graph_ms: float | None = None
    both_graph_ms: float | None = None
    graph_reason: str = ""

    def times(self, graph: bool = False) -> Pair:
        """Return the ms of forward and forward + backward, of whole calls or of replays of CUDA graphs."""
        return (self.forward_graph_ms, self.both_graph_ms) if graph else (self.forward_ms, self.both_ms)


@dataclass
class CaseReport:
    """All methods in one case; the GPU's state before and after."""

    case: Case
    results: list[Result]
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None

    def ours(self) -> Result | None:
        """Return our first form that was timed."""
        return next((r for r in self.results if r.group == "ours" and r.forward_ms is not None), None)

    def best_peer(self, forward: bool, graph: bool = False) -> Result | None:
        """Return the fastest peer that the floors are measured against.

        The best SDPA backend; any peer with dropout; for packed cases torch's packed attention; for block-sparse cases
        FlexAttention, and in the sweep over densities our own dense attention; in the runtime table the standard one.
        """
        peers = [r for r in self.results if r.group != "ours"]
        if self.case.contest != "all":
            peers = [r for r in peers if r.method == _PEERS[self.case.contest]]
        elif self.case.packed:
            peers = [r for r in peers if r.method == "torch varlen"]
        elif not self.case.dropout:
            peers = [r for r in peers if r.group == "sdpa"]
        which = 0 if forward else 1
        timed = [(ms, i) for i, r in enumerate(peers) if (ms := r.times(graph)[which]) is not None]
        return peers[min(timed)[1]] if timed else None

    def ratios(self, graph: bool = False) -> Pair:
        """Return the best peer's time divided by ours, forward and forward + backward; above 1 we are faster.

        With `graph` both times are those of replays, and the best peer is the fastest of these.
        In the sweep over densities the dense time counts times the density: 1 where skipped blocks cost nothing.
        """
        forward, both = (self.ratio(self.best_peer(i == 0, graph), graph)[i] for i in (0, 1))
        if self.case.contest != "density":
            return forward, both
        share = self.case.density
        return None if forward is None else forward * share, None if both is None else both * share

    def flash_ratios(self) -> Pair:
        """Return the same against SDPA's flash backend, FlashAttention-2."""
        return self.ratio(next((r for r in self.results if r.method == "SDPA flash"), None))

    def ratio(self, peer: Result | None, graph: bool = False) -> Pair:
        """Return a peer's times divided by ours, None where either is missing."""
        mine = self.ours()
        if mine is None or peer is None:
            return None, None
        forward, both = (_divide(*times) for times in zip(peer.times(graph), mine.times(graph), strict=True))
        return forward, both


def _divide(above: float | None, below: float | None) -> float | None:
    return None if not above or not below else above / below


@dataclass
class Report:
    """A whole run: when, how and on what it ran, and the cases."""

    date: str
    command: list[str]
    environment: dict[str, Any]
    settings: dict[str, Any]
    cases: list[CaseReport] = field(default_factory=list)


def table(report: CaseReport, graphs: bool = False) -> str:
    """Return one case as lines of text, a line a method, whatever became of it; with `graphs` replays too."""
    case = report.case
    replays = f"{'graph fwd ms':>14}{'graph f+b ms':>14}" if graphs else ""
    lines = [
        case.name,
        f"  {'method':<19}{'forward ms':>12}{'fwd+bwd ms':>12}{replays}"
        f"{'TFLOP/s':>9}{'f+b':>7}{'peak MiB':>10}{'to ours':>9}",
    ]
    for r in report.results:
        speed = ["-" if ms is None else f"{n * case.flops() / ms / 1e9:.1f}" for ms, n in _speeds(r)]
        peak = "-" if r.peak_bytes is None else f"{r.peak_bytes / _MIB:.0f}"
        error = "-" if r.error is None else f"{r.error:.1e}"
        replays = "".join(f"{_ms(ms):>14}" for ms in r.times(graph=True)) if graphs else ""
        lines.append(
            f"  {r.method:<19}{_ms(r.forward_ms):>12}{_ms(r.both_ms):>12}{replays}"
            f"{speed[0]:>9}{speed[1]:>7}{peak:>10}{error:>9}  {_note(r, case, graphs)}".rstrip()
        )
    lines.append("  " + _verdict(report))
    return "\n".join(lines)


def _note(r: Result, case: Case, graphs: bool) -> str:
    """Return what a method's line says behind its numbers."""
    note = "" if r.status == "timed" else f"{r.status}: {r.reason}"
    if r.group == "ours" and r.peak_bytes is not None:
        note = f"{note} (linear memory allows {case.memory_allowed() / _MIB:.0f} MiB in 16 bits)".strip()
    refused = f"not in a CUDA graph: {r.graph_reason}" if graphs and r.graph_reason else ""
    return " ".join(text[:_NOTE_LENGTH] for text in (note, refused) if text)


def _speeds(r: Result) -> tuple[tuple[float | None, float], tuple[float | None, float]]:
    return (r.forward_ms, 1.0), (r.both_ms, 3.5)


def _ms(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3f}"


def _verdict(report: CaseReport) -> str:
    """Return the ratios with the floors beside them, and the clock."""
    parts = []
    for i, (what, ratio) in enumerate(zip(("forward", "forward + backward"), report.ratios(), strict=True)):
        peer, floor = report.best_peer(i == 0), report.case.floor
        name = "" if peer is None else peer.method
        name += f" x density {report.case.density:.4g}" if report.case.contest == "density" else ""
        text = f"{what}: " + ("no ratio" if ratio is None else f"{name} takes {ratio:.2f}x our time")
        if floor is not None and report.case.aim is not None:
            reached = "" if ratio is None else (" reached" if ratio >= floor[i] else " NOT reached")
            text += f" (floor {floor[i]:g}{reached}, aim {report.case.aim[i]:g})"
        parts.append(text)
    clocks = [f"{s['clocks.sm']:.0f}" for s in (report.before, report.after) if s and "clocks.sm" in s]
    parts.append(f"SM clock {' to '.join(clocks)} MHz" if clocks else "SM clock not known")
    return "; ".join(parts)


def summary(cases: Sequence[CaseReport], graphs: bool = False) -> str:
    """Return a Markdown table of ours against the best peer, a row a case; with `graphs` the ratio of replays too."""
    added = (" in CUDA graphs |", "---|") if graphs else ("", "")
    lines = [
        f"| case | ours, ms fwd / fwd+bwd | best peer, ms fwd / fwd+bwd | ratio | floor |{added[0]} to SDPA flash |",
        f"|---|---|---|---|---|{added[1]}---|",
    ]
    for report in cases:
        mine = report.ours()
        ours = "-" if mine is None else f"{_ms(mine.forward_ms)} / {_ms(mine.both_ms)}"
        forward, both = report.best_peer(True), report.best_peer(False)
        peers = f"{_ms(forward.forward_ms if forward else None)} / {_ms(both.both_ms if both else None)}"
        names = ", ".join(dict.fromkeys(r.method for r in (forward, both) if r is not None))
        floor = " / ".join(f"{x:g}" for x in report.case.floor) if report.case.floor else "-"
        peers += f" ({names})" if names else ""
        columns = [report.case.name, ours, peers, _pair(report.ratios()), floor]
        columns += [_pair(report.ratios(graph=True))] if graphs else []
        lines.append(f"| {' | '.join([*columns, _pair(report.flash_ratios())])} |")
    return "\n".join(lines)


def _pair(ratios: Pair) -> str:
    return " / ".join("-" if x is None else f"{x:.2f}" for x in ratios)


def write_json(report: Report, path: Path) -> None:
    """Write the report, whole or not at all."""
    values = {"format": FORMAT, **dataclasses.asdict(report)}
    for case, written in zip(report.cases, values["cases"], strict=True):
        written["ratios"] = case.ratios()
    write_values(values, path)


def write_values(values: dict[str, Any], path: Path) -> None:
    """Write values as JSON, whole or not at all; raises ValueError for NaN, which is not JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    temp.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temp, path)


def read_json(path: Path) -> Report:
    """Read what write_json wrote. Raises ValueError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError("another format")
        cases = [_read_case(value) for value in values.pop("cases")]
        return Report(**values, cases=cases)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{path} is no result of this benchmark: {e}.") from e


def _read_case(values: dict[str, Any]) -> CaseReport:
    case = values["case"]
    for name in ("floor", "aim"):
        case[name] = None if case[name] is None else tuple(case[name])
    results = [Result(**result) for result in values["results"]]
    return CaseReport(Case(**case), results, values["before"], values["after"])


def check_drawable(cases: Sequence[CaseReport] | Sequence[Case]) -> None:
    """Raise ValueError unless the cases of one head dim differ in length (and batch) alone."""
    kinds: dict[int, set[tuple[Any, ...]]] = {}
    for item in cases:
        case = item if isinstance(item, Case) else item.case
        kinds.setdefault(case.head_dim, set()).add((case.heads, case.dropout, case.packed, case.causal, case.layout))
    if any(len(kind) > 1 for kind in kinds.values()):
        raise ValueError(
            "The plots are over the length: of one head dim only cases with the same heads and dropout fit."
        )


def draw(cases: Sequence[CaseReport], folder: Path) -> list[Path]:
    """Draw time and peak memory against length, log-log, two PNGs for each head dim; return their paths.

    Methods without a number at a length have no point there. Raises ValueError where matplotlib is missing or the
    cases do not belong on one axis.
    """
    check_drawable(cases)
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError("The plots need matplotlib: pip install matplotlib.") from e
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context({"font.size": 9.0, "axes.grid": True, "grid.color": "#e4e4e4"}):
        for head_dim in sorted({report.case.head_dim for report in cases}):
            chosen = [report for report in cases if report.case.head_dim == head_dim]
            for what, title in (("time", "forward + backward (ms)"), ("memory", "peak memory beside the inputs (MiB)")):
                path = folder / f"{what}_d{head_dim}.png"
                _draw_one(chosen, what, title, path)
                paths.append(path)
    return paths


def _draw_one(cases: Sequence[CaseReport], what: str, title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(result.method for report in cases for result in report.results))
    lengths = sorted({report.case.length for report in cases})
    for i, name in enumerate(names):
        points = sorted(p for report in cases if (p := _point(report, name, what)) is not None)
        if points:
            style: dict[str, Any] = {
                "color": _COLOURS[i % len(_COLOURS)],
                "marker": _MARKERS[i % len(_MARKERS)],
                "markersize": 4,
            }
            axes.plot([n for n, _ in points], [y for _, y in points], label=name, linewidth=1.4, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=30)
    axes.minorticks_off()
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(title)
    axes.set_title(f"head dim {cases[0].case.head_dim}, {cases[0].case.heads} heads")
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured on this machine", ha="center", transform=axes.transAxes)
    figure.savefig(path)


def _point(report: CaseReport, name: str, what: str) -> tuple[int, float] | None:
    for result in report.results:
        value = result.both_ms if what == "time" else result.peak_bytes
        if result.method == name and value:
            return report.case.length, value if what == "time" else value / _MIB
    return None
