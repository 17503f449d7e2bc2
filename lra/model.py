"""One pre-norm Transformer encoder over packed tokens, with the classifier of every LRA protocol.

x_TE -> [norm, attention, norm, MLP] x depth -> norm -> pool -> ReLU layers -> logits_BC. Google's and Nystromformer's
models are settings of it; their parameter counts (lra_spec section 2) are met exactly.
Shape letters: B examples, S sequences (2 B for Retrieval), T rows of the batch, H heads, D head dim, E width,
C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lra.attention import Backend, KeyRows, key_rows, make_backend
from lra.config import ModelConfig, RunConfig
from lra.packing import Packed, look_up, pack_info
from lra.pooling import Pool
from lra.positions import (
    PositionTable,
    axial_rotary_angles,
    local_biases,
    local_offsets,
    rotary_angles,
    rotate,
)
from lra.weighing import with_weights
from tasks.batches import Batch
from tasks.registry import Task, get

NUM_BYTES = 256
Turn = tuple[Tensor, Tensor]
"""Cosine and sine of rotary positions, each (T, 1, D/2) float32."""


class Rows(NamedTuple):
    """What every layer is told of a batch's rows: its sequences, keys and rotations, and log_weight_T as in Batch."""

    packed: Packed
    keys: KeyRows | None
    turn: Turn | None
    log_weight_T: Tensor | None


def make_norm(model: ModelConfig) -> nn.Module:
    """Return the normalisation over the model width that the recipe names."""
    kind = nn.LayerNorm if model.norm == "layernorm" else nn.RMSNorm
    return kind(model.width, eps=model.norm_eps)


class SelfAttention(nn.Module):
    """Multi-head attention on packed rows; the backend decides how the scores are computed."""

    def __init__(self, model: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.num_heads, self.head_dim = model.num_heads, model.head_dim
        # Kernels read head dims that are multiples of 8; the projections make room, so that nothing is copied.
        self.kernel_dim = -(-model.head_dim // 8) * 8
        self.dropout_p, self.backend = model.attention_dropout, backend
        self.key_weights = model.key_weights
        self.qkv = nn.Linear(model.width, 3 * model.attention_width, bias=model.attention_bias)
        self.out = nn.Linear(model.attention_width, model.width, bias=model.attention_bias)
        self.q_norm = nn.RMSNorm(model.head_dim) if model.qk_norm else None
        self.k_norm = nn.RMSNorm(model.head_dim) if model.qk_norm else None
        if self.q_norm is not None:
            nn.init.constant_(self.q_norm.weight, model.qk_gain)

    def forward(self, x_TE: Tensor, rows: Rows, seed: Tensor) -> Tensor:
        """Return (T, E); `seed` is this layer's int64 pair for the dropout mask."""
        q_THD, k_THD, v_THD = self.project(x_TE)
        if self.q_norm is not None and self.k_norm is not None:
            # In float32, as the weights are: torch has no fused form for two dtypes.
            q_THD = self.q_norm(q_THD.float()).to(v_THD.dtype)
            k_THD = self.k_norm(k_THD.float()).to(v_THD.dtype)
        if rows.turn is not None:
            q_THD, k_THD = rotate(q_THD, *rows.turn), rotate(k_THD, *rows.turn)
        softmax_scale = self.head_dim**-0.5
        if self.key_weights:
            q_THD, k_THD = with_weights(q_THD, k_THD, rows.log_weight_T, softmax_scale)
        out_THD = self.backend(
            q_THD,
            k_THD,
            v_THD,
            rows.packed,
            rows.keys,
            dropout_p=self.dropout_p if self.training else 0.0,
            dropout_seed=seed,
            softmax_scale=softmax_scale,
        )
        return self.merge(out_THD)

    def project(self, x_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v as (T, H, kernel_dim) views of one product; the features past D are zero."""
        weight: Tensor = self.qkv.weight
        bias: Tensor | None = self.qkv.bias
        extra = self.kernel_dim - self.head_dim
        if extra:
            weight = F.pad(weight.view(3 * self.num_heads, self.head_dim, -1), (0, 0, 0, extra)).flatten(0, 1)
            bias = None if bias is None else F.pad(bias.view(-1, self.head_dim), (0, extra)).flatten()
        qkv = F.linear(x_TE, weight, bias).view(x_TE.shape[0], 3, self.num_heads, self.kernel_dim)
        q_THD, k_THD, v_THD = qkv.unbind(1)
        return q_THD, k_THD, v_THD

    def merge(self, out_THD: Tensor) -> Tensor:
        """Return the output projection (T, E) of the heads; the features past D meet zero weights."""
        weight: Tensor = self.out.weight
        extra = self.kernel_dim - self.head_dim
        if extra:
            weight = F.pad(weight.view(-1, self.num_heads, self.head_dim), (0, extra)).flatten(1)
        return F.linear(out_THD.flatten(1), weight, self.out.bias)


class Layer(nn.Module):
    """x + Drop(Attention(Norm(x))), then x + Drop(MLP(Norm(x))) with GELU and dropout after both linear layers."""

    def __init__(self, model: ModelConfig, backend: Backend) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = make_norm(model), make_norm(model)
        self.attention = SelfAttention(model, backend)
        self.up, self.down = nn.Linear(model.width, model.mlp_width), nn.Linear(model.mlp_width, model.width)
        self.dropout = nn.Dropout(model.dropout)

    def forward(self, x_TE: Tensor, rows: Rows, seed: Tensor) -> Tensor:
        """Return (T, E)."""
        x_TE = x_TE + self.dropout(self.attention(self.attention_norm(x_TE), rows, seed))
        hidden = self.dropout(F.gelu(self.up(self.mlp_norm(x_TE))))
        return x_TE + self.dropout(self.down(hidden))


class Embed(nn.Module):
    """Bytes to vectors: a table of symbols, or one linear layer over pixel values scaled to [-1, 1]."""

    def __init__(self, model: ModelConfig, task: Task) -> None:
        super().__init__()
        self.shift = task.token_shift
        self.by_value = model.input == "scalar"
        if self.by_value:
            self.scale = nn.Linear(1, model.width)
        else:
            self.table = nn.Embedding(model.vocab_size or task.vocab_size, model.width)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """Return (T, E) for uint8 tokens."""
        if self.by_value:
            # Products of single numbers, not a matrix product: under autocast the residual stream stays float32.
            value_T1 = (tokens_T.to(self.scale.weight.dtype) / 127.5 - 1.0)[:, None]
            return value_T1 * self.scale.weight[:, 0] + self.scale.bias
        return look_up(self.table.weight, tokens_T.to(torch.int64) + self.shift)


class Denoiser(nn.Module):
    """Guesses hidden tokens: `mask` stands in for their vectors, one linear layer gives the guess."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.guess = nn.Linear(width, vocab_size)

    def forward(self, x_TE: Tensor, tokens_T: Tensor, hidden_T: Tensor) -> Tensor:
        """Return the mean cross-entropy over the hidden rows, 0 if there are none."""
        losses_T = F.cross_entropy(self.guess(x_TE).float(), tokens_T.to(torch.int64), reduction="none")
        return torch.where(hidden_T, losses_T, 0.0).sum() / hidden_T.sum().clamp(min=1)


class Started(NamedTuple):
    """What goes into the layers."""

    x_TE: Tensor
    rows: Rows
    seeds: Tensor


class Parts(NamedTuple):
    """The functions that the model is run by: its own, or their compiled forms (lra/compiling.py)."""

    start: Callable[[Classifier, Batch, Tensor | None], Started]
    layer: Callable[..., Tensor]
    """Takes a Layer and its arguments. One function for all, so that one compiled code serves all."""
    predict: Callable[[Classifier, Tensor, Packed], Tensor]


class Classifier(nn.Module):
    """Encoder, pooling and head; takes a Batch, gives logits."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        model, task = config.model, get(config.task.name)
        self.documents, self.grid = task.documents, task.grid
        self.has_cls = model.pooling == "cls"
        self.num_positions = config.padded_length
        self.positions_kind, self.head_dim, self.rotary_base = model.positions, model.head_dim, model.rotary_base
        self.pair_features = model.pair_features
        self.embed = Embed(model, task)
        if self.has_cls:
            self.cls = nn.Parameter(torch.zeros(model.width))
        self.table: PositionTable | None = None
        if model.positions in ("learned", "sinusoidal"):
            self.table = PositionTable(model.positions, self.num_positions, model.width, cls=self.has_cls)
        self.dropout = nn.Dropout(model.dropout)
        length = config.max_length + int(self.has_cls)
        self.layers = nn.ModuleList(
            Layer(model, make_backend(config.attention, model.num_heads, model.head_dim, length))
            for _ in range(model.depth)
        )
        self.final_norm = make_norm(model)
        self.pool = Pool(model.pooling, model.width, config.padded_length)
        self.head = make_head(model, task)
        # Guesses bytes as they are stored, before any shift of the task: 256 classes at most.
        self.denoiser = None if config.train.denoise is None else Denoiser(model.width, NUM_BYTES)
        self.parts = Parts(Classifier.start, Layer.__call__, Classifier.predict)
        self.reset_parameters(model)

    def reset_parameters(self, model: ModelConfig) -> None:
        """Draw the initial weights from torch's global generator: seed it before (the training loop does)."""
        if model.input == "embedding":
            nn.init.normal_(self.embed.table.weight, std=model.token_std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and model.init == "xavier":
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if model.init == "zero_head":
            last = self.head[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        if model.init == "xavier":
            for module in self.modules():
                if isinstance(module, SelfAttention):
                    # One matrix holds q, k and v: each gets the bounds of its own shape.
                    for part in module.qkv.weight.chunk(3):
                        nn.init.xavier_uniform_(part)
        if model.local_start:
            self.start_locally(model)

    @torch.no_grad()
    def start_locally(self, model: ModelConfig) -> None:
        """Set the biases of queries and keys so that heads first look at places near their own."""
        axial = model.positions == "axial_rotary"
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            distance = model.local_start[i % len(model.local_start)]
            offsets = local_offsets(i, model.num_heads, distance, axial=axial)
            query, key = local_biases(offsets, model.head_dim, model.rotary_base, axial=axial)
            layer.attention.qkv.bias[: 2 * model.attention_width] = torch.cat((query, key))

    def forward(self, batch: Batch) -> Tensor:
        """Return float32 logits (B, C)."""
        return self.parts.predict(self, *self.through(batch))

    def through(self, batch: Batch, hidden_T: Tensor | None = None) -> tuple[Tensor, Packed]:
        """Return every row's vector (T, E) after the last layer, before the last norm, and where the sequences lie.

        hidden_T (boolean) are rows whose token the encoder must not see.
        """
        x_TE, rows, seeds = self.parts.start(self, batch, hidden_T)
        for layer, seed in zip(self.layers, seeds, strict=True):
            x_TE = self.parts.layer(layer, x_TE, rows, seed)
        return x_TE, rows.packed

    def start(self, batch: Batch, hidden_T: Tensor | None) -> Started:
        """Return what the first layer takes, and (depth, 2) int64 seeds, one pair for each layer's dropout masks."""
        packed = pack_info(batch.cu_seqlens, batch.max_length, batch.tokens_T.shape[0], uniform=batch.uniform)
        positions_T = batch.positions_T.to(torch.int64)
        x_TE = self.embed(batch.tokens_T)
        if hidden_T is not None and self.denoiser is not None:
            x_TE = torch.where(hidden_T[:, None], self.denoiser.mask.to(x_TE.dtype), x_TE)
        if self.has_cls:
            last_S = packed.cu_seqlens[1:].to(torch.int64) - 1
            x_TE = x_TE.index_copy(0, last_S, self.cls.to(x_TE.dtype).expand(last_S.shape[0], -1))
            positions_T = positions_T.index_fill(0, last_S, self.num_positions)
        if self.table is not None:
            x_TE = x_TE + self.table(positions_T)
        x_TE = self.dropout(x_TE)
        rows = Rows(packed, key_rows(batch.keys), self.turn(positions_T), batch.log_weight_T)
        # Drawn by torch's generator once a forward pass.
        seeds = torch.randint(-(2**62), 2**62, (len(self.layers), 2), device=x_TE.device)
        return Started(x_TE, rows, seeds)

    def predict(self, x_TE: Tensor, packed: Packed) -> Tensor:
        """Return float32 logits (B, C) from what `through` gave."""
        return self.classify(self.final_norm(x_TE), packed)

    def encode(self, batch: Batch, hidden_T: Tensor | None = None) -> tuple[Tensor, Packed]:
        """Return every row's vector (T, E) after the last norm, and where the sequences lie; hidden_T as above."""
        x_TE, packed = self.through(batch, hidden_T)
        return self.final_norm(x_TE), packed

    def classify(self, x_TE: Tensor, packed: Packed) -> Tensor:
        """Return float32 logits (B, C) from what `encode` gave."""
        return self.head(self.join_documents(self.pool(x_TE, packed))).float()

    def denoising_loss(self, x_TE: Tensor, tokens_T: Tensor, hidden_T: Tensor) -> Tensor:
        """Return the mean cross-entropy of the hidden tokens, guessed from what `encode` gave."""
        if self.denoiser is None:
            raise ValueError("The model was built without train.denoise.")
        return self.denoiser(x_TE, tokens_T, hidden_T)

    def turn(self, positions_T: Tensor) -> Turn | None:
        """Return the rotation of queries and keys; the CLS row is not turned."""
        if self.positions_kind == "rotary":
            angle = rotary_angles(positions_T, self.head_dim, self.rotary_base)
        elif self.positions_kind == "axial_rotary":
            assert self.grid is not None
            angle = axial_rotary_angles(positions_T, self.grid[1], self.head_dim, self.rotary_base)
        else:
            return None
        if self.has_cls:
            angle = angle.masked_fill((positions_T == self.num_positions)[:, None], 0.0)
        return angle.cos()[:, None], angle.sin()[:, None]

    def join_documents(self, pooled_SE: Tensor) -> Tensor:
        """Return one vector an example; a pair becomes [x1, x2, x1*x2, x1-x2] (LRA paper, equation 1) or [x1, x2]."""
        if self.documents == 1:
            return pooled_SE
        x1, x2 = pooled_SE.view(-1, 2, pooled_SE.shape[1]).unbind(1)
        parts = (x1, x2, x1 * x2, x1 - x2) if self.pair_features == "nli" else (x1, x2)
        return torch.cat(parts, dim=1)


def make_head(model: ModelConfig, task: Task) -> nn.Sequential:
    """Return the ReLU layers and the last linear layer to the classes."""
    vectors = 1 if task.documents == 1 else 4 if model.pair_features == "nli" else 2
    widths = [vectors * model.width, *model.head_widths]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], task.num_classes))


def num_parameters(module: nn.Module) -> int:
    """Count the trainable numbers."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
