"""Compiled inner loops of ListOps: parse and evaluate, draw, write out. Plain arrays in, plain arrays out.

Token bytes are the ids of `tasks.listops`: 1..4 operators, 5 the closing bracket, 6..15 the digits. Called by
`tasks.listops` and `tasks.generate_listops`, imported only when one of them has work to do (numba takes half a
second to import). Grammar and law: lra_spec.md sections 1.1 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

MIN, MAX, MED, SM, CLOSE, ZERO = 1, 2, 3, 4, 5, 6
MAX_OPEN = 64  # operators inside one another; the official data have at most 9
OPERATOR_CHANCE = 0.25

OK, BAD_TOKEN, TOO_EARLY, TOO_DEEP, TOO_LATE, NO_TAB, BAD_TARGET, WRONG_TARGET = range(8)
_EXPRESSION, _CLOSE_ARGUMENT, _BRACKET, _CLOSE_OPERATOR, _END = range(5)

_F = TypeVar("_F", bound=Callable[..., Any])


def _compiled(function: _F) -> _F:
    """Compile without the GIL; keep the machine code on disk where a folder for it can be written."""
    try:
        return cast(_F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # numba found no writable folder (read-only checkout and home)
        return cast(_F, numba.njit(nogil=True)(function))


@_compiled
def combine(operator: int, values: np.ndarray, start: int, stop: int) -> int:
    """Apply an operator to values[start:stop]: digits in, a digit out."""
    if operator == MIN:
        return int(values[start:stop].min())
    if operator == MAX:
        return int(values[start:stop].max())
    if operator == SM:
        return int(values[start:stop].sum()) % 10
    # int(np.median): the mean of the two middle values of an even count, cut off towards zero.
    ordered = np.sort(values[start:stop])
    count = stop - start
    return (int(ordered[(count - 1) // 2]) + int(ordered[count // 2])) // 2


@_compiled
def _operator_at(data: np.ndarray, position: int, stop: int) -> tuple[int, int]:
    """Return the operator that data[position:] begins with and its number of bytes, or (0, 0)."""
    if stop - position >= 4 and data[position + 1] == 77:  # M
        second, third = data[position + 2], data[position + 3]
        if second == 73 and third == 78:  # IN
            return MIN, 4
        if second == 65 and third == 88:  # AX
            return MAX, 4
        if second == 69 and third == 68:  # ED
            return MED, 4
    if stop - position >= 3 and data[position + 1] == 83 and data[position + 2] == 77:  # SM
        return SM, 3
    return 0, 0


@_compiled
def parse(
    data: np.ndarray, start: int, stop: int, tokens: np.ndarray, at: int, values: np.ndarray
) -> tuple[int, int, int, int]:
    """Parse one official expression data[start:stop] and write its tokens from tokens[at] on.

    `values` is scratch space as long as the line. Returns (status, tokens written, value, byte where it failed).
    A node with n arguments is n + 1 times "(", the operator, n arguments each followed by ")", "]" and ")".
    """
    operators = np.empty(MAX_OPEN, np.int64)
    missing = np.empty(MAX_OPEN, np.int64)
    first = np.empty(MAX_OPEN, np.int64)
    depth, opened, held, written = 0, 0, 0, 0
    state = _EXPRESSION
    position = start
    while position < stop:
        byte = data[position]
        size = 1
        done = False
        if state == _EXPRESSION and byte == 40:  # (
            opened += 1
        elif state == _EXPRESSION and byte == 91 and opened >= 2:  # [
            operator, size = _operator_at(data, position, stop)
            if operator == 0:
                return BAD_TOKEN, written, 0, position
            if depth == MAX_OPEN:
                return TOO_DEEP, written, 0, position
            operators[depth], missing[depth], first[depth] = operator, opened - 1, held
            depth, opened = depth + 1, 0
            tokens[at + written] = operator
            written += 1
        elif state == _EXPRESSION and 48 <= byte <= 57 and opened == 0:  # a digit
            values[held] = byte - 48
            tokens[at + written] = ZERO + byte - 48
            held, written, done = held + 1, written + 1, True
        elif state == _CLOSE_ARGUMENT and byte == 41:  # )
            missing[depth - 1] -= 1
            state = _EXPRESSION if missing[depth - 1] > 0 else _BRACKET
        elif state == _BRACKET and byte == 93:  # ]
            tokens[at + written] = CLOSE
            written += 1
            state = _CLOSE_OPERATOR
        elif state == _CLOSE_OPERATOR and byte == 41:  # )
            depth -= 1
            values[first[depth]] = combine(operators[depth], values, first[depth], held)
            held, done = first[depth] + 1, True
        else:
            return (TOO_LATE if state == _END else BAD_TOKEN), written, 0, position
        if done:
            state = _CLOSE_ARGUMENT if depth > 0 else _END
        position += size
        if position < stop:
            if data[position] != 32 or position + 1 == stop:  # one space between tokens, none at the end
                return BAD_TOKEN, written, 0, position
            position += 1
    if state != _END:
        return TOO_EARLY, written, 0, stop
    return OK, written, values[0], stop


@_compiled
def parse_rows(data: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> tuple[int, int, int]:
    """Parse whole rows `expression TAB digit [CR] LF`; `data` ends with LF.

    Fills tokens, and a length and a label for each row. Returns (status, rows parsed, tokens written); a status
    other than OK is about the row after the last one parsed.
    """
    values = np.empty(len(data), np.int64)
    rows, written, start = 0, 0, 0
    for end in range(len(data)):
        if data[end] != 10:
            continue
        stop = end - 1 if end > start and data[end - 1] == 13 else end
        tab = start
        while tab < stop and data[tab] != 9:
            tab += 1
        if tab == stop:
            return NO_TAB, rows, written
        status, count, value, _ = parse(data, start, tab, tokens, written, values)
        if status != OK:
            return status, rows, written
        if stop - tab != 2 or data[tab + 1] < 48 or data[tab + 1] > 57:
            return BAD_TARGET, rows, written
        if data[tab + 1] - 48 != value:
            return WRONG_TARGET, rows, written
        lengths[rows], labels[rows] = count, value
        rows, written, start = rows + 1, written + count, end + 1
    return OK, rows, written


@_compiled
def _draw(
    rng: np.random.Generator, out: np.ndarray, at: int, max_depth: int, max_args: int, max_length: int
) -> tuple[int, int]:
    """Draw one tree into out[at:]; return (length, value), or (-1, 0) as soon as it has max_length tokens.

    Giving up early changes nothing in the law: such a tree would be refused when complete.
    """
    operators = np.empty(max_depth, np.int64)
    missing = np.empty(max_depth, np.int64)
    first = np.empty(max_depth, np.int64)
    values = np.empty(max_length + 1, np.int64)
    depth, held, length = 0, 0, 0
    while True:
        if length >= max_length:
            return -1, 0
        # A node at depth max_depth is a digit; above it, an operator with chance 1/4.
        if depth + 1 < max_depth and rng.random() <= OPERATOR_CHANCE:
            operators[depth] = rng.integers(MIN, SM + 1)
            missing[depth] = rng.integers(2, max_args + 1)
            first[depth] = held
            out[at + length] = operators[depth]
            depth, length = depth + 1, length + 1
            continue
        values[held] = rng.integers(0, 10)
        out[at + length] = ZERO + values[held]
        held, length = held + 1, length + 1
        while depth > 0:
            missing[depth - 1] -= 1
            if missing[depth - 1] > 0:
                break
            depth -= 1
            out[at + length] = CLOSE
            length += 1
            values[first[depth]] = combine(operators[depth], values, first[depth], held)
            held = first[depth] + 1
            if length >= max_length:
                return -1, 0
        if depth == 0:
            return length, values[0]


@_compiled
def draw_many(
    rng: np.random.Generator,
    out: np.ndarray,
    lengths: np.ndarray,
    labels: np.ndarray,
    max_depth: int,
    max_args: int,
    min_length: int,
    max_length: int,
    max_tries: int,
) -> tuple[int, int]:
    """Draw len(lengths) trees with min_length < length < max_length, one after another in `out`.

    `out` has room for len(lengths) * max_length tokens and one more. Returns (tokens written, trees tried);
    tokens is -1 if one of them took more than `max_tries`.
    """
    written, tried = 0, 0
    for i in range(len(lengths)):
        for _ in range(max_tries):
            tried += 1
            length, value = _draw(rng, out, written, max_depth, max_args, max_length)
            if length > min_length:
                lengths[i], labels[i] = length, value
                written += length
                break
        else:
            return -1, tried
    return written, tried


@_compiled
def write_out(tokens: np.ndarray, out: np.ndarray) -> int:
    """Write one tree in the official form (spaces and parentheses); return the number of bytes.

    `out` needs 5 bytes a token and 4 bytes an argument: 10 bytes a token are always enough.
    """
    arguments = np.zeros(len(tokens), np.int64)
    open_at = np.empty(len(tokens) + 1, np.int64)
    depth = 0
    for i in range(len(tokens)):
        if tokens[i] == CLOSE:
            depth -= 1
        elif depth > 0:
            arguments[open_at[depth - 1]] += 1
        if tokens[i] < CLOSE:
            open_at[depth] = i
            depth += 1
    names = np.array([77, 73, 78, 77, 65, 88, 77, 69, 68, 83, 77, 32], np.uint8)  # MIN MAX MED SM
    size, depth = 0, 0
    for i in range(len(tokens)):
        token = tokens[i]
        if token < CLOSE:
            for _ in range(arguments[i] + 1):
                out[size], out[size + 1] = 40, 32
                size += 2
            out[size] = 91
            letters = 2 if token == SM else 3
            out[size + 1 : size + 1 + letters] = names[3 * (token - 1) : 3 * (token - 1) + letters]
            size += 1 + letters
            depth += 1
        elif token == CLOSE:
            out[size], out[size + 1], out[size + 2] = 93, 32, 41
            size += 3
            depth -= 1
        else:
            out[size] = 48 + token - ZERO
            size += 1
        if token >= CLOSE and depth > 0:
            out[size], out[size + 1] = 32, 41
            size += 2
        out[size] = 32
        size += 1
    return size - 1


@_compiled
def _next_random(state: np.ndarray) -> int:
    """Return 63 random bits and move the state on (splitmix64)."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((z ^ (z >> np.uint64(31))) >> np.uint64(1))


@_compiled
def _find_ends(tokens: np.ndarray, start: int, stop: int, ends: np.ndarray, stack: np.ndarray) -> bool:
    """Fill ends[i] with the place behind the expression that begins at start + i; False if it is not whole."""
    depth = 0
    for at in range(start, stop):
        token = tokens[at]
        if MIN <= token <= SM:
            stack[depth] = at - start
            depth += 1
        elif token == CLOSE:
            if depth == 0:
                return False
            depth -= 1
            ends[stack[depth]] = at + 1 - start
        else:
            ends[at - start] = at + 1 - start
    return depth == 0 and stop > start and ends[0] == stop - start


@_compiled
def shuffle_many(tokens: np.ndarray, bounds: np.ndarray, seed: int, copy: np.ndarray, scratch: np.ndarray) -> None:
    """Shuffle the operands of each expression tokens[bounds[s, 0]:bounds[s, 1]] in place, by (seed, s).

    copy uint8 and the three rows of scratch int64 have room for the longest expression.
    """
    ends, stack, children = scratch[0], scratch[1], scratch[2]
    state = np.empty(1, np.uint64)
    for s in range(len(bounds)):
        start, stop = bounds[s, 0], bounds[s, 1]
        if not _find_ends(tokens, start, stop, ends, stack):
            continue
        copy[: stop - start] = tokens[start:stop]
        state[0] = np.uint64(seed) ^ (np.uint64(s) * np.uint64(0xD1342543DE82EF95))
        # What is still to be written, the next on top: the place of an expression, or -1 for a closing bracket.
        stack[0], depth, out = 0, 1, start
        while depth > 0:
            depth -= 1
            place = stack[depth]
            tokens[out] = CLOSE if place < 0 else copy[place]
            out += 1
            if place < 0 or not MIN <= copy[place] <= SM:
                continue
            count, child = 0, place + 1
            while copy[child] != CLOSE:
                children[count] = child
                count += 1
                child = ends[child]
            stack[depth] = -1
            depth += 1
            for left in range(count, 0, -1):
                chosen = _next_random(state) % left
                stack[depth] = children[chosen]
                depth += 1
                children[chosen] = children[left - 1]
