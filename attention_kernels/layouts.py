"""Which blocks of the score matrix exist: patterns over a square grid of blocks, as compressed rows and columns.

Called by users (the constructors) and by block_sparse.py; knows nothing of attention. The dense mask is never built
on the way: memory is proportional to the non-zero blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """P patterns over N x N blocks of `block_size` tokens; make one with a class method, not by hand.

    Row i of pattern p holds the key blocks col_idx[row_ptr[p N + i] : row_ptr[p N + i + 1]], ascending; column j is
    held the same way by col_ptr and row_idx. Head h follows pattern head_to_pattern[h]; a head_to_pattern of one
    entry serves any number of heads. All tensors are int32 on one device. Frozen: share it freely.
    """

    length: int
    block_size: int
    num_patterns: int
    row_ptr: Tensor
    col_idx: Tensor
    col_ptr: Tensor
    row_idx: Tensor
    head_to_pattern: Tensor

    @classmethod
    def butterfly(cls, length: int, block_size: int = 64) -> "BlockLayout":
        """Block i sees itself and every i xor 2^k: log2(N) + 1 blocks ("Pixelated Butterfly", ICLR 2022)."""
        num = _num_blocks(length, block_size)
        flips = [0] + [1 << k for k in range(max(num - 1, 0).bit_length())]
        rows, columns = _cross(torch.arange(num), torch.tensor(flips))
        columns = rows ^ columns
        inside = columns < num
        return _build(length, block_size, 1, rows[inside] * num + columns[inside])

    @classmethod
    def dense(cls, length: int, block_size: int = 64) -> "BlockLayout":
        """Every block sees every block."""
        num = _num_blocks(length, block_size)
        return _build(length, block_size, 1, torch.arange(num * num))

    @classmethod
    def local(cls, length: int, window: int, block_size: int = 64) -> "BlockLayout":
        """Block i sees the blocks from i - window to i + window."""
        num = _num_blocks(length, block_size)
        return _build(length, block_size, 1, _band(num, _count("window", window)))

    @classmethod
    def local_global(cls, length: int, window: int, num_global: int, block_size: int = 64) -> "BlockLayout":
        """As `local`, and the first `num_global` blocks see all and are seen by all."""
        num = _num_blocks(length, block_size)
        first = torch.arange(min(_count("num_global", num_global), num))
        rows, columns = _cross(first, torch.arange(num))
        keys = torch.cat([_band(num, _count("window", window)), rows * num + columns, columns * num + rows])
        return _build(length, block_size, 1, keys)

    @classmethod
    def stripes(cls, length: int, stride: int, block_size: int = 64) -> "BlockLayout":
        """Block i sees the blocks whose distance is a multiple of `stride`: i, i +- stride, i +- 2 stride, ..."""
        num = _num_blocks(length, block_size)
        if _count("stride", stride) == 0:
            raise ValueError("stride must be at least 1, got 0.")
        starts, steps = _cross(torch.arange(num), torch.arange(-(-num // stride)) * stride)
        columns = starts % stride + steps
        inside = columns < num
        return _build(length, block_size, 1, starts[inside] * num + columns[inside])

    @classmethod
    def from_mask(cls, block_mask: Tensor, block_size: int) -> "BlockLayout":
        """Take a boolean mask over blocks, (rows, columns) or (patterns, rows, columns); head p follows pattern p."""
        if not isinstance(block_mask, Tensor) or block_mask.dtype != torch.bool or block_mask.dim() not in (2, 3):
            is_tensor = isinstance(block_mask, Tensor)
            shown = f"{block_mask.dtype} {tuple(block_mask.shape)}" if is_tensor else type(block_mask).__name__
            raise ValueError(
                f"block_mask must be bool of shape (rows, columns) or (patterns, rows, columns), got {shown}."
            )
        mask = block_mask[None] if block_mask.dim() == 2 else block_mask
        num_patterns, num, num_columns = mask.shape
        if num != num_columns or num_patterns == 0:
            raise ValueError(f"block_mask must be square with at least one pattern, got {tuple(block_mask.shape)}.")
        _num_blocks(num * block_size, block_size)
        keys = mask.cpu().flatten().nonzero().flatten()
        return _build(num * block_size, block_size, num_patterns, keys).to(block_mask.device)

    @classmethod
    def per_head(cls, layouts: Sequence["BlockLayout"], head_to_pattern: Sequence[int]) -> "BlockLayout":
        """Give head h the layout numbered head_to_pattern[h]; all must have one length and block size."""
        if not layouts or not head_to_pattern:
            raise ValueError("layouts and head_to_pattern must not be empty.")
        first = layouts[0]
        for layout in layouts:
            if (layout.length, layout.block_size) != (first.length, first.block_size):
                raise ValueError(f"layouts must share one length and block size, got {first} and {layout}.")
            if layout.num_patterns != 1:
                raise ValueError(f"layouts must have one pattern each, got {layout}.")
        if not all(0 <= pattern < len(layouts) for pattern in head_to_pattern):
            raise ValueError(f"head_to_pattern must name layouts 0 to {len(layouts) - 1}, got {list(head_to_pattern)}.")
        num = first.num_blocks
        keys = torch.cat([layout._keys() + p * num * num for p, layout in enumerate(layouts)])
        return _build(first.length, first.block_size, len(layouts), keys, head_to_pattern).to(first.device)

    def with_global_end(self, num_global: int) -> "BlockLayout":
        """Return the layout with its last `num_global` blocks seeing all and seen by all, in every pattern.

        For a token at the end that must see everything (a CLS); in a packed batch only sequences of the layout's own
        length have their end there.
        """
        num = self.num_blocks
        last = torch.arange(max(0, num - _count("num_global", num_global)), num)
        rows, columns = _cross(last, torch.arange(num))
        added = torch.cat([rows * num + columns, columns * num + rows])
        keys = torch.cat([self._keys(), *(added + p * num * num for p in range(self.num_patterns))])
        heads = self.head_to_pattern.tolist()
        return _build(self.length, self.block_size, self.num_patterns, keys, heads).to(self.device)

    @property
    def num_blocks(self) -> int:
        """Blocks along one side of the grid."""
        return -(-self.length // self.block_size)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.row_ptr.device

    @property
    def density(self) -> float:
        """Fraction of blocks that exist, averaged over the heads; 0 for an empty grid."""
        num = self.num_blocks
        per_pattern = self.row_ptr[::num].diff().double() if num else torch.zeros(self.num_patterns)
        return float(per_pattern[self.head_to_pattern.long()].mean()) / max(num * num, 1)

    def to_mask(self) -> Tensor:
        """Return the dense boolean mask over blocks (patterns, rows, columns)."""
        num = self.num_blocks
        mask = torch.zeros(self.num_patterns * num * num, dtype=torch.bool)
        mask[self._keys()] = True
        return mask.view(self.num_patterns, num, num).to(self.device)

    def clip(self, length: int) -> "BlockLayout":
        """Return the layout of the first `length` tokens; ValueError if it is shorter than that."""
        num, clipped = self.num_blocks, _num_blocks(length, self.block_size)
        if clipped > num:
            raise ValueError(f"length must be at most the layout's {self.length}, got {length}.")
        keys = self._keys()
        pattern, row, column = keys // max(num * num, 1), keys // max(num, 1) % max(num, 1), keys % max(num, 1)
        inside = (row < clipped) & (column < clipped)
        keys = ((pattern * clipped + row) * clipped + column)[inside]
        heads = self.head_to_pattern.tolist()
        return _build(length, self.block_size, self.num_patterns, keys, heads).to(self.device)

    def to(self, device: torch.device | str) -> "BlockLayout":
        """Return the layout with its tensors on the device; itself if they are there."""
        if torch.device(device) == self.device:
            return self
        tensors = (self.row_ptr, self.col_idx, self.col_ptr, self.row_idx, self.head_to_pattern)
        return BlockLayout(self.length, self.block_size, self.num_patterns, *(x.to(device) for x in tensors))

    def _keys(self) -> Tensor:
        """Return (pattern N + row) N + column of each block, ascending, int64 on the CPU."""
        row_ptr, num = self.row_ptr.cpu().long(), self.num_blocks
        rows = torch.repeat_interleave(torch.arange(self.num_patterns * num), row_ptr.diff())
        return rows * num + self.col_idx.cpu().long()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        if (self.length, self.block_size) != (other.length, other.block_size):
            return False
        pairs = zip(
            (self.row_ptr, self.col_idx, self.head_to_pattern),
            (other.row_ptr, other.col_idx, other.head_to_pattern),
            strict=True,
        )
        return all(torch.equal(mine.cpu(), its.cpu()) for mine, its in pairs)

    def __hash__(self) -> int:
        return hash((self.length, self.block_size, self.num_patterns, len(self.col_idx)))

    def __repr__(self) -> str:
        heads = len(self.head_to_pattern)
        shared = "all heads" if heads == 1 else f"{heads} heads"
        return (
            f"BlockLayout(length={self.length}, block_size={self.block_size}, num_blocks={self.num_blocks}, "
            f"patterns={self.num_patterns} for {shared}, density={self.density:.4g}, device={self.device})"
        )


def _count(name: str, value: int) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a non-negative int, got {value!r}.")
    return value


def _num_blocks(length: int, block_size: int) -> int:
    """Return the blocks that cover the length; ValueError for sizes that the dropout's tiles do not divide."""
    if not isinstance(block_size, int) or block_size <= 0 or block_size % 32:
        raise ValueError(f"block_size must be a positive multiple of 32, got {block_size!r}.")
    return -(-_count("length", length) // block_size)


def _cross(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return all pairs, flattened."""
    return rows.repeat_interleave(len(columns)), columns.repeat(len(rows))


def _band(num: int, window: int) -> Tensor:
    window = min(window, num)
    rows, columns = _cross(torch.arange(num), torch.arange(-window, window + 1))
    columns = rows + columns
    inside = (columns >= 0) & (columns < num)
    return rows[inside] * num + columns[inside]


def _build(
    length: int, block_size: int, num_patterns: int, keys: Tensor, head_to_pattern: Sequence[int] | None = None
) -> BlockLayout:
    """Make a layout from the keys (pattern N + row) N + column of its blocks, in any order, repeats allowed."""
    num = -(-length // block_size)
    keys = torch.unique(keys.long())
    line, column = keys // max(num, 1), keys % max(num, 1)
    pattern, row = line // max(num, 1), line % max(num, 1)
    # Keys ascend by row, so a stable sort by column leaves the rows of each column ascending.
    column_line, order = torch.sort(pattern * num + column, stable=True)
    heads = list(range(num_patterns)) if head_to_pattern is None else list(head_to_pattern)
    return BlockLayout(
        length,
        block_size,
        num_patterns,
        _pointers(line, num_patterns * num),
        column.int(),
        _pointers(column_line, num_patterns * num),
        row[order].int(),
        torch.tensor(heads, dtype=torch.int32),
    )


def _pointers(lines: Tensor, num_lines: int) -> Tensor:
    counts = torch.bincount(lines, minlength=num_lines)
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
