"""Draw Pathfinder images on all CPU cores: numba code without the GIL under a thread pool.

`tasks.generate_pathfinder` calls it. Images are drawn in chunks; an image depends on (seed, index) alone, so
neither the number of workers nor the chunks nor the start change a byte.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np

from lra.base import console
from lra.base.errors import ConfigError, DataError
from tasks.pathfinder_draw import F_COUNT, draw_image
from tasks.pathfinder_law import Law
from tasks.pathfinder_tables import P_COUNT, P_STRIDE, PICTURES_SHA256, Tables, pathfinder_tables, pictures_sha256

# 64 px hard needs 3,600 attempts a pair on average; a law that needs this many cannot be drawn in practice.
MAX_ATTEMPTS = 20_000_000
PILOT_ATTEMPTS = 300_000
_MAX_SEED = 1 << 63
_CHUNK_IMAGES = {32: 128, 64: 32, 128: 32, 256: 32}


def trace_rows(law: Law) -> int:
    """Return how many paddles an image of this law has at most."""
    return 2 * law.contour_length + law.num_distractors * law.distractor_length


class Drawn(NamedTuple):
    """What a chunk gave besides its pixels: facts (count, F_COUNT) int64, traces (count, rows, 4) int32."""

    facts: np.ndarray
    traces: np.ndarray


class _Scratch(NamedTuple):
    canvas: np.ndarray
    near: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, law: Law, tables: Tables) -> _Scratch:
        cells = int(tables.params[0, P_STRIDE]) ** 2
        return cls(
            np.zeros(cells, np.uint8),
            np.zeros(trace_rows(law), np.int32),
            np.zeros(tables.turns.shape[2], np.int32),
        )


def _source_sha256() -> str:
    digest = hashlib.sha256(f"{numba.__version__} {P_COUNT} {F_COUNT}".encode())
    here = Path(__file__).parent
    for name in ("random", "canvas", "step", "paths", "draw", "stencils", "tables", "threads"):
        digest.update((here / f"pathfinder_{name}.py").read_bytes())
    return digest.hexdigest()


def _compile(source: str, cache: bool) -> Callable[..., int]:
    """Return the compiled loop over a chunk's images.

    Only this outermost function is cached on disk, under a name that holds the hash of every file it is made
    of: numba's own check sees only the file of the cached function and would keep an old callee.
    """

    @numba.njit(cache=cache, nogil=True)
    def draw_chunk(
        tables: Tables,
        seed: int,
        first: int,
        max_attempts: int,
        canvas: np.ndarray,
        near: np.ndarray,
        weights: np.ndarray,
        traces: np.ndarray,
        facts: np.ndarray,
        images: np.ndarray,
    ) -> int:
        if len(source) == 0:
            return 0
        for i in range(images.shape[0]):
            trace = traces[min(i, traces.shape[0] - 1)]
            if not draw_image(tables, seed, first + i, max_attempts, canvas, near, weights, trace, facts[i], images[i]):
                return i
        return images.shape[0]

    return draw_chunk


@lru_cache(maxsize=1)
def compiled() -> Callable[..., int]:
    """Return the compiled chunk loop (about ten seconds the first time ever, then from numba's cache)."""
    try:
        return _compile(_source_sha256(), cache=True)
    except RuntimeError:  # numba finds no folder that it may write to
        return _compile(_source_sha256(), cache=False)


def draw_chunk(
    law: Law,
    seed: int,
    first: int,
    images: np.ndarray,
    *,
    keep_traces: bool = False,
    max_attempts: int = MAX_ATTEMPTS,
    tables: Tables | None = None,
) -> Drawn:
    """Draw images first, first + 1, ... into the rows of `images` (count, side * side) uint8, on this thread.

    Raises
    ------
    ConfigError
        An image found no pair of paths in max_attempts: the law asks for paths that do not fit.
    """
    tables = pathfinder_tables(law) if tables is None else tables
    scratch = _Scratch.of(law, tables)
    count = images.shape[0]
    traces = np.zeros((count if keep_traces else 1, max(1, trace_rows(law)), 4), np.int32)
    facts = np.zeros((count, F_COUNT), np.int64)
    done = compiled()(tables, seed, first, max_attempts, *scratch, traces, facts, images)
    if done < count:
        raise ConfigError(
            f"Two paths of {law.contour_length} paddles found no place in a {law.resolution} x "
            f"{law.resolution} image in {max_attempts:,} attempts.",
            "Use a smaller contour_length.",
        )
    return Drawn(facts, traces)


def check_drawable(law: Law, seed: int, start: int, count: int) -> None:
    """Refuse impossible requests before anything is written; draws one image to see that paths fit."""
    for name, value in (("seed", seed), ("start", start), ("count", count)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < _MAX_SEED:
            raise ConfigError(f"{name}={value!r} cannot be used.", "Give a whole number from 0 up.")
    if start + count >= _MAX_SEED:
        raise ConfigError(f"start={start} leaves no room for {count} images.", "Use a smaller start.")
    _draw_pilot(law)


@lru_cache(maxsize=64)
def _draw_pilot(law: Law) -> None:
    if pictures_sha256(pathfinder_tables(law)) != PICTURES_SHA256[law.resolution]:
        console.warn("This version of Pillow draws lines otherwise: images differ from those made elsewhere.")
    pixels = np.zeros((1, law.resolution**2), np.uint8)
    draw_chunk(law, 0, 0, pixels, max_attempts=PILOT_ATTEMPTS)


def num_workers(workers: int | None) -> int:
    """Return how many threads to use: all cores this process may run on, unless told."""
    if workers is None:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ConfigError(f"workers={workers!r} cannot be used.", "Give a whole number of at least 1.")
    return workers


def draw_all(
    law: Law,
    seed: int,
    start: int,
    images: np.ndarray,
    on_chunk: Callable[[int, np.ndarray, np.ndarray], None],
    workers: int | None = None,
) -> None:
    """Draw a whole array of images, calling on_chunk(first row, chunk's images, chunk's facts) as each ends.

    The calls come from this thread, in the order in which chunks end. Pages of a memory-mapped array are given
    back after each chunk, so the process holds a few chunks whatever the array's size.
    """
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != law.resolution**2:
        raise DataError(
            f"The array for the images has shape {images.shape} and dtype {images.dtype}.",
            f"It must be (count, {law.resolution**2}) uint8.",
        )
    mapped = mapping_of(images)
    tables = pathfinder_tables(law)
    with ThreadPoolExecutor(num_workers(workers), thread_name_prefix="pathfinder") as pool:
        pending: dict[Future[Drawn], tuple[int, int]] = {}
        chunks = _chunks(images.shape[0], law)
        limit = 2 * num_workers(workers)
        try:
            while True:
                for first, stop in chunks:
                    rows = images[first:stop]
                    future = pool.submit(draw_chunk, law, seed, start + first, rows, tables=tables)
                    pending[future] = (first, stop)
                    if len(pending) >= limit:
                        break
                if not pending:
                    return
                ended, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in ended:
                    first, stop = pending.pop(future)
                    on_chunk(first, images[first:stop], future.result().facts)
                if mapped is not None:
                    mapped.madvise(mmap.MADV_DONTNEED)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _chunks(count: int, law: Law) -> Iterator[tuple[int, int]]:
    """Yield row ranges that take some 20 ms: long against a call's cost, short against the whole."""
    size = _CHUNK_IMAGES[law.resolution]
    for first in range(0, count, size):
        yield first, min(count, first + size)


def mapping_of(images: np.ndarray) -> mmap.mmap | None:
    """Return the file mapping under an array, if it has one whose pages may be dropped safely."""
    base: object = images
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and base.mode in ("r+", "w+"):
            return getattr(base, "_mmap", None) if hasattr(mmap, "MADV_DONTNEED") else None
        base = base.base
    return None
