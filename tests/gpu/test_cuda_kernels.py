"""The CUDA kernels against float64 and against PyTorch in the same dtype, over shapes, dtypes, lengths and dropout."""

from collections.abc import Callable, Iterator
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

import attention_kernels as ak
from attention_kernels import cuda_ops, philox
from tests.gpu.cases import NAN, SEED, Case, Guard, Rule, complaints, ours

LENGTHS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257, 520]
HEAD_DIMS = [8, 16, 24, 32, 40, 64, 80, 96, 128]
KINDS = ["full", "cross", "ragged", "packed"]
DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _only_the_kernels() -> Iterator[None]:
    with ak.using("cuda"):
        yield
    assert ak.what_ran()["flash_forward"].startswith("CUDA kernel")


def make(kind: str, length: int, head_dim: int, dtype: torch.dtype, heads: int = 2) -> Case:
    torch.manual_seed(length * 1000 + head_dim)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, heads, head_dim, device="cuda").to(dtype)

    if kind == "packed":
        return packed(random, [length, 0, length // 2 + 1, 1], [length // 3 + 1, 5, length, 0])
    k_length = length if kind != "cross" else 2 * length // 3 + 5
    batch = 3
    tensors = [random(batch * length), random(batch * k_length), random(batch * k_length), random(batch * length)]
    lengths = [k_length] * batch if kind != "ragged" else [k_length, k_length // 2, 0]
    for x in tensors[1:3]:
        for b, n in enumerate(lengths):
            x[b * k_length + n : (b + 1) * k_length] = NAN
    key_lengths = torch.tensor(lengths, device="cuda") if kind == "ragged" else None

    def call(q: Tensor, k: Tensor, v: Tensor, **more: object) -> tuple[Tensor, Tensor]:
        q, k, v = (x.unflatten(0, (batch, -1)) for x in (q, k, v))
        out, lse = ak.flash_attention(q, k, v, key_lengths=key_lengths, return_lse=True, **more)
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    q_ranges = [(b * length, (b + 1) * length) for b in range(batch)]
    k_ranges = [(b * k_length, b * k_length + n) for b, n in enumerate(lengths)]
    dlse = torch.randn(heads, batch * length, device="cuda")
    return Case(tensors, dlse, q_ranges, k_ranges, [k_length - length] * batch, call)


def packed(random: Callable[[int], Tensor], q_lengths: list[int], k_lengths: list[int]) -> Case:
    tail = 7
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int().tolist() for n in (q_lengths, k_lengths))
    rows = [n + tail for n in (cu_q[-1], cu_k[-1])]
    tensors = [random(rows[0]), random(rows[1]), random(rows[1]), random(rows[0])]
    for x, end in zip(tensors, (cu_q[-1], cu_k[-1], cu_k[-1], cu_q[-1]), strict=True):
        x[end:] = NAN
    on_gpu = [torch.tensor(c, dtype=torch.int32, device="cuda") for c in (cu_q, cu_k)]
    bounds = [max(n) + 100 for n in (q_lengths, k_lengths)]

    def call(q: Tensor, k: Tensor, v: Tensor, **more: object) -> tuple[Tensor, Tensor]:
        return ak.flash_attention_varlen(q, k, v, *on_gpu, *bounds, return_lse=True, **more)

    pairs = [list(pairwise(c)) for c in (cu_q, cu_k)]
    offsets = [k - q for q, k in zip(q_lengths, k_lengths, strict=True)]
    dlse = torch.randn(tensors[0].shape[1], rows[0], device="cuda")
    return Case(tensors, dlse, pairs[0], pairs[1], offsets, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_error_is_at_most_pytorchs_own_times_2_and_3(head_dim: int, kind: str, dtype: torch.dtype) -> None:
    wrong = []
    for length, causal, dropout_p in product(LENGTHS, (False, True), (0.0, 0.1)):
        for text in complaints(make(kind, length, head_dim, dtype), Rule(causal, dropout_p)):
            wrong.append(f"length {length} causal {causal} dropout {dropout_p}: {text}")
    assert not wrong, f"{len(wrong)} complaints\n" + "\n".join(wrong[:12])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_thousands_of_keys_and_heavy_dropout(head_dim: int, dtype: torch.dtype) -> None:
    wrong = []
    for kind, causal, dropout_p in product(("full", "packed"), (False, True), (0.0, 0.6)):
        for text in complaints(make(kind, 2049, head_dim, dtype), Rule(causal, dropout_p)):
            wrong.append(f"{kind} causal {causal} dropout {dropout_p}: {text}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0, 3.0])
def test_any_softmax_scale(scale: float) -> None:
    assert complaints(make("full", 200, 32, torch.bfloat16), Rule(scale=scale)) == []


@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
def test_outputs_lie_between_untouched_guard_bands(family: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(monkeypatch)
    for kind, length, causal in product(KINDS, (1, 63, 200), (False, True)):
        found = ours(make(kind, length, head_dim, torch.bfloat16), Rule(causal, 0.1))
        assert not any(x.isnan().any() for x in found), (
            f"{kind} {length}: an element was not written, or a NaN was read"
        )
    assert guard.intact()


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 96, 128])
@pytest.mark.parametrize(
    ("kind", "length", "causal", "dropout_p"),
    [("packed", 700, True, 0.0), ("packed", 700, True, 0.1), ("full", 2049, False, 0.1), ("ragged", 300, False, 0.0)],
)
def test_250_repeats_give_the_same_bits(
    family: str, kind: str, length: int, causal: bool, dropout_p: float, head_dim: int
) -> None:
    case, rule = make(kind, length, head_dim, torch.bfloat16, heads=8), Rule(causal, dropout_p)
    first, exact = ours(case, rule), ours(case, rule, deterministic=True)
    for _ in range(250):
        again = ours(case, rule)
        for i in (0, 2, 3, 4):  # all but dq, whose sums have no fixed order
            assert torch.equal(again[i].nan_to_num(), first[i].nan_to_num())
        again = ours(case, rule, deterministic=True)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(again, exact, strict=True))


def test_dropout_mask_is_the_python_one_bit_for_bit(family: str) -> None:
    # Equal scores and values of one: out is the kept share of a row; the gradient of v names the kept rows of a column.
    length, dim = 96, 32
    q = torch.zeros(1, length, 1, dim, device="cuda", dtype=torch.float16)
    v = torch.zeros_like(q).requires_grad_()
    seed = torch.tensor(SEED, device="cuda")
    count = philox.drop_count(0.3)
    zero = torch.tensor([0], device="cuda")
    keep = philox.keep_mask(seed, count, zero, zero, (0, length), (0, length))[0, 0].float()
    for start in range(0, length, dim):
        one_hot = torch.zeros_like(q)
        rows = torch.arange(dim, device="cuda")
        one_hot[0, start + rows, 0, rows] = 1.0
        out = ak.flash_attention(q, q, one_hot, dropout_p=0.3, dropout_seed=seed)
        assert torch.equal((out[0, :, 0] > 0).float(), keep[:, start : start + dim])
        made = ak.flash_attention(q, q, v, dropout_p=0.3, dropout_seed=seed)
        (grad,) = torch.autograd.grad(made, v, one_hot)
        assert torch.equal((grad[0, :, 0] > 0).float(), keep[start : start + dim].t())


@pytest.mark.parametrize("head_dim", [16, 32, 40, 64])
def test_a_fused_projection_is_read_in_place(family: str, head_dim: int) -> None:
    fused = torch.randn(2, 130, 3, 4, head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = fused.unbind(2)
    assert all(cuda_ops.readable(x) is x for x in (q, k, v))
    plain = ak.flash_attention(*(x.contiguous() for x in (q, k, v)), causal=True)
    assert torch.equal(ak.flash_attention(q, k, v, causal=True), plain)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(ak.flash_attention(*heads_first, causal=True), plain)


@pytest.mark.parametrize("head_dim", [4, 20, 33])
def test_other_head_dims_and_odd_storage_are_copied(head_dim: int) -> None:
    assert complaints(make("full", 70, head_dim, torch.float16), Rule(True)) == []
    odd = torch.randn(1 + 2 * 50 * 32, device="cuda", dtype=torch.float16)[1:].view(1, 50, 2, 32)
    assert torch.equal(ak.flash_attention(odd, odd, odd), ak.flash_attention(*(odd.clone() for _ in range(3))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64])
def test_extreme_scores(head_dim: int, dtype: torch.dtype) -> None:
    case = make("full", 300, head_dim, dtype)
    q, k, v, dout = case.tensors
    ramp = torch.linspace(-8, 8, len(k), device="cuda").view(-1, 1, 1).to(dtype)
    for name, changed in {
        "one-hot rows": (q * 30, k),
        "ever larger keys": (q.abs(), k + ramp),
        "all equal": (q * 0, k),
        "tiny": (q * 1e-6, k * 1e-2),
    }.items():
        assert complaints(case._replace(tensors=[*changed, v, dout]), Rule(dropout_p=0.1)) == [], name
    largest = torch.finfo(torch.float16).max / head_dim
    out, lse = case.call(q.sign() * 100, k.sign() * largest, v)
    assert out.isfinite().all() and lse.isfinite().all()


def test_on_a_second_stream_and_in_a_cuda_graph() -> None:
    data = [torch.randn(2, 300, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

    def step() -> list[Tensor]:
        # Why new leaves: a leaf's gradient belongs to the stream it was first used on.
        leaves = [x.detach().requires_grad_() for x in data[:3]]
        out = ak.flash_attention(*leaves, deterministic=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, data[3])]

    def agree(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    expected = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            found = step()
    torch.cuda.current_stream().wait_stream(side)
    assert agree(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    data[0].copy_(torch.randn_like(data[0]))
    graph.replay()
    assert agree(found, step()) and not torch.equal(found[0], expected[0])


def test_compiled_in_one_graph_with_gradients() -> None:
    q, k, v = (torch.randn(2, 100, 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (2 * ak.flash_attention(q * 0.5, k, v, causal=True)).float().square().sum()

    wanted = torch.autograd.grad(loss(q, k, v), (q, k, v))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_wild_offsets_stay_inside_the_buffers(family: str) -> None:
    q = torch.randn(100, 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for offsets in ([0, 2**31 - 1, 5, 90], [-50, 300, 20, 100], [90, 60, 30, 0]):
        cu = torch.tensor(offsets, dtype=torch.int32, device="cuda")
        ak.flash_attention_varlen(q, q, q, cu, cu, 100, 100).sum().backward()
    torch.cuda.synchronize()


def test_offsets_beyond_two_to_the_31(family: str) -> None:
    # 4.3e9 elements in one tensor, 8.6 GB each.
    q = torch.zeros(2, 65_536, 256, 128, device="cuda", dtype=torch.bfloat16)
    q[1, -200:, -1] = torch.randn(200, 128, device="cuda", dtype=torch.bfloat16)
    cu = torch.tensor([0, 131_072 - 200, 131_072], dtype=torch.int32, device="cuda")
    packed = q.flatten(0, 1)[:, -1:]
    out = ak.flash_attention_varlen(packed, packed, packed, cu, cu, 131_072, 131_072)[-200:]
    small = q[1, -200:, -1:].clone()[None]
    torch.testing.assert_close(out[None], ak.flash_attention(small, small, small))
