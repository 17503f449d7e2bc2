"""Packed sequences: T rows of all sequences one after another, their boundaries, and the way to a padded form and back.

Padding and unpadding are index copies along unique rows, so their backward is a gather: no atomics, bit-equal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Where each sequence of a packed batch lies. S sequences, T rows."""

    cu_seqlens: Tensor
    """(S+1,) int32: sequence s holds rows cu_seqlens[s] to cu_seqlens[s+1]-1."""
    bound: int
    """Rows of the longest sequence, or an upper bound."""
    padded_row_T: Tensor
    """(T,) int64: the row's place in the padded (S * max_length) form; S * max_length for rows after the last."""
    is_uniform: bool = False
    """Whether every sequence has max_length rows and none follow, so that packed and padded are the same memory."""

    @property
    def max_length(self) -> int:
        """Rows of the longest sequence, or an upper bound.

        Where all are whole the shapes tell it: compiled code takes any shape, but another number is another code.
        """
        return self.padded_row_T.shape[0] // self.num_sequences if self.is_uniform else self.bound

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.cu_seqlens.shape[0] - 1


def pack_info(cu_seqlens: Tensor, max_length: int, num_rows: int, *, uniform: bool = False) -> Packed:
    """Return the Packed of `num_rows` rows with boundaries `cu_seqlens`. No host synchronisation.

    `uniform` is the caller's word that every sequence has max_length rows: the shapes alone do not tell it, for
    max_length may be an upper bound and rows may follow the last sequence.
    """
    rows = torch.arange(num_rows, device=cu_seqlens.device)
    ends = cu_seqlens[1:].to(torch.int64)
    sequence_T = torch.searchsorted(ends, rows, right=True)
    num_sequences = cu_seqlens.shape[0] - 1
    if uniform:
        max_length = num_rows // num_sequences  # the same number, from a shape
    starts = cu_seqlens.to(torch.int64)[sequence_T.clamp(max=num_sequences - 1)]
    padded_row_T = torch.where(
        sequence_T < num_sequences, sequence_T * max_length + rows - starts, num_sequences * max_length
    )
    return Packed(cu_seqlens, max_length, padded_row_T, uniform)


def pad(x_T: Tensor, packed: Packed) -> Tensor:
    """Turn (T, ...) into (S, max_length, ...) with zeros behind each sequence."""
    shape = (packed.num_sequences, packed.max_length, *x_T.shape[1:])
    if packed.is_uniform:
        return x_T.view(shape)
    # One spare row takes what lies after the last sequence.
    flat = x_T.new_zeros(shape[0] * shape[1] + 1, *x_T.shape[1:])
    return flat.index_copy(0, packed.padded_row_T, x_T)[:-1].view(shape)


def unpad(x_SL: Tensor, packed: Packed) -> Tensor:
    """Turn (S, max_length, ...) back into (T, ...); rows after the last sequence are zero."""
    flat = x_SL.reshape(-1, *x_SL.shape[2:])
    if packed.is_uniform:
        return flat
    spare = flat.new_zeros(1, *flat.shape[1:])
    return torch.cat([flat, spare]).index_select(0, packed.padded_row_T)


def real_rows(packed: Packed) -> Tensor:
    """Return (S, max_length) booleans: which rows of the padded form hold a token."""
    lengths = packed.cu_seqlens.diff()
    return torch.arange(packed.max_length, device=lengths.device) < lengths[:, None]


def take_rows(x_T: Tensor, index_K: Tensor) -> Tensor:
    """Return the rows index_K (int64) of x_T, all different; an index of T, which may repeat, gives an unused row.

    The gradient is copied back to each row's place: no sums, no atomics, the same bits every time.
    """
    taken: Tensor = _TakeRows.apply(x_T, index_K)
    return taken


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_T: Tensor, index_K: Tensor) -> Tensor:
        ctx.save_for_backward(index_K)
        ctx.num_rows = x_T.shape[0]
        return x_T.index_select(0, index_K.clamp(max=x_T.shape[0] - 1))

    @staticmethod
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor, None]:
        (index_K,) = ctx.saved_tensors
        # One spare row takes what belongs to no row.
        grad = grad_K.new_zeros(ctx.num_rows + 1, *grad_K.shape[1:])
        return grad.index_copy(0, index_K, grad_K)[:-1], None


# A GPU spreads a table's gradient over copies of it, so many rows in all: most tokens may be one symbol (an image's
# black), and hundreds of thousands of additions to one row would wait for one another.
_SPREAD_ROWS, _MOST_COPIES = 1 << 14, 64


def look_up(table_VE: Tensor, index_T: Tensor) -> Tensor:
    """Return the rows index_T (int64) of a table, (T, E), as F.embedding does."""
    found: Tensor = _LookUp.apply(table_VE, index_T)
    return found


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_VE: Tensor, index_T: Tensor) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.num_rows = table_VE.shape[0]
        return table_VE.index_select(0, index_T)

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None]:
        (index_T,) = ctx.saved_tensors
        copies = max(1, min(_MOST_COPIES, _SPREAD_ROWS // ctx.num_rows)) if grad_TE.is_cuda else 1
        if copies > 1:
            index_T = index_T + ctx.num_rows * (torch.arange(index_T.shape[0], device=index_T.device) % copies)
        sums = grad_TE.new_zeros(copies * ctx.num_rows, grad_TE.shape[1]).index_add(0, index_T, grad_TE)
        return sums.view(copies, ctx.num_rows, -1).sum(0), None
