"""Times attention: ours beside every peer, on the same tensors, in one run.

    python -m attention_kernels.bench --shapes issue --json results/bench_issue.json

Every method is first checked against ours (output and gradients); one that differs is marked and not timed, one that
fails is listed with the reason. Rounds are interleaved: each round times every method once, and the medians over the
rounds count. Times on a GPU are by events with L2 flushed. With --graphs replays of CUDA graphs are timed as well:
theirs is the kernels' time, what a call takes beyond it the host's. With --caller-thread backwards run in the thread
that asks for them, not in autograd's own, which has to wake. Timings of a busy GPU mean nothing: nothing else may run.
"""

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from attention_kernels import families
from attention_kernels.bench_cases import SETS, Case, Inputs, make_cases, make_inputs
from attention_kernels.bench_graphs import time_graph
from attention_kernels.bench_peers import Call, Method, Unsupported, methods_of, ours
from attention_kernels.bench_report import (
    CaseReport,
    Report,
    Result,
    check_drawable,
    draw,
    read_json,
    summary,
    table,
    write_json,
)
from attention_kernels.bench_timing import (
    describe_machine,
    first_estimate,
    free_memory,
    gpu_state,
    peak_bytes,
    time_call,
)

__all__ = ["Parser", "main", "measure_case"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Relative Frobenius distance to ours; the peers' own rounding is a quarter of it or less.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3}
# How far from sqrt(p / (1 - p)) the relative change by dropout may lie: cuDNN rounds p to sixteenths.
_DROPOUT_RANGE = (0.6, 1.6)
_REASON_LENGTH = 600
_WORDS = {"forward": "forward", "both": "forward + backward"}


@dataclass
class _Runner:
    """A method that passed its check: its calls, their estimated times in ms, and the times of each round.

    graph_times are those of replays; a kind that could not be recorded is no longer among them.
    """

    result: Result
    call: Call
    estimates: dict[str, float]
    times: dict[str, list[float]]
    graph_times: dict[str, list[float]]

    def run(self, kind: str) -> object:
        """Run "forward" (alone, without gradients) or "both" (forward and backward)."""
        if kind == "both":
            return self.call.gradients()
        with torch.no_grad():
            return self.call.forward()


def measure_case(
    case: Case,
    methods: Sequence[Method],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float = 0.6,
    rounds: int = 3,
    graphs: bool = False,
) -> CaseReport:
    """Check and time every method on one case's tensors, with `graphs` its replays in CUDA graphs as well.

    seconds is about how long the timing of a method takes, forward and forward + backward over all rounds; graphs
    double it. A failure of a method never ends the run: it becomes the method's result.
    """
    results, runners = [], []
    reference: list[Tensor] | str
    inputs: Inputs | None = None
    try:
        inputs = make_inputs(case, dtype, device)
        reference = _tensors(ours(inputs, 0.0))
    except Exception as e:
        reference = f"ours, the reference, failed: {_reason(e, [])}"
    for method in methods:
        result = Result(method.name, method.group)
        results.append(result)
        if inputs is None or isinstance(reference, str):
            result.status, result.reason = "failed", str(reference)
        elif (runner := _prepare(method, inputs, reference, result)) is not None:
            runners.append(runner)
        free_memory(device)
    del reference
    # Not before the checks: until they have run, an idle GPU rests at a low clock.
    before = gpu_state(device)
    budget = 1e3 * seconds / (2 * rounds)
    # Graphs come last: whole calls find the same memory with them as without.
    for one_round in (_round, _round_of_graphs) if graphs else (_round,):
        for _ in range(rounds):
            for runner in runners:
                one_round(runner, device, budget)
    for runner in runners:
        result = runner.result
        result.forward_ms, result.both_ms = _medians(runner.times)
        result.forward_graph_ms, result.both_graph_ms = _medians(runner.graph_times)
    return CaseReport(case, results, before, gpu_state(device))


def _medians(times: dict[str, list[float]]) -> tuple[float | None, float | None]:
    """Return the medians of "forward" and "both", None without times."""
    forward, both = (statistics.median(times[kind]) if times.get(kind) else None for kind in _WORDS)
    return forward, both


def _prepare(method: Method, inputs: Inputs, reference: list[Tensor], result: Result) -> _Runner | None:
    """Check a method and take its memory; return what the rounds need, or None with the result filled in."""
    device, dropout = inputs.q.device, inputs.case.dropout
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            plain = method.build(inputs, 0.0)
            with plain.context():
                if method.checked:
                    _check(plain, reference, result)
                call = method.build(inputs, dropout) if dropout else plain
                if dropout and method.checked and result.status != "wrong":
                    _check_dropout(call, reference[0], dropout, result)
            if result.status == "wrong":
                return None
            kinds = ["forward"] if result.status == "forward only" else ["forward", "both"]
            runner = _Runner(result, call, {}, {kind: [] for kind in kinds}, {kind: [] for kind in kinds})
            with call.context():
                for kind in kinds:
                    runner.estimates[kind] = first_estimate(partial(runner.run, kind), device)
                result.peak_bytes = peak_bytes(partial(runner.run, kinds[-1]), device)
        except Exception as e:
            result.status = "unsupported" if isinstance(e, Unsupported) else "failed"
            result.reason = _reason(e, said)
            return None
    return runner


def _check(call: Call, reference: list[Tensor], result: Result) -> None:
    """Compare output and gradients with ours; a backward that fails leaves the forward to be timed."""
    tolerance = TOLERANCE[reference[0].dtype]
    with torch.no_grad():
        result.error = _distance(call.canonical(call.forward()), reference[0])
    worst = "the output"
    if result.error <= tolerance:
        try:
            gradients = [call.canonical(x) for x in call.gradients()]
        except Exception as e:
            result.status, result.reason = "forward only", f"backward: {_reason(e, [])}"
            return
        for name, mine, its in zip(("dq", "dk", "dv"), gradients, reference[1:], strict=True):
            distance = _distance(mine, its)
            if not distance <= result.error:
                result.error, worst = distance, name
    if not result.error <= tolerance:
        result.status = "wrong"
        result.reason = f"{worst} differs from ours by {result.error:.1e} (allowed: {tolerance:.0e}); not timed"
        # JSON knows no infinity.
        result.error = result.error if math.isfinite(result.error) else None


def _check_dropout(call: Call, plain_out: Tensor, dropout: float, result: Result) -> None:
    """Refuse a method that drops nothing or another share: masks differ, the size of their effect must not."""
    with torch.no_grad():
        change = _distance(call.canonical(call.forward()), plain_out) / (dropout / (1 - dropout)) ** 0.5
    if not _DROPOUT_RANGE[0] <= change <= _DROPOUT_RANGE[1]:
        result.status = "wrong"
        result.reason = f"dropout {dropout:g} changes the output {change:.2f} times as much as it should; not timed"


def _distance(x: Tensor, reference: Tensor) -> float:
    """Return ||x - reference|| / ||reference||; NaN and other shapes count as infinite."""
    if x.shape != reference.shape:
        return math.inf
    distance = float((x.float() - reference.float()).norm() / reference.float().norm().clamp(min=1e-30))
    return distance if math.isfinite(distance) else math.inf


def _tensors(call: Call) -> list[Tensor]:
    """Return out, dq, dk, dv in the case's shape."""
    with call.context():
        with torch.no_grad():
            out = call.canonical(call.forward())
        return [out, *(call.canonical(x) for x in call.gradients())]


def _round(runner: _Runner, device: torch.device, budget: float) -> None:
    """Time a method once more; if it fails now, that is its result."""
    if runner.result.status == "failed":
        return
    try:
        with runner.call.context():
            for kind, times in runner.times.items():
                times.append(time_call(partial(runner.run, kind), device, budget, runner.estimates[kind]))
    except Exception as e:
        runner.result.status, runner.result.reason = "failed", f"while timed: {_reason(e, [])}"
        for times in runner.times.values():
            times.clear()
        free_memory(device)


def _round_of_graphs(runner: _Runner, device: torch.device, budget: float) -> None:
    """Record a method and time its replays once more; what cannot be recorded says so and is not tried again."""
    result = runner.result
    if result.status == "failed":
        return
    for kind, times in list(runner.graph_times.items()):
        try:
            with runner.call.context():
                times.append(time_graph(partial(runner.run, kind), device, budget))
        except Exception as e:
            del runner.graph_times[kind]
            reason = f"{_WORDS[kind]}: {_reason(e, [])}"
            result.graph_reason = "; ".join(text for text in (result.graph_reason, reason) if text)
        # Outside the handler: an error's traceback holds what was allocated.
        free_memory(device)


def _reason(error: Exception, said: Sequence[warnings.WarningMessage]) -> str:
    """Return why a method failed, in one line: what torch warned of says more than "no available kernel"."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip() or type(error).__name__
    text = text if isinstance(error, Unsupported) else f"{type(error).__name__}: {text.splitlines()[0]}"
    if "No available kernel" in text:
        notes = dict.fromkeys(str(w.message).split(" (Triggered")[0].strip() for w in said)
        text = " ".join([text, *notes])
    return " ".join(text.split())[:_REASON_LENGTH]


def main(arguments: Sequence[str] | None = None, prog: str = "python -m attention_kernels.bench") -> None:
    """Run the benchmark; a mistake of the user leaves with exit code 2."""
    parser = _parser(prog)
    args = parser.parse_args(arguments)
    if args.graphs and args.from_json is None and (device := _device(args)).type != "cuda":
        parser.error(
            f"--graphs needs a CUDA GPU, and this run is on {device}.", "Leave --graphs out, or give --device a GPU."
        )
    try:
        if args.from_json is not None:
            report = read_json(args.from_json)
            args.graphs = args.graphs or bool(report.settings.get("graphs"))
            for case in report.cases:
                print(table(case, args.graphs) + "\n")
        else:
            report = _run(args, [*prog.split(), *(sys.argv[1:] if arguments is None else arguments)])
        print(summary(report.cases, args.graphs))
        if args.plots is not None:
            for path in draw(report.cases, args.plots):
                print(path)
    except (ValueError, OSError) as e:
        parser.error(str(e))


def _device(args: argparse.Namespace) -> torch.device:
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _run(args: argparse.Namespace, command: list[str]) -> Report:
    """Measure every case, printing and saving after each, so that a run cut short keeps what it has."""
    start = time.monotonic()
    cases = make_cases(args.shapes, args.dropout, args.causal)
    if args.plots is not None:
        check_drawable(cases)
    device = _device(args)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can see; torch sees none.")
    if args.seconds <= 0 or args.rounds < 1:
        raise ValueError("--seconds must be positive and --rounds at least 1.")
    settings = {"dtype": args.dtype, "seconds": args.seconds, "rounds": args.rounds, "shapes": args.shapes}
    settings |= {"kernels": families.asked(), "graphs": args.graphs, "caller_thread": args.caller_thread}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    report = Report(date, command, describe_machine(device), settings)
    print(", ".join(f"{k} {v}" for k, v in report.environment.items() if v is not None) + "\n", flush=True)
    for case in cases:
        methods = _chosen(methods_of(case, args.tiled), args.peers)
        if time.monotonic() - start > args.limit:
            reason = f"--limit {args.limit:g} seconds were over"
            done = CaseReport(case, [Result(m.name, m.group, "not run", reason) for m in methods])
        else:
            rule = {"seconds": args.seconds, "rounds": args.rounds, "graphs": args.graphs}
            with torch.autograd.set_multithreading_enabled(not args.caller_thread):
                done = measure_case(case, methods, dtype=DTYPES[args.dtype], device=device, **rule)
        report.cases.append(done)
        print(table(done, args.graphs) + "\n", flush=True)
        if args.json is not None:
            write_json(report, args.json)
    return report


def _chosen(methods: list[Method], peers: str | None) -> list[Method]:
    """Return ours, and of the peers those whose name contains one of the words; all of them without words."""
    words = [word.strip().lower() for word in peers.split(",")] if peers is not None else [""]
    return [m for m in methods if m.group == "ours" or any(word in m.name.lower() for word in words)]


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong and in one what to do, and leaves with 2."""

    def error(self, message: str, remedy: str | None = None) -> NoReturn:
        """Print cause and remedy, exit with 2."""
        print(f"error: {message}\n  {remedy or f'Try: {self.prog} --help'}", file=sys.stderr)
        raise SystemExit(2)


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Time attention: ours beside every peer.")
    sets = ", ".join(SETS)
    parser.add_argument(
        "--shapes", default="issue", help=f"{sets}, or shapes such as 8x2x1024x32,4x2x999x32p (p: packed)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--dropout", type=float, help="dropout probability of every case, in place of its own")
    parser.add_argument("--causal", action="store_true", help="time under a causal mask")
    parser.add_argument("--tiled", action="store_true", help="time our PyTorch form too")
    parser.add_argument("--graphs", action="store_true", help="time every method in CUDA graphs too: twice the time")
    parser.add_argument("--caller-thread", action="store_true", help="run backwards in the thread that asks for them")
    parser.add_argument("--peers", help="of the peers, time those with one of these words in their names: flash,cudnn")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; default: a GPU where there is one")
    parser.add_argument("--seconds", type=float, default=0.6, help="timing of a method in a case, about (default 0.6)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no case after so many seconds")
    parser.add_argument("--json", type=Path, help="file of the results, written after each case")
    parser.add_argument("--plots", type=Path, help="folder of the plots of time and memory against length")
    parser.add_argument("--from", dest="from_json", type=Path, help="measure nothing: print and draw this JSON")
    return parser


if __name__ == "__main__":
    main()
