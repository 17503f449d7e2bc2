"""Block-sparse attention on the CUDA kernels: against float64 under the mask, against flash, what it must not read."""

from itertools import product

import pytest
import torch
from torch import Tensor

import attention_kernels as ak
from attention_kernels import BlockLayout
from attention_kernels.kernel_plan import plan
from tests.gpu.cases import SEED, Guard, Rule, complaints, ours
from tests.gpu.random_cases import Drawn
from tests.gpu.sparse_cases import KINDS, Pattern, check, make_layout, make_sparse, poison

CASES, LAYOUTS = 1000, 200
ITEMS = 40  # so that test workers share them evenly


@pytest.mark.parametrize("item", range(ITEMS))
def test_random_cases(item: int, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(monkeypatch)
    with ak.using("cuda"):
        wrong = [text for number in range(item, CASES, ITEMS) for text in check(number, guard=guard)]
    assert not wrong, f"{len(wrong)} complaints\n" + "\n".join(wrong)
    assert ak.what_ran()["sparse_forward"].startswith("CUDA kernel")


@pytest.mark.parametrize("item", range(LAYOUTS // 10))
def test_random_layouts(item: int) -> None:
    wrong = []
    for number in range(item * 10, item * 10 + 10):
        rng = torch.Generator().manual_seed(number)
        length, dim, kind, holes = (int(torch.randint(0, n, (), generator=rng)) for n in (1500, 5, len(KINDS), 4))
        pattern = Pattern(KINDS[kind], (64, 128)[number % 2], number % 3, float(torch.rand((), generator=rng)), holes)
        drawn = Drawn(number, "fixed", (length + 1,), (length + 1,), heads=3, head_dim=(16, 32, 64, 96, 128)[dim])
        case = make_sparse(drawn, make_layout(pattern, length + 1, drawn.heads, number))
        with ak.using("cuda"):
            wrong += [f"{number} {pattern} {drawn}: {text}" for text in complaints(case, Rule(bool(number & 4)))]
    assert not wrong, "\n".join(wrong)


def _all_but_the_last(length: int, block_size: int) -> BlockLayout:
    """Return every block that the length reaches, and an empty one beyond: the dense kernels do not take it."""
    num = -(-length // block_size) + 1
    mask = torch.ones(num, num, dtype=torch.bool)
    mask[-1] = mask[:, -1] = False
    return BlockLayout.from_mask(mask, block_size)


def _sums_as_dense(family: str, head_dim: int, block_size: int, causal: bool, dropout: bool) -> bool:
    """Whether both forwards sum in the same order and from the same reference.

    A stage must have equally many keys; and where two groups share a list, both settle their references anew at a tile
    of which one sees only part.
    """
    dense, sparse = (
        plan("forward", head_dim, "bfloat16", dropout, hopper=family != "generic", sparse=block)
        for block in (0, block_size)
    )
    return dense.tiles.tile == sparse.tiles.tile and not (causal and sparse.tiles.one_list)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
@pytest.mark.parametrize("block_size", [64, 128])
def test_a_dense_layout_gives_flash_attentions_bits(family: str, block_size: int, head_dim: int) -> None:
    torch.manual_seed(head_dim)
    for length, causal, dropout_p in product((1, 64, 130, 700), (False, True), (0.0, 0.1)):
        q, k, v = (torch.randn(2, length, 2, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        rule = {"causal": causal, "dropout_p": dropout_p, "dropout_seed": torch.tensor(SEED, device="cuda")}
        rule |= {"key_lengths": torch.tensor([length, length // 2], device="cuda"), "return_lse": True}
        layouts = [BlockLayout.dense(length + 64, block_size)]
        if _sums_as_dense(family, head_dim, block_size, causal, dropout_p > 0):
            layouts.append(_all_but_the_last(length, block_size))
        dense = ak.flash_attention(q, k, v, **rule)
        cu = torch.tensor([0, length, 2 * length], dtype=torch.int32, device="cuda")
        packed = [x.flatten(0, 1) for x in (q, k, v)]
        out = ak.flash_attention_varlen(*packed, cu, cu, length, length, causal=causal)
        for layout in (one.to(q.device) for one in layouts):
            sparse = ak.block_sparse_attention(q, k, v, layout, **rule)
            said = (family, length, causal, dropout_p, layout)
            assert all(torch.equal(a, b) for a, b in zip(sparse, dense, strict=True)), said
            if dropout_p == 0.0:
                same = ak.block_sparse_attention_varlen(*packed, layout, cu, length, causal=causal)
                assert torch.equal(out, same), (*said, "packed")


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 96, 128])
@pytest.mark.parametrize("block_size", [64, 128])
def test_what_no_block_reaches_is_not_read(family: str, block_size: int, head_dim: int) -> None:
    for number, causal in product(range(6), (False, True)):
        drawn = Drawn(number, "packed", (700, 1, 260), (700, 1, 260), tail=(9, 9), heads=3, head_dim=head_dim)
        layout = make_layout(Pattern("per head", block_size, 0, 0.2, 2), 700, 3, number)
        case, rule = make_sparse(drawn, layout), Rule(causal, 0.1)
        clean = poison(case, causal)
        for more in ({"deterministic": True}, {}):
            wanted, found = ours(clean, rule, **more), ours(case, rule, **more)
            pairs = list(zip(found, wanted, strict=True))
            if not more:  # dq's last bits vary there
                a, b = pairs.pop(1)
                assert a.isfinite().all() and (a - b).abs().max() <= 0.02 * b.abs().max() + 1e-3
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs), (family, number, causal, more)
            assert all(x.isfinite().all() for x, _ in pairs[:-1])


@pytest.mark.parametrize("head_dim", [16, 32, 64, 96, 128])
def test_outputs_lie_between_untouched_guard_bands(family: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(monkeypatch)
    drawn = Drawn(1, "packed", (63, 0, 200, 129), (63, 0, 200, 129), tail=(5, 5), head_dim=head_dim)
    for block_size, causal, deterministic in product((64, 128), (False, True), (False, True)):
        layout = make_layout(Pattern("random", block_size, 1, 0.3, 1), 200, 2, 5)
        found = ours(make_sparse(drawn, layout), Rule(causal, 0.1), deterministic=deterministic)
        assert not any(x.isnan().any() for x in found), f"{family}: an element was not written, or a NaN was read"
        assert guard.intact()


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 96, 128])
@pytest.mark.parametrize("block_size", [64, 128])
def test_100_repeats_give_the_same_bits(family: str, block_size: int, head_dim: int) -> None:
    drawn = Drawn(3, "packed", (700, 300), (700, 300), heads=4, head_dim=head_dim)
    case = make_sparse(drawn, make_layout(Pattern("per head", block_size, 0, 0.4, 1), 700, 4, 3))
    first, exact = ours(case, Rule(True, 0.1)), ours(case, Rule(True, 0.1), deterministic=True)
    for _ in range(100):
        again = ours(case, Rule(True, 0.1))
        assert all(torch.equal(again[i], first[i]) for i in (0, 2, 3, 4)), family  # all but dq, summed by atomics
        again = ours(case, Rule(True, 0.1), deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(again, exact, strict=True)), family


def test_nothing_to_see_gives_zero_and_minus_infinity(family: str) -> None:
    q, k, v = (torch.randn(2, 200, 2, 32, device="cuda", dtype=torch.float16).requires_grad_() for _ in range(3))
    layout = BlockLayout.from_mask(torch.zeros(4, 4, dtype=torch.bool), 64).to(q.device)
    out, lse = ak.block_sparse_attention(q, k, v, layout, return_lse=True)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert lse.isneginf().all() and all((x == 0).all() for x in (out, *grads)), family


def test_a_sequence_longer_than_was_said_stays_inside_the_layout(family: str) -> None:
    q = torch.randn(900, 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cu = torch.tensor([0, 800, 900], dtype=torch.int32, device="cuda")
    layout = BlockLayout.butterfly(130, 64).to(q.device)
    for offsets in (cu, cu - 50, cu.flip(0)):
        ak.block_sparse_attention_varlen(q, q, q, layout, offsets, 130).sum().backward()
    torch.cuda.synchronize()


def test_in_a_cuda_graph_without_waiting(family: str) -> None:
    data = [torch.randn(1, 500, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    layout = BlockLayout.butterfly(500).to(data[0].device)

    def step() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in data[:3]]
        out = ak.block_sparse_attention(*leaves, layout, deterministic=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, data[3])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    data[0].copy_(torch.randn_like(data[0]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True)), family


def test_compiled_in_one_graph_with_gradients(family: str) -> None:
    q, k, v = (torch.randn(2, 300, 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    layout = BlockLayout.local(300, window=1).to(q.device)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (2 * ak.block_sparse_attention(q * 0.5, k, v, layout, causal=True)).float().square().sum()

    wanted = torch.autograd.grad(loss(q, k, v), (q, k, v))
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, msg=lambda m: f"{family}: {m}")


def test_memory_is_that_of_the_dense_call_and_the_lists(family: str) -> None:
    q, k, v, dout = (torch.randn(1, 65_536, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    layout = BlockLayout.butterfly(65_536).to(q.device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(ak.block_sparse_attention(*leaves, layout), leaves, dout)
    one, rows = q.numel() * 2, q.numel() // 32
    # out and three gradients; lse and two statistics; float32 sums of dq.
    assert torch.cuda.max_memory_allocated() - before <= 4 * one + 12 * rows + 128 * rows + 2**16, family
    assert all(x.isfinite().all() for x in grads)
    assert sum(x.numel() for x in (layout.row_ptr, layout.col_idx, layout.col_ptr, layout.row_idx)) < 2**15


def test_wrong_layouts_are_refused_before_any_launch(family: str) -> None:
    q = torch.randn(1, 200, 2, 32, device="cuda", dtype=torch.bfloat16)
    wrong = {
        "layout must be at least as long as q's length 200": BlockLayout.dense(128).to(q.device),
        "layout must be on q's device cuda": BlockLayout.dense(200),
        "layout must be for 2 heads": BlockLayout.from_mask(torch.ones(3, 4, 4, dtype=torch.bool), 64).to(q.device),
        "layout has blocks of 96; the kernels take 64 and 128": BlockLayout.dense(200, 96).to(q.device),
    }
    for message, layout in wrong.items():
        with pytest.raises(ValueError, match=message):
            ak.block_sparse_attention(q, q, q, layout)
    with pytest.raises(ValueError, match="block_mask must be bool"):
        BlockLayout.from_mask(torch.ones(4, 4, device="cuda"), 64)
    assert ak.why_not(q, q, q, layout=BlockLayout.dense(200).to(q.device)) is None, family
