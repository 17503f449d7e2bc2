"""Block-sparse FlashAttention: attention over the blocks that a BlockLayout names, skipping all others.

The public functions check their arguments and go through an autograd class to the operators of ops.py.
"""

from typing import Any

import torch
from torch import Tensor

from attention_kernels import ops
from attention_kernels.checks import (
    check_cu_seqlens,
    check_dropout_seed,
    check_inputs,
    check_key_lengths,
    check_layout,
    check_max_seqlen,
    check_numbers,
)
from attention_kernels.flash import autocast_inputs, call_seed, distinct, refuse_second_backward
from attention_kernels.layouts import BlockLayout

__all__ = ["block_sparse_attention", "block_sparse_attention_varlen"]

_Layout = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention over the layout's blocks; the other blocks are never read.

    q, k and v are (B, L, H, D) with one length. The layout may be longer than L: it is clipped. Everything else is
    as in `flash_attention`; a layout with every block gives its very bits. Raises ValueError naming the argument.

    Examples
    --------
    >>> q = k = v = torch.zeros(1, 256, 2, 16)
    >>> block_sparse_attention(q, k, v, BlockLayout.butterfly(256)).shape
    torch.Size([1, 256, 2, 16])
    """
    check_inputs(q, k, v, rank=4)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k must have q's length {q.shape[1]} (layouts are square), got {k.shape[1]}.")
    check_key_lengths(key_lengths, k)
    check_layout(layout, q, "q's length", q.shape[1])
    form = (key_lengths, None, q.shape[1])
    return _attend(q, k, v, layout, form, dropout_p, dropout_seed, softmax_scale, causal, deterministic, return_lse)


def block_sparse_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return attention over the layout's blocks within each packed sequence; q, k and v are (T, H, D).

    The layout is laid over each sequence from its first token and clipped at its end, so it may be longer than
    `max_seqlen`. cu_seqlens (S + 1,) and the rest are as in `flash_attention_varlen`.
    """
    check_inputs(q, k, v, rank=3)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's {q.shape[0]} rows (layouts are square), got {k.shape[0]}.")
    check_cu_seqlens("cu_seqlens", cu_seqlens, q)
    check_max_seqlen("max_seqlen", max_seqlen)
    check_layout(layout, q, "max_seqlen", max_seqlen)
    form = (None, cu_seqlens, max_seqlen)
    return _attend(q, k, v, layout, form, dropout_p, dropout_seed, softmax_scale, causal, deterministic, return_lse)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    form: tuple[Tensor | None, Tensor | None, int],
    dropout_p: float,
    dropout_seed: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    check_numbers(dropout_p, softmax_scale)
    check_dropout_seed(dropout_seed, q)
    q, k, v = distinct(*autocast_inputs(q, k, v))
    seed = call_seed(dropout_p, dropout_seed, q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    blocks = (layout.row_ptr, layout.col_idx, layout.col_ptr, layout.row_idx, layout.head_to_pattern)
    out, lse = _BlockSparse.apply(
        q, k, v, *blocks, layout.num_blocks, layout.block_size, *form, seed, dropout_p, scale, causal, deterministic
    )
    return (out, lse) if return_lse else out


class _BlockSparse(torch.autograd.Function):
    """Ties sparse_forward and sparse_backward together for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        row_ptr: Tensor,
        col_idx: Tensor,
        col_ptr: Tensor,
        row_idx: Tensor,
        head_to_pattern: Tensor,
        num_blocks: int,
        block_size: int,
        key_lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        seed: Tensor | None,
        dropout_p: float,
        scale: float,
        causal: bool,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        blocks = (row_ptr, col_idx, col_ptr, row_idx, head_to_pattern)
        sizes = (num_blocks, block_size)
        form = (key_lengths, cu_seqlens, max_seqlen)
        rule = (seed, dropout_p, scale, causal)
        out, lse = ops.call("sparse_forward", q, k, v, *blocks, *sizes, *form, *rule)
        ctx.save_for_backward(q, k, v, out, lse, *blocks, key_lengths, cu_seqlens, seed)
        ctx.numbers = (sizes, max_seqlen, dropout_p, scale, causal, deterministic)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *blocks, key_lengths, cu_seqlens, seed = ctx.saved_tensors
        sizes, max_seqlen, dropout_p, scale, causal, deterministic = ctx.numbers
        refuse_second_backward()
        dout = torch.zeros_like(out) if dout is None else dout
        saved = (q, k, v, out, lse, dout, dlse)
        form = (key_lengths, cu_seqlens, max_seqlen)
        rule = (seed, dropout_p, scale, causal, deterministic)
        grads = ops.call("sparse_backward", *saved, *blocks, *sizes, *form, *rule)
        return *grads, *(None,) * 15
