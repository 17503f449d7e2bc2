"""The operators behind the public functions, registered with torch.library, each with a fake implementation.

flash_* and sparse_* take fixed (B, L, H, D) and packed (T, H, D) tensors: packed where cu_seqlens are given.
Forward and backward are operators of their own, so that torch.compile(fullgraph=True) traces through both without
looking inside. The autograd classes of flash.py and block_sparse.py reach them through `call`. CUDA kernels join
through `dispatch.add_cuda` with the same arguments.
"""

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from attention_kernels import dispatch
from attention_kernels.block_sparse_tiles import SparseRows, sparse_backward, sparse_forward
from attention_kernels.groups import compute_dtype, make_options
from attention_kernels.sequences import Segment, fixed_segments, packed_segments
from attention_kernels.tiles import dense_backward, dense_forward

_FORM = "Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_RULE = "Tensor? dropout_seed, float dropout_p, float softmax_scale, bool causal"
_LAYOUT = (
    "Tensor row_ptr, Tensor col_idx, Tensor col_ptr, Tensor row_idx, Tensor head_to_pattern, "
    "SymInt num_blocks, SymInt block_size"
)
_SPARSE_FORM = "Tensor? key_lengths, Tensor? cu_seqlens, SymInt max_seqlen"
_SAVED = "Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, Tensor? dlse"
_GRADS = "(Tensor dq, Tensor dk, Tensor dv)"

_SCHEMAS = {
    "flash_forward": f"(Tensor q, Tensor k, Tensor v, {_FORM}, {_RULE}) -> (Tensor out, Tensor lse)",
    "flash_backward": f"({_SAVED}, {_FORM}, {_RULE}, bool deterministic) -> {_GRADS}",
    "sparse_forward": f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}, {_SPARSE_FORM}, {_RULE}) -> (Tensor out, Tensor lse)",
    "sparse_backward": f"({_SAVED}, {_LAYOUT}, {_SPARSE_FORM}, {_RULE}, bool deterministic) -> {_GRADS}",
}
# Where block_size stands among the arguments of the sparse operators.
_BLOCK_SIZE_AT = {"sparse_forward": 9, "sparse_backward": 13}


def _tiled_flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    segments = _segments(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = make_options(softmax_scale, causal, dropout_p, dropout_seed)
    out, lse = dense_forward(_flat(q), _flat(k), _flat(v), segments, options)
    return out.view(q.shape), _unflat_lse(lse, q)


def _tiled_flash_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = _segments(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = make_options(softmax_scale, causal, dropout_p, dropout_seed)
    # `deterministic` asks for nothing here: one tile after another adds to each sum, in one order.
    flat_dlse = None if dlse is None else _flat_lse(dlse)
    saved = (_flat(q), _flat(k), _flat(v), _flat(out), _flat_lse(lse), _flat(dout), flat_dlse)
    dq, dk, dv = dense_backward(*saved, segments, options)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _tiled_sparse_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    head_to_pattern: Tensor,
    num_blocks: int,
    block_size: int,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    dropout_seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    segments = _segments(q, k, key_lengths, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = make_options(softmax_scale, causal, dropout_p, dropout_seed)
    rows = SparseRows(row_ptr, col_idx, head_to_pattern, num_blocks, block_size)
    flat = (_flat(q), _flat(k), _flat(v))
    if rows.is_dense():
        out, lse = dense_forward(*flat, segments, options)
    else:
        out, lse = sparse_forward(*flat, segments, options, rows)
    return out.view(q.shape), _unflat_lse(lse, q)


def _tiled_sparse_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    row_ptr: Tensor,
    col_idx: Tensor,
    col_ptr: Tensor,
    row_idx: Tensor,
    head_to_pattern: Tensor,
    num_blocks: int,
    block_size: int,
    key_lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    dropout_seed: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = _segments(q, k, key_lengths, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = make_options(softmax_scale, causal, dropout_p, dropout_seed)
    rows = SparseRows(row_ptr, col_idx, head_to_pattern, num_blocks, block_size)
    flat_dlse = None if dlse is None else _flat_lse(dlse)
    saved = (_flat(q), _flat(k), _flat(v), _flat(out), _flat_lse(lse), _flat(dout), flat_dlse)
    if rows.is_dense():
        dq, dk, dv = dense_backward(*saved, segments, options)
    else:
        dq, dk, dv = sparse_backward(*saved, segments, options, rows)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _segments(
    q: Tensor,
    k: Tensor,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> list[Segment]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return fixed_segments(q.shape[0], q.shape[1], k.shape[1], key_lengths)
    return packed_segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q.shape[0], k.shape[0])


def _flat(x: Tensor) -> Tensor:
    """(B, L, H, D) as (B L, H, D), without a copy where the strides allow; packed tensors as they are."""
    return x.flatten(0, 1) if x.dim() == 4 else x


def _unflat_lse(lse_TH: Tensor, q: Tensor) -> Tensor:
    """(T, H) as the public (B, H, L) or (H, T)."""
    if q.dim() == 3:
        return lse_TH.t().contiguous()
    return lse_TH.view(q.shape[:3]).transpose(1, 2).contiguous()


def _flat_lse(lse: Tensor) -> Tensor:
    """The public (B, H, L) or (H, T) as (T, H)."""
    return lse.t() if lse.dim() == 2 else lse.transpose(1, 2).flatten(0, 1)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    lse_shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=compute_dtype(q.dtype))


def _fake_backward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_TILED: dict[str, dispatch.Function] = {
    "flash_forward": _tiled_flash_forward,
    "flash_backward": _tiled_flash_backward,
    "sparse_forward": _tiled_sparse_forward,
    "sparse_backward": _tiled_sparse_backward,
}
_PLAIN = frozenset((Tensor, NoneType, int, float, bool))


def call(name: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Run an operator; the CUDA kernels without torch.ops around them where nobody would see the difference.

    Passing a dozen arguments through the dispatcher costs the host more than the launches of a forward.
    """
    if not torch.compiler.is_compiling() and not _is_watched() and _are_plain(arguments):
        function = _pick(name, arguments)
        if function is not _TILED[name]:
            return function(*arguments)
    results: tuple[Tensor, ...] = _OPERATORS[name](*arguments)
    return results


def _is_watched() -> bool:
    """Return whether a mode, a transform, a tracer or a profiler would see an operator that is called now."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
    )


def _are_plain(arguments: Sequence[Any]) -> bool:
    """Return whether the dispatcher would hand all arguments on as they are.

    It would not: tensors of other classes, and lazy ones, which autograd too may hand in as gradients: negations that
    nobody has carried out, zeros without memory, batches of vmap's.
    """
    if not _PLAIN.issuperset(map(type, arguments)):
        return False
    # q, k and v, and in a backward out, lse, dout and dlse: the operators behind out and lse made those.
    for x in (*arguments[:3], *arguments[5:7]):
        if type(x) is Tensor and (x.is_neg() or x._is_zerotensor() or not torch._C._has_storage(x)):
            return False
    return True


def _pick(name: str, arguments: Sequence[Any]) -> dispatch.Function:
    at = _BLOCK_SIZE_AT.get(name)
    return dispatch.pick(name, _TILED[name], arguments[0], None if at is None else arguments[at])


def _operator(name: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        function, device = _pick(name, arguments), arguments[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*arguments)
        # Why: autocast would turn the float32 sums inside into half precision.
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


_LIBRARY = torch.library.Library("attention_kernels", "DEF")
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _operator(_name), "CompositeExplicitAutograd")
    _fake = _fake_forward if _name.endswith("forward") else _fake_backward
    torch.library.register_fake(f"attention_kernels::{_name}", _fake, lib=_LIBRARY)
_OPERATORS = {name: getattr(torch.ops.attention_kernels, name) for name in _SCHEMAS}
