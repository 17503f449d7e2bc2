"""What the benchmark measures: named sets of shapes, their floors, and the tensors of a case.

Shapes are batch x heads x length x head dim. Floors and aims are ratios on one NVIDIA H200, bf16, not causal: time of
the best peer divided by ours; in the sweep over densities, our dense time times the density divided by ours.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from attention_kernels.kernel_plan import width_of
from attention_kernels.layouts import BlockLayout

__all__ = ["SETS", "Case", "Inputs", "make_cases", "make_inputs"]

Numbers = tuple[float, float]
# Which methods are compared (bench_peers.methods_of): all; block-sparse with our dense; with FlexAttention as well; the
# three of FlashAttention's runtime table.
Contest = Literal["all", "density", "flex", "runtime"]
_DTYPE_BYTES = 2


@dataclass(frozen=True)
class Case:
    """One shape; a packed case holds `batch` sequences of at most `length` tokens, their lengths drawn like IMDB's."""

    batch: int
    heads: int
    length: int
    head_dim: int
    dropout: float = 0.0
    packed: bool = False
    causal: bool = False
    floor: Numbers | None = None  # forward, forward + backward
    aim: Numbers | None = None
    contest: Contest = "all"
    layout: str = ""  # block-sparse: "random", or "band", the pattern of the comparison with FlexAttention
    block: int = 128
    row_blocks: int = 0  # of a random layout: blocks a row, and as many a column

    @cached_property
    def blocks(self) -> BlockLayout | None:
        """The layout, on the CPU."""
        num = -(-self.length // self.block)
        if self.layout == "random":
            return _random_layout(num, self.row_blocks, self.block)
        if self.layout == "band":
            row, column = torch.arange(num)[:, None], torch.arange(num)
            apart = row ^ column
            return BlockLayout.from_mask(((apart & (apart - 1)) == 0) | ((row - column).abs() <= 1), self.block)
        return None

    @property
    def density(self) -> float:
        """The fraction of blocks that are computed."""
        return 1.0 if self.blocks is None else self.blocks.density

    @property
    def name(self) -> str:
        """The shape in words: 32x2x4096x32, dropout 0.1."""
        text = f"{self.batch}x{self.heads}x{self.length}x{self.head_dim}"
        text += ", packed" if self.packed else ""
        text += ", causal" if self.causal else ""
        text += f", {self.layout} 1/{1 / self.density:.3g}, blocks of {self.block}" if self.layout else ""
        return text + (f", dropout {self.dropout:g}" if self.dropout else "")

    def lengths(self) -> list[int]:
        """Return each sequence's length: `length`, or for a packed case draws around IMDB's quartiles."""
        if not self.packed:
            return [self.length] * self.batch
        draws = torch.randn(self.batch, generator=torch.Generator().manual_seed(1))
        # Median 1,043 and sigma 0.75 in the logarithm: a third of the padded tokens are real, as in IMDB's bytes.
        drawn = torch.exp(draws * 0.75 + 6.95) * self.length / 4096
        return [max(1, min(self.length, int(x))) for x in drawn.tolist()]

    def flops(self) -> float:
        """Return the forward's floating-point operations, two products; forward + backward is 3.5 times that."""
        pairs = sum(n * n for n in self.lengths()) / (2 if self.causal else 1)
        return 4.0 * self.heads * self.head_dim * pairs * self.density

    def memory_allowed(self) -> int:
        """Return the bytes that ours may add to inputs and dout in 16 bits: linear in the tokens.

        Output, three gradients, 8 bytes a row a head for statistics, the fp32 sums of dQ at the kernels' width.
        """
        rows = sum(self.lengths()) * self.heads
        width = width_of(self.head_dim) if self.head_dim <= 128 else self.head_dim
        return rows * (4 * _DTYPE_BYTES * self.head_dim + 8 + 4 * width)


@dataclass(frozen=True)
class Inputs:
    """A case's tensors: q, k, v (leaves) and dout are (B, H, L, D), or (T, H, D) for a packed case."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    cu_seqlens: Tensor | None  # int32 (B + 1,), packed cases only
    max_length: int
    layout: BlockLayout | None = None  # block-sparse cases only


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return normal random tensors, the same for every call with the same arguments."""
    torch.manual_seed(0)
    lengths = case.lengths()
    shape: tuple[int, ...] = (case.batch, case.heads, case.length, case.head_dim)
    cu_seqlens = None
    if case.packed:
        shape = (sum(lengths), case.heads, case.head_dim)
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    q, k, v, dout = (torch.randn(shape, dtype=dtype, device=device) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    layout = None if case.blocks is None else case.blocks.to(device)
    return Inputs(case, q, k, v, dout, cu_seqlens, max(lengths), layout)


def _random_layout(num: int, row_blocks: int, block: int) -> BlockLayout:
    """Return a layout of `num` blocks a side with `row_blocks` in each row and each column, scattered."""
    rng = torch.Generator().manual_seed(num + row_blocks)
    steps, places = torch.randperm(num, generator=rng)[:row_blocks], torch.randperm(num, generator=rng)
    mask = torch.zeros(num, num, dtype=torch.bool)
    rows = torch.arange(num)[:, None]
    mask[rows, places[(rows + steps) % num]] = True
    return BlockLayout.from_mask(mask, block)


def _rows(shapes: str, floor: Numbers, aim: Numbers, dropout: float = 0.0, packed: bool = False) -> list[Case]:
    """Return the cases of a row of the table of floors."""
    sizes = [[int(x) for x in shape.split("x")] for shape in shapes.split()]
    return [Case(b, h, n, d, dropout, packed, False, floor, aim) for b, h, n, d in sizes]


def _densities(shapes: str) -> list[Case]:
    """Return the sweep over densities 1/2 to 1/32 with blocks of 128 and 64, in scattered layouts."""
    cases = []
    for b, h, n, d in ([int(x) for x in shape.split("x")] for shape in shapes.split()):
        for block in (128, 64):
            for part in (2, 4, 8, 16, 32):
                row_blocks = n // block // part
                floor = 0.6 if block == 64 else 0.85 if row_blocks >= 16 else 0.7
                numbers = ((floor, floor), (1.0, 1.0))
                cases.append(Case(b, h, n, d, 0.0, False, False, *numbers, "density", "random", block, row_blocks))
    return cases


SMALL = "512x4x1024x8 512x4x1024x16 16x2x16384x8 16x2x16384x16 1x4x65536x8"
SETS: dict[str, list[Case]] = {
    # The settings of the FlashAttention-2 and -3 papers: 16,384 tokens, width 2,048.
    "paper": [Case(16384 // n, 2048 // d, n, d) for d in (64, 128) for n in (512, 1024, 2048, 4096, 8192, 16384)],
    "issue": [
        *_rows(SMALL, (1.6, 1.8), (2.0, 2.5)),
        *_rows("256x2x1024x32 32x2x4096x32 8x2x16384x32 1x2x65536x32", (1.5, 1.6), (1.8, 2.0)),
        *_rows("32x8x2048x64 32x4x4096x64 4x8x16384x64 1x8x65536x64", (1.15, 1.2), (1.3, 1.35)),
        *_rows("4x8x16384x128", (1.08, 1.1), (1.12, 1.15)),
    ],
    "dropout": [
        *_rows("512x4x1024x8 32x2x4096x32", (1.5, 1.6), (2.0, 2.0), 0.1),
        *_rows("32x4x4096x64", (1.3, 1.4), (1.6, 1.7), 0.1),
    ],
    "varlen": _rows("32x2x4096x32 32x4x4096x64", (1.4, 1.6), (1.8, 2.0), packed=True),
    # One batch and one number of heads from 512 to 65,536 tokens, for the two plots.
    "length": [Case(4, 8, 512 << i, 64) for i in range(8)],
    "sparse": _densities("8x2x16384x32 4x8x16384x64 1x2x65536x32 1x8x65536x64"),
    "flex": [
        Case(8, 2, 16384, 32, 0.0, False, False, (1.3, 1.3), (2.0, 2.0), "flex", "band"),
        Case(4, 8, 16384, 64, 0.0, False, False, (1.2, 1.2), (1.5, 1.5), "flex", "band"),
    ],
    # FlashAttention's table of runtimes: batch 16, 8 heads, head dim 64, 128 to 65,536 tokens.
    "runtime": [Case(16, 8, 128 << i, 64, contest="runtime") for i in range(10)],
}


def make_cases(shapes: str, dropout: float | None = None, causal: bool = False) -> list[Case]:
    """Return the cases of sets and shapes separated by commas, such as "dropout,8x2x1024x32".

    dropout (in [0, 1)) and causal change every case, whose floors then no longer apply. Raises ValueError for
    anything else.
    """
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
    cases = [case for text in shapes.split(",") for case in SETS.get(text.strip()) or [_read(text)]]
    if dropout is None and not causal:
        return cases
    rates = [case.dropout if dropout is None else dropout for case in cases]
    return [replace(c, dropout=p, causal=causal, floor=None, aim=None) for c, p in zip(cases, rates, strict=True)]


def _read(text: str) -> Case:
    """Read BxHxLxD; a trailing "p" makes it packed."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(p?)", text.strip())
    if not found:
        raise ValueError(f"{text!r} is neither {', '.join(SETS)} nor a shape such as 8x2x1024x32.")
    batch, heads, length, head_dim = (int(x) for x in found.groups()[:4])
    return Case(batch, heads, length, head_dim, packed=bool(found[5]))
