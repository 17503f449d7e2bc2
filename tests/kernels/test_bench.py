"""The benchmark's logic on the CPU: what is listed, what is refused, what is written. No test asserts a time."""

import importlib.machinery
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention_kernels import bench, bench_peers
from attention_kernels.bench_cases import SETS, Case, make_cases, make_inputs
from attention_kernels.bench_peers import Call, Method, Unsupported, make_methods, methods_of, ours
from attention_kernels.bench_report import CaseReport, Report, Result, draw, read_json, summary, table, write_json

CPU = torch.device("cpu")
SMALL = Case(2, 2, 40, 16)
NAMES = [method.name for method in make_methods(tiled=True)]
QUICK = ["--dtype", "float32", "--device", "cpu", "--seconds", "0.006", "--rounds", "1"]


def measure(build, case: Case = SMALL, rounds: int = 1) -> Result:
    """Return what the benchmark makes of one method."""
    report = bench.measure_case(
        case, [Method("it", "other", build)], dtype=torch.float32, device=CPU, seconds=0.004, rounds=rounds
    )
    return report.results[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """Run the whole benchmark once on three tiny cases; return its folder and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", str(folder / "new" / "r.json"), "--plots", str(folder / "plots")]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *a, **k: lines.append(" ".join(map(str, a))))
        bench.main(["--shapes", "2x2x40x16,1x2x64x16,3x2x900x8p", "--tiled", *QUICK, *files])
    return folder, "\n".join(lines)


def test_every_method_is_listed_with_a_time_or_a_reason(run):
    folder, out = run
    report = read_json(folder / "new" / "r.json")
    assert [case.case.name for case in report.cases] == ["2x2x40x16", "1x2x64x16", "3x2x900x8, packed"]
    for case in report.cases:
        results = {result.method: result for result in case.results}
        assert list(results) == NAMES
        for name in ("ours (tiled)", "SDPA math"):
            assert results[name].status == "timed" and results[name].forward_ms > 0 and results[name].both_ms > 0
            assert results[name].error < 1e-5
        for result in results.values():
            assert (result.status == "timed") == (result.reason == "") == (result.forward_ms is not None), result
        assert "CUDA" in results["ours (cuda)"].reason and results["ours (cuda)"].status == "failed"
        assert results["FlexAttention"].status == "unsupported"
        assert results["flash_attn"].reason == "flash_attn is not installed"
    for name in NAMES:
        assert out.count(f"  {name} ") == 3
    assert out.count("unsupported: flash_attn is not installed") == 3


def test_json_holds_where_and_how_and_comes_back_the_same(run, tmp_path):
    folder, _ = run
    values = json.loads((folder / "new" / "r.json").read_text())
    assert values["environment"]["torch"] == torch.__version__ and values["settings"]["dtype"] == "float32"
    assert "--shapes" in values["command"] and values["date"].endswith("+00:00")
    assert values["cases"][0]["ratios"][0] > 0 and values["cases"][2]["ratios"] == [None, None]
    assert [path.name for path in (folder / "new").iterdir()] == ["r.json"]
    report = read_json(folder / "new" / "r.json")
    report.cases.append(CaseReport(SETS["issue"][0], [], {"clocks.sm": 1980.0}))
    write_json(report, tmp_path / "again.json")
    assert read_json(tmp_path / "again.json") == report


def test_peers_are_chosen_by_words_of_their_names(capsys, tmp_path):
    shape = ["--device", "cpu", "--dtype", "float32", "--seconds", "0.01", "--rounds", "1", "--shapes", "1x1x20x8"]
    bench.main([*shape, "--peers", "math, Varlen", "--tiled", "--json", str(tmp_path / "r.json")])
    (case,) = read_json(tmp_path / "r.json").cases
    assert [r.method for r in case.results] == ["ours (cuda)", "ours (tiled)", "SDPA math", "torch varlen"]
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["kernels"] == "auto"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 9, "cases": []}'])
def test_another_file_is_no_result(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is no result"):
        read_json(tmp_path / "x.json")


def test_plots_of_time_and_memory_for_each_head_dim(run):
    names = sorted(path.name for path in (run[0] / "plots").iterdir())
    assert names == ["memory_d16.png", "memory_d8.png", "time_d16.png", "time_d8.png"]
    assert all((run[0] / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_plots_show_what_was_measured(tmp_path):
    cases = [
        CaseReport(case, [Result("a", "sdpa", both_ms=1e-5 * case.length**2, peak_bytes=case.length << 12)])
        for case in SETS["length"]
    ]
    paths = draw(cases, tmp_path)
    empty = draw([CaseReport(case, [Result("a", "sdpa", "failed")]) for case in SETS["length"]], tmp_path / "empty")
    assert [p.name for p in paths] == ["time_d64.png", "memory_d64.png"]
    assert all(full.read_bytes() != nothing.read_bytes() for full, nothing in zip(paths, empty, strict=True))


def scaled(what: str, factor: float):
    """Return a method whose output, or whose dv alone, is wrong by a factor."""

    class Wrong(Call):
        def gradients(self):
            dq, dk, dv = super().gradients()
            return dq, dk, dv * (factor if what == "dv" else 1)

    def build(inputs, dropout):
        right = ours(inputs, dropout)
        return Wrong(
            lambda: right.forward() * (factor if what == "the output" else 1),
            right.leaves,
            inputs.dout,
            right.canonical,
        )

    return build


@pytest.mark.parametrize("factor", [1.1, 0.0, float("nan")])
@pytest.mark.parametrize("what", ["the output", "dv"])
def test_a_wrong_method_is_marked_and_not_timed(what, factor):
    result = measure(scaled(what, factor))
    assert result.status == "wrong" and result.reason.startswith(f"{what} differs from ours by")
    assert result.forward_ms is None and result.both_ms is None
    assert measure(scaled(what, 1.0)).status == "timed"


def test_another_shape_is_wrong():
    def build(inputs, dropout):
        right = ours(inputs, dropout)
        return Call(lambda: right.forward()[:, :, 1:], right.leaves, inputs.dout)

    assert measure(build).status == "wrong"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("first line\nsecond"), "failed", "RuntimeError: first line"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "failed", "out of memory"),
        (Unsupported("has no dropout"), "unsupported", "has no dropout"),
        (AssertionError(), "failed", "AssertionError: AssertionError"),
    ],
)
def test_a_failure_is_listed_with_its_reason(error, status, reason):
    def build(inputs, dropout):
        raise error

    result = measure(build)
    assert (result.status, result.reason, result.forward_ms) == (status, reason, None)


def test_what_torch_warned_of_explains_no_available_kernel():
    def build(inputs, dropout):
        import warnings

        warnings.warn("Head dim must be larger. (Triggered internally at x.cpp:1.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    assert measure(build).reason.endswith("No available kernel. Aborting execution. Head dim must be larger.")


def test_without_a_backward_the_forward_is_timed():
    class Half(Call):
        def gradients(self):
            raise NotImplementedError("no backward here")

    def build(inputs, dropout):
        return Half(ours(inputs, dropout).forward, (inputs.q, inputs.k, inputs.v), inputs.dout)

    result = measure(build)
    assert result.status == "forward only" and "no backward here" in result.reason
    assert result.forward_ms is not None and result.both_ms is None


def test_a_failure_while_timed_leaves_no_number():
    calls = []

    def build(inputs, dropout):
        right = ours(inputs, dropout)

        def forward():
            calls.append(1)
            if len(calls) > 8:
                raise RuntimeError("gone")
            return right.forward()

        return Call(forward, right.leaves, inputs.dout)

    result = measure(build, rounds=20)
    assert (result.status, result.reason) == ("failed", "while timed: RuntimeError: gone")
    assert result.forward_ms is None and result.both_ms is None


def test_dropout_that_drops_nothing_or_too_much_is_wrong():
    case = replace(SMALL, dropout=0.1)
    assert measure(ours, case).status == "timed"
    for rate in (0.0, 0.5):
        result = measure(lambda inputs, p, rate=rate: ours(inputs, rate if p else 0.0), case)
        assert result.status == "wrong" and "dropout 0.1" in result.reason


def test_without_a_reference_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(bench, "ours", lambda inputs, p: 1 / 0)
    result = measure(ours)
    assert result.status == "failed" and "ours, the reference, failed: ZeroDivisionError" in result.reason


def test_after_the_limit_cases_are_listed_as_not_run(capsys):
    bench.main(["--shapes", "1x1x8x8,1x1x16x8", "--limit", "-1", *QUICK])
    out = capsys.readouterr().out
    assert out.count("not run: --limit -1 seconds were over") == 2 * (len(NAMES) - 1)


def timed(method: str, group: str, forward: float, both: float) -> Result:
    return Result(method, group, forward_ms=forward, both_ms=both)


def test_floors_are_measured_against_the_right_peer():
    results = [
        timed("ours (cuda)", "ours", 1.0, 3.0),
        timed("SDPA flash", "sdpa", 2.0, 5.4),
        timed("SDPA cuDNN", "sdpa", 1.7, 6.0),
        timed("torch varlen", "other", 1.5, 4.5),
        timed("flash_attn", "other", 1.1, 3.3),
    ]
    dense = CaseReport(SETS["issue"][0], results, {"clocks.sm": 1980.0}, {"clocks.sm": 1965.0})
    assert dense.ratios() == (1.7, pytest.approx(1.8)) and dense.flash_ratios() == (2.0, pytest.approx(1.8))
    assert CaseReport(SETS["dropout"][0], results).ratios() == (1.1, pytest.approx(1.1))
    assert CaseReport(SETS["varlen"][0], results).ratios() == (1.5, 1.5)
    text = table(dense)
    assert "forward: SDPA cuDNN takes 1.70x our time (floor 1.6 reached, aim 2)" in text
    assert "SM clock 1980 to 1965 MHz" in text
    results[1].both_ms = 5.3
    assert "SDPA flash takes 1.77x our time (floor 1.8 NOT reached, aim 2.5)" in table(dense)
    peers = "1.700 / 5.300 (SDPA cuDNN, SDPA flash)"
    row = f"| 512x4x1024x8 | 1.000 / 3.000 | {peers} | 1.70 / 1.77 | 1.6 / 1.8 | 2.00 / 1.77 |"
    assert summary([dense]).splitlines()[2] == row
    assert CaseReport(SETS["issue"][0], results[1:]).ratios() == (None, None)


def test_the_sets_of_cases():
    assert {name: len(cases) for name, cases in SETS.items()} == {
        "paper": 12, "issue": 14, "dropout": 3, "varlen": 2, "length": 8, "sparse": 40, "flex": 2, "runtime": 10,
    }  # fmt: skip
    assert all(case.floor and case.aim for name in ("issue", "dropout", "varlen") for case in SETS[name])
    assert [case.length for case in SETS["length"]] == [512 << i for i in range(8)]
    assert make_cases("dropout,8x2x100x32p") == [*SETS["dropout"], Case(8, 2, 100, 32, packed=True)]
    changed = make_cases("issue", 0.2, causal=True)
    assert all((c.dropout, c.causal, c.floor) == (0.2, True, None) for c in changed)
    lengths = SETS["varlen"][0].lengths()
    assert len(lengths) == 32 and max(lengths) <= 4096 and 0.2 < sum(lengths) / (32 * 4096) < 0.45
    assert Case(2, 3, 10, 8).flops() == 4 * 2 * 3 * 100 * 8
    assert Case(1, 1, 65536, 32).memory_allowed() == 65536 * (4 * 2 * 32 + 8 + 4 * 32)


def test_random_layouts_have_equally_many_blocks_in_every_row_and_column():
    for case in SETS["sparse"]:
        if case.length == 16384:
            mask = case.blocks.to_mask()[0]
            assert (mask.sum(0) == case.row_blocks).all() and (mask.sum(1) == case.row_blocks).all()
            assert case.density == case.row_blocks / (case.length // case.block) and "random 1/" in case.name
    floors = {(c.block, c.row_blocks): c.floor[0] for c in SETS["sparse"]}
    assert floors[128, 16] == 0.85 and floors[128, 8] == 0.7 and floors[64, 128] == 0.6
    assert SETS["flex"][0].density == pytest.approx(0.07, abs=0.01)


SPARSE = Case(1, 2, 512, 16, contest="density", layout="random", block=64, row_blocks=2, floor=(0.6, 0.6), aim=(1, 1))


@pytest.mark.parametrize("contest", ["density", "flex", "runtime"])
def test_block_sparse_cases_and_the_runtime_table(contest, tmp_path):
    case = replace(SPARSE, contest=contest) if contest != "runtime" else Case(1, 2, 512, 16, contest=contest)
    rule = {"dtype": torch.float32, "device": CPU, "seconds": 0.004, "rounds": 1}
    report = bench.measure_case(case, methods_of(case, tiled=True), **rule)
    results = {result.method: result for result in report.results}
    timed = {"ours (tiled)", {"density": "ours, dense", "flex": "ours, dense", "runtime": "standard"}[contest]}
    assert all(results[name].status == "timed" for name in timed) and results["ours (cuda)"].status == "failed"
    if contest == "flex":
        assert "CUDA GPUs only" in results["FlexAttention"].reason and report.ratios() == (None, None)
    if contest == "density":
        dense, ours_ = results["ours, dense"], results["ours (tiled)"]
        assert report.ratios() == pytest.approx(
            (dense.forward_ms / ours_.forward_ms / 4, dense.both_ms / ours_.both_ms / 4)
        )
        assert dense.error is None and "ours, dense x density 0.25 takes" in table(report)
    if contest == "runtime":
        assert results["block-sparse butterfly"].status == "timed" and report.ratios()[0] > 0
    whole = Report("now", [], {}, {}, [report])
    write_json(whole, tmp_path / "r.json")
    assert read_json(tmp_path / "r.json") == whole and case.name in summary(whole.cases)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shapes", "isue"], "'isue' is neither"),
        (["--shapes", "2x2x0x8"], "2x2x0x8"),
        (["--dropout", "1"], "dropout must lie in"),
        (["--seconds", "0"], "--seconds"),
        (["--from", "nowhere.json"], "nowhere.json"),
        (["--nonsense"], "--nonsense"),
        (["--shapes", "issue", "--plots", "p"], "only cases with the same heads"),
    ],
)
def test_a_mistake_leaves_with_2_cause_and_remedy(capsys, arguments, words):
    with pytest.raises(SystemExit) as left:
        bench.main(arguments)
    err = capsys.readouterr().err
    assert left.value.code == 2 and words in err and err.startswith("error: ") and err.count("\n") == 2


def test_the_command_line_prints_and_draws_a_saved_result(run, tmp_path, capsys):
    from lra.cli import main

    with pytest.raises(SystemExit) as left:
        main(["bench", "attention", "--from", str(run[0] / "new" / "r.json"), "--plots", str(tmp_path / "p")])
    out = capsys.readouterr().out
    assert left.value.code == 0 and "3x2x900x8, packed" in out and (tmp_path / "p" / "time_d8.png").exists()


def fake_flash_attn(monkeypatch) -> None:
    """Install a package flash_attn that computes by our attention."""
    from attention_kernels import flash_attention, flash_attention_varlen

    package = types.ModuleType("flash_attn")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attention, flash_attention_varlen
    monkeypatch.setitem(sys.modules, "flash_attn", package)


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attn_is_called_with_its_own_layouts(monkeypatch, packed):
    fake_flash_attn(monkeypatch)
    result = measure(bench_peers._flash_attn, replace(SMALL, packed=packed, length=600))
    assert result.status == "timed" and result.error < 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packed", [False, True])
def test_flex_attention_computes_the_same(monkeypatch, packed):
    monkeypatch.setattr(bench_peers, "_on_gpu", lambda inputs: True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    inputs = make_inputs(replace(SMALL, packed=packed, length=600), torch.float32, CPU)
    inputs = replace(inputs, q=inputs.q.detach(), k=inputs.k.detach(), v=inputs.v.detach())
    with torch.no_grad():
        mine, its = ours(inputs, 0.0).forward(), bench_peers._flex(inputs, 0.0).forward()
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


def test_flex_attention_takes_the_layout():
    from torch.nn.attention.flex_attention import BlockMask

    for case in (replace(SPARSE, block=128, row_blocks=2), Case(1, 1, 2000, 8, layout="band")):
        listed = bench_peers._flex_blocks(case.blocks, BlockMask)
        assert torch.equal(listed.to_dense()[0, 0] > 0, case.blocks.to_mask()[0])
        assert listed.BLOCK_SIZE == (128, 128) and (listed.kv_num_blocks == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_causal_peers_agree(causal):
    methods = [m for m in make_methods(tiled=True) if m.name in ("ours (tiled)", "SDPA math")]
    rule = {"dtype": torch.float32, "device": CPU, "seconds": 0.002, "rounds": 1}
    report = bench.measure_case(replace(SMALL, causal=causal), methods, **rule)
    assert [result.status for result in report.results] == ["timed", "timed"]


def test_scores_that_do_not_fit_are_refused_with_the_sizes():
    assert measure(make_methods()[1].build).status == "timed"
    inputs = make_inputs(Case(1, 1, 20000, 1), torch.float32, CPU)
    with pytest.raises(Unsupported, match="need about 7 GiB and 4 GiB are free"):
        make_methods()[1].build(inputs, 0.0)


def test_a_report_needs_no_cases():
    assert summary(Report("now", [], {}, {}).cases).count("\n") == 1
