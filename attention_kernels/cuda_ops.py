"""The operators on the CUDA kernels: allocates outputs and scratch, fills in the parameters, launches.

Joined to the operators when the package is imported with a CUDA build of torch. Reads no value of any tensor, so
nothing waits for the GPU: lengths, offsets and layouts are read by the kernels, which stay inside their buffers
whatever lengths and offsets say. ATTENTION_KERNELS_CHECK=1 reads and checks those here, at the cost of a wait a call.
"""

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from attention_kernels import dispatch, families, launcher, philox
from attention_kernels.kernel_plan import Kernel, Plan, plan, width_of
from attention_kernels.sequences import fixed_segments, packed_segments

_LOG2_E = 1.4426950408889634
_MAX_BLOCKS = 2**31 - 1
_Strides = tuple[int, int, int]


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
    call = _Call.of(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _forward(call.with_rule(dropout_seed, dropout_p, softmax_scale, causal), q, k, v)


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
    call = _Call.of(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = call.with_rule(dropout_seed, dropout_p, softmax_scale, causal)
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
    call = _Call.of(q, k, key_lengths, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    call = call.with_rule(dropout_seed, dropout_p, softmax_scale, causal)
    lists = _Lists.of(row_ptr, col_idx, col_ptr, row_idx, head_to_pattern, num_blocks, block_size)
    return _forward(replace(call, lists=lists), q, k, v)


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
    call = _Call.of(q, k, key_lengths, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    call = call.with_rule(dropout_seed, dropout_p, softmax_scale, causal)
    lists = _Lists.of(row_ptr, col_idx, col_ptr, row_idx, head_to_pattern, num_blocks, block_size)
    return _backward(replace(call, lists=lists), q, k, v, out, lse, dout, dlse, deterministic)


def _forward(call: "_Call", q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    head_dim = q.shape[-1]
    q, k, v = (readable(x) for x in (q, k, v))
    out = _empty(q.shape, q.dtype, q.device)
    lse = _empty(call.lse_shape, torch.float32, q.device)
    if lse.numel():
        call.launch("forward", call.max_q, q=q, k=k, v=v, out_written=out, lse=lse)
    return _narrow(out, head_dim), lse


def _backward(
    call: "_Call",
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
    q, k, v, out, dout = (readable(x) for x in (q, k, v, out, dout))
    dq, dk, dv = (_empty(x.shape, x.dtype, x.device) for x in (q, k, v))
    stats = _empty((*call.lse_shape, 2), torch.float32, q.device)
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    saved = {"q": q, "k": k, "v": v, "dout": dout, "stats": stats}
    if stats.numel():
        call.launch("preprocess", 0, out=out, dout=dout, lse=lse, dlse=dlse, stats=stats)
    if deterministic or not stats.numel() or not dk.numel() or not call.fits("backward"):
        if stats.numel():
            call.launch("backward_queries", call.max_q, **saved, dq=dq)
        if dk.numel():
            call.launch("backward_keys", call.max_k, **saved, dk=dk, dv=dv)
    else:
        sums = torch.zeros((*call.lse_shape, width_of(q.shape[-1])), dtype=torch.float32, device=q.device)
        call.launch("backward", call.max_k, **saved, dk=dk, dv=dv, dq_sums=sums)
        call.launch("postprocess", 0, dq=dq, dq_sums=sums)
    return _narrow(dq, head_dim), _narrow(dk, head_dim), _narrow(dv, head_dim)


def readable(x: Tensor) -> Tensor:
    """Return x as the kernels can read it: rows of whole 16-byte chunks, columns side by side.

    The same tensor for any head dim that is a multiple of 8 and any view whose rows are aligned (a slice of a fused
    projection); a copy, zero-padded to a multiple of 8, for the rest.
    """
    if x.shape[-1] % 8:
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % 8))
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides):
        return x
    return x.contiguous() if not x.is_contiguous() else x.clone()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for an output; the tests put guard bands around it here."""
    return torch.empty(shape, dtype=dtype, device=device)


def _narrow(x: Tensor, head_dim: int) -> Tensor:
    return x if x.shape[-1] == head_dim else x[..., :head_dim].contiguous()


def _strides(x: Tensor) -> _Strides:
    """Return the strides of batch, row and head; packed tensors have batch stride 0."""
    return (0, x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0), x.stride(1), x.stride(2))


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


@dataclass(frozen=True)
class _Lists:
    """A block layout as the kernels read it: those over queries its rows, those over keys its columns."""

    rows: tuple[Tensor | None, Tensor | None]  # pointers and entries
    columns: tuple[Tensor | None, Tensor | None]
    head_to_pattern: Tensor | None
    pattern_stride: int
    num_blocks: int
    block_size: int

    @staticmethod
    def of(
        row_ptr: Tensor,
        col_idx: Tensor,
        col_ptr: Tensor,
        row_idx: Tensor,
        head_to_pattern: Tensor,
        num_blocks: int,
        block_size: int,
    ) -> "_Lists":
        rows, columns = (_int32(row_ptr), _int32(col_idx)), (_int32(col_ptr), _int32(row_idx))
        # One entry serves all heads.
        stride = 0 if len(head_to_pattern) == 1 else 1
        return _Lists(rows, columns, _int32(head_to_pattern), stride, num_blocks, block_size)


@dataclass(frozen=True)
class _Call:
    """Everything of a call that is the same for its kernels."""

    device: torch.device
    dtype: str
    head_dim: int
    heads: int
    batch: int
    packed: bool
    total_q: int
    total_k: int
    len_q: int
    len_k: int
    max_q: int
    max_k: int
    key_lengths: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    seed: Tensor | None = None
    drop_count: int = 0
    scale: float = 1.0
    causal: bool = False
    lists: _Lists | None = None

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        key_lengths: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int,
        max_k: int,
    ) -> "_Call":
        packed = cu_q is not None and cu_k is not None
        if os.environ.get("ATTENTION_KERNELS_CHECK") == "1":
            if cu_q is not None and cu_k is not None:
                packed_segments(cu_q, cu_k, max_q, max_k, q.shape[0], k.shape[0])
            else:
                fixed_segments(q.shape[0], q.shape[1], k.shape[1], key_lengths)
        batch = len(cu_q) - 1 if cu_q is not None else q.shape[0]
        total_q, total_k = (x.shape[0] if packed else x.shape[0] * x.shape[1] for x in (q, k))
        len_q, len_k = (0, 0) if packed else (q.shape[1], k.shape[1])
        new_q = _int32(cu_q)
        return _Call(
            device=q.device,
            dtype=str(q.dtype).removeprefix("torch."),
            head_dim=-(-q.shape[-1] // 8) * 8,  # as `readable` makes it
            heads=q.shape[-2],
            batch=batch,
            packed=packed,
            total_q=total_q,
            total_k=total_k,
            len_q=len_q,
            len_k=len_k,
            # Why min: an upper bound may be far beyond what the tensor can hold, and each tile costs a block.
            max_q=min(max_q, total_q) if packed else len_q,
            max_k=min(max_k, total_k) if packed else len_k,
            key_lengths=_int32(key_lengths),
            cu_q=new_q,
            cu_k=new_q if cu_k is cu_q else _int32(cu_k),
        )

    def with_rule(self, seed: Tensor | None, dropout_p: float, scale: float, causal: bool) -> "_Call":
        """Return the call with its dropout, scale and mask."""
        count = 0 if seed is None else philox.drop_count(dropout_p)
        # A caller may hand in any view of two numbers; the kernels read them side by side.
        seed = seed.contiguous() if seed is not None and count else None
        return replace(self, seed=seed, drop_count=count, scale=scale, causal=causal)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """Shape of lse and of the row statistics."""
        return (self.heads, self.total_q) if self.packed else (self.batch, self.heads, self.len_q)

    def plan(self, kernel: Kernel) -> Plan:
        """Return the plan of one of the call's kernels, of the best family that the device runs."""
        hopper = launcher.is_hopper(self.device) and families.asked() != "generic"
        return plan(kernel, self.head_dim, self.dtype, self.drop_count > 0, hopper, self.lists is not None)

    def fits(self, kernel: Kernel) -> bool:
        """Return whether the device has the shared memory that a kernel's tiles want (8.6 and 8.9 have 99 KB)."""
        return launcher.fits(self.plan(kernel), self.device)

    def launch(self, kernel: Kernel, longest: int, **tensors: Tensor | None) -> None:
        """Launch a kernel over every tile of `longest` rows, every head and every sequence."""
        chosen = self.plan(kernel)
        tiles = max(1, -(-longest // chosen.rows))
        if kernel in ("preprocess", "postprocess"):
            blocks = self._row_blocks(chosen)
        else:
            # Packed: one sequence more, the rows after the last one.
            blocks = tiles * self.heads * (self.batch + self.packed)
        if blocks > _MAX_BLOCKS:
            raise ValueError(
                f"q is too large for one launch: {blocks} tiles of {chosen.rows} rows, at most {_MAX_BLOCKS}."
            )
        if chosen.persistent:
            blocks = min(blocks, launcher.blocks_at_a_time(chosen, self.device))
        if self.lists is not None:
            over_keys = kernel in ("backward", "backward_keys")
            tensors["row_ptr"], tensors["col_idx"] = self.lists.columns if over_keys else self.lists.rows
            tensors["head_to_pattern"] = self.lists.head_to_pattern
        launcher.launch(chosen, self.device, blocks, self._parameters(tiles, tensors))

    def _row_blocks(self, chosen: Plan) -> int:
        """Blocks of the kernels that have a few lanes for each row."""
        lanes = chosen.width // 4
        if chosen.kernel == "preprocess":
            lanes = 1
            while lanes * 8 < self.head_dim:
                lanes *= 2
        return -(-self.total_q * self.heads * lanes // chosen.threads)

    def _parameters(self, tiles: int, tensors: dict[str, Tensor | None]) -> tuple[int | float, ...]:
        """Return the fields of struct Params (csrc/common/types.cuh) in their order."""

        def address(x: Tensor | None) -> int:
            return 0 if x is None else x.data_ptr()

        def strides(name: str) -> _Strides:
            x = tensors.get(name)
            return (0, 0, 0) if x is None else _strides(x)

        names = ("q", "k", "v", "out", "dout", "out_written", "dq", "dk", "dv", "lse", "dlse", "stats", "dq_sums")
        # out is read in one kernel and written in another, never both: they share the strides.
        out = "out_written" if "out_written" in tensors else "out"
        strided = ("q", "k", "v", out, "dout", "dq", "dk")
        per_head = self.total_q if self.packed else self.len_q
        # philox.cuh compares four bytes at a time with these two.
        step = (128 - self.drop_count % 128) * 0x01010101
        high = 0xFFFFFFFF if self.drop_count < 128 else 0
        return (
            *(address(tensors.get(name)) for name in names),
            *(address(x) for x in (self.cu_q, self.cu_k, self.key_lengths, self.seed)),
            *(address(tensors.get(name)) for name in ("row_ptr", "col_idx", "head_to_pattern")),
            *(number for name in strided for number in strides(name)),
            0 if self.packed else self.heads * self.len_q,
            per_head,
            self.total_q,
            self.total_k,
            0 if self.lists is None else self.lists.pattern_stride,
            *(self.batch, self.heads, self.len_q, self.len_k, self.head_dim, tiles, int(self.causal)),
            *((0, 0) if self.lists is None else (self.lists.num_blocks, self.lists.block_size)),
            *(step, high),
            *(self.scale, self.scale * _LOG2_E, philox.keep_scale(self.drop_count)),
        )
