"""Sets drawn by a GPU, with one stood in for by the CPU: the same cache, and what differs is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import pathfinder_gpu
from tasks.cache import build_cache, open_cache
from tasks.pathfinder_draw import F_SUM, F_ZEROS
from tasks.pathfinder_law import Law, pathfinder_law
from tasks.pathfinder_threads import draw_chunk
from tasks.registry import get


class OnHost:
    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def copy_to_host(self) -> np.ndarray:
        return self.values


class StandIn:
    """Draws as the GPU does: the CPU's images, without the facts that the CPU alone measures."""

    spoiled_from = 1 << 60

    def __init__(self, law: Law) -> None:
        self.law, self.starts = law, list[int]()

    def draw(self, seed: int, start: int, count: int) -> Any:
        self.starts.append(start)
        images = np.zeros((count, self.law.resolution**2), np.uint8)
        facts = draw_chunk(self.law, seed, start, images).facts
        facts[:, [F_ZEROS, F_SUM]] = 0
        if start >= self.spoiled_from:
            images[0, 17] ^= 1
        drawn = pathfinder_gpu.GpuImages(images, OnHost(facts), np.zeros(0), self.law)
        object.__setattr__(drawn, "images", OnHost(images))
        return drawn


def prepared(folder: Path, monkeypatch: pytest.MonkeyPatch, made: StandIn | None) -> tuple[np.ndarray, np.ndarray, Any]:
    monkeypatch.setattr(pathfinder_gpu, "generator_for", lambda law, count: made)
    task = get("pathfinder")
    options = task.options(name="pathfinder", contour_length=6, count=5000)
    cache = open_cache(build_cache(task, options, None, folder))
    return np.array(cache.tokens), np.array(cache.labels), cache.manifest


def test_a_set_has_the_same_bytes_and_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = StandIn(pathfinder_law(32, 6))
    images, labels, manifest = prepared(tmp_path / "gpu", monkeypatch, made)
    expected, expected_labels, expected_manifest = prepared(tmp_path / "cpu", monkeypatch, None)
    assert made.starts == [0, 4096]  # in few large draws
    assert np.array_equal(images, expected) and np.array_equal(labels, expected_labels)
    assert manifest.notes == expected_manifest.notes


def test_images_that_differ_are_drawn_again_by_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = StandIn(pathfinder_law(32, 6))
    monkeypatch.setattr(StandIn, "spoiled_from", 4096)
    images, labels, _ = prepared(tmp_path / "gpu", monkeypatch, made)
    expected, expected_labels, _ = prepared(tmp_path / "cpu", monkeypatch, None)
    assert "differ between GPU and CPU" in capsys.readouterr().err
    assert np.array_equal(images, expected) and np.array_equal(labels, expected_labels)


def test_small_sets_and_machines_without_a_gpu_are_left_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    law = pathfinder_law(32, 6)
    monkeypatch.setattr(pathfinder_gpu, "GpuGenerator", StandIn)
    assert isinstance(pathfinder_gpu.generator_for(law, 10_000), StandIn)
    assert pathfinder_gpu.generator_for(law, 9_999) is None
    monkeypatch.undo()
    monkeypatch.setattr(pathfinder_gpu, "_cuda", _no_cuda)
    assert pathfinder_gpu.generator_for(law, 10_000) is None


def test_a_gpu_that_numba_cannot_use_is_told_and_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(StandIn):
        def draw(self, seed: int, start: int, count: int) -> Any:
            raise RuntimeError("NVVM is too old\nlong story")

    monkeypatch.setattr(pathfinder_gpu, "GpuGenerator", Broken)
    assert pathfinder_gpu.generator_for(pathfinder_law(32, 6), 10_000) is None
    said = capsys.readouterr().err
    assert "NVVM is too old" in said and "long story" not in said and "the CPU does" in said


def _no_cuda() -> None:
    from lra.base.errors import ConfigError

    raise ConfigError("numba finds no CUDA device.", "Draw on the CPU.")
