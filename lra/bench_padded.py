"""The literature's baseline: the same encoder on padded rectangles, as one writes it in PyTorch; no masks.

Nothing here knows of packing: every sequence is as long as the longest that the task allows. Standard attention
materialises its scores; the other form calls torch's scaled_dot_product_attention without a mask, its fastest way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lra.config import ModelConfig

# Bytes that a score takes at the peak of a step, about: kept for the backward in every layer, and once for what one
# layer needs at a time. Scores in bf16, softmax in float32, dropout's mask and product; the compiled form keeps less.
_EAGER_BYTES, _COMPILED_BYTES = (9, 6), (5, 6)


class PaddedLayer(nn.Module):
    """Pre-norm attention and MLP on (B, L, E)."""

    def __init__(self, model: ModelConfig, sdpa: bool) -> None:
        super().__init__()
        self.num_heads, self.sdpa = model.num_heads, sdpa
        self.dropout_p, self.attention_dropout_p = model.dropout, model.attention_dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(model.width), nn.LayerNorm(model.width)
        self.qkv = nn.Linear(model.width, 3 * model.attention_width, bias=model.attention_bias)
        self.out = nn.Linear(model.attention_width, model.width, bias=model.attention_bias)
        self.up, self.down = nn.Linear(model.width, model.mlp_width), nn.Linear(model.mlp_width, model.width)

    def forward(self, x_BLE: Tensor) -> Tensor:
        """Return (B, L, E)."""
        x_BLE = x_BLE + F.dropout(self.attend(self.norm_1(x_BLE)), self.dropout_p, self.training)
        hidden = F.dropout(F.gelu(self.up(self.norm_2(x_BLE))), self.dropout_p, self.training)
        return x_BLE + F.dropout(self.down(hidden), self.dropout_p, self.training)

    def attend(self, x_BLE: Tensor) -> Tensor:
        """Return the attention block's output (B, L, E)."""
        batch, length, _ = x_BLE.shape
        qkv = self.qkv(x_BLE).view(batch, length, 3, self.num_heads, -1)
        q_BHLD, k_BHLD, v_BHLD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.sdpa:
            out_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, dropout_p=self.attention_dropout_p)
        else:
            scores = torch.matmul(q_BHLD, k_BHLD.mT) * q_BHLD.shape[-1] ** -0.5
            weights = F.dropout(scores.softmax(dim=-1), self.attention_dropout_p, self.training)
            out_BHLD = torch.matmul(weights.to(v_BHLD.dtype), v_BHLD)
        return self.out(out_BHLD.transpose(1, 2).reshape(batch, length, -1))


class PaddedClassifier(nn.Module):
    """Embedding, layers, mean over all places, one linear layer; pairs are classified from both means."""

    def __init__(self, model: ModelConfig, length: int, vocab_size: int, num_classes: int, documents: int, sdpa: bool):
        super().__init__()
        self.documents = documents
        self.table = nn.Embedding(vocab_size, model.width)
        self.positions = nn.Parameter(torch.randn(length, model.width) * 0.02)
        self.dropout_p = model.dropout
        self.layers = nn.ModuleList(PaddedLayer(model, sdpa) for _ in range(model.depth))
        self.norm = nn.LayerNorm(model.width)
        self.head = nn.Linear(documents * model.width, num_classes)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Return logits for int64 tokens; documents of a pair are neighbours."""
        x_BLE = F.dropout(self.table(tokens_BL) + self.positions, self.dropout_p, self.training)
        for layer in self.layers:
            x_BLE = layer(x_BLE)
        return self.head(self.norm(x_BLE).mean(1).view(-1, self.documents * x_BLE.shape[-1]))


def score_bytes(model: ModelConfig, sequences: int, length: int, *, compiled: bool) -> int:
    """Estimate what the scores of standard attention take at the peak of a step, in bytes."""
    kept, once = _COMPILED_BYTES if compiled else _EAGER_BYTES
    return sequences * model.num_heads * length**2 * (kept * model.depth + once)
