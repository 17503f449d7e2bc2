"""How the Hopper backward's keys are cut into pieces of two sizes, and which block takes which."""

import random
from collections import Counter

import pytest

from attention_kernels import pieces
from attention_kernels.pieces import _MOST_ROUNDS, _NEARLY, GROUP, WORTH, Cut, _cuts, cut, makespan, taker, whole

ROWS = 192
SHAPES = [(1024, 512), (2048, 128), (4096, 64), (16384, 16), (65536, 2), (8192, 32), (1024, 20000), (70, 3), (1, 1)]


def keys_of(one: Cut, keys: int) -> list[int]:
    """Return the keys of all pieces of a head, as find_keys (csrc/common/backward_stages.cuh) has them."""
    spans = [(i * ROWS, (i + 1) * ROWS) for i in range(one.tiles)]
    begin = one.tiles * ROWS
    spans += [(begin + i * one.part, begin + (i + 1) * one.part) for i in range(one.parts)]
    return [key for first, end in spans for key in range(first, min(end, keys))]


def test_every_key_is_in_one_piece_and_no_piece_is_empty() -> None:
    drawn = random.Random(0)
    shapes = SHAPES + [(drawn.randint(1, 3000), drawn.randint(1, 600)) for _ in range(150)]
    for keys, heads in shapes:
        for one in (cut(keys, heads, ROWS, 132), *_cuts(keys, heads, ROWS, 132)):
            assert keys_of(one, keys) == list(range(keys)), (keys, heads, one)
            assert one.part % GROUP == 0 and one.part <= ROWS
            size, pieces = (one.part, one.parts) if one.parts else (ROWS, one.tiles)
            assert (one.tiles * ROWS if one.parts else 0) + (pieces - 1) * size < keys


def steps(pieces_in_all: int, blocks: int, parts: bool = True) -> list[list[int]]:
    """Return the pieces of each block as Works::next_keys goes through them."""
    taken: list[list[int]] = []
    for number in range(blocks):
        mine = []
        while number < pieces_in_all:
            mine.append(number)
            number += 1 if number % blocks == blocks - 1 else blocks + 1
            place = number % blocks
            if parts and number - place + blocks > pieces_in_all:
                number = number - place + blocks - 1 - place
        taken.append(mine)
    return taken


@pytest.mark.parametrize("parts", [False, True])
def test_every_piece_is_taken_once(parts: bool) -> None:
    for blocks in (1, 2, 3, 7, 132):
        for count in {*range(blocks, 5 * blocks + 2), 3072}:
            taken = steps(count, blocks, parts)
            assert Counter(x for mine in taken for x in mine) == Counter(range(count)), (count, blocks)
            assert all(taker(x, count, blocks, parts) == block for block, mine in enumerate(taken) for x in mine)


def test_teams_beyond_the_pieces_take_none() -> None:
    # Two teams a block: five pieces launch three blocks.
    assert steps(5, 6) == [[0], [1], [2], [3], [4], []]


def test_the_last_round_is_not_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "COSTS", (0.5, 0.75, 1.0))
    # 512 heads of five whole tiles and one of 64 keys; a round more of whole tiles would be 22.
    assert makespan(Cut(5, 1, 64), 1024, 512, ROWS, 132) == pytest.approx(21.5)
    # Head by head, a tile of 64 behind every five.
    assert makespan(whole(1024, ROWS), 1024, 512, ROWS, 132) > 21.5


def test_what_was_timed_is_cut_where_that_was_faster() -> None:
    # docs/kernels.md, 41: tokens and heads of all sequences.
    for keys, heads in [(65536, 2), (512, 32), (100, 8)]:
        assert cut(keys, heads, ROWS, 132).parts > 0
    for keys, heads in [(1024, 512), (2048, 128), (4096, 64), (16384, 16), (1024, 20000)]:
        assert cut(keys, heads, ROWS, 132) == whole(keys, ROWS)


@pytest.mark.parametrize(("keys", "heads"), SHAPES)
def test_a_cut_gains_enough(keys: int, heads: int) -> None:
    one, plain = cut(keys, heads, ROWS, 132), whole(keys, ROWS)
    assert one == plain or makespan(one, keys, heads, ROWS, 132) * WORTH <= _NEARLY * makespan(
        plain, keys, heads, ROWS, 132
    )


def test_calls_with_more_rounds_than_are_looked_at_gain_little() -> None:
    # A last round that is all waste is less than WORTH takes.
    assert 1 + 1 / _MOST_ROUNDS <= WORTH
