"""Generated Pathfinder caches: chunk by chunk, resumable, with the generator's statistics in the manifest."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tasks import pathfinder
from tasks.cache import build_cache, find_cache, open_cache
from tasks.registry import get


class Generator(ModuleType):
    """Stands in for tasks.generate_pathfinder: image i is full of i, its label is i modulo 2."""

    def __init__(self, stop_at: int = 1 << 30) -> None:
        super().__init__("tasks.generate_pathfinder")
        self.calls: list[dict[str, Any]] = []
        self.stop_at = stop_at

    def generate_into(self, images: np.ndarray, labels: np.ndarray, **options: Any) -> dict[str, Any]:
        if options["start"] >= self.stop_at:
            raise RuntimeError("killed")
        self.calls.append(options)
        numbers = options["start"] + np.arange(len(images))
        images[:] = numbers[:, None]
        labels[:] = numbers % 2
        options["progress"](len(images))
        return {"zero_fraction": float(len(images)), "law": "x"}


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    module = Generator()
    monkeypatch.setitem(sys.modules, "tasks.generate_pathfinder", module)
    monkeypatch.setattr("tasks.generate_pathfinder", module, raising=False)
    monkeypatch.setattr(pathfinder, "_CHUNK_BYTES", 0)
    return module


def test_images_are_drawn_in_order_with_the_options(generator: Generator, tmp_path: Path) -> None:
    task = get("path64")
    options = task.options(name="path64", count=600, num_distractors="wrapper", match_contrast=True, seed=9)
    cache = open_cache(build_cache(task, options, None, tmp_path))
    assert [call["start"] for call in generator.calls] == [0, 256, 512]
    first = {k: v for k, v in generator.calls[0].items() if k not in ("start", "progress", "workers")}
    assert first == {
        "resolution": 64, "contour_length": 14, "num_distractors": "wrapper", "match_contrast": True, "seed": 9,
        "gpu": None,
    }  # fmt: skip
    assert cache.manifest.source == "generated" and cache.parts == {"all": (0, 600)}
    assert [int(cache.example(i)[0][0]) for i in range(600)] == [i % 256 for i in range(600)]
    assert cache.labels.tolist() == [i % 2 for i in range(600)]
    weighted = (256 * 256 + 256 * 256 + 88 * 88) / 600
    assert cache.manifest.notes["generator"] == {
        "images": 600, "zero_fraction": pytest.approx(weighted), "law": "x",
    }  # fmt: skip


def test_a_broken_build_goes_on_with_the_next_chunk(generator: Generator, tmp_path: Path) -> None:
    task = get("pathfinder")
    options = task.options(name="pathfinder", count=600)
    generator.stop_at = 512
    with pytest.raises(RuntimeError, match="killed"):
        build_cache(task, options, None, tmp_path)
    assert find_cache(task, options, tmp_path) is None
    generator.stop_at = 1 << 30
    cache = open_cache(build_cache(task, options, None, tmp_path))
    assert [call["start"] for call in generator.calls] == [0, 256, 512]
    assert cache.labels.tolist() == [i % 2 for i in range(600)]
    assert cache.manifest.notes["generator"]["images"] == 600


def test_another_count_or_seed_is_another_cache(generator: Generator, tmp_path: Path) -> None:
    task = get("pathfinder")
    folders = {
        build_cache(task, task.options(name="pathfinder", **knobs), None, tmp_path)
        for knobs in ({"count": 10}, {"count": 11}, {"count": 10, "seed": 1}, {"count": 10, "contour_length": 9})
    }
    assert len(folders) == 4


@pytest.mark.parametrize("bad", [{"num_distractors": True}, {"num_distractors": "many"}, {"count": 1}, {"colour": 1}])
def test_wrong_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        get("pathfinder").options(name="pathfinder", **bad)


def test_files_that_our_generator_wrote_read_back_to_its_cache(tmp_path: Path) -> None:
    from tasks.pathfinder_release import write_release

    task = get("pathfinder")
    drawn = open_cache(build_cache(task, task.options(name="pathfinder", count=40), None, tmp_path / "data"))
    write_release(tmp_path / "raw", resolution=32, count=40)
    read = open_cache(build_cache(task, task.options(name="pathfinder"), tmp_path / "raw", tmp_path / "data"))
    assert np.array_equal(drawn.tokens, read.tokens) and np.array_equal(drawn.labels, read.labels)
    assert read.manifest.source == "generated" and read.manifest.source_kind == "files"
