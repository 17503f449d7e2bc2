"""Calls of block-sparse attention drawn at random by number: those of random_cases.py, square and under a layout.

What no block of the layout reaches is NaN: keys that no row sees, and queries (and the gradient of their outputs) that
see no key, a head at a time. To run one alone:

    python -m tests.gpu.sparse_cases 1234
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

import attention_kernels as ak
from attention_kernels import BlockLayout
from tests.gpu.cases import NAN, Case, Guard, complaints
from tests.gpu.random_cases import Drawn, draw, make

KINDS = ("random", "random", "random", "per head", "mapped", "butterfly", "local", "local_global", "stripes", "dense")


@dataclass(frozen=True)
class Pattern:
    """All that makes a layout; `spare` blocks lie beyond the longest sequence."""

    kind: str
    block_size: int
    spare: int
    density: float
    holes: int  # rows and columns of blocks that are empty


def draw_sparse(number: int) -> tuple[Drawn, Pattern]:
    """Return case `number`."""
    drawn = draw(number)
    rng = random.Random(f"block-sparse case {number}")
    most = drawn.q_lengths[0]
    keys = tuple(min(n, most) if rng.random() < 0.5 else rng.randint(0, most) for n in drawn.keys)
    tail = (drawn.tail[0], drawn.tail[0])
    pattern = Pattern(
        kind=rng.choice(KINDS),
        block_size=rng.choice((64, 128)),
        spare=rng.choice((0, 0, 1, 4)),
        density=rng.choice((0.05, 0.2, 0.5, 0.9)),
        holes=rng.choice((0, 0, 1, 2)),
    )
    return replace(drawn, k_lengths=drawn.q_lengths, keys=keys, tail=tail), pattern


def make_layout(pattern: Pattern, length: int, heads: int, number: int) -> BlockLayout:
    """Return the layout on the CPU."""
    size = pattern.block_size
    num = -(-length // size) + pattern.spare
    rng = torch.Generator().manual_seed(number)
    if pattern.kind in ("butterfly", "dense"):
        return getattr(BlockLayout, pattern.kind)(num * size, block_size=size)
    if pattern.kind == "local":
        return BlockLayout.local(num * size, window=1, block_size=size)
    if pattern.kind == "local_global":
        return BlockLayout.local_global(num * size, window=1, num_global=1, block_size=size)
    if pattern.kind == "stripes":
        return BlockLayout.stripes(num * size, stride=3, block_size=size)
    mask = torch.rand(heads if pattern.kind == "per head" else 2, num, num, generator=rng) < pattern.density
    for _ in range(pattern.holes if num else 0):
        row, column = torch.randint(0, num, (2,), generator=rng).tolist()
        mask[:, row], mask[-1, :, column] = False, False
    if pattern.kind == "random":
        return BlockLayout.from_mask(mask[-1], size)
    if pattern.kind == "per head":
        return BlockLayout.from_mask(mask, size)
    picked = torch.randint(0, 2, (heads,), generator=rng).tolist()
    return BlockLayout.per_head([BlockLayout.from_mask(m, size) for m in mask], picked)


def make_sparse(drawn: Drawn, layout: BlockLayout, device: str = "cuda") -> Case:
    """Return the case's tensors and its block-sparse call."""
    layout = layout.to(device)
    case = make(drawn, device)
    call = _packed(drawn, layout, device) if drawn.kind == "packed" else _fixed(drawn, layout, device)
    return case._replace(call=call, layout=layout)


def _fixed(drawn: Drawn, layout: BlockLayout, device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    keys = torch.tensor(drawn.keys, dtype=drawn.index_dtype, device=device) if drawn.keys else None

    def call(q: Tensor, k: Tensor, v: Tensor, **more: object) -> tuple[Tensor, Tensor]:
        out, lse = ak.block_sparse_attention(q, k, v, layout, key_lengths=keys, return_lse=True, **more)
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    return call


def _packed(drawn: Drawn, layout: BlockLayout, device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    starts = list(accumulate(drawn.q_lengths, initial=0))
    offsets = torch.tensor(starts, dtype=drawn.index_dtype, device=device)
    most = min(max(drawn.q_lengths) + drawn.slack, layout.num_blocks * layout.block_size)

    def call(q: Tensor, k: Tensor, v: Tensor, **more: object) -> tuple[Tensor, Tensor]:
        return ak.block_sparse_attention_varlen(q, k, v, layout, offsets, most, return_lse=True, **more)

    return call


def poison(case: Case, causal: bool) -> Case:
    """Write NaN over all that no block reaches; return the case as it was, its tensors copied."""
    clean = case._replace(tensors=[x.clone() for x in case.tensors])
    assert case.layout is not None
    size, heads = case.layout.block_size, case.tensors[0].shape[-2]
    for (a, b), (c, d), offset in zip(case.q_ranges, case.k_ranges, case.offsets, strict=True):
        seen = case.visible(b - a, d - c, causal, offset).expand(heads, -1, -1)
        for start, dimension, which in ((a, 2, (0, 3)), (c, 1, (1, 2))):
            reached = seen.any(dimension)
            # Whole blocks: within one, tiles of rows are read together.
            blocks = torch.nn.functional.pad(reached, (0, -reached.shape[1] % size)).view(heads, -1, size).any(-1)
            for head, block in (~blocks).nonzero().tolist():
                rows = slice(start + block * size, min(start + (block + 1) * size, start + reached.shape[1]))
                for i in which:
                    _write_nan(case.tensors[i], rows, head)
    return clean


def _write_nan(x: Tensor, rows: slice, head: int) -> None:
    if 0 in x.stride():
        return  # a broadcast gradient has no rows of its own
    if x.dim() == 3:
        x[rows, head] = NAN
        return
    length = x.shape[1]
    sample = rows.start // length
    x[sample, rows.start - sample * length : rows.stop - sample * length, head] = NAN


def check(number: int, device: str = "cuda", guard: Guard | None = None) -> list[str]:
    """Return what is wrong with case `number`, each line with the family and how to run it alone."""
    drawn, pattern = draw_sparse(number)
    case = make_sparse(drawn, make_layout(pattern, max(drawn.q_lengths), drawn.heads, number), device)
    clean = poison(case, drawn.rule.causal)
    said = complaints(case, drawn.rule, (drawn.deterministic,), clean, guard)
    return [f"{text}; python -m tests.gpu.sparse_cases {number}: {pattern} {drawn}" for text in said]


if __name__ == "__main__":
    with ak.using("cuda"):
        for argument in sys.argv[1:]:
            print(*draw_sparse(int(argument)))
            print("\n".join(check(int(argument))) or "nothing wrong")
