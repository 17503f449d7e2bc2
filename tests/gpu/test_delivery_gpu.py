"""The kernels where people run them: compiled, captured, on streams, in threads and processes; memory and extremes."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import attention_kernels as ak
from attention_kernels import BlockLayout, compiler, families, launcher
from attention_kernels.bench_cases import Case as Shape
from attention_kernels.kernel_plan import Plan
from tests.gpu.cases import SEED

OPS = torch.ops.attention_kernels
# Why: dynamo itself makes an autograd.Function object, which torch warns about.
through_dynamo = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def randoms(count: int, *shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> list[Tensor]:
    torch.manual_seed(sum(shape))
    return [torch.randn(*shape).to(device, dtype) for _ in range(count)]


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")


def step(data: list[Tensor], **rule: object) -> list[Tensor]:
    """Return out, dq, dk, dv of a fixed batch; the last of `data` is the gradient of out."""
    # Why new leaves: a leaf's gradient belongs to the stream it was first used on.
    leaves = [x.detach().requires_grad_() for x in data[:3]]
    out = ak.flash_attention(*leaves, **rule)
    return [out.detach(), *torch.autograd.grad(out, leaves, data[3])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def operator_calls() -> list[tuple[object, tuple[object, ...]]]:
    """Return (operator, arguments) of the four operators, fixed and packed, with every optional tensor once."""
    calls: list[tuple[object, tuple[object, ...]]] = []
    for shape in [(2, 70, 2, 16), (70, 2, 16)]:
        q, k, v = randoms(3, *shape, dtype=torch.float16)
        cu, lengths = (None, torch.tensor([70, 3], device="cuda")) if len(shape) == 4 else (offsets(50, 15), None)
        layout = BlockLayout.butterfly(128, 64).to(q.device)
        blocks = (layout.row_ptr, layout.col_idx, layout.col_ptr, layout.row_idx, layout.head_to_pattern, 2, 64)
        rule = (torch.tensor(SEED, device="cuda"), 0.2, 0.3, True)
        for name, form in (("flash", (lengths, cu, cu, 70, 70)), ("sparse", (*blocks, lengths, cu, 70))):
            forward = getattr(OPS, f"{name}_forward")
            out, lse = forward(q, k, v, *form, *rule)
            calls.append((forward, (q, k, v, *form, *rule)))
            saved = (q, k, v, out, lse, torch.ones_like(out), torch.ones_like(lse))
            calls.append((getattr(OPS, f"{name}_backward"), (*saved, *form, *rule, True)))
    return calls


@pytest.mark.parametrize("number", range(8))
@through_dynamo
def test_opcheck(number: int) -> None:
    operator, arguments = operator_calls()[number]
    results = torch.library.opcheck(operator.default, arguments)  # type: ignore[attr-defined]
    assert set(results.values()) == {"SUCCESS"}


def test_a_family_asked_for_is_the_one_that_runs(family: families.Family, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launch = launcher.launch

    def noting(plan: Plan, *rest: Any) -> None:
        launched.append(plan.source)
        launch(plan, *rest)

    monkeypatch.setattr(launcher, "launch", noting)
    step(randoms(4, 2, 200, 2, 64))
    assert any(name.startswith(f"{family}_") for name in launched), launched
    assert family == "hopper" or not any(name.startswith("hopper_") for name in launched), launched


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current_one(family: families.Family) -> None:
    data = randoms(4, 2, 150, 2, 32)
    expected = step(data, deterministic=True)
    torch.cuda.set_device(0)
    moved = [x.to("cuda:1") for x in data]
    assert same([x.to("cuda:0") for x in step(moved, deterministic=True)], expected)
    with torch.cuda.stream(torch.cuda.Stream("cuda:1")):
        found = step(moved, deterministic=True)
    torch.cuda.synchronize("cuda:1")
    assert same([x.to("cuda:0") for x in found], expected)


def test_many_threads_and_streams_at_once_from_the_first_call_on(family: families.Family) -> None:
    shapes = [(2, 130 + 40 * i, 2, 16 << (i % 4)) for i in range(8)]
    inputs = [randoms(4, *shape) for shape in shapes]
    expected = [step(data, deterministic=True) for data in inputs]
    torch.cuda.synchronize()
    launcher._ready.clear()
    launcher._loaded.cache_clear()
    launcher._kernel.cache_clear()
    wrong = []

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = [step(inputs[number], deterministic=True) for _ in range(20)]
        stream.synchronize()
        if not all(same(one, expected[number]) for one in found):
            wrong.append(shapes[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_cuda_graph_follows_its_inputs_lengths_and_seeds(family: families.Family) -> None:
    q, k, v, dout = randoms(4, 300, 2, 32)
    cu, seed = offsets(100, 200), torch.tensor(SEED, device="cuda")

    def packed() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        rule = {"dropout_p": 0.3, "dropout_seed": seed, "causal": True, "deterministic": True}
        out = ak.flash_attention_varlen(*leaves, cu, cu, 300, 300, **rule)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    for _ in range(2):
        packed()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = packed()
    first = None
    for lengths, shift in (((100, 200), 0), ((299, 1), 0), ((40, 60), 0), ((40, 60), 1)):
        q.copy_(torch.randn_like(q))
        cu.copy_(offsets(*lengths))
        seed.add_(shift)
        graph.replay()
        assert same(captured, packed()), lengths
        assert first is None or not torch.equal(captured[0], first)
        first = captured[0].clone()


def test_a_captured_call_draws_a_new_seed_at_each_replay(family: families.Family) -> None:
    q, k, v, _ = randoms(4, 2, 200, 2, 32)
    ak.flash_attention(q, k, v, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ak.flash_attention(q, k, v, dropout_p=0.5)
    graph.replay()
    before = out.clone()
    graph.replay()
    assert not torch.equal(out, before)


def test_autocast_lowers_float32_inputs_and_gradients_come_back_in_float32(family: families.Family) -> None:
    data = randoms(4, 2, 90, 2, 32, dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for x in data[:3]]
    with torch.autocast("cuda", torch.bfloat16):
        out = ak.flash_attention(*leaves, deterministic=True)
    grads = torch.autograd.grad(out.float(), leaves, data[3])
    expected = step([x.bfloat16() for x in data], deterministic=True)
    assert out.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in grads)
    assert same([out.detach(), *(x.bfloat16() for x in grads)], expected)


@through_dynamo
def test_compiled_once_for_packed_batches_of_any_length(family: families.Family) -> None:
    torch._dynamo.reset()

    def loss(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int) -> Tensor:
        out = ak.flash_attention_varlen(q * 0.5, k, v, cu, cu, longest, longest, causal=True, deterministic=True)
        return out.float().square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for lengths in ([100, 50], [30, 200, 65], [7, 7, 7, 400], [511, 90]):
        leaves = [x.requires_grad_() for x in randoms(3, sum(lengths), 2, 32)]
        arguments = (*leaves, offsets(*lengths), max(lengths))
        wanted = torch.autograd.grad(loss(*arguments), leaves)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = torch.autograd.grad(compiled(*arguments), leaves)
        for mine, its in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, its, rtol=2e-2, atol=2e-2)


_CHILDREN = """
import multiprocessing, sys, torch
import attention_kernels as ak

def attend(queue):
    try:
        q = torch.ones(1, 70, 1, 32, device="cuda", dtype=torch.float16)
        with ak.using("cuda"):
            queue.put(float(ak.flash_attention(q, q, q).float().sum()))
    except Exception as error:
        queue.put(f"{type(error).__name__}: {error}")

if __name__ == "__main__":
    for how in (None, "fork", "spawn"):
        context = multiprocessing.get_context(how or "spawn")
        queue = context.Queue()
        if how is None:
            attend(queue)
        else:
            child = context.Process(target=attend, args=(queue,))
            child.start()
        print(how, queue.get(timeout=60), flush=True)
"""


def test_a_forked_child_is_told_why_not_and_a_spawned_one_runs(tmp_path: Path) -> None:
    script = tmp_path / "children.py"
    script.write_text(_CHILDREN)
    # -W: Python warns of any fork beside threads.
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2], check=False
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["None"] == lines["spawn"] == "2240.0", done.stderr
    assert "RuntimeError" in lines["fork"] and "spawn" in lines["fork"], lines


def test_a_failed_build_says_so_and_the_next_call_builds(
    family: families.Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTENTION_KERNELS_CACHE", str(tmp_path / "kernels"))
    launcher._ready.clear()
    launcher._loaded.cache_clear()
    launcher._kernel.cache_clear()
    q, k, v, _ = randoms(4, 1, 40, 1, 32)
    crashed = subprocess.CompletedProcess([], -11, stdout="", stderr="")
    with monkeypatch.context() as broken:
        broken.setattr(subprocess, "run", lambda *a, **k: crashed)
        with pytest.raises(compiler.CompileError, match=r"crashed \(signal 11\)"):
            ak.flash_attention(q, k, v)
    assert ak.flash_attention(q, k, v).isfinite().all()
    assert list((tmp_path / "kernels").glob("*.cubin"))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_a_nan_stays_in_its_row_and_head(family: families.Family, head_dim: int) -> None:
    data = randoms(4, 1, 300, 2, head_dim)
    clean = step(data, deterministic=True)
    data[0][0, 137, 1] = float("nan")
    out, dq, dk, dv = found = step(data, deterministic=True)
    others = [i for i in range(300) if i != 137]
    for x, y in zip((out, dq), clean[:2], strict=True):
        assert x[0, 137, 1].isnan().all()
        torch.testing.assert_close(x[:, others], y[:, others], rtol=2e-2, atol=2e-2)
    assert dk[:, :, 1].isnan().all() and dv[:, :, 1].isnan().all()
    assert same([x[:, :, 0] for x in found], [x[:, :, 0] for x in clean])
    # By atomics too, dq of a row takes nothing from another row.
    assert step(data)[1][:, others].isfinite().all()


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("top", [1e4, -1e4])
def test_scores_of_ten_thousand(family: families.Family, head_dim: int, top: float) -> None:
    # The first column of q is one, so that of k shifts all scores alike: softmax does not change, lse does by as much.
    q, k, v, dout = randoms(4, 1, 400, 2, head_dim, dtype=torch.float16)
    q[..., 0], k[..., 0] = 1.0, 0.0
    plain = step([q, k, v, dout], softmax_scale=1.0, causal=True)
    moved = k.clone()
    moved[..., 0] = top
    found = step([q, moved, v, dout], softmax_scale=1.0, causal=True)
    # float32 holds a score of 10,000 to 1e-3, the sums of a product a little less, and so the weights.
    for i, (x, y) in enumerate(zip(found, plain, strict=True)):
        x, y = (t[..., 1:] if i == 1 else t for t in (x, y))  # dq's first column is summed from k's
        assert (x - y).abs().max() <= 2e-2 * y.abs().max() + 2e-3
    _, lse = ak.flash_attention(q, moved, v, softmax_scale=1.0, causal=True, return_lse=True)
    _, its = ak.flash_attention(q, k, v, softmax_scale=1.0, causal=True, return_lse=True)
    torch.testing.assert_close(lse - top, its, rtol=0, atol=2e-2)


def test_denormals_and_values_near_the_largest_float16(family: families.Family) -> None:
    q, k, v, _ = randoms(4, 1, 200, 2, 32, dtype=torch.float16)
    tiny = torch.full_like(v, 6e-8)
    assert torch.equal(ak.flash_attention(q, k, tiny), tiny)
    large = torch.full_like(v, 65_000.0)
    torch.testing.assert_close(ak.flash_attention(q, k, large), large, rtol=1e-3, atol=0)
    assert ak.flash_attention(q * 1e-7, k, v).isfinite().all()


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 8), (2, 32), (4, 64), (2, 128)])
def test_memory_is_linear_at_65536_tokens(family: families.Family, heads: int, head_dim: int) -> None:
    data = randoms(4, 1, 65_536, heads, head_dim)
    leaves = [x.requires_grad_() for x in data[:3]]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(ak.flash_attention(*leaves), leaves, data[3])
    used = torch.cuda.max_memory_allocated() - before
    # Output, gradients, 8 bytes a row a head, the float32 sums of dq. torch rounds each tensor up to 512 bytes.
    allowed = Shape(1, heads, 65_536, head_dim).memory_allowed()
    assert used <= allowed + 2**14, f"{used:,} bytes beside the inputs, {allowed:,} allowed"
    assert all(x.isfinite().all() for x in grads)


def test_no_memory_stays_behind(family: families.Family) -> None:
    data = randoms(4, 2, 500, 2, 64)
    step(data)
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        step(data, dropout_p=0.1)
    # Autograd's thread may let go of the last call's gradients a little later.
    end = time.monotonic() + 5
    while torch.cuda.memory_allocated() != before and time.monotonic() < end:
        time.sleep(0.01)
    assert torch.cuda.memory_allocated() == before


def test_more_than_two_to_the_31_elements_forward_and_backward(family: families.Family) -> None:
    # 131,172 rows of 128 heads of 128: 2.15e9 elements a tensor, 4.3 GB each, about 45 GB in all.
    rows, last = 131_172, 100
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free memory")
    q = torch.empty(rows, 128, 128, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    cu = torch.tensor([*range(0, rows - last, 64), rows - last, rows], dtype=torch.int32, device="cuda")
    out = ak.flash_attention_varlen(q, q, q, cu, cu, 128, 128, causal=True)
    (grad,) = torch.autograd.grad(out, q, q.detach())
    for part in (slice(0, 64), slice(rows - last, rows)):
        small = q.detach()[None, part].requires_grad_()
        expected = ak.flash_attention(small, small, small, causal=True)
        (its,) = torch.autograd.grad(expected, small, small.detach())
        torch.testing.assert_close(out[part], expected[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(grad[part], its[0], rtol=2e-2, atol=5e-2)
