"""One call of attention on the CUDA kernels: the parameters that its launches share, its plans, and the launches.

Called by cuda_ops.py. Reads no value of any tensor, unless ATTENTION_KERNELS_CHECK=1 asks for it.
"""

import os

import torch
from torch import Tensor

from attention_kernels import families, launcher, philox, pieces
from attention_kernels.kernel_plan import Kernel, Plan, plan, width_of
from attention_kernels.sequences import fixed_segments, packed_segments

CHECK = os.environ.get("ATTENTION_KERNELS_CHECK") == "1"
_LOG2_E = 1.4426950408889634
_MAX_BLOCKS = 2**31 - 1
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}

# The fields of struct Params (csrc/common/types.cuh) in their order, and where some of them stand.
_POINTERS = (
    *("q", "k", "v", "out", "dout", "out_written", "dq", "dk", "dv", "lse", "dlse", "stats", "dq_sums"),
    *("cu_q", "cu_k", "key_lengths", "seed", "row_ptr", "col_idx", "head_to_pattern", "order"),
)
_ADDRESS = {name: at for at, name in enumerate(_POINTERS)}
_LISTS = _ADDRESS["row_ptr"]  # and behind it col_idx
# out is read in one kernel and written in another, never both: they share the strides. dv has dk's.
_STRIDES = {
    name: 21 + 3 * at
    for at, names in enumerate((["q"], ["k"], ["v"], ["out", "out_written"], ["dout"], ["dq"], ["dk"]))
    for name in names
}
_NUMBERS = 42  # stats_batch, stats_head, total_q, total_k, pattern_stride, batch, heads, len_q, len_k, head_dim
_TILES = 52  # tiles, pieces, rows
_RULE = 55  # causal, num_blocks, block_size, drop_step, drop_high
_PARTS = 60  # parts, part
_SCALES = 62  # scale, scale_log2, keep_scale
_NOTHING: list[int | float] = [0] * 65


def takes_hopper(index: int) -> bool:
    """Return whether calls on CUDA device `index` go to the family for 9.0 where it has the kernel."""
    return launcher.is_hopper(index) and families.asked() != "generic"


def int32(x: Tensor) -> Tensor:
    """Return x as contiguous int32, the same tensor where it is that already."""
    return x if x.dtype == torch.int32 and x.is_contiguous() else x.to(torch.int32).contiguous()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for an output; the tests put guard bands around it here."""
    return torch.empty(*shape, dtype=dtype, device=device)


class KernelCall:
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
        self.device = q.device
        self.index = q.device.index or 0
        shape = q.shape
        self.dtype, self.heads = DTYPES[q.dtype], shape[-2]
        self.head_dim = -(-shape[-1] // 8) * 8  # as `readable` makes it
        self.fields = _NOTHING.copy()
        self.dropout, self.sparse = False, 0  # the layout's block size
        self.plans: dict[Kernel, Plan] = {}
        self.packed = cu_q is not None and cu_k is not None
        lengths = (0, 0)
        if cu_q is not None and cu_k is not None:
            if CHECK:
                packed_segments(cu_q, cu_k, max_q, max_k, q.shape[0], k.shape[0])
            # Kept: what `int32` made must be there until the last launch.
            self.offsets = new_q, new_k = int32(cu_q), int32(cu_k)
            self.place(cu_q=new_q, cu_k=new_k)
            self.batch, self.total_q, self.total_k = cu_q.shape[0] - 1, shape[0], k.shape[0]
            # Why min: an upper bound may be far beyond what the tensor can hold, and each tile costs a block.
            self.max_q, self.max_k = min(max_q, self.total_q), min(max_k, self.total_k)
            self.lse_shape: tuple[int, ...] = (self.heads, self.total_q)
            stats = (0, self.total_q)
        else:
            self.batch, len_q, len_k = shape[0], shape[1], k.shape[1]
            if CHECK:
                fixed_segments(self.batch, len_q, len_k, key_lengths)
            self.total_q, self.total_k = self.batch * len_q, self.batch * len_k
            self.max_q, self.max_k = lengths = (len_q, len_k)
            self.lse_shape = (self.batch, self.heads, len_q)
            stats = (self.heads * len_q, len_q)
            if key_lengths is not None:
                self.key_lengths = int32(key_lengths)
                self.place(key_lengths=self.key_lengths)
        numbers = (*stats, self.total_q, self.total_k, 0, self.batch, self.heads, *lengths, self.head_dim)
        self.fields[_NUMBERS:_TILES] = numbers

    def with_rule(self, seed: Tensor | None, dropout_p: float, scale: float, causal: bool) -> "KernelCall":
        """Set dropout, scale and mask; return the call."""
        count = 0 if seed is None else philox.drop_count(dropout_p)
        if seed is not None and count:
            # A caller may hand in any view of two numbers; the kernels read them side by side.
            self.seed = seed.contiguous()
            self.place(seed=self.seed)
            self.dropout = True
        # philox.cuh compares four bytes at a time with the two numbers made of the count.
        drop = ((128 - count % 128) * 0x01010101, 0xFFFFFFFF if count < 128 else 0)
        self.fields[_RULE:_PARTS] = (int(causal), 0, 0, *drop)
        self.fields[_SCALES:] = (scale, scale * _LOG2_E, philox.keep_scale(count))
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
        # Kept: what `int32` made must be there until the last launch.
        self.layout = lists = [int32(x) for x in (row_ptr, col_idx, col_ptr, row_idx, head_to_pattern)]
        addresses = [x.data_ptr() for x in lists]
        self.rows, self.columns, self.fields[_ADDRESS["head_to_pattern"]] = addresses[:2], addresses[2:4], addresses[4]
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
        found = self.plans.get(kernel)
        if found is None:
            found = plan(kernel, self.head_dim, self.dtype, self.dropout, takes_hopper(self.index), self.sparse)
            self.plans[kernel] = found
        return found

    def fits(self, kernel: Kernel) -> bool:
        """Return whether the device has the shared memory that a kernel's tiles want (8.6 and 8.9 have 99 KB)."""
        return launcher.fits(self.plan(kernel), self.index)

    def size_of_sums(self) -> int:
        """Return how many numbers dQ's sums are as tiles of 64 rows (csrc/common/dq_tiles.cuh)."""
        heads = self.heads * (1 if self.packed else self.batch)
        a_head = self.total_q // 64 + self.batch + 1 if self.packed else -(-self.max_q // 64)
        return a_head * heads * 64 * width_of(self.head_dim)

    def order(self, kernel: Kernel, longest: int) -> bool:
        """Make room for the order of a kernel's pieces of work, which the next launch writes; return whether so.

        Packed sequences differ in length: pieces of the longest begin first (csrc/common/order.cuh).
        """
        chosen = self.plan(kernel)
        if not (self.packed and chosen.hopper):
            return False
        # Kept: it must be there until the kernel is launched.
        self.pieces = empty((self._cut(chosen, longest),), torch.int32, self.device)
        self.place(order=self.pieces)
        return True

    def _cut(self, chosen: Plan, longest: int) -> int:
        """Cut a kernel's work into pieces of its plan's rows, and return how many there may be."""
        tiles, parts, part = self._tiles(chosen, longest)
        # Packed: one sequence more, the rows after the last one.
        count = (tiles + parts) * self.heads * (self.batch + self.packed)
        if count > _MAX_BLOCKS:
            raise ValueError(
                f"q is too large for one launch: {count} tiles of {chosen.rows} rows, at most {_MAX_BLOCKS}."
            )
        if self.packed and chosen.hopper:
            # The order lists no empty tile, and each sequence rounds up once.
            listed = (self.total_k if chosen.over_keys else self.total_q) // chosen.rows + self.batch
            count = min(count, (listed + tiles) * self.heads)
        self.fields[_TILES:_RULE] = tiles, count, chosen.rows
        self.fields[_PARTS:_SCALES] = parts, part
        return count

    def _tiles(self, chosen: Plan, longest: int) -> pieces.Cut:
        """Return how a head is cut: in two sizes where all pieces of a size cost the same, and blocks take several."""
        uneven = self.packed or self.sparse or self.fields[_RULE] or self.fields[_ADDRESS["key_lengths"]]
        if chosen.kernel != "hopper_backward" or not chosen.persistent or uneven:
            return pieces.whole(longest, chosen.rows)
        return pieces.cut(longest, self.heads * self.batch, chosen.rows, launcher.blocks_at_a_time(chosen, self.index))

    def launch(self, kernel: Kernel, longest: int, **tensors: Tensor | None) -> None:
        """Launch a kernel over every tile of `longest` rows, every head and every sequence.

        It gets the tensors that were named up to now, and these.
        """
        self.place(**tensors)
        chosen = self.plan(kernel)
        if kernel == "order":
            blocks = 1
        elif kernel == "preprocess" or (kernel == "postprocess" and not chosen.tiled):
            blocks = self._row_blocks(chosen) + (self.fields[_ADDRESS["order"]] != 0)
        else:
            if kernel == "postprocess":
                self.fields[_ADDRESS["order"]] = 0
            blocks = -(-self._cut(chosen, longest) // chosen.tiles.teams)
        if chosen.persistent and not self.packed:
            blocks = min(blocks, launcher.blocks_at_a_time(chosen, self.index))
        if self.sparse:
            self.fields[_LISTS : _LISTS + 2] = self.columns if kernel in ("backward", "backward_keys") else self.rows
        launcher.launch(chosen, self.index, blocks, self.fields, self._overlaps(kernel))

    def _overlaps(self, kernel: Kernel) -> bool:
        """Return whether a kernel may begin while the one before it still runs."""
        if kernel == "forward":
            return self.fields[_ADDRESS["order"]] != 0
        return kernel in ("backward", "postprocess") and self.plan("backward").persistent

    def _row_blocks(self, chosen: Plan) -> int:
        """Blocks of the kernels that have a few lanes for each row."""
        lanes = chosen.width // 4
        if chosen.kernel == "preprocess":
            lanes = 1 << (self.head_dim // 8 - 1).bit_length()  # a power of two, eight features each
        return -(-self.total_q * self.heads * lanes // chosen.threads)
