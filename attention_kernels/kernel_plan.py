"""Which kernel runs a call, with which tiles: pure functions of head dim, dtype and dropout, tested without a GPU.

A plan is all that the compiler (source and macros) and the launcher (threads, rows a block, shared memory) need.
Standard library only: the compiler's child process reads none of torch.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

Kernel = Literal[
    "forward",
    "backward",
    "backward_keys",
    "backward_queries",
    "order",
    "preprocess",
    "postprocess",
    "hopper_forward",
    "hopper_backward",
]

WIDTHS = (16, 32, 64, 96, 128)
DTYPES = ("float16", "bfloat16")
# backward: all three gradients, dQ by atomics; backward_keys and backward_queries: the same without atomics.
_OF_ANY_WIDTH: tuple[Kernel, ...] = ("order", "preprocess")
_LOOPS: tuple[Kernel, ...] = ("forward", "backward", "backward_keys", "backward_queries")


@dataclass(frozen=True)
class Tiles:
    """Tile numbers of one kernel: a warp has 16 * row_tiles stationary rows, a stage has `tile` streamed ones."""

    warps: int
    row_tiles: int
    tile: int
    step: int
    stages: int
    min_blocks: int  # blocks a multiprocessor that the compiler must leave registers for
    # What is read from shared memory instead of registers: 1 v, 2 k as well (generic backward over keys); 1 q
    # (Hopper forward); 1 k and v (Hopper backward).
    shared_operands: int = 0
    ds_slots: int = 0  # Hopper backward: tiles of dS at a time
    turns: int = 0  # Hopper forward: 1 lets the warpgroups take turns at queueing products
    persistent: int = 1  # Hopper: 1 launches as many blocks as run at a time, 0 one for each piece of work
    teams: int = 1  # Hopper: into how many the computing warps of a block fall, each with pieces of work of its own
    one_list: int = 0  # Hopper, block-sparse: 1 where a team of several groups has at most the rows of one block
    # Hopper backward: dQ goes to its sums by additions of the lanes (1) or by bulk reductions (2).
    sums: int = 0
    ahead: int = 0  # Hopper backward: 1 queues S of a tile behind dV and dK of the one before
    pairs: int = 0  # Hopper backward with dropout: 1 lets two warps share their draws of the mask


@dataclass(frozen=True)
class Plan:
    """One compiled variant and how to launch it."""

    kernel: Kernel
    width: int
    dtype: str
    dropout: bool
    tiles: Tiles
    sparse: bool = False  # the block-sparse kernel, of the same build where the tiles are the dense kernel's
    tiled: bool = False  # postprocess: the sums are the Hopper backward's tiles, not rows

    @property
    def source(self) -> str:
        """Name of the file in csrc."""
        if self.hopper:
            return f"{self.kernel}.cu"
        return f"generic_{'backward_keys' if self._over_keys else self.kernel}.cu"

    @property
    def entry(self) -> str:
        """Name of the kernel in the cubin."""
        return f"attention_{'backward_keys' if self._over_keys else self.kernel}{'_sparse' if self.sparse else ''}"

    @property
    def defines(self) -> dict[str, int]:
        """Macros of the build."""
        t = self.tiles
        named = {"HEAD_DIM": self.width, "DTYPE_BF16": int(self.dtype == "bfloat16"), "WARPS": t.warps}
        if self.kernel in ("order", "preprocess"):
            return named
        if self.kernel == "postprocess":
            return named | {"TILED": int(self.tiled)}
        named |= {
            "DROPOUT": int(self.dropout),
            "ROW_TILES": t.row_tiles,
            "STAGES": t.stages,
            "MIN_BLOCKS": t.min_blocks,
        }
        if self.hopper:
            named |= {"TEAMS": t.teams, "SHARED_OPERANDS": t.shared_operands, **self._kernels_of_build}
            named["ONE_LIST"] = int(t.one_list or t.warps == 4 * t.teams)
            if self.kernel == "hopper_backward":
                named |= {"DS_SLOTS": t.ds_slots, "PERSISTENT": t.persistent}
                return named | {"SUMS": t.sums, "AHEAD": t.ahead, "PAIRS": t.pairs}
            return named | {"KEY_TILE": t.tile, "TURNS": t.turns}
        if self._over_keys:
            with_dq = int(self.kernel == "backward")
            return named | {"QUERY_TILE": t.tile, "SHARED_OPERANDS": t.shared_operands, "WITH_DQ": with_dq}
        return named | {"KEY_TILE": t.tile, "STEP": t.step}

    @property
    def _kernels_of_build(self) -> dict[str, int]:
        """Which kernels of a Hopper source are built with these tiles."""
        at = (self.kernel, self.width, self.dropout)
        dense = not self.sparse or _hopper_tiles(self.kernel, self.width, self.dropout) == self.tiles
        return {"DENSE": int(dense), "SPARSE": int(self.sparse or _HOPPER_SPARSE.get(at) == self.tiles)}

    @property
    def _over_keys(self) -> bool:
        """Whether the source is the generic kernel over keys."""
        return self.kernel in ("backward", "backward_keys")

    @cached_property
    def over_keys(self) -> bool:
        """Whether the stationary rows are keys."""
        return self._over_keys or self.kernel == "hopper_backward"

    @cached_property
    def hopper(self) -> bool:
        """Whether it is of the family for 9.0."""
        return self.kernel.startswith("hopper_")

    @property
    def spills(self) -> int:
        """Bytes of spills that are known to lie outside the loop of products."""
        return _KNOWN_SPILLS.get((self.tiles, self.dropout), 0) if self.sparse and self.hopper else 0

    @cached_property
    def threads(self) -> int:
        """Threads a block; the Hopper family has four warps more that copy."""
        return 32 * (self.tiles.warps + 4 * self.hopper)

    @cached_property
    def persistent(self) -> bool:
        """Whether a block goes from one piece of work to the next: then a launch has as many as run at a time."""
        return self.hopper and self.tiles.persistent == 1

    @cached_property
    def rows(self) -> int:
        """Stationary rows (queries, or keys in backward_keys) a piece of work: a block's, a team's, a tile of sums."""
        if self.tiled:
            return 64
        return 16 * self.tiles.row_tiles * self.tiles.warps // self.tiles.teams

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory a block: two tiles a stage, and what backward over keys lays beside them."""
        if self.kernel in ("order", "preprocess", "postprocess"):
            return 0
        t = self.tiles
        stage = 2 * t.tile * self.width * 2
        if self.kernel == "hopper_forward":
            queries = t.shared_operands * (self.rows * self.width * 2 + 16)
            return self._of_teams(t.stages * (stage + 24) + queries)
        if self.kernel == "hopper_backward":
            slots = t.ds_slots * (self.rows * t.tile * 2 + 16)
            keys = (1 + t.persistent) * (2 * self.rows * self.width * 2 + 16)
            dq = (t.sums == 2) * self.rows * self.width * 4
            return self._of_teams(t.stages * (stage + 8 * t.tile + 24) + keys + slots + dq + t.pairs * self.rows * 8)
        if not self._over_keys:
            return t.stages * stage
        with_dq = self.kernel == "backward"
        operands = (with_dq or t.shared_operands == 2) + (t.shared_operands >= 1)
        scores = self.rows * t.tile * 2 if with_dq else 0
        return t.stages * (stage + 8 * t.tile) + operands * self.rows * self.width * 2 + scores

    def _of_teams(self, bytes_each: int) -> int:
        """Return the shared memory of all teams; where there are several, each begins at a multiple of 1 KB."""
        teams = self.tiles.teams
        return bytes_each if teams == 1 else teams * (-(-bytes_each // 1024) * 1024)

    @property
    def name(self) -> str:
        """A short name for tables."""
        dropout = ", dropout" if self.dropout else ""
        form = ", block-sparse" if self.sparse else ", tiles" if self.tiled else ""
        return f"{self.kernel} {self.width} {self.dtype}{dropout}{form}"


def width_of(head_dim: int) -> int:
    """Return the native width that a head dim is read into; ValueError beyond the widest."""
    for width in WIDTHS:
        if head_dim <= width:
            return width
    raise ValueError(f"head_dim must be at most {WIDTHS[-1]}, got {head_dim}.")


# Chosen by register count (no spills on 8.0 and 9.0) and by the timings in docs/kernels.md.
_FORWARD = {
    16: Tiles(4, 2, 128, 32, 3, 4),
    32: Tiles(4, 2, 128, 32, 2, 3),
    64: Tiles(4, 2, 64, 32, 2, 2),
    96: Tiles(8, 1, 64, 64, 2, 1),
    128: Tiles(8, 1, 64, 64, 2, 1),
}
_ALL = {
    16: Tiles(4, 2, 64, 16, 2, 4, 2),
    32: Tiles(4, 2, 64, 16, 2, 3, 2),
    64: Tiles(4, 2, 64, 16, 2, 2, 2),
    96: Tiles(8, 1, 64, 16, 2, 1, 2),
    128: Tiles(8, 1, 64, 16, 2, 1, 2),
}
_KEYS = {
    16: Tiles(4, 2, 64, 16, 3, 4),
    32: Tiles(4, 2, 64, 16, 2, 3, 2),
    64: Tiles(4, 2, 64, 16, 2, 2, 2),
    96: Tiles(4, 1, 64, 16, 2, 2),
    128: Tiles(4, 1, 32, 16, 2, 2, 1),
}
_QUERIES = {
    16: Tiles(4, 2, 128, 32, 3, 3),
    32: Tiles(4, 2, 64, 16, 3, 2),
    64: Tiles(4, 1, 64, 32, 2, 3),
    96: Tiles(4, 1, 64, 32, 2, 2),
    128: Tiles(4, 1, 32, 16, 2, 2),
}
# Where dropout's registers ask for other tiles.
_DROPOUT: dict[tuple[Kernel, int], Tiles] = {
    ("forward", 16): Tiles(4, 2, 128, 32, 3, 3),
    ("backward_keys", 128): Tiles(4, 1, 32, 16, 2, 2, 2),
    ("hopper_forward", 32): Tiles(12, 1, 64, 64, 4, 1),
    ("hopper_forward", 64): Tiles(12, 1, 64, 64, 4, 1, turns=1),
    ("hopper_backward", 32): Tiles(12, 1, 64, 0, 3, 1, 1, 2, sums=1, pairs=1),
    ("hopper_backward", 64): Tiles(8, 1, 64, 0, 2, 1, 0, 2, persistent=0, sums=1, ahead=1, pairs=1),
    ("hopper_backward", 96): Tiles(8, 1, 64, 0, 2, 1, 1, 2, persistent=0, sums=2, pairs=1),
}
# The Hopper family: four warps are a group of 64 rows.
_HOPPER_FORWARD = {
    32: Tiles(16, 1, 64, 64, 6, 1),
    64: Tiles(16, 1, 64, 64, 4, 1, 1, turns=1),
    96: Tiles(12, 1, 64, 64, 4, 1, 1, turns=1),
    128: Tiles(12, 1, 64, 64, 4, 1, 1, turns=1),
}
_HOPPER_BACKWARD = {
    32: Tiles(12, 1, 64, 0, 4, 1, 0, 2, sums=1),
    64: Tiles(12, 1, 64, 0, 2, 1, 1, 3, persistent=0, sums=1),
    96: Tiles(8, 1, 64, 0, 2, 1, 1, 2, persistent=0, sums=2),
    128: Tiles(8, 1, 64, 0, 2, 1, 1, 2, persistent=0, sums=2),
}
# Block-sparse: a stage is one step of the walk, 64 keys or queries. Where registers and shared memory allow, teams have
# at most the rows of one block of the layout, and so one list: no group sits out what others want. Where groups with
# different lists share stages, there are more stages and tiles of dS than in dense kernels. By kernel, width, dropout.
_HOPPER_SPARSE: dict[tuple[Kernel, int, bool], Tiles] = {
    ("hopper_forward", 32, False): Tiles(16, 1, 64, 64, 8, 1, teams=2, one_list=1),
    ("hopper_forward", 32, True): Tiles(12, 1, 64, 64, 6, 1, teams=3),
    ("hopper_forward", 64, False): Tiles(16, 1, 64, 64, 6, 1, 1, teams=2, one_list=1),
    ("hopper_forward", 64, True): Tiles(12, 1, 64, 64, 4, 1, teams=3),
    ("hopper_forward", 96, False): Tiles(12, 1, 64, 64, 6, 1, 1),
    ("hopper_forward", 96, True): Tiles(12, 1, 64, 64, 6, 1, 1),
    ("hopper_forward", 128, False): Tiles(12, 1, 64, 64, 5, 1, 1),
    ("hopper_forward", 128, True): Tiles(12, 1, 64, 64, 5, 1, 1),
    ("hopper_backward", 32, False): Tiles(12, 1, 64, 0, 5, 1, 0, 1, teams=3, sums=1),
    ("hopper_backward", 32, True): Tiles(8, 1, 64, 0, 6, 1, 0, 3, one_list=1, sums=1),
    ("hopper_backward", 64, False): Tiles(8, 1, 64, 0, 4, 1, 0, 2, one_list=1, sums=2),
    ("hopper_backward", 64, True): Tiles(8, 1, 64, 0, 4, 1, 0, 3, one_list=1, sums=1),
    # No room for more: the dense kernels' tiles, and so their builds.
    ("hopper_backward", 96, False): _HOPPER_BACKWARD[96],
    ("hopper_backward", 96, True): _DROPOUT["hopper_backward", 96],
    ("hopper_backward", 128, False): _HOPPER_BACKWARD[128],
    ("hopper_backward", 128, True): _HOPPER_BACKWARD[128],
}
# Where blocks of 64 run on other tiles than blocks of 128: on teams of one group.
_HOPPER_SPARSE_64: dict[tuple[Kernel, int, bool], Tiles] = {
    ("hopper_forward", 32, False): Tiles(16, 1, 64, 64, 6, 1, 1, teams=4),
    ("hopper_forward", 64, False): Tiles(12, 1, 64, 64, 4, 1, teams=3),
    ("hopper_backward", 32, True): Tiles(12, 1, 64, 0, 6, 1, 0, 1, persistent=0, teams=3, sums=1),
    ("hopper_backward", 64, False): Tiles(8, 1, 64, 0, 4, 1, 0, 1, teams=2, sums=1),
    ("hopper_backward", 64, True): Tiles(8, 1, 64, 0, 5, 1, 0, 1, persistent=0, teams=2, sums=1),
}
# Bytes spilled outside the loops of products, seen in the disassembly with NVRTC 13.0: by the copying warps, whose time
# is hidden, and three words of the forward's computing warps once a piece of work. A kernel that spills more has to be
# looked at again.
_KNOWN_SPILLS = {
    (_HOPPER_SPARSE["hopper_forward", 64, False], False): 160,
    (_HOPPER_SPARSE_64["hopper_backward", 32, True], True): 48,
}
_TABLES = {"forward": _FORWARD, "backward": _ALL, "backward_keys": _KEYS, "backward_queries": _QUERIES}
_HOPPER: dict[Kernel, tuple[Kernel, dict[int, Tiles]]] = {
    "forward": ("hopper_forward", _HOPPER_FORWARD),
    "backward": ("hopper_backward", _HOPPER_BACKWARD),
}


@cache
def plan(kernel: Kernel, head_dim: int, dtype: str, dropout: bool, hopper: bool = False, sparse: int = 0) -> Plan:
    """Return the plan of a call; `dtype` is "float16" or "bfloat16". Raises ValueError for another.

    `hopper` asks for the family for 9.0 where it has the kernel and the width; `sparse`, a layout's block size, for the
    block-sparse kernel; the plan of 128 computes no other where its teams of two groups follow one list.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float16 or bfloat16, got {dtype}.")
    if kernel == "order":
        return Plan(kernel, WIDTHS[-1], dtype, False, Tiles(32, 1, 0, 0, 0, 1))
    if kernel == "preprocess":
        return Plan(kernel, WIDTHS[-1], dtype, False, Tiles(8, 1, 0, 0, 0, 1))
    width = width_of(head_dim)
    if kernel == "postprocess":
        tiled = hopper and width in _HOPPER_BACKWARD
        # In tiles of 64 rows and 32 columns there is work for four warps.
        return Plan(kernel, width, dtype, False, Tiles(4 if tiled else 8, 1, 0, 0, 0, 1), tiled=tiled)
    if hopper and width in _HOPPER.get(kernel, (kernel, {}))[1]:
        kernel = _HOPPER[kernel][0]
        at = (kernel, width, dropout)
        of_block = _HOPPER_SPARSE_64.get(at, _HOPPER_SPARSE[at]) if sparse == 64 else _HOPPER_SPARSE[at]
        tiles = of_block if sparse else _hopper_tiles(kernel, width, dropout)
        return Plan(kernel, width, dtype, dropout, tiles, bool(sparse))
    tiles = _TABLES[kernel][width]
    return Plan(kernel, width, dtype, dropout, _DROPOUT.get((kernel, width), tiles) if dropout else tiles, bool(sparse))


def _hopper_tiles(kernel: Kernel, width: int, dropout: bool) -> Tiles:
    """Return the tiles of a dense kernel for 9.0."""
    tiles = (_HOPPER_FORWARD if kernel == "hopper_forward" else _HOPPER_BACKWARD)[width]
    return _DROPOUT.get((kernel, width), tiles) if dropout else tiles


def all_plans() -> list[Plan]:
    """Return every variant that a call can ask for."""
    loops = [plan(k, w, d, drop) for k in _LOOPS for w in WIDTHS for d in DTYPES for drop in (False, True)]
    loops += [plan("postprocess", w, d, False) for w in WIDTHS for d in DTYPES]
    loops += [plan("postprocess", w, d, False, hopper=True) for w in _HOPPER_BACKWARD for d in DTYPES]
    loops += hopper_plans()
    return loops + [plan(kernel, 0, dtype, False) for kernel in _OF_ANY_WIDTH for dtype in DTYPES]


def hopper_plans() -> list[Plan]:
    """Return every build of the family for 9.0; a block-sparse kernel with the dense one's tiles comes with that."""
    kinds = [(kernel, width) for kernel, (_, table) in _HOPPER.items() for width in table]
    calls = [(k, w, d, drop) for k, w in kinds for d in DTYPES for drop in (False, True)]
    dense = [plan(*call, hopper=True) for call in calls]
    sparse = dict.fromkeys(plan(*call, hopper=True, sparse=block) for call in calls for block in (64, 128))
    return dense + [one for one in sparse if not one.defines["DENSE"]]


def cover_plans() -> list[Plan]:
    """Return a covering set: every kernel at every width, and each dtype and dropout with every kernel."""
    picked = [plan(k, w, DTYPES[i % 2], i % 3 == 0) for k in _LOOPS for i, w in enumerate(WIDTHS)]
    hopper = [plan(k, w, DTYPES[i % 2], False, hopper=True) for k in _HOPPER for i, w in enumerate(_HOPPER_FORWARD)]
    # With dropout where tiles are block-sparse only: there every variant is free of spills.
    sparse = [plan(k, w, DTYPES[i], True, hopper=True, sparse=128) for k in _HOPPER for i, w in enumerate((32, 64))]
    rest = [plan("postprocess", 32, "float16", False, tiled) for tiled in (False, True)]
    return picked + hopper + sparse + rest + [plan(kernel, 0, "bfloat16", False) for kernel in _OF_ANY_WIDTH]
