"""Heads that start local: the first scores, computed place by place, peak at each head's offset."""

from __future__ import annotations

import math

import pytest
import torch

from lra.base.errors import ConfigError
from lra.model import Classifier, SelfAttention
from lra.positions import local_offsets, rotate
from lra.recipes import load_config
from tests.model.helpers import model_of

SIDE = 32
OPEN = [
    *("model.positions=axial_rotary", "model.width=64", "model.num_heads=2", "model.mlp_width=64"),
    *("model.qk_norm=true", "model.qk_gain=2.0", "model.rotary_base=100.0", "data.black_pixels=token", "model.depth=3"),
]


def scores_from(model: Classifier, layer: int, place: tuple[int, int]) -> torch.Tensor:
    """Return (H, rows, columns) scores of one query place, from the biases alone, by the formula for one pair."""
    attention = model.layers[layer].attention
    assert isinstance(attention, SelfAttention)
    heads, dim = attention.num_heads, attention.head_dim
    q, k, _ = attention.qkv.bias.detach().double().view(3, heads, dim)
    q, k = (x / x.pow(2).mean(1, keepdim=True).sqrt() for x in (q, k))
    half, quarter = dim // 2, dim // 4
    out = torch.zeros(heads, SIDE, SIDE, dtype=torch.float64)
    for head in range(heads):
        for i in range(half):
            frequency = model.rotary_base ** (-(i % quarter) / quarter)
            pair_q, pair_k = complex(q[head, i], q[head, i + half]), complex(k[head, i], k[head, i + half])
            for p in range(SIDE):
                moved = (place[0] if i < quarter else place[1]) - p
                score = (
                    pair_q * pair_k.conjugate() * complex(math.cos(frequency * moved), math.sin(frequency * moved))
                ).real
                if i < quarter:
                    out[head, p, :] += score
                else:
                    out[head, :, p] += score
    assert attention.q_norm is not None
    return out * float(attention.q_norm.weight.detach()[0]) / math.sqrt(dim)


@pytest.mark.parametrize("distances", [[3.0], [2.0, 5.0]])
def test_each_head_first_looks_at_its_offset(distances: list[float]) -> None:
    config = load_config("pathfinder/smoke", [*OPEN, f"model.local_start={distances}"])
    model = model_of(config)
    for layer in range(3):
        scores = scores_from(model, layer, (15, 16))
        offsets = local_offsets(layer, 2, distances[layer % len(distances)], axial=True)
        for head, (down, right) in enumerate(offsets):
            top = divmod(int(scores[head].argmax()), SIDE)
            assert abs(top[0] - 15 - down) <= 0.51 and abs(top[1] - 16 - right) <= 0.51
            assert math.hypot(down, right) == pytest.approx(distances[layer % len(distances)])
            near = scores[head].flatten().softmax(0)
            rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
            close = ((rows - 15 - down) ** 2 + (columns - 16 - right) ** 2 <= 6**2).flatten()
            assert float(near[close].sum()) > 0.5


def test_the_model_computes_these_scores() -> None:
    """With zero projections the model's own rotated queries and keys give the scores of the formula."""
    config = load_config("pathfinder/smoke", [*OPEN, "model.local_start=[4.0]"])
    model = model_of(config)
    attention = model.layers[1].attention
    assert isinstance(attention, SelfAttention)
    torch.nn.init.zeros_(attention.qkv.weight)
    positions = torch.arange(SIDE * SIDE)
    turn = model.turn(positions)
    assert turn is not None and attention.q_norm is not None and attention.k_norm is not None
    q, k, _ = attention.project(torch.zeros(SIDE * SIDE, 64))
    q, k = rotate(attention.q_norm(q), *turn), rotate(attention.k_norm(k), *turn)
    scores = torch.einsum("hd,thd->ht", q[15 * SIDE + 16], k) / math.sqrt(32)
    expected = scores_from(model, 1, (15, 16)).flatten(1).float()
    assert torch.allclose(scores, expected, atol=1e-4)


def test_on_a_line_heads_look_back_and_ahead() -> None:
    assert local_offsets(0, 2, 3.0, axial=False) == [(0.0, -3.0), (0.0, 3.0)]
    config = load_config(
        "listops/smoke",
        [
            "model.positions=rotary",
            "model.width=64",
            "model.num_heads=2",
            "model.qk_norm=true",
            "model.local_start=[3.0]",
        ],
    )
    model = model_of(config)
    attention = model.layers[0].attention
    assert isinstance(attention, SelfAttention)
    torch.nn.init.zeros_(attention.qkv.weight)
    turn = model.turn(torch.arange(50))
    assert turn is not None
    q, k, _ = attention.project(torch.zeros(50, 64))
    q, k = rotate(q, *turn), rotate(k, *turn)
    assert torch.einsum("hd,thd->ht", q[20], k).argmax(1).tolist() == [17, 23]


def test_local_start_without_rotary_positions_is_refused() -> None:
    with pytest.raises(ConfigError, match="local_start"):
        load_config("listops/smoke", ["model.local_start=[3.0]", "model.positions=learned"])
