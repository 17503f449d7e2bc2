"""Cuts the keys of a call into pieces of work of two sizes where the last round of blocks would be a large share.

Called by kernel_call.py for the persistent Hopper backward, where every head has the same keys and every key the same
queries. Whole tiles come first, those of all heads, and then the rest of each head in parts. Standard library only.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

GROUP = 64  # keys of one warpgroup
# What a piece costs of which 1, 2 and 3 groups have keys, in tiles of three. More than their share: queries are copied,
# and dQ is multiplied, for all groups alike.
COSTS = (0.45, 0.72, 1.0)
# By so much the estimate must fall. Measured (docs/kernels.md, 41): of an estimated tenth a quarter came true, and
# where the estimate gained 3% or less the call was as fast as before, or up to 2% slower.
WORTH = 1.06
# With more rounds of blocks than this, all of the last one is not worth a cut.
_MOST_ROUNDS = 17
_NEARLY = 1.01  # the estimate is no better


class Cut(NamedTuple):
    """Of each head `tiles` whole ones, and `parts` of `part` keys that hold the rest.

    Without parts the last tile holds what is left, and a head's tiles stay together.
    """

    tiles: int
    parts: int
    part: int


def whole(keys: int, rows: int) -> Cut:
    """Return the cut into tiles alone."""
    return Cut(max(1, -(-keys // rows)), 0, 0)


@cache
def cut(keys: int, heads: int, rows: int, blocks: int) -> Cut:
    """Return the cut of `heads` of all sequences that ends first: tiles of `rows` keys, `blocks` at work at a time.

    Of those that end at nearly the same time the one with the fewest pieces; tiles alone unless a cut gains enough.
    """
    plain = whole(keys, rows)
    if plain.tiles * heads > _MOST_ROUNDS * blocks:
        return plain
    ends = {one: makespan(one, keys, heads, rows, blocks) for one in _cuts(keys, heads, rows, blocks)}
    soonest = min(ends.values(), default=float("inf"))
    if soonest * WORTH > makespan(plain, keys, heads, rows, blocks):
        return plain
    return min((one for one in ends if ends[one] <= _NEARLY * soonest), key=lambda one: one.tiles + one.parts)


def _cuts(keys: int, heads: int, rows: int, blocks: int) -> Iterator[Cut]:
    """Yield the cuts to choose from: as many whole tiles as there are, or as fill one of the last rounds."""
    most = keys // rows
    rounds = most * heads // blocks
    for tiles in sorted({most, most - 1, rounds * blocks // heads, (rounds - 1) * blocks // heads}, reverse=True):
        left = keys - tiles * rows
        if 0 <= tiles <= most and left:
            yield from (Cut(tiles, -(-left // part), part) for part in range(rows, 0, -GROUP))


def makespan(one: Cut, keys: int, heads: int, rows: int, blocks: int) -> float:
    """Return when the last block is done, in whole tiles."""
    size = one.part if one.parts else rows
    begin = one.tiles * rows if one.parts else 0
    a_head = [COSTS[-(-min(size, keys - first) // GROUP) - 1] for first in range(begin, keys, size)]
    costs = [1.0] * (one.tiles * heads if one.parts else 0) + a_head * heads
    loads = [0.0] * blocks
    for number, cost in enumerate(costs):
        loads[taker(number, len(costs), blocks, one.parts > 0)] += cost
    return max(loads)


def taker(number: int, pieces: int, blocks: int, parts: bool) -> int:
    """Return which block takes piece `number` (Works, csrc/common/warpgroups.cuh)."""
    turn, place = divmod(number, blocks)
    if parts and turn > 0 and (turn + 1) * blocks > pieces:
        place = blocks - 1 - place
    return (place - turn) % blocks
