"""The switch between attention backends: one class each, one signature, a registry of names.

A backend takes packed q, k, v and knows nothing of tasks or models. A new one is one subclass and one `register`
(docs/extend.md). `keys` names the rows that may be attended to where a protocol drops some.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import attention_kernels as ak
import lra.mixers
from attention_kernels import BlockLayout
from attention_kernels.ahead import build_ahead
from lra.config import AttentionConfig
from lra.packing import Packed, pack_info, pad, take_rows, unpad
from tasks.batches import Keys

DEFAULT_BLOCK = 64


class KeyRows(NamedTuple):
    """The rows of the packed batch that serve as keys, and where each sequence's lie among them.

    Entries of index_K after the last sequence's are T, no row of the batch.
    """

    index_K: Tensor
    packed: Packed


def key_rows(keys: Keys | None) -> KeyRows | None:
    """Return the key rows of a batch; None means that every row is a key."""
    if keys is None:
        return None
    return KeyRows(keys.index_K, pack_info(keys.cu_seqlens, keys.max_length, keys.index_K.shape[0]))


def only_keys(k_THD: Tensor, v_THD: Tensor, packed: Packed, keys: KeyRows | None) -> tuple[Tensor, Tensor, Packed]:
    """Return the rows of k and v that may be attended to, and where each sequence's lie among them."""
    if keys is None:
        return k_THD, v_THD, packed
    return take_rows(k_THD, keys.index_K), take_rows(v_THD, keys.index_K), keys.packed


class Backend(nn.Module):
    """Exact or approximate attention over packed sequences.

    forward(q_THD, k_THD, v_THD, packed, keys, *, dropout_p, dropout_seed, softmax_scale) -> out_THD, with
    dropout_seed an int64 tensor of two on the inputs' device.
    """

    static: ClassVar[bool] = False
    """Its forward asks the host for no value of a tensor: torch.compile traces it whole and CUDA graphs record it."""
    exact: ClassVar[bool] = False
    """It is softmax over q . k, so that features of q and k can add to the scores (lra/weighing.py)."""
    linear_memory: ClassVar[bool] = False
    """Its memory grows with the length and not with its square, so an evaluation batch may be as large as is quick."""

    def __init__(self, config: AttentionConfig, num_heads: int, head_dim: int, max_length: int) -> None:
        super().__init__()

    @classmethod
    def why_not_recorded(cls, config: AttentionConfig, q_THD: Tensor) -> str | None:
        """Return why CUDA graphs cannot record it on tensors like q_THD, in words, or None if they can."""
        return None if cls.static else "its attention asks the host for values"

    @classmethod
    def prepare(cls, config: AttentionConfig, q_THD: Tensor, *, dropout: bool) -> None:
        """Begin in the background whatever the first call on tensors like q_THD would otherwise wait for."""

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
        """Return the attention output (T, H, D)."""
        raise TypeError(f"{type(self).__name__} must define forward")


_BACKENDS: dict[str, type[Backend]] = {}


def register(name: str) -> Callable[[type[Backend]], type[Backend]]:
    """Class decorator: make a backend known under `name` to recipes and the command line."""

    def add(backend: type[Backend]) -> type[Backend]:
        if name in _BACKENDS:
            raise ValueError(f"A backend named {name!r} exists already: {_BACKENDS[name].__qualname__}.")
        _BACKENDS[name] = backend
        return backend

    return add


def backend_names() -> list[str]:
    """Return every known backend, the exact ones first."""
    _import_mixers()
    return list(_BACKENDS)


def backend_class(name: str) -> type[Backend]:
    """Return the class registered under a name."""
    _import_mixers()
    return _BACKENDS[name]


def make_backend(config: AttentionConfig, num_heads: int, head_dim: int, max_length: int) -> Backend:
    """Build the backend that the recipe names for sequences of at most max_length rows."""
    return backend_class(config.backend)(config, num_heads, head_dim, max_length)


class _Padded(Backend):
    """Backends that know rectangles only: pad inside attention, compute, unpad."""

    @staticmethod
    def rectangle(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, **arguments: Any) -> Tensor:
        """Attend on (B, Lq, H, D) queries and (B, Lk, H, D) keys with `key_lengths`."""
        raise TypeError("a subclass defines rectangle")

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
        """Return the attention output (T, H, D)."""
        k_THD, v_THD, key_packed = only_keys(k_THD, v_THD, packed, keys)
        out_BLHD = self.rectangle(
            pad(q_THD, packed),
            pad(k_THD, key_packed),
            pad(v_THD, key_packed),
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            softmax_scale=softmax_scale,
            key_lengths=None if key_packed.is_uniform else key_packed.cu_seqlens.diff(),
        )
        return unpad(out_BLHD, packed)


@register("standard")
class Standard(_Padded):
    """Softmax attention that writes the L x L scores to memory, as before FlashAttention, with torch's own dropout."""

    static, exact = True, True

    @staticmethod
    def rectangle(
        q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, dropout_seed: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """Return (B, Lq, H, D)."""
        return ak.standard_attention(q_BLHD, k_BLHD, v_BLHD, torch_dropout=True, **arguments)


@register("flash")
class Flash(Backend):
    """Exact tiled attention with linear memory on packed rows; no padding is computed."""

    static, exact, linear_memory = True, True, True

    def __init__(self, config: AttentionConfig, num_heads: int, head_dim: int, max_length: int) -> None:
        super().__init__(config, num_heads, head_dim, max_length)
        self.deterministic = config.deterministic

    @classmethod
    def why_not_recorded(cls, config: AttentionConfig, q_THD: Tensor) -> str | None:
        """Return why CUDA graphs cannot record it: the tiled PyTorch form reads the sequences' offsets on the host."""
        return ak.why_not(q_THD, q_THD, q_THD)

    @classmethod
    def prepare(cls, config: AttentionConfig, q_THD: Tensor, *, dropout: bool) -> None:
        """Build the kernels."""
        build_ahead(q_THD, dropout=dropout, deterministic=config.deterministic)

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
        """Return the attention output (T, H, D)."""
        k_THD, v_THD, key_packed = only_keys(k_THD, v_THD, packed, keys)
        out_THD = ak.flash_attention_varlen(
            q_THD,
            k_THD,
            v_THD,
            packed.cu_seqlens,
            key_packed.cu_seqlens,
            packed.max_length,
            key_packed.max_length,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            softmax_scale=softmax_scale,
            deterministic=self.deterministic,
        )
        assert isinstance(out_THD, Tensor)  # a pair only with return_lse
        return out_THD


@register("block_sparse")
class BlockSparse(Backend):
    """FlashAttention over the non-zero blocks of a layout; skipped blocks cost nothing."""

    static, exact, linear_memory = True, True, True

    def __init__(self, config: AttentionConfig, num_heads: int, head_dim: int, max_length: int) -> None:
        super().__init__(config, num_heads, head_dim, max_length)
        self.deterministic = config.deterministic
        self.layout = make_layout(config, max_length)

    @classmethod
    def why_not_recorded(cls, config: AttentionConfig, q_THD: Tensor) -> str | None:
        """Return why CUDA graphs cannot record it: the tiled PyTorch form reads the sequences' offsets on the host."""
        return ak.why_not(q_THD, q_THD, q_THD, layout=cls.one_block(config))

    @classmethod
    def prepare(cls, config: AttentionConfig, q_THD: Tensor, *, dropout: bool) -> None:
        """Build the kernels."""
        layout = cls.one_block(config)
        build_ahead(q_THD, dropout=dropout, deterministic=config.deterministic, layout=layout)

    @staticmethod
    def one_block(config: AttentionConfig) -> BlockLayout:
        """Return the smallest layout with the recipe's size of blocks."""
        block = config.block or DEFAULT_BLOCK
        return BlockLayout.dense(block, block_size=block)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockSparse:
        """Take the layout along when the module moves to another device."""
        super()._apply(fn, recurse)
        self.layout = self.layout.to(fn(self.layout.row_ptr).device)
        return self

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
        """Return the attention output (T, H, D)."""
        if keys is not None:
            raise ValueError("block_sparse attends by position; it cannot leave out single keys.")
        out_THD = ak.block_sparse_attention_varlen(
            q_THD,
            k_THD,
            v_THD,
            self.layout,
            packed.cu_seqlens,
            packed.max_length,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            softmax_scale=softmax_scale,
            deterministic=self.deterministic,
        )
        assert isinstance(out_THD, Tensor)  # a pair only with return_lse
        return out_THD


@register("sdpa")
class Sdpa(_Padded):
    """PyTorch's scaled_dot_product_attention, padded: what a PyTorch user writes. It draws its own dropout mask."""

    static, exact = True, True

    @staticmethod
    def rectangle(
        q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, dropout_seed: Tensor | None = None, **arguments: Any
    ) -> Tensor:
        """Return (B, Lq, H, D)."""
        return ak.sdpa_attention(q_BLHD, k_BLHD, v_BLHD, **arguments)


def make_layout(config: AttentionConfig, length: int) -> BlockLayout:
    """Return the block layout that the recipe names over `length` rows."""
    block = config.block or DEFAULT_BLOCK
    # On the CPU whatever the default device: layouts are built from their entries, which a meta tensor lacks.
    with torch.device("cpu"):
        layout = _layout(config, length, block)
        return layout.with_global_end(config.end_global) if config.end_global else layout


def _layout(config: AttentionConfig, length: int, block: int) -> BlockLayout:
    match config.layout or "butterfly":
        case "butterfly":
            return BlockLayout.butterfly(length, block_size=block)
        case "dense":
            return BlockLayout.dense(length, block_size=block)
        case "local":
            return BlockLayout.local(length, window=config.window, block_size=block)
        case "local_global":
            return BlockLayout.local_global(
                length, window=config.window, num_global=config.num_global, block_size=block
            )
        case _:
            return BlockLayout.stripes(length, stride=config.stride, block_size=block)


def _import_mixers() -> None:
    """Import every module of lra/mixers, so that it registers its backend."""
    for module in pkgutil.iter_modules(lra.mixers.__path__):
        importlib.import_module(f"lra.mixers.{module.name}")
