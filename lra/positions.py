"""Position information: tables added to the tokens, and rotations of queries and keys.

A CLS row has no place in the text or image: it takes the last row of a table and no rotation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lra.packing import look_up


def sinusoidal_table(num_rows: int, width: int, base: float = 10_000.0) -> Tensor:
    """Return (num_rows, width) float32 with sine and cosine interleaved (Vaswani et al. 2017, section 3.5).

    table[p, 2i] = sin(p / base^(2i/width)), table[p, 2i+1] = cos(p / base^(2i/width)).
    """
    frequency = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-torch.log(torch.tensor(base)) / width))
    angle = torch.arange(num_rows, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


class PositionTable(nn.Module):
    """Adds a learned or fixed vector for each position; the CLS row, if any, is the last of the table."""

    def __init__(self, kind: str, num_positions: int, width: int, *, cls: bool) -> None:
        super().__init__()
        self.num_positions = num_positions
        num_rows = num_positions + (1 if cls else 0)
        if kind == "learned":
            self.table = nn.Parameter(torch.empty(num_rows, width).normal_(std=0.02))
        else:
            self.register_buffer("table", sinusoidal_table(num_rows, width), persistent=False)

    def forward(self, positions_T: Tensor) -> Tensor:
        """Return (T, E) vectors for int64 positions; position num_positions is the CLS row."""
        return look_up(self.table, positions_T)


def rotary_angles(positions_T: Tensor, head_dim: int, base: float) -> Tensor:
    """Return (T, head_dim / 2) angles p * base^(-2i/head_dim) of 1-D rotary positions (Su et al. 2021, eq. 15)."""
    index = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32)
    return positions_T.float()[:, None] * base ** (-index / head_dim)


def axial_rotary_angles(positions_T: Tensor, columns: int, head_dim: int, base: float) -> Tensor:
    """Return (T, head_dim / 2) angles: the first half turns with the row, the second with the column, in pixels."""
    row = rotary_angles(positions_T // columns, head_dim // 2, base)
    column = rotary_angles(positions_T % columns, head_dim // 2, base)
    return torch.cat((row, column), dim=1)


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Turn each pair (x[d], x[d + D/2]) by its angle; cos and sin have shape (T, 1, D/2)."""
    a, b = x_THD.float().chunk(2, dim=-1)
    return torch.cat((a * cos_T1D - b * sin_T1D, a * sin_T1D + b * cos_T1D), dim=-1).to(x_THD.dtype)


# Length of each (pair of features)'s bias. The content part of a query starts near 0.58 a feature, so with the QK-norm
# most of the score is position at first; training moves it freely, for these are ordinary biases.
LOCAL_LENGTH = 2.0
_GOLDEN_TURN = math.pi * (3.0 - math.sqrt(5.0))


def local_offsets(layer: int, num_heads: int, distance: float, *, axial: bool) -> list[tuple[float, float]]:
    """Return where each head of a layer first looks, as (rows, columns) from its own place; 1-D: (0, tokens).

    In the plane the heads of a layer stand evenly around the circle and each layer is turned by the golden angle; on a
    line they look back and ahead in turn.
    """
    if not axial:
        return [(0.0, distance if (head + layer) % 2 else -distance) for head in range(num_heads)]
    angles = [layer * _GOLDEN_TURN + 2.0 * math.pi * head / num_heads for head in range(num_heads)]
    return [(distance * math.sin(angle), distance * math.cos(angle)) for angle in angles]


def local_biases(
    offsets: list[tuple[float, float]], head_dim: int, base: float, *, axial: bool
) -> tuple[Tensor, Tensor]:
    """Return biases of queries and keys, each (H * head_dim,), whose rotary score peaks at the heads' offsets.

    Keys get the unturned pair (A, 0) everywhere and queries the pair turned by the angle of the offset: after the
    rotation by their places p_q and p_k the score is sum_i A^2 cos(f_i (p_q + offset - p_k)), largest at the offset.
    """
    rows, columns = torch.tensor(offsets, dtype=torch.float32).T
    if axial:
        angles = [rotary_angles(places, head_dim // 2, base) for places in (rows, columns)]
        angle_HD = torch.cat(angles, dim=1)
    else:
        angle_HD = rotary_angles(columns, head_dim, base)
    query = torch.cat((angle_HD.cos(), angle_HD.sin()), dim=1)
    key = torch.cat((torch.ones_like(angle_HD), torch.zeros_like(angle_HD)), dim=1)
    return LOCAL_LENGTH * query.flatten(), LOCAL_LENGTH * key.flatten()
