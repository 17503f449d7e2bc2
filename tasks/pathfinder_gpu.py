"""Draw Pathfinder images on an NVIDIA GPU: the CPU's source compiled by numba.cuda, and the same bytes.

The kernels are in `tasks.pathfinder_kernels`. Needs the extra `gpu-generator` (numba-cuda); numba.cuda is not
imported before a generator is made.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lra.base import console
from lra.base.errors import ConfigError
from tasks.pathfinder_draw import F_COUNT, F_LABEL, F_SUM, F_ZEROS
from tasks.pathfinder_law import Distractors, Law, pathfinder_law
from tasks.pathfinder_tables import P_STRIDE, Tables, pathfinder_tables
from tasks.pathfinder_threads import MAX_ATTEMPTS, check_drawable, draw_chunk, mapping_of, trace_rows

if TYPE_CHECKING:
    import torch

LANES = 32  # threads that share one image's search: a warp
# A thread's private arrays have a fixed size: paths up to this many paddles, directions up to this many turns.
MAX_CONTOUR = 32
MAX_TURNS = 32
NO_ATTEMPT = 2**31 - 1
_BLOCK = 64
_CANVAS_BYTES = 1 << 30  # canvases of the images finished at once
_WORTH = 10_000  # images of a set from which on the seconds of compiling for the GPU are won back
_COMPARED = 4  # images of each draw that the CPU draws as well


def _cuda() -> Any:
    """Return numba.cuda, or explain what is missing."""
    remedy = "Install the extra `gpu-generator` on a machine with an NVIDIA GPU, or draw on the CPU."
    if not hasattr(np, "row_stack"):
        # numba-cuda up to 0.30 overloads a function that NumPy 2.5 has dropped.
        np.row_stack = np.vstack  # type: ignore[attr-defined]
    try:
        from numba import config, cuda
    except ImportError as error:
        raise ConfigError(f"numba.cuda cannot be imported ({error}).", remedy) from error
    # A last, small batch is no mistake. setattr, because the name is made at run time and type checkers miss it.
    setattr(config, "CUDA_LOW_OCCUPANCY_WARNINGS", 0)  # noqa: B010
    if not cuda.is_available():
        raise ConfigError("numba finds no CUDA device.", remedy)
    return cuda


@dataclass(frozen=True)
class GpuImages:
    """Images in GPU memory: `images` (N, side * side) uint8 and `facts` (N, F_COUNT) int64, numba arrays.

    facts lacks what only the CPU measures (F_ZEROS, F_SUM).
    """

    images: Any
    facts: Any
    best: Any
    law: Law

    def wait(self) -> GpuImages:
        """Wait until the GPU has drawn them; raise ConfigError if a pair of paths found no place."""
        if self.best.shape[0] and int(self.best.copy_to_host().max()) == NO_ATTEMPT:
            raise ConfigError(
                f"Two paths of {self.law.contour_length} paddles found no place in a {self.law.resolution} x "
                f"{self.law.resolution} image in {MAX_ATTEMPTS:,} attempts.",
                "Use a smaller contour_length.",
            )
        return self

    def images_on_host(self) -> np.ndarray:
        """Return a copy of the images in host memory."""
        return np.asarray(self.wait().images.copy_to_host())

    def labels_on_host(self) -> np.ndarray:
        """Return a copy of the labels, (N,) uint8, in host memory."""
        return np.asarray(self.wait().facts.copy_to_host())[:, F_LABEL].astype(np.uint8)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (uint8) and labels (int64) as CUDA tensors on the same memory, without a copy."""
        import torch

        self.wait()
        images = torch.as_tensor(self.images, device="cuda")
        return images, torch.as_tensor(self.facts, device="cuda")[:, F_LABEL]


class GpuGenerator:
    """A law's tables and scratch in GPU memory, ready to draw.

    Raises ConfigError without numba-cuda or a GPU, and for paths longer than MAX_CONTOUR paddles.
    """

    def __init__(self, law: Law) -> None:
        if law.contour_length > MAX_CONTOUR:
            raise ConfigError(
                f"The GPU generator draws paths of at most {MAX_CONTOUR} paddles, not {law.contour_length}.",
                "Draw on the CPU.",
            )
        self._cuda = _cuda()
        tables = pathfinder_tables(law)
        assert tables.turns.shape[2] <= MAX_TURNS
        self.law = law
        self._tables = Tables(*(self._cuda.to_device(array) for array in tables))
        self._cells = int(tables.params[0, P_STRIDE]) ** 2
        self._slots = 0

    def _reserve(self, count: int) -> None:
        """Make scratch for that many images at once, or for as many as the memory set aside holds."""
        slots = max(_BLOCK, min(count, _CANVAS_BYTES // self._cells))
        if slots > self._slots:
            cuda = self._cuda
            self._canvases = cuda.device_array((slots, self._cells), np.uint8)
            self._traces = cuda.device_array((slots, trace_rows(self.law), 4), np.int32)
            self._near = cuda.device_array((slots, trace_rows(self.law)), np.int32)
            self._slots = slots

    def draw(self, seed: int, start: int, count: int) -> GpuImages:
        """Start drawing images start ... start + count - 1 and return at once; see GpuImages.wait.

        The images are those that `tasks.generate_pathfinder.fresh` draws, byte for byte.
        """
        check_drawable(self.law, seed, start, count)
        from tasks.pathfinder_kernels import finish_kernel, search_kernel

        cuda = self._cuda
        best = cuda.to_device(np.full(count, NO_ATTEMPT, np.int32))
        images = cuda.device_array((count, self.law.resolution**2), np.uint8)
        facts = cuda.device_array((count, F_COUNT), np.int64)
        if count:
            self._reserve(count)
            blocks = -(-count * LANES // _BLOCK)
            search_kernel[blocks, _BLOCK](self._tables, seed, start, best, MAX_ATTEMPTS)
            for first in range(0, count, self._slots):
                blocks = -(-min(count - first, self._slots) // _BLOCK)
                finish_kernel[blocks, _BLOCK](
                    self._tables, seed, start, first, best, self._canvases, self._traces, self._near, facts, images
                )
        return GpuImages(images, facts, best, self.law)


class DrawnDifferentlyError(RuntimeError):
    """The GPU's images are not the CPU's."""


def generator_for(law: Law, count: int) -> GpuGenerator | None:
    """Return a generator for a set of so many images, or None where threads of the CPU should draw it."""
    if count < _WORTH:
        return None
    try:
        generator = GpuGenerator(law)
        generator.draw(0, 0, 1).wait()  # compiles
    except ConfigError:  # no GPU, no numba-cuda, paths too long for it
        return None
    except Exception as e:  # numba's and the driver's are of many kinds, and the CPU draws the same images
        said = str(e).splitlines() or [""]
        console.warn(f"The GPU cannot draw images here ({type(e).__name__}: {said[0][:200]}); the CPU does.")
        return None
    return generator


def draw_into(
    generator: GpuGenerator,
    seed: int,
    start: int,
    images_NL: np.ndarray,
    on_chunk: Callable[[int, np.ndarray, np.ndarray], None],
) -> None:
    """Do what `pathfinder_threads.draw_all` does, in one draw.

    Raises DrawnDifferentlyError, before on_chunk is called, if the first images are not those that the CPU draws.
    """
    drawn = generator.draw(seed, start, images_NL.shape[0])
    images_NL[:] = drawn.images_on_host()
    facts = np.array(drawn.facts.copy_to_host())
    facts[:, F_ZEROS], facts[:, F_SUM] = (images_NL == 0).sum(1), images_NL.sum(1, dtype=np.int64)
    same = np.zeros_like(images_NL[:_COMPARED])
    expected = draw_chunk(generator.law, seed, start, same).facts
    if not (np.array_equal(same, images_NL[:_COMPARED]) and np.array_equal(expected, facts[:_COMPARED])):
        raise DrawnDifferentlyError(f"Images from {start} on differ between GPU and CPU.")
    on_chunk(0, images_NL, facts)
    mapped = mapping_of(images_NL)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


def generate_on_gpu(
    resolution: int,
    contour_length: int = 14,
    *,
    num_distractors: Distractors = "formula",
    match_contrast: bool = False,
    seed: int = 0,
    start: int = 0,
    count: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `tasks.generate_pathfinder.fresh` returns, drawn on the GPU.

    To draw often, or to keep the images on the GPU, make a GpuGenerator and use `draw(...).tensors()`.
    """
    drawn = GpuGenerator(pathfinder_law(resolution, contour_length, num_distractors, match_contrast)).draw(
        seed, start, count
    )
    return drawn.images_on_host(), drawn.labels_on_host()
