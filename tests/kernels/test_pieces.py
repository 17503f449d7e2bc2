"""How the Hopper backward's keys are cut into pieces of two sizes, and which block takes which."""

import random
from collections import Counter

import pytest

from attention_kernels import pieces
from attention_kernels.pieces import GROUP, Cut, cut, makespan, taker

SHAPES = [(1024, 512), (2048, 128), (4096, 64), (16384, 16), (65536, 2), (8192, 32), (1024, 20000), (70, 3), (1, 1)]


def keys_of(one: Cut, keys: int, rows: int) -> list[int]:
    """Return the keys of all pieces of a head, as find_keys (csrc/common/backward_stages.cuh) has them."""
    spans = [(i * rows, (i + 1) * rows) for i in range(one.tiles)]
    begin = one.tiles * rows
    spans += [(begin + i * one.part, begin + (i + 1) * one.part) for i in range(one.parts)]
    return [key for first, end in spans for key in range(first, min(end, keys))]


@pytest.mark.parametrize("rows", [64, 128, 192])
@pytest.mark.parametrize("persistent", [False, True])
def test_every_key_is_in_one_piece_and_no_piece_is_empty(rows: int, persistent: bool) -> None:
    drawn = random.Random(rows)
    shapes = SHAPES + [(drawn.randint(1, 3000), drawn.randint(1, 600)) for _ in range(150)]
    for keys, heads in shapes:
        one = cut(keys, heads, rows, 132, persistent)
        assert keys_of(one, keys, rows) == list(range(keys)), (keys, heads, one)
        assert one.part % GROUP == 0 and one.part <= rows
        assert not one.parts or one.tiles * rows + (one.parts - 1) * one.part < keys


def steps(pieces_in_all: int, blocks: int) -> list[list[int]]:
    """Return the pieces of each block as Works::next_keys goes through them."""
    taken: list[list[int]] = []
    for number in range(blocks):
        mine = []
        while number < pieces_in_all:
            mine.append(number)
            number += 1 if number % blocks == blocks - 1 else blocks + 1
            place = number % blocks
            if number - place + blocks > pieces_in_all:
                number = number - place + blocks - 1 - place
        taken.append(mine)
    return taken


def test_every_piece_is_taken_once() -> None:
    for blocks in (1, 2, 3, 7, 132):
        for count in {*range(blocks, 5 * blocks + 2), 3072}:
            taken = steps(count, blocks)
            assert Counter(x for mine in taken for x in mine) == Counter(range(count)), (count, blocks)
            assert all(taker(x, count, blocks) == block for block, mine in enumerate(taken) for x in mine)


def test_teams_beyond_the_pieces_take_none() -> None:
    # Two teams a block: five pieces launch three blocks.
    assert steps(5, 6) == [[0], [1], [2], [3], [4], []]


def test_the_last_round_is_not_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "COSTS", {3: (0.5, 0.75, 1.0)})
    # 512 heads of five whole tiles and one of 64 keys; a round more of whole tiles would be 22.
    assert makespan(Cut(5, 1, 64), 1024, 512, 192, 132, True) == pytest.approx(21.5)
    # Head by head, a tile of 64 behind every five.
    blocks = [[x for x in range(3072) if (x % 132 - x // 132) % 132 == block] for block in range(132)]
    assert max(sum(0.5 if x % 6 == 5 else 1.0 for x in mine) for mine in blocks) > 21.5


@pytest.mark.parametrize(("keys", "heads"), SHAPES[:6])
def test_the_chosen_cut_is_not_behind_whole_tiles(keys: int, heads: int) -> None:
    for rows, persistent in ((192, True), (192, False), (128, False)):
        chosen = makespan(cut(keys, heads, rows, 132, persistent), keys, heads, rows, 132, persistent)
        whole = makespan(Cut(keys // rows, int(keys % rows > 0), rows), keys, heads, rows, 132, persistent)
        assert chosen <= pieces._NEARLY * whole
        assert chosen >= keys / rows * heads / 132 - 1e-9
