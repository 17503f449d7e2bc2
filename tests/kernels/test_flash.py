"""flash_attention against the reference in float64: values, lse and all gradients."""

import pytest
import torch

from attention_kernels import (
    flash_attention,
    flash_attention_varlen,
    groups,
    reference_attention,
    standard,
    standard_attention,
)
from attention_kernels.reference import reference_forward
from tests.kernels.cases import (
    SEED,
    answer,
    assert_close,
    cotangents,
    factors_of,
    inputs,
    offsets,
    packed_reference,
)

LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 129, 257]


@pytest.fixture(params=[None, 4096], ids=["budget", "small-tiles"])
def tiles(request, monkeypatch):
    """Run with the shipped tiles, and with tiles so small that every case crosses their borders."""
    if request.param is not None:
        monkeypatch.setattr(groups, "_SCORES_CPU", request.param)


def compare_fixed(q, k, v, **rule):
    rule["dropout_seed"] = SEED
    wanted = answer(lambda *x: reference_attention(*x, **rule), q, k, v)
    assert_close(answer(lambda *x: flash_attention(*x, return_lse=True, **rule), q, k, v), wanted)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_self_attention(tiles, length, causal, dropout_p):
    compare_fixed(*inputs((2, length, 3, 8), (2, length, 3, 8)), causal=causal, dropout_p=dropout_p)


@pytest.mark.parametrize(("q_length", "k_length"), [(1, 70), (70, 1), (33, 130), (130, 33), (5, 0), (0, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention(tiles, q_length, k_length, causal):
    compare_fixed(*inputs((2, q_length, 2, 4), (2, k_length, 2, 4)), causal=causal, dropout_p=0.1)


@pytest.mark.parametrize("lengths", [[0, 0, 0], [70, 70, 70], [1, 0, 70], [69, 35, 2]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_key_lengths(tiles, lengths, causal, dropout_p, dtype):
    key_lengths = torch.tensor(lengths, dtype=dtype)
    q, k, v = inputs((3, 65, 2, 8), (3, 70, 2, 8))
    compare_fixed(q, k, v, causal=causal, dropout_p=dropout_p, key_lengths=key_lengths)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, -0.3, 5.0])
def test_softmax_scale(scale):
    compare_fixed(*inputs((1, 40, 2, 8), (1, 40, 2, 8)), softmax_scale=scale)


@pytest.mark.parametrize("dim", [1, 3, 4, 8, 32, 64, 128, 160])
def test_head_dims(dim):
    compare_fixed(*inputs((1, 33, 2, dim), (1, 33, 2, dim)), dropout_p=0.1)


def test_long_rows_cross_many_shipped_tiles():
    compare_fixed(*inputs((1, 1100, 1, 4), (1, 1300, 1, 4)), causal=True, dropout_p=0.1)


PACKS = [
    ([5], [5]),
    ([], []),
    ([0, 3, 0], [0, 3, 0]),
    ([1, 64, 17, 130], [1, 64, 17, 130]),
    ([40, 40, 40, 40], [40, 40, 40, 40]),
    ([65, 3, 30], [12, 0, 70]),
    ([0, 9, 9], [9, 0, 9]),
    ([1, 30], [70, 40]),
]


@pytest.mark.parametrize(("q_lengths", "k_lengths"), PACKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("spare", [0, 7])
def test_packed_sequences(tiles, q_lengths, k_lengths, causal, dropout_p, spare):
    q, k, v = inputs((sum(q_lengths) + spare, 2, 8), (sum(k_lengths) + spare, 2, 8))
    wanted = packed_reference(q, k, v, q_lengths, k_lengths, causal=causal, dropout_p=dropout_p)
    maxima = (max(q_lengths, default=0) + spare, max(k_lengths, default=0) + spare)
    rule = {"causal": causal, "dropout_p": dropout_p, "dropout_seed": SEED, "return_lse": True}
    numbers = (offsets(q_lengths), offsets(k_lengths), *maxima)
    assert_close(answer(lambda *x: flash_attention_varlen(*x, *numbers, **rule), q, k, v), wanted)


def test_packed_equals_fixed_bit_for_bit_without_padding():
    q, k, v = inputs((3, 50, 2, 8), (3, 50, 2, 8), torch.float32)
    rule = {"dropout_p": 0.1, "dropout_seed": SEED, "return_lse": True}
    fixed, lse = flash_attention(q, k, v, **rule)
    cu_seqlens = offsets([50, 50, 50])
    flat = (x.flatten(0, 1) for x in (q, k, v))
    packed, packed_lse = flash_attention_varlen(*flat, cu_seqlens, cu_seqlens, 50, 50, **rule)
    assert torch.equal(packed, fixed.flatten(0, 1))
    assert torch.equal(packed_lse, lse.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("heads", [1, 3])
def test_views_of_a_fused_projection(heads):
    qkv = inputs((2, 40, 3, heads, 8), (1,))[0]
    wanted = answer(reference_attention, *(x.contiguous() for x in qkv.unbind(2)))
    leaf = qkv.clone().requires_grad_()
    out, lse = flash_attention(*leaf.unbind(2), return_lse=True)
    (grad,) = torch.autograd.grad((out, lse), leaf, cotangents(out, lse))
    torch.testing.assert_close(grad, torch.stack(wanted[2:], 2), rtol=1e-10, atol=1e-10)
    assert torch.equal(leaf.detach(), qkv)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (1, 0, 2, 3), (3, 1, 2, 0)])
def test_permuted_strides_and_odd_offsets(order):
    q, k, v = inputs((2, 20, 2, 20), (2, 20, 2, 20))
    wanted = answer(reference_attention, q, k, v)
    strided = []
    for x in (q, k, v):
        storage = torch.empty([x.shape[d] for d in order] + [3], dtype=x.dtype)[..., 1]
        strided.append(storage.permute(*[order.index(d) for d in range(4)]).copy_(x))
    copies = [x.clone() for x in strided]
    assert_close(answer(lambda *x: flash_attention(*x, return_lse=True), *strided), wanted)
    assert all(torch.equal(x, its) for x, its in zip(strided, copies, strict=True))


def test_one_tensor_as_query_key_and_value():
    x = inputs((2, 30, 1, 8), (1,))[0].requires_grad_()
    (mine,) = torch.autograd.grad(flash_attention(x, x, x).square().sum(), x)
    (its,) = torch.autograd.grad(reference_attention(x, x, x)[0].square().sum(), x)
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_lse_alone():
    q, k, v = (x.requires_grad_() for x in inputs((2, 30, 2, 8), (2, 30, 2, 8)))
    mine = torch.autograd.grad(flash_attention(q, k, v, return_lse=True)[1].square().sum(), (q, k, v))
    its = torch.autograd.grad(reference_attention(q, k, v)[1].square().sum(), (q, k, v))
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


def test_forward_and_backward_draw_one_mask():
    """With one-hot values the output shows the weights; with a one-hot gradient dv shows them again."""
    q, k, _ = inputs((1, 48, 1, 8), (1, 64, 1, 8))
    v = torch.eye(64, dtype=torch.float64)[None, :, None, :].requires_grad_()
    out = flash_attention(
        torch.nn.functional.pad(q, (0, 56)), torch.nn.functional.pad(k, (0, 56)), v, dropout_p=0.4, dropout_seed=SEED
    )
    forward = out[0, :, 0] != 0
    (dv,) = torch.autograd.grad(out, v, torch.eye(48, 64, dtype=torch.float64)[None, :, None, :])
    assert torch.equal(dv[0, :, 0, :48].t() != 0, forward)
    assert torch.equal(forward, factors_of(0, 1, 48, 64, 0.4)[0, 0] != 0)
    assert 0.5 < float(forward.double().mean()) < 0.7


def test_standard_attention_with_torchs_dropout_is_softmax_attention_with_it():
    q, k, v = (torch.randn(2, 40, 3, 8, dtype=torch.float64) for _ in range(3))
    torch.manual_seed(5)
    out = standard_attention(q, k, v, dropout_p=0.25, torch_dropout=True)
    weights = torch.einsum("bihd,bjhd->bhij", q, k).mul(8**-0.5).softmax(-1)
    torch.manual_seed(5)
    kept = torch.nn.functional.dropout(weights, 0.25)
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", kept, v))
    with pytest.raises(ValueError, match="dropout_seed must be None with torch_dropout"):
        standard_attention(q, k, v, dropout_p=0.25, torch_dropout=True, dropout_seed=torch.tensor([1, 2]))


def test_standard_attention_draws_the_same_mask():
    q, k, v = inputs((2, 50, 2, 8), (2, 70, 2, 8))
    rule = {"dropout_p": 0.3, "dropout_seed": SEED, "causal": True, "key_lengths": torch.tensor([70, 20])}
    wanted = answer(lambda *x: reference_attention(*x, **rule), q, k, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = standard_attention(*leaves, **rule)
    torch.testing.assert_close(out, wanted.out, rtol=1e-12, atol=1e-12)
    mine = torch.autograd.grad(out, leaves, cotangents(wanted.out, wanted.lse)[0])
    its = torch.autograd.grad(reference_attention(*leaves, **rule)[0], leaves, cotangents(wanted.out, wanted.lse)[0])
    torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("key_lengths", [None, [41, 0]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 40, 41, 47])
def test_rows_of_standard_scores_begin_at_multiples_of_8(monkeypatch, length, causal, key_lengths):
    q, k, v = inputs((2, 41, 2, 8), (2, length, 2, 8))
    lengths = None if key_lengths is None else torch.tensor(key_lengths).clamp(max=length)
    rule = {"causal": causal, "key_lengths": lengths}
    wanted = answer(lambda *x: reference_attention(*x, **rule), q, k, v)
    softmax, seen = standard._softmax, []
    monkeypatch.setattr(standard, "_softmax", lambda s, visible: seen.append(s.shape[-1]) or softmax(s, visible))
    out = standard_attention(q, k, v, **rule)
    assert seen == [-(-length // 8) * 8]
    torch.testing.assert_close(out, wanted.out, rtol=1e-12, atol=1e-12)


def test_a_seed_is_drawn_from_torchs_generator():
    q, k, v = inputs((1, 40, 1, 8), (1, 40, 1, 8), torch.float32)
    torch.manual_seed(5)
    first, second = (flash_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(flash_attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)


def test_the_mean_over_seeds_approaches_attention_without_dropout():
    q, k, v = inputs((1, 4, 1, 4), (1, 9, 1, 4))
    seeds = torch.stack([torch.arange(4000), torch.arange(4000) * 7], 1)
    mean = torch.stack([flash_attention(q, k, v, dropout_p=0.3, dropout_seed=seed) for seed in seeds[:500]]).mean(0)
    wanted, _ = reference_forward(q, k, v, 0.5, None, None)
    torch.testing.assert_close(mean, wanted, rtol=0, atol=0.15)
