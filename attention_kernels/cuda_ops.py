"""The operators on the CUDA kernels: allocates outputs and scratch, and launches through kernel_call.py.

Joined to the operators when the package is imported with a CUDA build of torch. Reads no value of any tensor, so
nothing waits for the GPU: lengths, offsets and layouts are read by the kernels, which stay inside their buffers
whatever lengths and offsets say. ATTENTION_KERNELS_CHECK=1 reads and checks those here, at the cost of a wait a call.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from attention_kernels import dispatch, kernel_call
from attention_kernels.kernel_call import KernelCall
from attention_kernels.kernel_plan import width_of


def register_where_possible() -> None:
    """Register with a CUDA build of torch that has the CUDA bindings beside it; initialises nothing."""
    if torch.version.cuda is None:
        return
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        dispatch.explain("the package cuda-bindings is missing (pip install cuda-bindings)")
        return
    register()


def register() -> None:
    """Let the CUDA kernels take the operators' calls."""
    dispatch.add_cuda("flash_forward", flash_forward)
    dispatch.add_cuda("flash_backward", flash_backward)
    dispatch.add_cuda("sparse_forward", sparse_forward)
    dispatch.add_cuda("sparse_backward", sparse_backward)


def flash_forward(
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
    """Return out, contiguous in q's shape and dtype, and lse float32, (B, H, Lq) or (H, Tq)."""
    call = KernelCall(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call.with_rule(dropout_seed, dropout_p, softmax_scale, causal)
    return _forward(call, q, k, v)


def flash_backward(
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
    """Return dq, dk and dv, contiguous; dq too is the same bits every time when `deterministic`, at some cost."""
    call = KernelCall(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call.with_rule(dropout_seed, dropout_p, softmax_scale, causal)
    return _backward(call, q, k, v, out, lse, dout, dlse, deterministic)


def sparse_forward(
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
    """Return what `flash_forward` returns, over the layout's blocks alone."""
    call = KernelCall(q, k, key_lengths, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    call.with_rule(dropout_seed, dropout_p, softmax_scale, causal)
    call.with_layout(row_ptr, col_idx, col_ptr, row_idx, head_to_pattern, num_blocks, block_size)
    return _forward(call, q, k, v)


def sparse_backward(
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
    """Return what `flash_backward` returns, over the layout's blocks alone."""
    call = KernelCall(q, k, key_lengths, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    call.with_rule(dropout_seed, dropout_p, softmax_scale, causal)
    call.with_layout(row_ptr, col_idx, col_ptr, row_idx, head_to_pattern, num_blocks, block_size)
    return _backward(call, q, k, v, out, lse, dout, dlse, deterministic)


def _forward(call: KernelCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    head_dim = q.shape[-1]
    q, k, v = readable(q), readable(k), readable(v)
    out = kernel_call.empty(q.shape, q.dtype, q.device)
    lse = kernel_call.empty(call.lse_shape, torch.float32, q.device)
    if lse.numel():
        call.place(q=q, k=k, v=v, out_written=out, lse=lse)
        if call.order("forward", call.max_q):
            call.launch("order", 0)
        call.launch("forward", call.max_q)
    return _narrow(out, head_dim), lse


def _backward(
    call: KernelCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = q.shape[-1]
    q, k, v, out, dout = readable(q), readable(k), readable(v), readable(out), readable(dout)
    dk, dv = kernel_call.empty(k.shape, k.dtype, k.device), kernel_call.empty(v.shape, v.dtype, v.device)
    stats = kernel_call.empty((*call.lse_shape, 2), torch.float32, q.device)
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    call.place(q=q, k=k, v=v, out=out, dout=dout, lse=lse, dlse=dlse, stats=stats, dk=dk, dv=dv)
    rows = stats.numel() > 0
    by_atomics = rows and dk.numel() > 0 and not deterministic and call.fits("backward")
    in_tiles = by_atomics and call.plan("backward").hopper
    if in_tiles:
        sums = kernel_call.empty((call.size_of_sums(),), torch.float32, q.device)
        call.order("backward", call.max_k)
    if rows:
        # Of tiles preprocess zeros the sums.
        call.launch("preprocess", 0, dq_sums=sums if in_tiles else None)
    if by_atomics:
        if not in_tiles:
            sums = torch.zeros((*call.lse_shape, width_of(q.shape[-1])), dtype=torch.float32, device=q.device)
        call.launch("backward", call.max_k, dq_sums=sums)
        # Why only now: the statistics are done with, and dq may lie where they were.
        del stats
        dq = kernel_call.empty(q.shape, q.dtype, q.device)
        call.launch("postprocess", call.max_q, dq=dq)
    else:
        dq = kernel_call.empty(q.shape, q.dtype, q.device)
        if rows:
            call.launch("backward_queries", call.max_q, dq=dq)
        if dk.numel():
            call.launch("backward_keys", call.max_k)
    return _narrow(dq, head_dim), _narrow(dk, head_dim), _narrow(dv, head_dim)


def readable(x: Tensor) -> Tensor:
    """Return x as the kernels can read it: rows of whole 16-byte chunks, columns side by side.

    The same tensor for any head dim that is a multiple of 8 and any view whose rows are aligned (a slice of a fused
    projection); a copy, zero-padded to a multiple of 8, for the rest.
    """
    if x.shape[-1] % 8:
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))
    strides = x.stride()
    if strides[-1] == 1 and x.data_ptr() % 16 == 0:
        # The first, the second and the last but one: those of batch, row and head, in three dimensions or four.
        if (strides[0] | strides[1] | strides[-2]) % 8 == 0:
            return x
        # The stride of a dimension of one element is never used.
        if all(stride % 8 == 0 or size == 1 for size, stride in zip(x.shape, strides[:-1], strict=False)):
            return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


def _narrow(x: Tensor, head_dim: int) -> Tensor:
    return x if x.shape[-1] == head_dim else x[..., :head_dim].contiguous()
