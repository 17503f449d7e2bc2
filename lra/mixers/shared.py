"""What the approximate backends share: padded rows with a mask of keys, a softmax in parts, balanced clusters.

Shape letters beside model.py's: L rows of the longest sequence, M keys of a row, N clusters of C rows, R rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lra.attention import Backend, KeyRows
from lra.config import AttentionConfig
from lra.packing import Packed, pad, real_rows, unpad

EMPTY = -1e30
"""Stands for the largest score of a row that sees no key: finite, so that differences are no NaN."""


class Rows(NamedTuple):
    """A batch as rectangles. Padded rows and rows that are no key hold zeros in k and v."""

    q_SHLD: Tensor
    k_SHLD: Tensor
    v_SHLE: Tensor
    """E is D rounded up to a multiple of 8: the features past D are zero (lra/model.py)."""
    real_SL: Tensor
    """Booleans: the row holds a token."""
    key_SL: Tensor
    """Booleans: the row may be attended to."""


class Mixer(Backend):
    """An approximate backend: subclasses compute `mix` on rectangles; padding and unpadding live here."""

    static, linear_memory = True, True

    def __init__(self, config: AttentionConfig, num_heads: int, head_dim: int, max_length: int) -> None:
        super().__init__(config, num_heads, head_dim, max_length)
        self.num_heads, self.head_dim, self.max_length = num_heads, head_dim, max_length

    def mix(self, rows: Rows, dropout_p: float, softmax_scale: float) -> Tensor:
        """Return the output (S, H, L, E); padded rows may hold anything finite."""
        raise TypeError(f"{type(self).__name__} must define mix")

    def forward(
        self,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        packed: Packed,
        keys: KeyRows | None,
        *,
        dropout_p: float,
        dropout_seed: Tensor,
        softmax_scale: float,
    ) -> Tensor:
        """Return the attention output (T, H, D). Dropout draws from torch's own generator, not from dropout_seed."""
        if q_THD.shape[0] == 0:
            return v_THD
        real_SL = key_SL = real_rows(packed)
        if keys is not None:
            is_key_T = torch.zeros(q_THD.shape[0], dtype=torch.bool, device=q_THD.device)
            is_key_T = is_key_T.index_fill(0, keys.index_K.to(torch.int64), True)
            k_THD, v_THD = (x.masked_fill(~is_key_T[:, None, None], 0.0) for x in (k_THD, v_THD))
            key_SL = pad(is_key_T, packed)
        # Features past head_dim are zeros for the kernels' sake; a feature map would make something of them.
        q_SHLD, k_SHLD = (pad(x[..., : self.head_dim], packed).transpose(1, 2) for x in (q_THD, k_THD))
        rows = Rows(q_SHLD, k_SHLD, pad(v_THD, packed).transpose(1, 2), real_SL, key_SL)
        out_SHLE = self.mix(rows, dropout_p, softmax_scale)
        return unpad(out_SHLE.transpose(1, 2), packed).to(v_THD.dtype)


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.float()


class Part(NamedTuple):
    """A softmax over some of the keys, not yet divided: several parts of one row can be put together."""

    sum_LE: Tensor
    """Values weighted by exp(score - top), (..., E)."""
    weight_L1: Tensor
    """Sum of the weights without dropout, (..., 1); 0 where the row sees no key."""
    top_L1: Tensor
    """Largest score, (..., 1), or EMPTY; no gradient, because it cancels."""


def softmax_part(scores: Tensor, v: Tensor, dropout_p: float) -> Part:
    """Return the part of `scores` (..., L, M), -inf where a key is not seen, over values (..., M, E)."""
    scores = wide(scores)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=EMPTY)
    weights = (scores - top).exp()
    kept = F.dropout(weights, dropout_p) if dropout_p else weights
    return Part(wide(kept.to(v.dtype) @ v), weights.sum(-1, keepdim=True), top)


def join(part: Part, dim: int | None = None) -> Tensor:
    """Return the output of a softmax over all keys of the parts along `dim` (None: of the one part); 0 without keys."""
    total, weight = part.sum_LE, part.weight_L1
    if dim is not None:
        factor = (part.top_L1 - part.top_L1.amax(dim, keepdim=True)).exp()
        total, weight = (total * factor).sum(dim), (weight * factor).sum(dim)
    # A row that sees a key has weight 1 or more.
    return total / weight.clamp(min=0.5)


class Clusters(NamedTuple):
    """Sorted rows cut into clusters of nearly equal size: n of l rows gives cluster c ranks c l // n to (c+1) l // n.

    The cut depends on a sequence's own length only, never on its neighbours' padding.
    """

    length_S: Tensor
    """Rows that are cut, int64."""
    num_S: Tensor
    """Clusters of each sequence, int64, 1 or more."""

    def ranks(self, cluster_SN: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return the ranks of each cluster's rows, (S, N, size), and which of these places are taken."""
        l_S1, n_S1 = self.length_S[:, None], self.num_S[:, None]
        start_SN, stop_SN = cluster_SN * l_S1 // n_S1, (cluster_SN + 1) * l_S1 // n_S1
        rank_SNC = start_SN[:, :, None] + torch.arange(size, device=start_SN.device)
        taken_SNC = (rank_SNC < stop_SN[:, :, None]) & (cluster_SN < n_S1)[:, :, None]
        return rank_SNC.masked_fill(~taken_SNC, 0), taken_SNC

    def places(self, rank_SX: Tensor, size: int) -> Tensor:
        """Return the place (cluster * size + slot) of each rank, (S, X); 0 for ranks past the length."""
        l_S1, n_S1 = self.length_S[:, None].clamp(min=1), self.num_S[:, None]
        cluster_SX = ((rank_SX + 1) * n_S1 - 1) // l_S1
        place_SX = cluster_SX * size + rank_SX - cluster_SX * l_S1 // n_S1
        return place_SX.masked_fill(rank_SX >= l_S1, 0)


def take(x_SHLD: Tensor, index_SHX: Tensor) -> Tensor:
    """Return rows index_SHX of each sequence and head, (S, H, *X, D); the index's trailing shape is kept."""
    num_rows = x_SHLD.shape[2]
    first = torch.arange(x_SHLD.shape[0] * x_SHLD.shape[1], device=x_SHLD.device) * num_rows
    flat = index_SHX + first.view(*x_SHLD.shape[:2], *[1] * (index_SHX.ndim - 2))
    return x_SHLD.reshape(-1, x_SHLD.shape[3]).index_select(0, flat.flatten()).view(*index_SHX.shape, -1)


def rows_at(order_SHRL: Tensor, rank_SNC: Tensor) -> Tensor:
    """Return the rows at these ranks, (S, H, R, N, C)."""
    index = rank_SNC.flatten(1)[:, None, None].expand(*order_SHRL.shape[:3], -1)
    return order_SHRL.gather(-1, index).unflatten(-1, rank_SNC.shape[1:])


def back(part: Part, order_SHRL: Tensor, clusters: Clusters, size: int) -> Part:
    """Turn a part with rows in clusters (S, H, R, N, C, .) into one with rows in their sequence (S, H, R, L, .)."""
    rank_SHRL = order_SHRL.argsort(-1)
    place_SHRL = clusters.places(rank_SHRL.flatten(1), size).view_as(rank_SHRL)
    rounds = rank_SHRL.shape[1:3]

    def unsorted(x: Tensor) -> Tensor:
        return take(x.flatten(1, 2).flatten(2, 3), place_SHRL.flatten(1, 2)).unflatten(1, rounds)

    return Part(unsorted(part.sum_LE), unsorted(part.weight_L1), unsorted(part.top_L1))
