"""Laws of BlockLayout: what each pattern is, and that rows, columns, masks and clips tell one story."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_kernels import BlockLayout

NUMS = [0, 1, 2, 3, 7, 8, 16, 21]


def by_rule(num: int, rule) -> torch.Tensor:
    return torch.tensor([[bool(rule(i, j)) for j in range(num)] for i in range(num)], dtype=torch.bool).view(num, num)


@st.composite
def masks(draw) -> torch.Tensor:
    patterns, num = draw(st.integers(1, 3)), draw(st.integers(0, 9))
    bits = draw(st.lists(st.booleans(), min_size=patterns * num * num, max_size=patterns * num * num))
    return torch.tensor(bits, dtype=torch.bool).view(patterns, num, num)


def rebuilt_from_columns(layout: BlockLayout) -> torch.Tensor:
    num = layout.num_blocks
    mask = torch.zeros(layout.num_patterns, num, num, dtype=torch.bool)
    for line in range(layout.num_patterns * num):
        rows = layout.row_idx[layout.col_ptr[line] : layout.col_ptr[line + 1]].long()
        assert torch.equal(rows, rows.sort().values)
        mask[line // num, rows, line % num] = True
    return mask


@pytest.mark.parametrize("num", NUMS)
def test_patterns_are_what_they_say(num):
    length = num * 64
    power_of_two = lambda x: x > 0 and x & (x - 1) == 0  # noqa: E731
    expected = {
        BlockLayout.butterfly(length): lambda i, j: i == j or power_of_two(i ^ j),
        BlockLayout.dense(length): lambda i, j: True,
        BlockLayout.local(length, 2): lambda i, j: abs(i - j) <= 2,
        BlockLayout.local(length, 0): lambda i, j: i == j,
        BlockLayout.local(length, 99): lambda i, j: True,
        BlockLayout.local_global(length, 1, 2): lambda i, j: abs(i - j) <= 1 or i < 2 or j < 2,
        BlockLayout.stripes(length, 3): lambda i, j: (i - j) % 3 == 0,
        BlockLayout.stripes(length, 1): lambda i, j: True,
    }
    for layout, rule in expected.items():
        assert torch.equal(layout.to_mask()[0], by_rule(num, rule)), layout


@settings(max_examples=100, deadline=None)
@given(masks())
def test_a_mask_survives_the_round_trip(mask):
    layout = BlockLayout.from_mask(mask, 32)
    assert torch.equal(layout.to_mask(), mask)
    assert BlockLayout.from_mask(layout.to_mask(), 32) == layout


@settings(max_examples=100, deadline=None)
@given(masks())
def test_columns_are_the_transpose_of_rows(mask):
    layout = BlockLayout.from_mask(mask, 32)
    assert torch.equal(rebuilt_from_columns(layout), mask)
    turned = BlockLayout.from_mask(mask.transpose(1, 2), 32)
    assert torch.equal(turned.row_ptr, layout.col_ptr)
    assert torch.equal(turned.col_idx, layout.row_idx)


@settings(max_examples=100, deadline=None)
@given(masks(), st.data())
def test_clipping_cuts_the_mask(mask, data):
    layout = BlockLayout.from_mask(mask, 32)
    length = data.draw(st.integers(0, layout.length))
    num = -(-length // 32)
    clipped = layout.clip(length)
    assert torch.equal(clipped.to_mask(), mask[:, :num, :num])
    assert clipped.clip(length) == clipped
    assert layout.clip(layout.length) == layout


@settings(max_examples=50, deadline=None)
@given(masks())
def test_density_is_the_mean_of_the_mask(mask):
    if mask.numel():
        assert BlockLayout.from_mask(mask, 32).density == pytest.approx(float(mask.double().mean()))


def test_density_of_a_butterfly_is_known():
    assert BlockLayout.butterfly(16 * 64).density == 5 / 16
    assert BlockLayout.dense(100).density == 1.0
    assert BlockLayout.dense(0).density == 0.0


def test_heads_follow_their_patterns():
    layouts = [BlockLayout.local(640, 1), BlockLayout.butterfly(640)]
    joined = BlockLayout.per_head(layouts, [1, 0, 1])
    assert joined.head_to_pattern.tolist() == [1, 0, 1]
    assert torch.equal(joined.to_mask(), torch.cat([layout.to_mask() for layout in layouts]))
    assert joined.density == pytest.approx((2 * layouts[1].density + layouts[0].density) / 3)
    assert joined.clip(320).head_to_pattern.tolist() == [1, 0, 1]


@settings(max_examples=50, deadline=None)
@given(masks(), st.integers(0, 4))
def test_a_global_end_fills_the_last_rows_and_columns_of_the_mask(mask, last):
    layout = BlockLayout.from_mask(mask, 32)
    want = mask.clone()
    if last:
        want[:, -last:], want[:, :, -last:] = True, True
    assert torch.equal(layout.with_global_end(last).to_mask(), want)
    assert layout.with_global_end(0) == layout


def test_equality_sees_everything_that_matters():
    layout = BlockLayout.local(640, 1)
    assert layout == BlockLayout.local(640, 1)
    assert hash(layout) == hash(BlockLayout.local(640, 1))
    others = [BlockLayout.local(640, 2), BlockLayout.local(639, 1), BlockLayout.local(1280, 1, 128), "local"]
    others.append(BlockLayout.per_head([layout], [0, 0]))
    assert all(layout != other for other in others)


def test_a_layout_is_frozen_and_readable():
    layout = BlockLayout.butterfly(1000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.block_size = 32  # type: ignore[misc]
    assert repr(layout) == (
        "BlockLayout(length=1000, block_size=64, num_blocks=16, patterns=1 for all heads, density=0.3125, device=cpu)"
    )


def test_moving_to_the_same_device_copies_nothing():
    layout = BlockLayout.butterfly(1000)
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == moved.row_idx.device.type == "meta"


def test_a_long_layout_takes_memory_in_proportion_to_its_blocks():
    layout = BlockLayout.butterfly(2**20, 64)
    assert len(layout.col_idx) == 2**14 * 15
    assert layout.row_ptr.dtype == layout.col_idx.dtype == layout.col_ptr.dtype == layout.row_idx.dtype == torch.int32


BAD = [
    (lambda: BlockLayout.butterfly(100, 48), "block_size"),
    (lambda: BlockLayout.butterfly(100, 0), "block_size"),
    (lambda: BlockLayout.dense(-1), "length"),
    (lambda: BlockLayout.local(100, -1), "window"),
    (lambda: BlockLayout.local_global(100, 1, -1), "num_global"),
    (lambda: BlockLayout.dense(100).with_global_end(-1), "num_global"),
    (lambda: BlockLayout.stripes(100, 0), "stride"),
    (lambda: BlockLayout.from_mask(torch.ones(2, 3, dtype=torch.bool), 64), "block_mask"),
    (lambda: BlockLayout.from_mask(torch.ones(2, 2), 64), "block_mask"),
    (lambda: BlockLayout.from_mask([[True]], 64), "block_mask must be bool .* got list"),
    (lambda: BlockLayout.from_mask(torch.ones(0, 2, 2, dtype=torch.bool), 64), "block_mask"),
    (lambda: BlockLayout.per_head([], [0]), "layouts"),
    (lambda: BlockLayout.per_head([BlockLayout.dense(64)], [1]), "head_to_pattern"),
    (lambda: BlockLayout.per_head([BlockLayout.dense(64), BlockLayout.dense(65)], [0]), "layouts"),
    (lambda: BlockLayout.dense(100).clip(200), "length"),
]


@pytest.mark.parametrize(("make", "name"), BAD)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()
