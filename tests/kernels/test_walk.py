"""The block-sparse kernels' walk (csrc/common/walk.cuh), compiled for the host, against the layout's mask."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from attention_kernels import BlockLayout, compiler
from tests.kernels.cases import generator

STRETCH = 64
Numbers = list[int]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    built = tmp_path_factory.mktemp("walk") / "walk.so"
    source = Path(__file__).parent / "walk_host.cpp"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-pthread"]
    subprocess.run(["g++", *flags, f"-I{compiler.SOURCES}", str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))


class Walker:
    """A layout, a head and a pair of lengths, walked tile by tile."""

    def __init__(self, library: ctypes.CDLL, layout: BlockLayout, head: int, lengths: tuple[int, int], causal: bool):
        self.library, self.layout, self.causal = library, layout, causal
        self.q_len, self.k_len = lengths
        shared = len(layout.head_to_pattern) == 1
        self.pattern = int(layout.head_to_pattern[0 if shared else head])
        self.offset = self.k_len - self.q_len
        sizes = [layout.num_blocks, layout.block_size, 0 if shared else 1]
        self.numbers = [head, self.q_len, self.k_len, self.offset, int(causal), *sizes]

    def steps(self, lists: int, part: int, keys: bool, first: int) -> list[tuple[int, int]]:
        """Return (row, who) of each step; `keys` where the tile's rows are keys."""
        return self._run(self.library.run_walk, lists, part, keys, first, part)

    def warp_steps(self, lists: int, slack: int, keys: bool, first: int) -> list[tuple[int, int]]:
        """Return the same for a warp that walks, in parts of 64 rows; one list serves the rows of a whole block."""
        return self._run(self.library.run_warp_walk, lists, slack, keys, first, 64)

    def _run(
        self, walk: Callable[..., int], lists: int, number: int, keys: bool, first: int, part: int
    ) -> list[tuple[int, int]]:
        layout = self.layout
        blocks = (layout.col_ptr, layout.row_idx) if keys else (layout.row_ptr, layout.col_idx)
        room = lists * (layout.num_blocks + 1) * max(1, layout.block_size // part) + 1
        found = [(ctypes.c_int * room)(), (ctypes.c_int * room)()]
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*blocks, layout.head_to_pattern)]
        numbers = (ctypes.c_int * len(self.numbers))(*self.numbers)
        count = walk(lists, number, int(keys), first, numbers, *pointers, *found)
        assert 0 <= count < room
        return list(zip(found[0][:count], found[1][:count], strict=True))

    def wanted(self, part: int, keys: bool, own: int, stretch: int = STRETCH) -> Numbers:
        """Return the first rows of the parts that the `stretch` rows from `own` on must visit, ascending."""
        own_rows, rows = (self.k_len, self.q_len) if keys else (self.q_len, self.k_len)
        if own >= own_rows or own // self.layout.block_size >= self.layout.num_blocks:
            return []
        mask = self.layout.to_mask()[self.pattern]
        line = (mask[:, own // self.layout.block_size] if keys else mask[own // self.layout.block_size]).tolist()
        last = min(own + stretch, own_rows) - 1
        starts = [r for b, there in enumerate(line) if there for r in self.parts(b, part) if r < rows]
        if not self.causal:
            return starts
        if keys:
            return [r for r in starts if r + part > own - self.offset]
        return [r for r in starts if r <= last + self.offset]

    def parts(self, block: int, part: int) -> range:
        return range(block * self.layout.block_size, (block + 1) * self.layout.block_size, part)


def random_walker(library: ctypes.CDLL, number: int) -> Walker:
    rng = generator(number, 71)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=rng))  # noqa: E731
    block, heads, length = (64, 128)[draw(0, 2)], draw(1, 4), draw(1, 1400)
    num = max(1, -(-length // block) + draw(-1, 3))  # shorter than the sequence, too: kernels must stay inside
    mask = torch.rand(heads if draw(0, 2) else 1, num, num, generator=rng) < float(torch.rand((), generator=rng))
    if draw(0, 2):
        mask[:, draw(0, num)] = False
        mask[:, :, draw(0, num)] = False
    layout = BlockLayout.from_mask(mask, block)
    if len(mask) > 1 and draw(0, 2):
        picked = [draw(0, len(mask)) for _ in range(heads)]
        layout = BlockLayout.per_head([BlockLayout.from_mask(m, block) for m in mask], picked)
    k_len = (length, draw(0, length + 1), length + draw(0, 200))[draw(0, 3)]
    return Walker(library, layout, draw(0, heads), (length, k_len), bool(draw(0, 2)))


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_each_stretch_visits_its_own_visible_rows_once_and_in_order(library: ctypes.CDLL, start: int) -> None:
    for number in range(start, start + 50):
        walker = random_walker(library, number)
        for lists, part, keys in ((1, 64, False), (2, 32, True), (2, 64, False), (3, 64, True), (3, 32, False)):
            own_rows = walker.k_len if keys else walker.q_len
            for first in range(0, own_rows + STRETCH, lists * STRETCH):
                steps = walker.steps(lists, part, keys, first)
                for s in range(lists):
                    mine = [row for row, who in steps if who >> s & 1]
                    assert mine == walker.wanted(part, keys, first + s * STRETCH), (number, lists, part, keys, first, s)


@pytest.mark.parametrize("slack", [0, 2])
def test_a_warp_walks_the_same_rows(library: ctypes.CDLL, slack: int) -> None:
    for number in range(20):
        walker = random_walker(library, number)
        for lists, keys in ((2, False), (4, True)):
            for first in range(0, (walker.k_len if keys else walker.q_len) + STRETCH, lists * STRETCH):
                steps = walker.warp_steps(lists, slack, keys, first)
                assert lists != 2 or slack or steps == walker.steps(2, 64, keys, first)
                for s in range(lists):
                    mine = [row for row, who in steps if who >> s & 1]
                    assert mine == walker.wanted(64, keys, first + s * STRETCH), (number, lists, keys, first, s)


def test_one_list_serves_the_rows_of_a_whole_block(library: ctypes.CDLL) -> None:
    for number in range(60):
        walker = random_walker(library, number)
        block = walker.layout.block_size
        for keys in (False, True):
            for first in range(0, (walker.k_len if keys else walker.q_len) + block, block):
                steps = walker.warp_steps(1, 0, keys, first)
                assert steps == [(row, 1) for row in walker.wanted(64, keys, first, block)], (number, keys, first)


def test_slack_lets_stretches_meet_more_often(library: ctypes.CDLL) -> None:
    mask = torch.rand(16, 16, generator=generator(0, 72)) < 0.5
    walker = Walker(library, BlockLayout.from_mask(mask, 64), 0, (1024, 1024), False)
    strict, loose = (sum(len(walker.warp_steps(4, n, False, f)) for f in range(0, 1024, 256)) for n in (0, 2))
    assert loose < strict
    dense = Walker(library, BlockLayout.dense(1000, 64), 0, (1000, 1000), False)
    assert dense.warp_steps(4, 2, False, 0) == [(row, 15) for row in range(0, 1000, 64)]


def test_parts_as_large_as_a_block_of_128(library: ctypes.CDLL) -> None:
    walker = Walker(library, BlockLayout.butterfly(1500, 128), 0, (1500, 1300), False)
    for first in range(0, 1500, 128):
        steps = walker.steps(2, 128, False, first)
        assert [row for row, _ in steps] == walker.wanted(128, False, first)
        halves = 3 if first + STRETCH < 1500 else 1
        assert all(who == halves for _, who in steps)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("part", [32, 64])
@pytest.mark.parametrize("lists", [1, 2, 3])
def test_a_dense_layout_is_walked_from_the_first_row_to_the_last_by_all(
    library: ctypes.CDLL, lists: int, part: int, block: int
) -> None:
    walker = Walker(library, BlockLayout.dense(1000, block), 0, (1000, 1000), False)
    everyone = [(row, (1 << lists) - 1) for row in range(0, 1000, part)]
    assert walker.steps(lists, part, False, 0) == everyone
    assert walker.steps(lists, part, True, lists * STRETCH) == everyone


def test_stretches_with_different_lists_take_turns(library: ctypes.CDLL) -> None:
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[0, [2, 5, 7]] = True
    mask[1, [3, 5, 9]] = True
    walker = Walker(library, BlockLayout.from_mask(mask, 64), 0, (700, 700), False)
    assert walker.steps(2, 64, False, 0) == [(row * 64, who) for row, who in ((2, 1), (3, 2), (5, 3), (7, 1), (9, 2))]
    mask[1] = ~mask[0]
    steps = Walker(library, BlockLayout.from_mask(mask, 64), 0, (700, 700), False).steps(2, 32, False, 0)
    # Lists without a common row: until the shorter one ends, neither is ever more than a step ahead.
    assert all(a != b for (_, a), (_, b) in pairwise(steps[:12]))


def test_a_long_list_is_entered_in_its_middle(library: ctypes.CDLL) -> None:
    walker = Walker(library, BlockLayout.dense(64 * 900, 64), 0, (64 * 900, 64 * 900), True)
    assert walker.steps(1, 32, True, 64 * 700)[0] == (64 * 700, 1)
    assert walker.steps(2, 64, False, 64 * 898)[-1] == (64 * 899, 2)
