"""The operators on the CUDA kernels: allocates outputs and scratch, fills in the parameters, launches.

Joined to the operators when the package is imported with a CUDA build of torch. Reads no value of any tensor, so
nothing waits for the GPU: lengths, offsets and layouts are read by the kernels, which stay inside their buffers
whatever lengths and offsets say. ATTENTION_KERNELS_CHECK=1 reads and checks those here, at the cost of a wait a call.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from attention_kernels import dispatch, families, launcher, philox
from attention_kernels.kernel_plan import Kernel, Plan, plan, width_of
from attention_kernels.sequences import fixed_segments, packed_segments

CHECK = os.environ.get("ATTENTION_KERNELS_CHECK") == "1"
_LOG2_E = 1.4426950408889634
_MAX_BLOCKS = 2**31 - 1
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}

# The fields of struct Params (csrc/common/types.cuh) in their order, and where some of them stand.
_POINTERS = (
    *("q", "k", "v", "out", "dout", "out_written", "dq", "dk", "dv", "lse", "dlse", "stats", "dq_sums"),
    *("cu_q", "cu_k", "key_lengths", "seed", "row_ptr", "col_idx", "head_to_pattern"),
)
_ADDRESS = {name: at for at, name in enumerate(_POINTERS)}
# out is read in one kernel and written in another, never both: they share the strides. dv has dk's.
_STRIDES = {
    name: 20 + 3 * at
    for at, names in enumerate((["q"], ["k"], ["v"], ["out", "out_written"], ["dout"], ["dq"], ["dk"]))
    for name in names
}
_NUMBERS = 41  # stats_batch, stats_head, total_q, total_k, pattern_stride, batch, heads, len_q, len_k, head_dim
_TILES = 51
_RULE = 52  # causal, num_blocks, block_size, drop_step, drop_high, scale, scale_log2, keep_scale
_NOTHING: list[int | float] = [0] * 60


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
    call = _Call(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
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
    call = _Call(q, k, key_lengths, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
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
    call = _Call(q, k, key_lengths, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
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
    call = _Call(q, k, key_lengths, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    call.with_rule(dropout_seed, dropout_p, softmax_scale, causal)
    call.with_layout(row_ptr, col_idx, col_ptr, row_idx, head_to_pattern, num_blocks, block_size)
    return _backward(call, q, k, v, out, lse, dout, dlse, deterministic)


def _forward(call: "_Call", q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    head_dim = q.shape[-1]
    q, k, v = readable(q), readable(k), readable(v)
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
    q, k, v, out, dout = readable(q), readable(k), readable(v), readable(out), readable(dout)
    dk, dv = _empty(k.shape, k.dtype, k.device), _empty(v.shape, v.dtype, v.device)
    stats = _empty((*call.lse_shape, 2), torch.float32, q.device)
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    call.place(q=q, k=k, v=v, out=out, dout=dout, lse=lse, dlse=dlse, stats=stats, dk=dk, dv=dv)
    rows = stats.numel() > 0
    by_atomics = rows and dk.numel() > 0 and not deterministic and call.fits("backward")
    in_tiles = by_atomics and call.plan("backward").hopper
    if in_tiles:
        sums = _empty((call.size_of_tiles(),), torch.float32, q.device)
        call.place(dq_sums=sums)  # preprocess zeros them
    if rows:
        call.launch("preprocess", 0)
    if not by_atomics:
        dq = _empty(q.shape, q.dtype, q.device)
        if rows:
            call.launch("backward_queries", call.max_q, dq=dq)
        if dk.numel():
            call.launch("backward_keys", call.max_k)
    else:
        if not in_tiles:
            sums = torch.zeros((*call.lse_shape, width_of(q.shape[-1])), dtype=torch.float32, device=q.device)
        call.launch("backward", call.max_k, dq_sums=sums)
        # Why only now: the statistics are done with, and dq may lie where they were.
        del stats
        dq = _empty(q.shape, q.dtype, q.device)
        call.launch("postprocess", call.max_q, dq=dq)
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


def _int32(x: Tensor) -> Tensor:
    """Return x as contiguous int32, the same tensor where it is that already."""
    return x if x.dtype == torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for an output; the tests put guard bands around it here."""
    return torch.empty(shape, dtype=dtype, device=device)


def _narrow(x: Tensor, head_dim: int) -> Tensor:
    return x if x.shape[-1] == head_dim else x[..., :head_dim].contiguous()


class _Call:
    """Everything of a call that is the same for its kernels, and the fields of their parameters.

    Runs several times in every step of a model: an address is put in its place once, for all kernels of the call.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        key_lengths: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int,
        max_k: int,
    ) -> None:
        self.index = q.device.index or 0
        shape = q.shape
        self.dtype, self.heads = _DTYPES[q.dtype], shape[-2]
        self.head_dim = -(-shape[-1] // 8) * 8  # as `readable` makes it
        self.fields = _NOTHING.copy()
        self.dropout, self.sparse = False, 0  # the layout's block size
        self.packed = cu_q is not None and cu_k is not None
        lengths = (0, 0)
        if cu_q is not None and cu_k is not None:
            if CHECK:
                packed_segments(cu_q, cu_k, max_q, max_k, q.shape[0], k.shape[0])
            # Kept: what `_int32` made must be there until the last launch.
            self.offsets = new_q, new_k = _int32(cu_q), _int32(cu_k)
            self.place(cu_q=new_q, cu_k=new_k)
            self.batch, self.total_q, total_k = cu_q.shape[0] - 1, shape[0], k.shape[0]
            # Why min: an upper bound may be far beyond what the tensor can hold, and each tile costs a block.
            self.max_q, self.max_k = min(max_q, self.total_q), min(max_k, total_k)
            self.lse_shape: tuple[int, ...] = (self.heads, self.total_q)
            stats = (0, self.total_q)
        else:
            self.batch, len_q, len_k = shape[0], shape[1], k.shape[1]
            if CHECK:
                fixed_segments(self.batch, len_q, len_k, key_lengths)
            self.total_q, total_k = self.batch * len_q, self.batch * len_k
            self.max_q, self.max_k = lengths = (len_q, len_k)
            self.lse_shape = (self.batch, self.heads, len_q)
            stats = (self.heads * len_q, len_q)
            if key_lengths is not None:
                self.key_lengths = _int32(key_lengths)
                self.place(key_lengths=self.key_lengths)
        numbers = (*stats, self.total_q, total_k, 0, self.batch, self.heads, *lengths, self.head_dim)
        self.fields[_NUMBERS:_TILES] = numbers

    def with_rule(self, seed: Tensor | None, dropout_p: float, scale: float, causal: bool) -> "_Call":
        """Set dropout, scale and mask; return the call."""
        count = 0 if seed is None else philox.drop_count(dropout_p)
        if seed is not None and count:
            # A caller may hand in any view of two numbers; the kernels read them side by side.
            self.seed = seed.contiguous()
            self.place(seed=self.seed)
            self.dropout = True
        # philox.cuh compares four bytes at a time with the two numbers made of the count.
        self.fields[_RULE:] = (
            *(int(causal), 0, 0, (128 - count % 128) * 0x01010101, 0xFFFFFFFF if count < 128 else 0),
            *(scale, scale * _LOG2_E, philox.keep_scale(count)),
        )
        return self

    def with_layout(
        self,
        row_ptr: Tensor,
        col_idx: Tensor,
        col_ptr: Tensor,
        row_idx: Tensor,
        head_to_pattern: Tensor,
        num_blocks: int,
        block_size: int,
    ) -> None:
        """Walk over the blocks of a layout alone: kernels over queries read its rows, those over keys its columns.

        A layout with every block is left to the dense kernels. Lists never repeat a block, so their length tells.
        """
        if col_idx.shape[0] == (row_ptr.shape[0] - 1) * num_blocks:
            return
        self.rows, self.columns = (_int32(row_ptr), _int32(col_idx)), (_int32(col_ptr), _int32(row_idx))
        self.head_to_pattern = _int32(head_to_pattern)
        self.place(head_to_pattern=self.head_to_pattern)
        # One entry serves all heads.
        self.fields[_NUMBERS + 4] = 0 if head_to_pattern.shape[0] == 1 else 1
        self.fields[_RULE + 1], self.fields[_RULE + 2] = num_blocks, block_size
        self.sparse = block_size

    def place(self, **tensors: Tensor | None) -> None:
        """Name the tensors, as struct Params does, that the launches from now on read or write."""
        fields, packed = self.fields, self.packed
        for name, x in tensors.items():
            if x is None:
                continue
            fields[_ADDRESS[name]] = x.data_ptr()
            at = _STRIDES.get(name)
            if at is None:
                continue
            # Of batch, row and head; packed tensors have batch stride 0.
            if packed:
                fields[at + 1], fields[at + 2], _ = x.stride()
            else:
                fields[at], fields[at + 1], fields[at + 2], _ = x.stride()

    def plan(self, kernel: Kernel) -> Plan:
        """Return the plan of one of the call's kernels, of the best family that the device runs."""
        hopper = launcher.is_hopper(self.index) and families.asked() != "generic"
        return plan(kernel, self.head_dim, self.dtype, self.dropout, hopper, self.sparse)

    def fits(self, kernel: Kernel) -> bool:
        """Return whether the device has the shared memory that a kernel's tiles want (8.6 and 8.9 have 99 KB)."""
        return launcher.fits(self.plan(kernel), self.index)

    def size_of_tiles(self) -> int:
        """Return how many numbers dQ's sums are as tiles of 64 rows (csrc/common/dq_tiles.cuh)."""
        a_head = self.total_q // 64 + self.batch + 1 if self.packed else -(-self.max_q // 64) * self.batch
        return a_head * self.heads * 64 * width_of(self.head_dim)

    def launch(self, kernel: Kernel, longest: int, **tensors: Tensor | None) -> None:
        """Launch a kernel over every tile of `longest` rows, every head and every sequence.

        It gets the tensors that were named up to now, and these.
        """
        self.place(**tensors)
        chosen = self.plan(kernel)
        tiles = max(1, -(-longest // chosen.rows))
        if kernel == "preprocess" or (kernel == "postprocess" and not chosen.tiled):
            blocks = self._row_blocks(chosen)
        else:
            # Packed: one sequence more, the rows after the last one.
            blocks = tiles * self.heads * (self.batch + self.packed)
            blocks = -(-blocks // chosen.tiles.teams)
        if blocks > _MAX_BLOCKS:
            raise ValueError(
                f"q is too large for one launch: {blocks} tiles of {chosen.rows} rows, at most {_MAX_BLOCKS}."
            )
        if chosen.persistent:
            blocks = min(blocks, launcher.blocks_at_a_time(chosen, self.index))
        if self.sparse:
            over_keys = kernel == "backward" or kernel == "backward_keys"
            pointers, entries = self.columns if over_keys else self.rows
            self.place(row_ptr=pointers, col_idx=entries)
        self.fields[_TILES] = tiles
        overlap = kernel in ("backward", "postprocess") and self.plan("backward").persistent
        launcher.launch(chosen, self.index, blocks, self.fields, overlap)

    def _row_blocks(self, chosen: Plan) -> int:
        """Blocks of the kernels that have a few lanes for each row."""
        lanes = chosen.width // 4
        if chosen.kernel == "preprocess":
            lanes = 1 << (self.head_dim // 8 - 1).bit_length()  # a power of two, eight features each
        return -(-self.total_q * self.heads * lanes // chosen.threads)
