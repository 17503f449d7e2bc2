"""FlashAttention for fixed and packed batches: exact attention that never holds the score matrix.

The public functions check their arguments and go through an autograd class to the operators of ops.py; which
implementation runs (CUDA kernels or the tiled PyTorch form) is decided there, call by call.
"""

from typing import Any

import torch
from torch import Tensor

from attention_kernels import ops
from attention_kernels.checks import (
    check_dropout_seed,
    check_inputs,
    check_key_lengths,
    check_numbers,
    check_varlen,
)
from attention_kernels.philox import draw_seed

__all__ = ["flash_attention", "flash_attention_varlen"]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax(q k^T scale) v in linear memory.

    Parameters
    ----------
    q
        (B, Lq, H, D), float16, bfloat16, float32 or float64; any strides (a view of a fused projection will do).
    k, v
        (B, Lk, H, D), same dtype and device.
    dropout_p
        Probability of dropping a weight, in [0, 1); rounded to a multiple of 1/256 (see philox.py).
    dropout_seed
        int64 tensor of two on q's device that fixes the mask; drawn from torch's generator when None.
    softmax_scale
        Factor of the scores; 1 / sqrt(D) when None.
    causal
        Row r sees column c only if c <= r + Lk - Lq (the ends are aligned).
    key_lengths
        int32 or int64 (B,): the keys of sample b from key_lengths[b] on do not exist.
    deterministic
        Ask for a backward whose sums have one order (the tiled form always has).
    return_lse
        Return (out, lse), lse (B, H, Lq) the log-sum-exp of each row's scores, float32 (float64 for float64
        inputs), differentiable.

    Returns
    -------
    out (B, Lq, H, D) in q's dtype. A row that may attend to nothing gives out 0, lse -inf, gradient 0.

    Raises ValueError naming the argument for anything else; RuntimeError for a second backward.

    Examples
    --------
    >>> q = k = v = torch.zeros(2, 5, 1, 8)
    >>> flash_attention(q, k, v, key_lengths=torch.tensor([5, 3])).shape
    torch.Size([2, 5, 1, 8])
    """
    check_inputs(q, k, v, rank=4)
    check_key_lengths(key_lengths, k)
    form = (key_lengths, None, None, q.shape[1], k.shape[1])
    return _attend(q, k, v, form, dropout_p, dropout_seed, softmax_scale, causal, deterministic, return_lse)


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax(q k^T scale) v for sequences packed one after another, each attending to itself alone.

    q is (Tq, H, D), k and v are (Tk, H, D); sequence s has the query rows cu_seqlens_q[s] to cu_seqlens_q[s + 1]
    and the key rows of cu_seqlens_k likewise (int32 or int64, S + 1 entries, starting at 0). Rows after the last
    offset belong to no sequence: out 0, lse -inf, gradient 0, so a buffer may have a fixed size. The maxima may be
    upper bounds. lse is (H, Tq). Everything else is as in `flash_attention`; causal aligns the ends of each
    sequence's queries and keys.
    """
    check_inputs(q, k, v, rank=3)
    check_varlen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q)
    # Why: torch.compile refuses one tensor as two arguments of an autograd class; None stands for "the same".
    form = (None, cu_seqlens_q, None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attend(q, k, v, form, dropout_p, dropout_seed, softmax_scale, causal, deterministic, return_lse)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: tuple[Tensor | None, Tensor | None, Tensor | None, int, int],
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
    out, lse = _Flash.apply(q, k, v, *form, seed, dropout_p, scale, causal, deterministic)
    return (out, lse) if return_lse else out


def autocast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in autocast's dtype inside torch.autocast, as torch's own attention does; float64 stays."""
    if not torch.is_autocast_enabled(q.device.type) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def distinct(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views where two of the inputs are one tensor: torch.compile refuses it twice in an autograd class."""
    k = k.view_as(k) if k is q else k
    return q, k, v.view_as(v) if v is q or v is k else v


def call_seed(dropout_p: float, dropout_seed: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the seed that a call uses: None without dropout, else the caller's or a fresh one."""
    if dropout_p == 0.0:
        return None
    return draw_seed(q.device) if dropout_seed is None else dropout_seed


class _Flash(torch.autograd.Function):
    """Ties flash_forward and flash_backward together for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_lengths: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        seed: Tensor | None,
        dropout_p: float,
        scale: float,
        causal: bool,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        lengths = (key_lengths, cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)
        rule = (seed, dropout_p, scale, causal)
        out, lse = ops.call("flash_forward", q, k, v, *lengths, max_seqlen_q, max_seqlen_k, *rule)
        ctx.save_for_backward(q, k, v, out, lse, *lengths, seed)
        ctx.numbers = (max_seqlen_q, max_seqlen_k, dropout_p, scale, causal, deterministic)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *lengths, seed = ctx.saved_tensors
        max_seqlen_q, max_seqlen_k, dropout_p, scale, causal, deterministic = ctx.numbers
        refuse_second_backward()
        dout = torch.zeros_like(out) if dout is None else dout
        saved = (q, k, v, out, lse, dout, dlse)
        rule = (seed, dropout_p, scale, causal, deterministic)
        grads = ops.call("flash_backward", *saved, *lengths, max_seqlen_q, max_seqlen_k, *rule)
        return *grads, *(None,) * 10


def refuse_second_backward() -> None:
    """Raise RuntimeError where the backward itself is being recorded for differentiation (create_graph=True)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "attention_kernels has no second backward: the gradient of attention cannot be differentiated again. "
            "Call backward or torch.autograd.grad without create_graph=True, or use standard_attention."
        )
