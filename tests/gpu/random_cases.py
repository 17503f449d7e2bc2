"""Calls of attention described by a record: drawn at random by number, or written down.

A drawn case is a pure function of its number. One that fails is named with all that was drawn; to run it alone:

    python -m tests.gpu.random_cases 1234
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

import attention_kernels as ak
from tests.gpu.cases import NAN, Case, Guard, Rule, complaints

LAYOUTS = (
    "plain",
    "plain",
    "fused",
    "fused",
    "heads first",
    "sliced",
    "every other row",
    "odd storage",
    "wide columns",
)
EDGES = [n + d for n in (16, 32, 64, 96, 128, 192, 256, 384, 512, 640) for d in (-1, 0, 1)]


@dataclass(frozen=True)
class Drawn:
    """All that makes a case; lengths are of each sequence, `keys` of a fixed batch with key_lengths."""

    number: int
    kind: str  # fixed, key_lengths, packed
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    keys: tuple[int, ...] = ()
    tail: tuple[int, int] = (0, 0)  # rows of q and k after the last packed sequence
    slack: int = 0  # how far max_seqlen lies above the longest sequence
    heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    index_dtype: torch.dtype = torch.int32
    layouts: tuple[str, str, str, str] = ("plain",) * 4  # of q, k, v and the gradient of out
    size: float = 1.0  # standard deviation of q and k
    with_dlse: bool = True
    deterministic: bool = False
    rule: Rule = Rule()  # noqa: RUF009 (a NamedTuple cannot be changed)


def draw(number: int) -> Drawn:
    """Return case `number`."""
    rng = random.Random(f"attention case {number}")
    kind = rng.choices(("fixed", "key_lengths", "packed"), (3, 3, 4))[0]
    long = rng.random() < 0.04
    count = rng.randint(1, 2) if long else rng.randint(1, 7 if kind == "packed" else 4)
    q_lengths = [_length(rng, long) for _ in range(count)]
    k_lengths = q_lengths if rng.random() < 0.5 else [_length(rng, long) for _ in range(count)]
    if kind != "packed":
        q_lengths, k_lengths = q_lengths[:1] * count, k_lengths[:1] * count
    most = k_lengths[0]
    keys = tuple(rng.choice((0, 1, most, rng.randint(0, most))) if most else 0 for _ in k_lengths)
    head_dim = rng.choice((8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 104, 128, 128, rng.randint(1, 128)))
    scale = rng.choice((None, None, None, 0.0, -(head_dim**-0.5), 1e-4, 1.0, rng.uniform(0.01, 0.4), 3.0))
    dropout_p = rng.choice((0.0, 0.0, 0.0, 0.001, 0.1, 0.5, 0.9, rng.uniform(0.0, 0.9)))
    dout_layout = rng.choice((*LAYOUTS, "expanded rows", "expanded scalar"))
    return Drawn(
        number=number,
        kind=kind,
        q_lengths=tuple(q_lengths),
        k_lengths=tuple(k_lengths),
        keys=keys if kind == "key_lengths" else (),
        tail=rng.choice(((0, 0), (7, 7), (0, 130), (130, 1))) if kind == "packed" else (0, 0),
        slack=rng.choice((0, 1, 1000)),
        heads=rng.randint(1, 2) if long else rng.randint(1, 5),
        head_dim=head_dim,
        dtype=rng.choice((torch.float16, torch.bfloat16)),
        index_dtype=rng.choice((torch.int32, torch.int64)),
        layouts=(rng.choice(LAYOUTS), rng.choice(LAYOUTS), rng.choice(LAYOUTS), dout_layout),
        size=rng.choice((1.0, 1.0, 1.0, 0.1, 4.0)),
        with_dlse=rng.random() < 0.5,
        deterministic=rng.random() < 0.5,
        rule=Rule(rng.random() < 0.4, dropout_p, scale, (rng.getrandbits(62), rng.getrandbits(62))),
    )


def _length(rng: random.Random, long: bool) -> int:
    if long:
        return rng.choice((rng.randint(700, 2500), rng.randint(2500, 5000)))
    return rng.choice(
        (rng.randint(0, 8), rng.choice(EDGES), rng.choice(EDGES), rng.randint(0, 700), rng.randint(0, 700))
    )


def make(drawn: Drawn, device: str = "cuda") -> Case:
    """Return the case's tensors, NaN wherever nothing may be read, and its call."""
    rng = torch.Generator().manual_seed(drawn.number)
    packed = drawn.kind == "packed"
    starts = [list(accumulate(n, initial=0)) for n in (drawn.q_lengths, drawn.k_lengths)]
    rows = [cu[-1] + more for cu, more in zip(starts, drawn.tail, strict=True)]
    ranges = [list(pairwise(cu)) for cu in starts]
    if drawn.keys:
        ranges[1] = [(a, a + n) for (a, _), n in zip(ranges[1], drawn.keys, strict=True)]
    tensors = []
    for name, (which, layout) in zip("qkvg", zip((0, 1, 1, 0), drawn.layouts, strict=True), strict=True):
        x = torch.randn(rows[which], drawn.heads, drawn.head_dim, generator=rng)
        x = (x * drawn.size if name in "qk" else x).to(drawn.dtype)
        for (_, end), (start, _) in pairwise([(0, 0), *ranges[which], (rows[which], 0)]):
            x[end:start] = NAN
        x = x if packed else x.unflatten(0, (len(drawn.q_lengths), -1 if rows[which] else 0))
        tensors.append(place(x, layout, device))
    dlse = torch.randn(drawn.heads, rows[0], generator=rng)
    dlse[:, starts[0][-1] :] = NAN
    offsets = [k - q for q, k in zip(drawn.q_lengths, drawn.k_lengths, strict=True)]
    call = _packed_call(drawn, starts, device) if packed else _fixed_call(drawn, device)
    return Case(tensors, dlse.to(device) if drawn.with_dlse else None, ranges[0], ranges[1], offsets, call)


def place(x: Tensor, layout: str, device: str) -> Tensor:
    """Return x (..., H, D) on the device in other strides, NaN in the rest of its storage."""
    x = x.to(device)
    if layout == "plain":
        return x
    if layout == "heads first":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "expanded rows":
        # One row of ones and twos for all: a gradient that was broadcast.
        return (torch.arange(x.shape[-1], device=device) % 2 + 1).to(x.dtype).expand(x.shape)
    if layout == "expanded scalar":
        return torch.ones((), dtype=x.dtype, device=device).expand(x.shape)
    *batch, rows, heads, dim = x.shape
    if layout == "far rows":
        # Rows 2^24 elements apart: from the 128th on, offsets are beyond 31 bits.
        return torch.empty(rows << 24, dtype=x.dtype, device=device).as_strided(x.shape, (1 << 24, dim, 1)).copy_(x)
    if layout == "odd storage":
        view = x.new_full((x.numel() + 1,), NAN)[1:].view(x.shape)
    elif layout == "fused":
        view = x.new_full((*batch, rows, 3, heads, dim), NAN)[..., 1, :, :]
    elif layout == "sliced":
        view = x.new_full((*batch, rows + 3, heads + 1, dim + 8), NAN)[..., 2 : 2 + rows, 1:, :dim]
    elif layout == "every other row":
        view = x.new_full((*batch, 2 * rows, heads, dim), NAN)[..., ::2, :, :]
    else:
        view = x.new_full((*batch, rows, heads, dim, 2), NAN)[..., 0]
    return view.copy_(x)


def _fixed_call(drawn: Drawn, device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    keys = torch.tensor(drawn.keys, dtype=drawn.index_dtype, device=device) if drawn.keys else None

    def call(q: Tensor, k: Tensor, v: Tensor, **more: object) -> tuple[Tensor, Tensor]:
        out, lse = ak.flash_attention(q, k, v, key_lengths=keys, return_lse=True, **more)
        return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    return call


def _packed_call(drawn: Drawn, starts: list[list[int]], device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    offsets = [torch.tensor(cu, dtype=drawn.index_dtype, device=device) for cu in starts]
    bounds = [max(n) + drawn.slack for n in (drawn.q_lengths, drawn.k_lengths)]

    def call(q: Tensor, k: Tensor, v: Tensor, **more: object) -> tuple[Tensor, Tensor]:
        return ak.flash_attention_varlen(q, k, v, *offsets, *bounds, return_lse=True, **more)

    return call


def check(number: int, device: str = "cuda", guard: Guard | None = None) -> list[str]:
    """Return what is wrong with case `number`, each line with the family and how to run it alone."""
    drawn = draw(number)
    said = complaints(make(drawn, device), drawn.rule, (drawn.deterministic,), guard=guard)
    return [f"{text}; python -m tests.gpu.random_cases {number}: {drawn}" for text in said]


if __name__ == "__main__":
    with ak.using("cuda"):
        for argument in sys.argv[1:]:
            print(draw(int(argument)))
            print("\n".join(check(int(argument))) or "nothing wrong")
