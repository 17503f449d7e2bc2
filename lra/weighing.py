"""Keys that stand for several tokens, by extra features of queries and keys: no kernel needs to know of weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EXTRA_FEATURES = 8
"""Kernels read head dims that are multiples of 8."""


def with_weights(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, log_weight_T: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v with EXTRA_FEATURES more, such that every score of key t has log_weight_T[t] (float32) added.

    softmax_scale (q . k + extra) = score + log weight where extra = log weight / softmax_scale. Two features carry it:
    the nearest whole number, exact in bfloat16 up to 256, and the rest. The output's extra features are 0.
    """
    extra_T = log_weight_T / softmax_scale
    whole_T = extra_T.round()
    pair_T12 = torch.stack((whole_T, extra_T - whole_T), dim=-1).to(k_THD.dtype)[:, None]
    ones_THX = torch.ones_like(q_THD[..., :EXTRA_FEATURES])
    extra_THX = F.pad(pair_T12, (0, EXTRA_FEATURES - 2)).expand(-1, k_THD.shape[1], -1)
    return (
        torch.cat((q_THD, ones_THX), dim=-1),
        torch.cat((k_THD, extra_THX), dim=-1),
        F.pad(v_THD, (0, EXTRA_FEATURES)),
    )
