"""Keys that stand for several tokens, by a pair of features of queries and keys: no kernel needs to know of it."""

from __future__ import annotations

import torch
from torch import Tensor


def spare_pair(head_dim: int) -> tuple[int, int]:
    """Return the features that carry a key's weight: those of the slowest rotary pair, the last of either half."""
    return head_dim // 2 - 1, head_dim - 1


def with_weights(
    q_THD: Tensor, k_THD: Tensor, log_weight_T: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return q and k whose scores, without the spare pair's own part, have log_weight_T[t] (float32) added for key t.

    softmax_scale (q . k + extra) = score + log weight where extra = log weight / softmax_scale. The pair of q is (1, 1)
    and that of k holds extra in two parts: the nearest whole number, exact in bfloat16 up to 256, and the rest. Without
    weights the pair of k is (0, 0), every key counts once, and nothing but q . k over the other features is left.
    """
    first, second = spare_pair(q_THD.shape[-1])
    feature_D = torch.arange(q_THD.shape[-1], device=q_THD.device)
    spare_D = (feature_D == first) | (feature_D == second)
    pair: Tensor | float = 0.0
    if log_weight_T is not None:
        extra_T11 = (log_weight_T / softmax_scale)[:, None, None]
        whole_T11 = extra_T11.round()
        pair = torch.where(feature_D == first, whole_T11, extra_T11 - whole_T11)
    # A float32 pair makes the choice float32: each feature is rounded once, or was exact.
    return torch.where(spare_D, 1.0, q_THD).to(q_THD.dtype), torch.where(spare_D, pair, k_THD).to(k_THD.dtype)
