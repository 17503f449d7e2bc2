"""Replays in the benchmark without a GPU: stand-ins for CUDA's graphs show what is recorded, noted and freed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attention_kernels import bench, bench_graphs
from attention_kernels.bench_cases import SETS, Case
from attention_kernels.bench_peers import Call, Method, make_methods, ours
from attention_kernels.bench_report import CaseReport, Report, Result, read_json, summary, table, write_json

CPU = torch.device("cpu")
NAMES = ["ours (tiled)", "SDPA math"]


class Replayed:
    """A graph that runs the call again, and counts how many graphs exist at once."""

    alive = 0

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        Replayed.alive += 1
        assert Replayed.alive == 1, "a graph was recorded before the last one was freed"

    def replay(self) -> None:
        self.call()

    def reset(self) -> None:
        Replayed.alive -= 1


def measure(monkeypatch: pytest.MonkeyPatch, record: Callable[..., object], **rule: object) -> CaseReport:
    """Return the results of two methods on a small case, recorded by `record`."""
    monkeypatch.setattr(bench_graphs, "record", record)
    methods = [method for method in make_methods(tiled=True) if method.name in NAMES]
    rule = {"dtype": torch.float32, "device": CPU, "seconds": 0.004, "rounds": 3} | rule
    return bench.measure_case(Case(2, 2, 40, 16), methods, graphs=True, **rule)


def test_replays_of_every_method_are_timed_beside_its_calls(monkeypatch):
    freed = []
    monkeypatch.setattr(bench, "free_memory", lambda device: freed.append(Replayed.alive))
    report = measure(monkeypatch, lambda call, device: Replayed(call))
    assert [r.method for r in report.results] == NAMES
    for result in report.results:
        assert result.status == "timed" and result.reason == result.graph_reason == ""
        assert all(ms > 0 for ms in (*result.times(), *result.times(graph=True)))
    assert report.ratios(graph=True)[0] == pytest.approx(
        report.results[1].forward_graph_ms / report.results[0].forward_graph_ms
    )
    # After each of two checks, then after each recording: two methods, two kinds, three rounds.
    assert freed == [0] * (2 + 12) and Replayed.alive == 0


def test_without_graphs_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(bench_graphs, "record", lambda call, device: pytest.fail("recorded"))
    rule = {"dtype": torch.float32, "device": CPU, "seconds": 0.004, "rounds": 1}
    (result,) = bench.measure_case(Case(2, 2, 40, 16), [Method("it", "other", ours)], **rule).results
    assert result.status == "timed" and result.times(graph=True) == (None, None)


def test_a_method_that_cannot_be_recorded_says_so_and_stays_timed(monkeypatch):
    tries = []

    def record(call, device):
        tries.append(call)
        # Of ours the second recording (forward + backward) fails; of SDPA both do.
        if len(tries) > 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return Replayed(call)

    report = measure(monkeypatch, record, rounds=1)
    mine, peer = report.results
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert mine.status == peer.status == "timed" and mine.both_ms > 0 and peer.both_ms > 0
    assert mine.forward_graph_ms > 0 and mine.both_graph_ms is None
    assert mine.graph_reason == f"forward + backward: {reason}"
    assert peer.times(graph=True) == (None, None)
    assert peer.graph_reason == f"forward: {reason}; forward + backward: {reason}"
    text = table(report, graphs=True)
    assert f"not in a CUDA graph: forward + backward: {reason}" in text
    assert f"not in a CUDA graph: forward: {reason}" in text
    assert "CUDA graph" not in table(report)
    assert report.ratios(graph=True) == (None, None) and None not in report.ratios()


def test_a_recording_that_fails_later_leaves_no_number_and_is_not_tried_again(monkeypatch):
    tries = []

    def record(call, device):
        tries.append(call)
        if len(tries) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Replayed(call)

    report = measure(monkeypatch, record)
    assert len(tries) == 8
    for result in report.results:
        assert result.times(graph=True) == (None, None) and None not in result.times()
        assert result.graph_reason == "forward: out of memory; forward + backward: out of memory"


def test_a_forward_without_a_backward_is_recorded_alone(monkeypatch):
    class Half(Call):
        def gradients(self):
            raise NotImplementedError("no backward here")

    def build(inputs, dropout):
        return Half(ours(inputs, dropout).forward, (inputs.q, inputs.k, inputs.v), inputs.dout)

    monkeypatch.setattr(bench_graphs, "record", lambda call, device: Replayed(call))
    rule = {"dtype": torch.float32, "device": CPU, "seconds": 0.004, "rounds": 1}
    (result,) = bench.measure_case(Case(2, 2, 40, 16), [Method("it", "other", build)], graphs=True, **rule).results
    assert result.forward_graph_ms > 0 and result.both_graph_ms is None
    assert result.status == "forward only" and result.graph_reason == ""


def finished() -> CaseReport:
    """Return a case in which cuDNN's calls are the fastest peer's and flash's replays are."""
    numbers = {"ours (cuda)": (1.0, 3.0, 0.5, 2.0), "SDPA flash": (2.0, 5.4, 0.8, 2.6), "SDPA cuDNN": (1.7, 6, 0.9, 3)}
    results = [
        Result(name, name.split()[0].lower(), "timed", "", a, b, 1 << 20, 1e-3, c, d)
        for name, (a, b, c, d) in numbers.items()
    ]
    return CaseReport(SETS["issue"][0], results)


def test_tables_show_replays_when_asked():
    report = finished()
    assert report.ratios(graph=True) == (pytest.approx(1.6), pytest.approx(1.3))
    assert report.best_peer(True).method == "SDPA cuDNN" and report.best_peer(True, graph=True).method == "SDPA flash"
    plain, asked = table(report).splitlines(), table(report, graphs=True).splitlines()
    head, rest = "method forward ms fwd+bwd ms", "TFLOP/s f+b peak MiB to ours"
    assert " ".join(plain[1].split()) == f"{head} {rest}"
    assert " ".join(asked[1].split()) == f"{head} graph fwd ms graph f+b ms {rest}"
    assert asked[2].split()[2:6] == ["1.000", "3.000", "0.500", "2.000"] and "0.500" not in plain[2]
    assert plain[-1] == asked[-1] and len(plain) == len(asked)
    header, rule, row = summary([report], graphs=True).splitlines()
    assert header.endswith("| ratio | floor | in CUDA graphs | to SDPA flash |")
    assert row.endswith("| 1.70 / 1.80 | 1.6 / 1.8 | 1.60 / 1.30 | 2.00 / 1.80 |")
    assert header.count("|") == rule.count("|") == row.count("|") == 8
    assert "graph" not in summary([report]).lower() and summary([report]).splitlines()[0].count("|") == 7


def test_replays_of_the_sweep_over_densities_count_times_the_density():
    case = Case(1, 2, 512, 16, contest="density", layout="random", block=64, row_blocks=2)
    mine = Result("ours (cuda)", "ours", forward_ms=1.0, forward_graph_ms=0.5, both_ms=1.0, both_graph_ms=0.5)
    dense = Result("ours, dense", "other", forward_ms=4.0, forward_graph_ms=4.0, both_ms=8.0, both_graph_ms=8.0)
    report = CaseReport(case, [mine, dense])
    assert report.ratios() == (1.0, 2.0) and report.ratios(graph=True) == (2.0, 4.0)


def saved(path: Path, graphs: bool) -> Path:
    """Write a result, as it was written before there were graphs unless `graphs`."""
    report = Report("now", [], {}, {"graphs": True} if graphs else {}, [finished()])
    report.cases[0].results[1].graph_reason = "forward: why"
    write_json(report, path)
    if not graphs:
        values = json.loads(path.read_text())
        for result in values["cases"][0]["results"]:
            for name in ("forward_graph_ms", "both_graph_ms", "graph_reason"):
                del result[name]
        path.write_text(json.dumps(values))
    else:
        assert read_json(path) == report
    return path


def test_a_saved_result_shows_what_it_was_asked_for(tmp_path, capsys):
    bench.main(["--from", str(saved(tmp_path / "new.json", True))])
    out = capsys.readouterr().out
    assert "graph fwd ms" in out and "1.60 / 1.30" in out and "not in a CUDA graph: forward: why" in out


def test_a_result_from_before_graphs_is_read(tmp_path, capsys):
    path = saved(tmp_path / "old.json", False)
    assert all(result.times(graph=True) == (None, None) for result in read_json(path).cases[0].results)
    bench.main(["--from", str(path)])
    assert "graph" not in capsys.readouterr().out.lower()
    bench.main(["--from", str(path), "--graphs"])
    out = capsys.readouterr().out
    assert "graph fwd ms" in out and "| 1.70 / 1.80 | 1.6 / 1.8 | - / - | 2.00 / 1.80 |" in out


def test_a_run_records_what_it_was_asked_for(tmp_path, monkeypatch):
    rule = ["--device", "cpu", "--dtype", "float32", "--seconds", "0.004", "--rounds", "1", "--shapes", "1x1x20x8"]
    bench.main([*rule, "--peers", "math", "--json", str(tmp_path / "without.json")])
    without = json.loads((tmp_path / "without.json").read_text())
    assert without["settings"]["graphs"] is False
    assert {(r["forward_graph_ms"], r["both_graph_ms"]) for r in without["cases"][0]["results"]} == {(None, None)}
    monkeypatch.setattr(bench_graphs, "record", lambda call, device: Replayed(call))
    monkeypatch.setattr(bench, "_device", lambda args: SimpleNamespace(type="cuda") if args.device is None else CPU)
    args = bench._parser("bench").parse_args([*rule, "--graphs", "--peers", "math"])
    report = bench._run(args, [])
    assert report.settings["graphs"] is True and report.cases[0].results[-1].both_graph_ms > 0


@pytest.mark.parametrize("command", ["module", "suite"])
def test_graphs_on_the_cpu_are_refused_with_cause_and_remedy(command, capsys):
    from lra.cli import main

    with pytest.raises(SystemExit) as left:
        if command == "module":
            bench.main(["--graphs", "--device", "cpu"])
        else:
            main(["bench", "attention", "--graphs", "--device", "cpu"])
    captured = capsys.readouterr()
    cause, remedy = captured.err.splitlines()
    assert left.value.code == 2 and captured.out == ""
    assert cause == "error: --graphs needs a CUDA GPU, and this run is on cpu."
    assert remedy == "  Leave --graphs out, or give --device a GPU."


class StandIn:
    """A graph that notes what is asked of it; `invalid` makes CUDA refuse at the end of the capture."""

    invalid, warns = False, False
    events: list[str] = []  # noqa: RUF012

    def capture_begin(self, pool: object) -> None:
        self.events.append("begin")

    def capture_end(self) -> None:
        import warnings

        self.events.append("end")
        if self.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if self.warns:
            warnings.warn("The CUDA Graph is empty. This usually means another stream.", stacklevel=1)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for CUDA; return what happens."""
    for name, value in {"events": [], "invalid": False, "warns": False}.items():
        monkeypatch.setattr(StandIn, name, value)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": StandIn, "Stream": lambda device: stream, "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(), "synchronize": lambda device: StandIn.events.append("wait"),
        "graph_pool_handle": lambda: (0, 1),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(bench_graphs, "_side_stream", lambda device: stream)
    monkeypatch.setattr(bench_graphs, "_clean_up", lambda pool, device: StandIn.events.append("clean up"))
    return StandIn.events


def test_a_call_is_warmed_up_and_recorded_once(events):
    graph = bench_graphs.record(lambda: events.append("call"), CPU)
    assert isinstance(graph, StandIn) and events == [*["call"] * 3, "wait", "begin", "call", "end"]


@pytest.mark.parametrize("invalid", [False, True])
def test_a_call_that_fails_while_recorded_ends_the_capture_and_says_why(events, monkeypatch, invalid):
    monkeypatch.setattr(StandIn, "invalid", invalid)

    def call() -> None:
        if "begin" in events:
            raise RuntimeError("it reads a tensor on the host")

    with pytest.raises(RuntimeError, match="reads a tensor on the host"):
        bench_graphs.record(call, CPU)
    assert events == ["wait", "begin", "end", *(["clean up"] if invalid else [])]


def test_a_capture_that_is_invalid_at_its_end_is_cleaned_up(events, monkeypatch):
    monkeypatch.setattr(StandIn, "invalid", True)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        bench_graphs.record(lambda: None, CPU)
    assert events == ["wait", "begin", "end", "clean up"]


def test_an_empty_recording_is_an_error(events, monkeypatch):
    monkeypatch.setattr(StandIn, "warns", True)
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        bench_graphs.record(lambda: None, CPU)
