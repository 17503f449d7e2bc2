"""Host checks of every argument: pure functions that raise ValueError naming the argument and what was expected.

Called by the public functions before anything runs. They look at shapes, dtypes and devices only, never at the
values of tensors, so they cost no synchronisation and vanish under torch.compile. Values (lengths, offsets)
are checked by `sequences.py`, where they are read.
"""

import torch
from torch import Tensor

from attention_kernels.layouts import BlockLayout

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, rank: int) -> None:
    """Raise ValueError unless q, k and v fit together; rank 4 is (B, L, H, D), rank 3 is packed (T, H, D)."""
    if not _fit_together(q, k, v, rank):
        _refuse_inputs(q, k, v, rank)


def _fit_together(q: Tensor, k: Tensor, v: Tensor, rank: int) -> bool:
    """Return whether `_refuse_inputs` would find nothing, at half its cost: every call pays for it."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    dtype, device, shape, other = q.dtype, q.device, q.shape, k.shape
    return (
        (dtype in DTYPES and k.dtype == dtype == v.dtype and k.device == device == v.device)
        and (len(shape) == rank == len(other) and other == v.shape and shape[-2:] == other[-2:])
        and (rank == 3 or shape[0] == other[0])
        and shape[-1] != 0
    )


def _refuse_inputs(q: Tensor, k: Tensor, v: Tensor, rank: int) -> None:
    layout = "(batch, length, heads, head_dim)" if rank == 4 else "(tokens, heads, head_dim)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor {layout}, got {type(x).__name__}.")
        if x.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(x.shape)}.")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}.")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}.")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}.")
        if x.shape[-2:] != q.shape[-2:]:
            raise ValueError(
                f"{name} must have q's heads and head dim {tuple(q.shape[-2:])}, got {tuple(x.shape[-2:])} "
                "(grouped-query heads are not supported: repeat k and v)."
            )
        if rank == 4 and x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch size {q.shape[0]}, got {x.shape[0]}.")
    if q.shape[-1] == 0:
        raise ValueError("q must have a head dim of at least 1, got 0.")
    if k.shape != v.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}.")


def check_numbers(dropout_p: float, softmax_scale: float | None) -> None:
    """Raise ValueError unless 0 <= dropout_p < 1 and the scale is a finite number or None."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}.")
    if softmax_scale is not None and not abs(softmax_scale) < float("inf"):
        raise ValueError(f"softmax_scale must be a finite number or None, got {softmax_scale}.")


def check_dropout_seed(seed: Tensor | None, q: Tensor) -> None:
    """Raise ValueError unless the seed is None or an int64 tensor of two on q's device."""
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.shape != (2,):
        shown = f"{seed.dtype} {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise ValueError(f"dropout_seed must be an int64 tensor of shape (2,), got {shown}.")
    if seed.device != q.device:
        raise ValueError(f"dropout_seed must be on q's device {q.device}, got {seed.device}.")


def check_key_lengths(key_lengths: Tensor | None, k: Tensor) -> None:
    """Raise ValueError unless the lengths are None or an int32 or int64 tensor (B,) on k's device."""
    if key_lengths is None:
        return
    if not isinstance(key_lengths, Tensor):
        raise ValueError(f"key_lengths must be an integer tensor (batch,), got {type(key_lengths).__name__}.")
    if key_lengths.dtype not in (torch.int32, torch.int64) or key_lengths.shape != (k.shape[0],):
        raise ValueError(
            f"key_lengths must be int32 or int64 of shape ({k.shape[0]},), "
            f"got {key_lengths.dtype} {tuple(key_lengths.shape)}."
        )
    if key_lengths.device != k.device:
        raise ValueError(f"key_lengths must be on k's device {k.device}, got {key_lengths.device}.")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    """Raise ValueError unless the offsets are an int32 or int64 tensor (sequences + 1,) on q's device."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"{name} must be an int32 tensor (sequences + 1,), got {type(cu_seqlens).__name__}.")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {cu_seqlens.dtype}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}.")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {cu_seqlens.device}.")


def check_varlen(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, q: Tensor) -> None:
    """Raise ValueError unless both sets of offsets fit together and the maxima are non-negative."""
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must name as many sequences as cu_seqlens_q ({cu_seqlens_q.shape[0] - 1}), "
            f"got {cu_seqlens_k.shape[0] - 1}."
        )
    check_max_seqlen("max_seqlen_q", max_seqlen_q)
    check_max_seqlen("max_seqlen_k", max_seqlen_k)


def check_max_seqlen(name: str, value: int) -> None:
    """Raise ValueError unless the maximum is a non-negative int."""
    # Why not isinstance(value, int): torch.compile hands in a symbolic integer.
    if isinstance(value, (Tensor, float)) or value < 0:
        raise ValueError(f"{name} must be a non-negative int (an upper bound will do), got {value!r}.")


def check_layout(layout: BlockLayout, q: Tensor, length_name: str, length: int) -> None:
    """Raise ValueError unless the layout covers the length and has q's heads and device."""
    if not isinstance(layout, BlockLayout):
        raise ValueError(f"layout must be a BlockLayout, got {type(layout).__name__}.")
    if layout.num_blocks * layout.block_size < length:
        raise ValueError(
            f"layout must be at least as long as {length_name} {length}, "
            f"got {layout.num_blocks} blocks of {layout.block_size}."
        )
    num_heads = q.shape[-2]
    num_patterned = layout.head_to_pattern.shape[0]
    if num_patterned != 1 and num_patterned != num_heads:
        raise ValueError(f"layout must be for {num_heads} heads or for all, got {num_patterned} heads.")
    if layout.device != q.device:
        raise ValueError(f"layout must be on q's device {q.device}, got {layout.device}: use layout.to(q.device).")
