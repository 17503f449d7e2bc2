"""Cuts the keys of a call into pieces of work of two sizes, so that the last round of blocks is not a whole one.

Called by kernel_call.py for the Hopper backward, where every head has the same keys and every key the same queries.
Whole tiles come first, those of all heads, and then the rest of each head in parts; a block that is left without a tile
takes several parts. Standard library only.
"""

import heapq
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

GROUP = 64  # keys of one warpgroup
# What a piece costs of which 1, 2 and 3 groups have keys, for tiles of so many groups. More than their share: queries
# are copied, and dQ is multiplied, for all groups alike.
COSTS = {1: (1.0,), 2: (0.6, 1.0), 3: (0.45, 0.72, 1.0)}
# With more parts the last round is a small share of the time, and to look for the best cut costs more than it saves.
_MOST_PARTS = 4096
_NEARLY = 1.01  # the estimate is no better


class Cut(NamedTuple):
    """Of each head `tiles` whole ones, and `parts` of `part` keys that hold the rest."""

    tiles: int
    parts: int
    part: int


def taker(number: int, pieces: int, blocks: int) -> int:
    """Return which persistent block takes piece `number` (Works, csrc/common/warpgroups.cuh)."""
    turn, place = divmod(number, blocks)
    if turn > 0 and (turn + 1) * blocks > pieces:
        place = blocks - 1 - place
    return (place - turn) % blocks


@cache
def cut(keys: int, heads: int, rows: int, blocks: int, persistent: bool) -> Cut:
    """Return the cut that ends first: `heads` of all sequences, tiles of `rows` keys, `blocks` at work at a time.

    Of those that end at nearly the same time the one with the fewest pieces, and the most whole tiles.
    """
    ends = {one: makespan(one, keys, heads, rows, blocks, persistent) for one in _cuts(keys, heads, rows, blocks)}
    near = [one for one in ends if ends[one] <= _NEARLY * min(ends.values())]
    return min(near, key=lambda one: one.tiles + one.parts)


def _cuts(keys: int, heads: int, rows: int, blocks: int) -> Iterator[Cut]:
    """Yield the cuts to choose from: as many whole tiles as there are, or as fill one of the last rounds."""
    most = keys // rows
    rounds = most * heads // blocks
    for tiles in sorted({most, most - 1, rounds * blocks // heads, (rounds - 1) * blocks // heads}, reverse=True):
        left = keys - tiles * rows
        if tiles < 0 or tiles > most:
            continue
        for part in range(rows, 0, -GROUP) if left else (0,):
            parts = -(-left // part) if part else 0
            if parts * heads <= _MOST_PARTS or (tiles == most and part == rows):
                yield Cut(tiles, parts, part)


def makespan(one: Cut, keys: int, heads: int, rows: int, blocks: int, persistent: bool) -> float:
    """Return when the last block is done, in whole tiles."""
    whole, pieces = one.tiles * heads, (one.tiles + one.parts) * heads
    sizes = (min(one.part, keys - one.tiles * rows - i * one.part) for i in range(one.parts))
    costs = [COSTS[rows // GROUP][-(-size // GROUP) - 1] for size in sizes]
    rounds = whole // blocks  # that are the same for all
    later = [1.0] * (whole - rounds * blocks) + costs * heads
    if persistent:
        loads = [0.0] * blocks
        for number, cost in enumerate(later, rounds * blocks):
            loads[taker(number, pieces, blocks)] += cost
        return rounds + max(loads)
    loads = [0.0] * blocks
    for cost in later:
        heapq.heapreplace(loads, loads[0] + cost)
    return rounds + max(loads)
