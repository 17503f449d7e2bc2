"""Pathfinder at 32, 64, 128 (Path-X) and 256 pixels: are the two marked ends on one path.

Reads the files of the LRA release, or has `tasks.generate_pathfinder` draw new images. The canonical order is that of
S4, MEGA and fly: metadata files by number, lines as they stand. Facts: lra_spec.md sections 1.5 and 4.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from lra.base import console
from lra.base.errors import ConfigError, DataError
from tasks import splits
from tasks.cache_writer import CacheWriter
from tasks.pathfinder_files import Sample, decode_into, list_samples, skip_known_empty
from tasks.registry import Task, TaskOptions, register

if TYPE_CHECKING:
    import torch

    from tasks.registry import FreshDrawer

RESOLUTIONS = {"pathfinder": 32, "path64": 64, "pathx": 128, "path256": 256}
# The release's folder of each difficulty; LRA uses the hardest.
DIFFICULTIES = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}
OFFICIAL_COUNT = 200_000
MADE_BY = "manifest.json"  # our generator leaves it beside the images; the release has none
_CHUNK_BYTES = 64 << 20


class PathfinderOptions(TaskOptions):
    """The difficulty, and the knobs of the generator.

    `num_distractors`: `formula` as the data set's builders state it, `wrapper` as the public wrapper script would
    have it, or a number. `match_contrast` gives paths and distractors one contrast (lra_spec.md 4.5).
    """

    generator_fields: ClassVar[frozenset[str]] = frozenset({"num_distractors", "match_contrast", "count", "seed"})

    name: Literal["pathfinder", "path64", "pathx", "path256"] = "pathfinder"
    contour_length: int = Field(14, ge=3, le=64)
    num_distractors: Literal["formula", "wrapper"] | Annotated[int, Field(ge=0, le=200)] = "formula"
    match_contrast: bool = False
    count: int = Field(OFFICIAL_COUNT, ge=10, le=100_000_000)
    seed: int = Field(0, ge=0)

    @property
    def law_knobs(self) -> dict[str, Any]:
        """What decides how an image is drawn, as `tasks.pathfinder_law.pathfinder_law` takes it."""
        return self.model_dump(include={"contour_length", "num_distractors", "match_contrast"})

    @field_validator("num_distractors", mode="before")
    @classmethod
    def _no_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("num_distractors is formula, wrapper or a number")
        return value


class Path64Options(PathfinderOptions):
    """As PathfinderOptions, at 64 pixels."""

    name: Literal["path64"] = "path64"


class PathXOptions(PathfinderOptions):
    """As PathfinderOptions, at 128 pixels."""

    name: Literal["pathx"] = "pathx"


class Path256Options(PathfinderOptions):
    """As PathfinderOptions, at 256 pixels."""

    name: Literal["path256"] = "path256"


def find_files(source: Path, options: TaskOptions, *, resolution: int) -> Mapping[str, Path]:
    """Return the folders `imgs` and `metadata` of one difficulty, in either layout of the release."""
    assert isinstance(options, PathfinderOptions)
    if options.contour_length not in DIFFICULTIES:
        raise ConfigError(
            f"The release has no Pathfinder set with contour_length={options.contour_length}.",
            "It has 6, 9 and 14; leave --source out to generate another.",
        )
    if source.is_file():
        raise DataError(f"{source} is a file, not a folder.", "Unpack the archive and name the folder.")
    difficulty = DIFFICULTIES[options.contour_length]
    name = f"pathfinder{resolution}/{difficulty}"
    # The release unpacks to a stray outer pathfinder128 as well; the inner one is meant and looked for first.
    places = (f"lra_release/lra_release/{name}", f"lra_release/{name}", name, f"pathfinder/{name}", difficulty, "")
    for place in places:
        found = {kind: source / place / kind for kind in ("imgs", "metadata")}
        if all(folder.is_dir() for folder in found.values()):
            return found
    raise DataError(
        f"{source} holds no {name} (folders imgs and metadata).",
        "Name the root of the LRA release or the folder itself; without --source images are generated.",
    )


def build(options: TaskOptions, source: Path | None, writer: CacheWriter, *, resolution: int) -> None:
    """Fill the cache from the release's files, or with drawn images if `source` is None."""
    assert isinstance(options, PathfinderOptions)
    if source is None:
        _generate(options, writer, resolution)
    else:
        _read(find_files(source, options, resolution=resolution), options, writer, resolution)


def _read(folders: Mapping[str, Path], options: PathfinderOptions, writer: CacheWriter, resolution: int) -> None:
    root = folders["imgs"].parent
    samples = list_samples(folders["metadata"])
    easiest = resolution == 32 and options.contour_length == 6
    samples, num_skipped = skip_known_empty(samples, root) if easiest else (samples, 0)
    _check_labels(samples, folders["metadata"])
    tokens, labels = writer.reserve("all", len(samples), resolution * resolution)
    labels[:] = [sample.label for sample in samples]
    with console.progress(len(samples), f"Pathfinder {resolution}: reading images", "images") as bar:
        decode_into(tokens, samples, root, resolution, bar.advance)
    if (root / MADE_BY).is_file():
        writer.source = "generated"
    if num_skipped:
        console.warn(f"{num_skipped} image known to be empty in the release was skipped.")
    writer.note("skipped_empty", num_skipped)
    writer.note("official_counts", len(samples) + num_skipped == OFFICIAL_COUNT)


def write_release(options: TaskOptions, folder: Path, *, resolution: int) -> Path:
    """Draw the images as the official PNG files with text metadata; return their folder."""
    from tasks import pathfinder_release

    assert isinstance(options, PathfinderOptions)
    return pathfinder_release.write_release(folder, resolution=resolution, **options.model_dump(exclude={"name"}))


def draw(options: TaskOptions, out_png: Path, *, resolution: int) -> None:
    """Save a picture of generated examples with labels, markers and true paths."""
    from tasks.pathfinder_pictures import show_pathfinder

    assert isinstance(options, PathfinderOptions)
    knobs = options.model_dump(exclude={"name", "count"})
    show_pathfinder(out_png, resolutions=[resolution], pairs=3, **knobs)


def fresh(laws: Sequence[TaskOptions], seed: int, device: torch.device, *, resolution: int) -> FreshDrawer:
    """Return a drawer of images that are in no set of these options: image i has law i mod len(laws)."""
    drawers = [_fresh_of_one(options, seed, device, resolution) for options in laws]
    return drawers[0] if len(drawers) == 1 else interleaved(drawers)


def interleaved(drawers: Sequence[FreshDrawer]) -> FreshDrawer:
    """Return the drawer whose image i is image i // n of drawer i mod n."""

    def draw(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        n, images, labels = len(drawers), None, None
        for j, drawer in enumerate(drawers):
            first, stop = -(-(start - j) // n), -(-(start + count - j) // n)
            if stop == first:
                continue
            some, marks = drawer(first, stop - first)
            if images is None or labels is None:
                images, labels = some.new_empty((count, some.shape[1])), marks.new_empty(count)
            places = slice(first * n + j - start, count, n)
            images[places], labels[places] = some, marks
        assert images is not None and labels is not None
        return images, labels

    return draw


def _fresh_of_one(options: TaskOptions, seed: int, device: torch.device, resolution: int) -> FreshDrawer:
    """Draw on the GPU if numba-cuda is there, else by threads: the same bytes."""
    import torch

    from tasks.generate_pathfinder import fresh as draw_on_cpu
    from tasks.pathfinder_gpu import GpuGenerator
    from tasks.pathfinder_law import pathfinder_law

    assert isinstance(options, PathfinderOptions)
    law = options.law_knobs
    seed += seed == options.seed  # the set's own images are for testing
    if device.type == "cuda":
        try:
            gpu = GpuGenerator(pathfinder_law(resolution, **law))
            return lambda start, count: gpu.draw(seed, start, count).tensors()
        except ConfigError as e:
            console.info(f"Fresh images are drawn by the CPU's threads: {e.cause}")

    def on_threads(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = draw_on_cpu(resolution, **law, seed=seed, start=start, count=count)
        return torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device, torch.int64)

    return on_threads


def _check_labels(samples: list[Sample], metadata: Path) -> None:
    if {sample.label for sample in samples} != {0, 1}:
        raise DataError(
            f"The samples in {metadata} do not have both labels, 0 and 1.",
            "The fourth field must be the label; files of the generator's `snakes.py` have none.",
        )


def _generate(options: PathfinderOptions, writer: CacheWriter, resolution: int) -> None:
    from tasks.generate_pathfinder import generate_into
    from tasks.pathfinder_gpu import DrawnDifferentlyError, generator_for
    from tasks.pathfinder_law import pathfinder_law

    knobs = options.law_knobs
    length = resolution * resolution
    tokens, labels = writer.reserve("all", options.count, length)
    done, statistics = writer.done()
    chunk = min(4096, max(256, _CHUNK_BYTES // length))
    gpu = generator_for(pathfinder_law(resolution, **knobs), options.count - done)
    if done:
        console.info(f"An earlier build drew {done:,} of {options.count:,} images; going on from there.")
    with console.progress(options.count, f"Pathfinder {resolution}: drawing images", "images") as bar:
        bar.advance(done)
        for start in range(done, options.count, chunk):
            stop = min(start + chunk, options.count)
            draw = partial(
                generate_into, tokens[start:stop], labels[start:stop], resolution=resolution, **knobs, start=start,
                seed=options.seed, progress=bar.advance,
            )  # fmt: skip
            try:
                facts = draw(gpu=gpu)
            except DrawnDifferentlyError as e:
                console.warn(f"{e} The CPU draws the set from here on; please tell us.")
                gpu = None
                facts = draw()
            statistics.append({"images": stop - start, **facts})
            writer.save_done(stop, statistics)
    writer.note("generator", mean_statistics(statistics))


def mean_statistics(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one dictionary for all chunks: numbers averaged over images, anything else as the first chunk has it."""
    total = sum(chunk["images"] for chunk in chunks)
    merged: dict[str, Any] = {"images": total}
    for key, first in chunks[0].items():
        if key == "images":
            continue
        if isinstance(first, int | float) and not isinstance(first, bool):
            merged[key] = round(sum(chunk[key] * chunk["images"] for chunk in chunks) / total, 6)
        else:
            merged[key] = first
    return merged


_CARD = """\
- **What.** Two dots and several dashed paths in a {side}x{side} grey picture; are the dots the two ends of one
  path. One token a pixel, rows one after another, ids 0 to 255.
- **Source.** `pathfinder{side}/curv_contour_length_14` of the LRA release (the hardest of three; `contour_length=6`
  and `9` read the others), or our generator, which follows the original's law (Linsley et al.) with LRA's
  parameters.
- **Licence.** The release names none for the data. Ours: Apache-2.0.
- **Counts.** 200,000; split `seed42`: metadata files by number, lines as they stand, torch's random_split with seed
  42 into 160,000 / 20,000 / 20,000, as S4, MEGA and fly have it. Google's TFDS order and Nystromformer's unseeded
  shuffle cannot be repeated.
- **Chance.** 50%; labels are balanced in expectation only.
- **Quirks.** The files named `metadata/*.npy` are text; the label is the fourth field. In the easiest set at 32
  pixels `imgs/0/sample_172.png` is empty: it is skipped and counted. The released distractor count is not known for
  certain: `num_distractors` is `formula`, `wrapper` or a number. With the documented contrasts distractors at 32
  pixels are brighter than targets; `match_contrast=true` draws both alike.
- **Citation.** Linsley et al., Learning long-range spatial dependencies with horizontal gated recurrent units,
  NeurIPS 2018; Tay et al., Long Range Arena, ICLR 2021.
"""
_PUBLISHED = {
    "pathfinder": "Transformer: 71.40 (LRA), 74.16 (Nystromformer), 72.7 with and without FlashAttention (its paper).",
    "path64": "Nothing: this set serves for pretraining (FlashAttention's authors train on it before Path-X).",
    "pathx": "Transformer: chance (LRA); 61.4 with FlashAttention after pretraining on Path-64 (its paper).",
    "path256": "63.1 with block-sparse FlashAttention after pretraining on Path-64 (its paper).",
}

_TASKS: tuple[tuple[str, str, type[PathfinderOptions]], ...] = (
    ("pathfinder", "Pathfinder", PathfinderOptions),
    ("path64", "Path-64", Path64Options),
    ("pathx", "Path-X", PathXOptions),
    ("path256", "Path-256", Path256Options),
)

for _name, _title, _options in _TASKS:
    register(
        Task(
            name=_name,
            title=_title,
            num_classes=2,
            vocab_size=256,
            token_shift=0,
            max_length=RESOLUTIONS[_name] ** 2,
            grid=(RESOLUTIONS[_name], RESOLUTIONS[_name]),
            options=_options,
            split_rules={"seed42": splits.seed42_thirds},
            build=partial(build, resolution=RESOLUTIONS[_name]),
            find_files=partial(find_files, resolution=RESOLUTIONS[_name]),
            generated=True,
            resumable=True,
            draw=partial(draw, resolution=RESOLUTIONS[_name]),
            fresh=partial(fresh, resolution=RESOLUTIONS[_name]),
            write_release=partial(write_release, resolution=RESOLUTIONS[_name]),
            class_names=("separate", "connected"),
            card=_CARD.format(side=RESOLUTIONS[_name]) + f"- **Published.** {_PUBLISHED[_name]}\n",
        )
    )
