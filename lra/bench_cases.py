"""The training steps that `bench training` times: published model sizes, real lengths, and the examples they read."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lra.base.errors import RunError
from lra.config import RunConfig
from lra.feed import Data
from lra.recipes import load_config
from tasks.cache import Cache
from tasks.manifest import Manifest
from tasks.registry import Task, get

# Quantiles of the lengths of IMDB's training reviews in bytes, clipped at 4,096: mean 1,299, quartiles 702, 979 and
# 1,614, 2.9% clipped. The inner ones are measured, the outer ones chosen so that the mean is met.
_IMDB = [(0.0, 60), (0.02, 300), (0.1, 520), (0.25, 702), (0.5, 979), (0.75, 1614), (0.9, 2480), (0.971, 4096)]
_STEPS_OF_DATA = 24


@dataclass(frozen=True)
class Case:
    """A model size with its batch and its inputs.

    `padded_length` is what the baselines pad each sequence to; `lengths` says how long the sequences really are: full,
    imdb, listops (the generator's) or images (the generator's, full). `dropped` are the overrides of a second form of
    ours that leaves black pixels out as keys, as the protocol does, and None where there are none. `floor` is the
    speed-up over compiled SDPA that is asked for, of both forms. `alone`: without baselines, which would not train on a
    part of the tokens; a chain's stage is to run at its speed.
    """

    name: str
    recipe: str
    padded_length: int
    lengths: str
    overrides: tuple[str, ...] = ()
    dropped: tuple[str, ...] | None = None
    floor: float | None = None
    dropped_floor: float | None = None
    alone: bool = False

    @property
    def protocol(self) -> str:
        """Whose model sizes these are."""
        return self.recipe.split("/")[1]

    def config(self, *overrides: str) -> RunConfig:
        """Return the recipe at these sizes."""
        return load_config(self.recipe, [*self.overrides, *overrides])


_TOKENS = ("data.black_pixels=token",)
CASES = (
    Case("listops-google", "listops/google", 2048, "listops", floor=2.0),
    Case("text-google", "text/google", 4096, "imdb", ("data.max_length=4096",), floor=4.0),
    Case("retrieval-google", "retrieval/google", 4096, "full", ("data.max_length=4096",), floor=1.4),
    Case("image-google", "image/google", 1024, "full", _TOKENS, floor=1.4),
    Case("pathfinder-google", "pathfinder/google", 1024, "images", _TOKENS, ("data.black_pixels=not_key",), 1.6, 3.0),
    Case("pathx-google", "pathx/google", 16384, "images", _TOKENS, ("data.black_pixels=not_key",), 1.7, 5.0),
    Case("listops-nystrom", "listops/nystrom", 2048, "listops"),
    Case("text-nystrom", "text/nystrom", 4096, "imdb", ("data.max_length=4096", "model.num_positions=4096")),
    Case("retrieval-nystrom", "retrieval/nystrom", 4096, "full", ("data.max_length=4096", "model.num_positions=4096")),
    Case("image-nystrom", "image/nystrom", 1024, "full", _TOKENS),
    Case("pathfinder-nystrom", "pathfinder/nystrom", 1024, "images", _TOKENS, ("data.black_pixels=dropped",)),
    Case("path64-best", "path64/best", 4096, "images", alone=True),
    Case("pathx-best", "pathx/best", 16384, "images", alone=True),
    Case("path256-best", "path256/best", 65536, "images", alone=True),
)
# The five tasks of FlashAttention's table, for the geometric means.
TABLE = ("listops", "text", "retrieval", "image", "pathfinder")


def case_of(values: dict[str, Any]) -> Case:
    """Return the case that `dataclasses.asdict` wrote, also through JSON."""
    tuples = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    return Case(**{**values, **tuples})


def as_values(case: Case) -> dict[str, Any]:
    """Return a case as JSON values."""
    return asdict(case)


def examples(case: Case, batch: int, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens uint8 (flat) and lengths int64 of enough sequences for some steps of `batch` examples.

    Text and photographs are random bytes: no time depends on what they say.
    """
    task = get(case.config().task.name)
    count = batch * task.documents * (_STEPS_OF_DATA if case.lengths in ("listops", "imdb") else 4)
    random = np.random.default_rng(seed)
    if case.lengths == "listops":
        return _listops(task, count, length, seed)
    if case.lengths == "images" and task.fresh is not None:
        pixels, _ = task.fresh([task.options(name=task.name)], 1, torch.device("cpu"))(0, count)
        images = np.ascontiguousarray(pixels.numpy()[:, :length])
        return images.reshape(-1), np.full(count, images.shape[1], np.int64)
    lengths = np.full(count, length, np.int64)
    if case.lengths == "imdb":
        lengths = np.minimum(imdb_lengths(random.random(count)), length)
    return random.integers(1, min(task.vocab_size, 255), int(lengths.sum()), dtype=np.uint8), lengths


def write_examples(line: str) -> None:
    """Write a case's inputs to a file, as the JSON line says: case, batch, length, file. The file appears whole."""
    spec = json.loads(line)
    tokens, lengths = examples(case_of(spec["case"]), spec["batch"], spec["length"])
    file = Path(spec["file"])
    partial = file.with_name(f"partial-{file.name}")
    np.savez(partial, tokens=tokens, lengths=lengths)
    partial.rename(file)


def read_examples(file: Path, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Read what write_examples writes, perhaps just now. Raises RunError if it is not there within so many seconds."""
    end = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > end:
            raise RunError(f"The inputs {file.name} were not made in {seconds:g} s.", "See what the generator said.")
        time.sleep(0.05)
    with np.load(file) as arrays:
        return arrays["tokens"], arrays["lengths"]


def imdb_lengths(uniform: np.ndarray) -> np.ndarray:
    """Turn uniform numbers in [0, 1) into lengths of film reviews: log-linear between the quantiles."""
    places, logs = [q for q, _ in _IMDB], [math.log(n) for _, n in _IMDB]
    return np.exp(np.interp(uniform, places, logs)).round().astype(np.int64)


def _listops(task: Task, count: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from tasks.generate_listops import draw_block
    from tasks.listops import ListOpsOptions

    options = ListOpsOptions(name="listops", seed=seed + 1)
    blocks = [draw_block(options, 0)]
    while sum(len(block.lengths) for block in blocks) < count:
        blocks.append(draw_block(options, len(blocks)))
    kept = np.concatenate([block.lengths for block in blocks])[:count]
    flat = np.concatenate([block.tokens for block in blocks])[: int(kept.sum())]
    if length >= int(kept.max()):
        return flat, kept
    starts = np.concatenate([[0], np.cumsum(kept)[:-1]])
    short = np.minimum(kept, length)
    return np.concatenate([flat[a : a + n] for a, n in zip(starts, short, strict=True)]), short


def data_of(case: Case, tokens: np.ndarray, lengths: np.ndarray) -> Data:
    """Return sequences as a cache in memory, all of it for training, with labels in turn."""
    task = get(case.config().task.name)
    count = len(lengths) // task.documents
    labels = (np.arange(count) % task.num_classes).astype(np.uint8)
    manifest = Manifest(
        format=1,
        builder=1,
        task=task.name,
        task_version=task.version,
        options={},
        source="made for the benchmark",
        source_kind="generated",
        source_path=None,
        source_files={},
        documents=task.documents,
        num_classes=task.num_classes,
        grid=task.grid,
        num_examples=count,
        num_sequences=len(lengths),
        num_tokens=int(lengths.sum()),
        parts={"all": (0, count)},
        label_histogram=np.bincount(labels, minlength=task.num_classes).tolist(),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        mean_length=float(lengths.mean()),
        files={},
        notes={},
        created="",
    )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    cache = Cache(Path("memory"), manifest, tokens, offsets, labels)
    return Data(cache, {"train": np.arange(count)}, "all")


if __name__ == "__main__":
    write_examples(sys.stdin.readline())
