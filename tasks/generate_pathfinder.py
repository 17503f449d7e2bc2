"""The Pathfinder generator's face: images into an array, fresh samples, one image explained, a benchmark.

`tasks.pathfinder` fills its cache with it, training on the open track draws fresh images from it. It follows
the law of the generator behind the Long Range Arena's sets (docs/pathfinder.md); an image is a function of the
parameters, the seed and its index alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from lra.base.errors import ConfigError, DataError, LraError
from tasks.pathfinder_draw import F_ATTEMPTS, F_LABEL, F_MARGIN, F_PLACED, F_SUM, F_ZEROS
from tasks.pathfinder_law import RESOLUTIONS, Distractors, Law, pathfinder_law
from tasks.pathfinder_tables import pathfinder_tables, tables_sha256
from tasks.pathfinder_threads import check_drawable, draw_all, draw_chunk, num_workers

if TYPE_CHECKING:
    from tasks.pathfinder_gpu import GpuGenerator

LENGTHS = (6, 9, 14)
# Milliseconds an image that one core may take at most, by (resolution, contour length).
ALLOWED_MS = {(32, 14): 2.0, (64, 14): 20.0, (128, 14): 6.0, (256, 14): 1.0}


def generate_into(
    images_NL: np.ndarray,
    labels_N: np.ndarray,
    *,
    resolution: int,
    contour_length: int = 14,
    num_distractors: Distractors = "formula",
    match_contrast: bool = False,
    seed: int = 0,
    start: int = 0,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
    gpu: GpuGenerator | None = None,
) -> dict[str, Any]:
    """Draw images start, start + 1, ... into an array and return statistics for a manifest.

    Parameters
    ----------
    images_NL : ndarray (N, resolution * resolution) uint8, writable
        May be memory-mapped; its pages are given back as chunks end, so memory stays small.
    labels_N : ndarray (N,), writable
        Gets 1 where both markers are on one path and 0 elsewhere.
    resolution, contour_length, num_distractors, match_contrast
        The law; see `tasks.pathfinder_law.pathfinder_law`.
    seed, start : int
        Image i of the array is image start + i of this seed, whatever else is drawn.
    workers : int, optional
        Threads; all cores by default. They do not change a byte.
    progress : callable, optional
        Called with the number of images that have just ended.
    gpu : GpuGenerator, optional
        Draws them, all at once, instead of threads: the same bytes (tasks.pathfinder_gpu.generator_for).

    Returns
    -------
    dict
        Means over the N images (numbers) and the law with the hash of its tables.

    Raises
    ------
    ConfigError, DataError
        Parameters that cannot be used, before anything is written; arrays of another shape.
    """
    law = pathfinder_law(resolution, contour_length, num_distractors, match_contrast)
    count = images_NL.shape[0]
    check_drawable(law, seed, start, count)
    num_workers(workers)
    if labels_N.shape != (count,):
        raise DataError(f"labels_N has shape {labels_N.shape}.", f"It must be ({count},), one label an image.")
    totals = _Totals(law)

    def on_chunk(first: int, images: np.ndarray, facts: np.ndarray) -> None:
        labels_N[first : first + len(facts)] = facts[:, F_LABEL]
        totals.add(facts)
        if progress is not None:
            progress(len(facts))

    if gpu is not None:
        from tasks.pathfinder_gpu import draw_into

        draw_into(gpu, seed, start, images_NL, on_chunk)
    else:
        draw_all(law, seed, start, images_NL, on_chunk, workers)
    return totals.statistics()


class _Totals:
    """Sums over images, turned into the statistics of a manifest."""

    def __init__(self, law: Law) -> None:
        self.law = law
        self.count = 0
        self.sums = {"label": 0, "attempts": 0, "placed": 0, "zeros": 0, "levels": 0}
        self.margins = [0] * len(law.margins)

    def add(self, facts: np.ndarray) -> None:
        self.count += len(facts)
        columns = {"label": F_LABEL, "attempts": F_ATTEMPTS, "placed": F_PLACED, "zeros": F_ZEROS, "levels": F_SUM}
        for name, column in columns.items():
            self.sums[name] += int(facts[:, column].sum())
        for i in range(len(self.margins)):
            self.margins[i] += int((facts[:, F_MARGIN] == i).sum())

    def statistics(self) -> dict[str, Any]:
        images = max(1, self.count)
        pixels = images * self.law.resolution**2
        means = {
            "label_mean": self.sums["label"] / images,
            "attempts_mean": self.sums["attempts"] / images,
            "distractors_asked": self.law.num_distractors,
            "distractors_placed_mean": self.sums["placed"] / images,
            "pixel_mean": self.sums["levels"] / pixels,
            "zero_fraction": self.sums["zeros"] / pixels,
        }
        for margin, count in zip(self.law.margins, self.margins, strict=True):
            means[f"margin_{margin}_share"] = count / images
        tables = tables_sha256(pathfinder_tables(self.law))
        return {**means, "law": asdict(self.law), "tables_sha256": tables}


def fresh(
    resolution: int,
    contour_length: int = 14,
    *,
    num_distractors: Distractors = "formula",
    match_contrast: bool = False,
    seed: int = 0,
    start: int = 0,
    count: int = 1,
    workers: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return new images (count, resolution ** 2) uint8 and labels (count,) uint8: an endless training set.

    Draw the next batch with `start` moved on by `count`; nothing repeats. Takes what `generate_into` takes.

    Examples
    --------
    >>> images, labels = fresh(32, 6, seed=1, count=2)
    >>> images.shape, labels.dtype, bool((fresh(32, 6, seed=1, start=1)[0] == images[1:]).all())
    ((2, 1024), dtype('uint8'), True)
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"count={count!r} cannot be used.", "Give a whole number of at least 1.")
    law = pathfinder_law(resolution, contour_length, num_distractors, match_contrast)
    images = np.zeros((count, law.resolution**2), np.uint8)
    labels = np.zeros(count, np.uint8)
    generate_into(
        images,
        labels,
        resolution=resolution,
        contour_length=contour_length,
        num_distractors=num_distractors,
        match_contrast=match_contrast,
        seed=seed,
        start=start,
        workers=workers,
    )
    return images, labels


def _bench_cpu(resolution: int, contour_length: int, seconds: float) -> tuple[int, float]:
    """Return (images, seconds of this thread's CPU time) of drawing for about that long.

    CPU time, so that other work on the machine does not count.
    """
    law = pathfinder_law(resolution, contour_length)
    images = np.zeros((16, resolution * resolution), np.uint8)
    draw_chunk(law, 1, 0, images[:1])
    count, began = 0, time.thread_time()
    while time.thread_time() - began < seconds:
        draw_chunk(law, 0, count, images)
        count += len(images)
    return count, time.thread_time() - began


def _bench_gpu(resolution: int, contour_length: int, count: int) -> str:
    """Return the GPU's images a second over `count` images and how many of 512 differ from the CPU's."""
    from tasks.pathfinder_gpu import GpuGenerator

    generator = GpuGenerator(pathfinder_law(resolution, contour_length))
    drawn = generator.draw(0, 0, 512)
    images, _ = fresh(resolution, contour_length, count=512)
    differing = int((drawn.images_on_host() != images).any(axis=1).sum())
    generator.draw(1, 0, count).wait()
    began = time.perf_counter()
    generator.draw(2, 0, count).wait()
    elapsed = time.perf_counter() - began
    return f"{count / elapsed:>12,.0f} {1e3 * elapsed / count:>9.4f} {differing:>9} of 512"


def bench(gpu: bool, seconds: float, count: int, settings: Sequence[tuple[int, int]]) -> list[str]:
    """Return a table, line by line: speed of each setting on one core, and on the GPU if asked."""
    head = f"{'setting':>8} {'images':>8} {'images/s':>10} {'ms/image':>9} {'allowed':>8}"
    if gpu:
        head += f" {'GPU img/s':>12} {'ms/image':>9} {'differing':>16}"
    lines = [head]
    for resolution, length in settings:
        images, elapsed = _bench_cpu(resolution, length, seconds)
        allowed = ALLOWED_MS.get((resolution, length))
        line = f"{f'{resolution}/{length}':>8} {images:>8} {images / elapsed:>10,.1f} {1e3 * elapsed / images:>9.3f}"
        line += f" {allowed if allowed is not None else '-':>8}"
        lines.append(line + (" " + _bench_gpu(resolution, length, count) if gpu else ""))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m tasks.generate_pathfinder --bench [--gpu]`; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tasks.generate_pathfinder", description=__doc__)
    parser.add_argument("--bench", action="store_true", required=True, help="print the speed of each setting")
    parser.add_argument("--gpu", action="store_true", help="also on the GPU, compared image for image")
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU time for each setting")
    parser.add_argument("--count", type=int, default=65_536, help="images of each timed GPU call")
    parser.add_argument("--resolution", type=int, choices=RESOLUTIONS, help="only this resolution")
    options = parser.parse_args(arguments)
    chosen = [options.resolution] if options.resolution else list(RESOLUTIONS)
    settings = [(resolution, length) for resolution in chosen for length in LENGTHS]
    try:
        for line in bench(options.gpu, options.seconds, options.count, settings):
            print(line, flush=True)
    except LraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
