"""The benchmark on a GPU: peers agree with our kernels, and what cannot run says why. No test asserts a time."""

import pytest
import torch

from attention_kernels import bench, bench_graphs
from attention_kernels.bench_cases import Case
from attention_kernels.bench_peers import make_methods


@pytest.mark.parametrize(
    ("case", "timed"),
    [
        (Case(2, 2, 300, 32), ["SDPA math", "SDPA flash", "SDPA mem-efficient", "FlexAttention"]),
        (Case(2, 2, 300, 64, dropout=0.1), ["SDPA math", "SDPA flash", "SDPA mem-efficient"]),
        (Case(4, 2, 900, 32, packed=True), ["SDPA math", "SDPA mem-efficient", "torch varlen"]),
    ],
)
def test_peers_agree_with_our_kernels_and_are_timed(case: Case, timed: list[str]) -> None:
    rule = {"dtype": torch.bfloat16, "device": torch.device("cuda"), "seconds": 0.03, "rounds": 1}
    report = bench.measure_case(case, make_methods(tiled=True), **rule)
    results = {result.method: result for result in report.results}
    for name in ("ours (cuda)", "ours (tiled)", *timed):
        result = results[name]
        assert result.status == "timed", result
        assert result.forward_ms > 0 and result.both_ms > 0 and result.peak_bytes > 0
    assert all(result.status == "timed" or result.reason for result in report.results)
    assert all(result.status != "wrong" for result in report.results), report.results


def read_on_the_host(x: torch.Tensor) -> None:
    """Do work that no CUDA graph can hold."""
    (x * 2).sum().item()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_replays_are_timed_and_what_cannot_be_recorded_says_so() -> None:
    """The tiled form reads packed offsets on the host; what comes after its broken capture is recorded all the same."""
    case, device = Case(4, 2, 900, 32, packed=True), torch.device("cuda")
    rule = {"dtype": torch.bfloat16, "device": device, "seconds": 0.03, "rounds": 2, "graphs": True}
    report = bench.measure_case(case, make_methods(tiled=True), **rule)
    results = {result.method: result for result in report.results}
    for name in ("ours (cuda)", "SDPA math", "SDPA mem-efficient"):
        assert results[name].graph_reason == "" and min(results[name].times(graph=True)) > 0, results[name]
    for result in report.results:
        recorded = [ms is not None for ms in result.times(graph=True)]
        assert result.status != "timed" or all(recorded) == (result.graph_reason == ""), result
    tiled = results["ours (tiled)"]
    assert tiled.status == "timed" and tiled.times(graph=True) == (None, None) and tiled.graph_reason, tiled
    assert report.ratios(graph=True) == (None, None) or min(report.ratios(graph=True)) > 0

    # 64 MiB each: a pool that stayed would be seen, whether its recording worked or broke.
    x = torch.ones(32 << 20, device=device, dtype=torch.bfloat16)
    sizes = []
    for _ in range(3):
        assert bench_graphs.time_graph(lambda: x * 2, device, 5.0) > 0
        with pytest.raises(RuntimeError):
            bench_graphs.record(lambda: read_on_the_host(x), device)
        bench_graphs.free_memory(device)
        sizes.append(torch.cuda.memory_reserved(device))
    assert sizes[-1] - sizes[0] < 32 << 20

    found: list[torch.Tensor] = []
    graph = bench_graphs.record(lambda: found.append(x * 2), device)
    x.fill_(5)
    graph.replay()
    assert found[-1].eq(10).all()
