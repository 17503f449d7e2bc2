"""Standard attention: the scores of every pair of tokens are held in memory, and autograd differentiates.

The baseline that flash_attention replaces, with the same arguments, dropout mask and treatment of rows
without keys; memory grows with the product of the lengths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_kernels.checks import check_dropout_seed, check_inputs, check_key_lengths, check_layout, check_numbers
from attention_kernels.flash import autocast_inputs, call_seed
from attention_kernels.layouts import BlockLayout
from attention_kernels.masks import dropout_factors, layout_rows, visible_mask

__all__ = ["attention_rows", "standard_attention"]


def standard_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    torch_dropout: bool = False,
) -> Tensor:
    """Return softmax(q k^T scale) v, (B, Lq, H, D) in q's dtype; arguments as in `flash_attention`.

    Products are taken in q's dtype and the softmax in float32 (float64 for float64), as attention in half
    precision usually is. `torch_dropout` draws the mask by torch's own dropout, as a baseline should: the mask of
    `flash_attention` costs more in PyTorch's operators than all the rest. Then there is no dropout_seed.
    """
    check_inputs(q, k, v, rank=4)
    check_key_lengths(key_lengths, k)
    check_numbers(dropout_p, softmax_scale)
    check_dropout_seed(dropout_seed, q)
    if torch_dropout and dropout_seed is not None:
        raise ValueError("dropout_seed must be None with torch_dropout, which draws from torch's own generator.")
    q, k, v = autocast_inputs(q, k, v)
    seed = None if torch_dropout else call_seed(dropout_p, dropout_seed, q)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    visible = visible_mask(q.shape[1], k.shape[1], q.device, causal=causal, key_lengths=key_lengths)
    if key_lengths is not None:
        # Why: a weight of 0 times a NaN in the padding would be NaN.
        padding = (torch.arange(k.shape[1], device=k.device) >= key_lengths[:, None])[:, :, None, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    k, v, visible = _aligned(k, v, visible)
    scores = torch.matmul(q.transpose(1, 2) * scale, k.permute(0, 2, 3, 1))
    weights = _softmax(scores, visible).to(q.dtype)
    if torch_dropout:
        weights = F.dropout(weights, dropout_p)
    elif seed is not None:
        sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        weights = weights * dropout_factors(seed, dropout_p, *sizes, weights.dtype)
    return torch.matmul(weights, v.transpose(1, 2)).transpose(1, 2)


def _aligned(k: Tensor, v: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return k, v and the mask with keys that nobody sees up to a multiple of 8.

    Why: products and vector loads of 16-bit numbers want rows of scores that begin at multiples of 16 bytes, and with a
    CLS slot a picture of 1,024 pixels has 1,025 keys.
    """
    missing = -k.shape[1] % 8
    if missing == 0:
        return k, v, visible
    if visible is None:
        visible = torch.ones(1, 1, 1, k.shape[1], dtype=torch.bool, device=k.device)
    k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (k, v))
    return k, v, F.pad(visible, (0, missing))


def _softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Return the weights of each row; a row that may see nothing has weights 0 and gradient 0."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if visible is None:
        return scores.softmax(-1, dtype=dtype)
    # Why the second mask: a softmax over -inf alone is NaN, in the gradient too.
    some = visible.any(-1, keepdim=True)
    weights = scores.masked_fill(~visible & some, float("-inf")).softmax(-1, dtype=dtype)
    return weights.masked_fill(~some, 0.0)


def attention_rows(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    rows: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    layout: BlockLayout | None = None,
) -> Tensor:
    """Return the attention probabilities of chosen query rows, (B, H, R, Lk) float32, for pictures.

    q (B, Lq, H, D), k (B, Lk, H, D) and lse (B, H, Lq) as from `flash_attention(..., return_lse=True)` with the same
    softmax_scale, causal and key_lengths, or from `block_sparse_attention` with the same layout; rows (R,) int64, in
    [0, Lq). Dropout is not applied. Not differentiable.
    """
    check_inputs(q, k, k, rank=4)
    check_key_lengths(key_lengths, k)
    check_numbers(0.0, softmax_scale)
    if layout is not None:
        check_layout(layout, q, "the lengths' maximum", max(q.shape[1], k.shape[1]))
    expected = (q.shape[0], q.shape[2], q.shape[1])
    if lse.shape != expected:
        raise ValueError(f"lse must have shape (batch, heads, query length) {expected}, got {tuple(lse.shape)}.")
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != q.device:
        raise ValueError(f"rows must be an int64 tensor (rows,) on q's device, got {rows.dtype} {tuple(rows.shape)}.")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < q.shape[1]:
        raise ValueError(f"rows must lie in [0, {q.shape[1]}), got {int(rows.min())} to {int(rows.max())}.")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    with torch.no_grad():
        scores = torch.einsum("brhd,bmhd->bhrm", q[:, rows].float(), k.float()) * scale
        chosen = lse[:, :, rows, None].float()
        probabilities = (scores - chosen).exp().masked_fill(torch.isneginf(chosen), 0.0)
        visible = visible_mask(q.shape[1], k.shape[1], q.device, causal=causal, key_lengths=key_lengths)
        if visible is not None:
            probabilities.masked_fill_(~(visible if visible.shape[2] == 1 else visible[:, :, rows]), 0.0)
        if layout is not None:
            probabilities.masked_fill_(~layout_rows(layout, rows, k.shape[1], q.shape[2]), 0.0)
        return probabilities
