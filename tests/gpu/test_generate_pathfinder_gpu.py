"""On a GPU: the bytes of the CPU, image for image, and fast enough to train on fresh images."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tasks.generate_pathfinder import fresh
from tasks.pathfinder_gpu import GpuGenerator, draw_into, generate_on_gpu
from tasks.pathfinder_law import pathfinder_law
from tasks.pathfinder_threads import draw_chunk

pytestmark = pytest.mark.gpu

cuda = pytest.importorskip("numba.cuda")
if not cuda.is_available():
    pytest.skip("needs a CUDA GPU and numba-cuda", allow_module_level=True)

SETTINGS = [(r, length) for r in (32, 64, 128, 256) for length in (6, 9, 14)]


@pytest.mark.parametrize(("resolution", "contour_length"), SETTINGS)
def test_gpu_and_cpu_draw_the_same_bytes(resolution: int, contour_length: int) -> None:
    count = 256
    images, labels = generate_on_gpu(resolution, contour_length, seed=7, start=1000, count=count)
    expected, expected_labels = fresh(resolution, contour_length, seed=7, start=1000, count=count)
    assert (images == expected).all()
    assert (labels == expected_labels).all()


@pytest.mark.parametrize("options", [{"num_distractors": "wrapper"}, {"num_distractors": 0}, {"match_contrast": True}])
def test_knobs_act_alike(options: dict[str, object]) -> None:
    images, _ = generate_on_gpu(32, 9, seed=1, count=64, **options)  # type: ignore[arg-type]
    assert (images == fresh(32, 9, seed=1, count=64, **options)[0]).all()  # type: ignore[arg-type]


def test_more_images_than_scratch_slots_are_drawn_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.pathfinder_gpu._CANVAS_BYTES", 1 << 20)
    images, _ = generate_on_gpu(64, 6, count=500)
    assert (images == fresh(64, 6, count=500)[0]).all()


def test_no_images_is_no_error() -> None:
    images, labels = generate_on_gpu(32, 6, count=0)
    assert images.shape == (0, 1024) and labels.shape == (0,)


def test_tensors_share_the_gpu_s_memory() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    drawn = GpuGenerator(pathfinder_law(64, 6)).draw(3, 0, 32)
    images, labels = drawn.tensors()
    assert images.is_cuda and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert (images.cpu().numpy() == fresh(64, 6, seed=3, count=32)[0]).all()
    assert set(labels.cpu().tolist()) <= {0, 1}


def test_path_x_is_drawn_at_ten_thousand_images_a_second() -> None:
    generator = GpuGenerator(pathfinder_law(128))
    generator.draw(0, 0, 32768).wait()
    began = time.perf_counter()
    drawn = generator.draw(1, 0, 32768).wait()
    rate = 32768 / (time.perf_counter() - began)
    assert np.asarray(drawn.labels_on_host()).mean() == pytest.approx(0.5, abs=0.02)
    assert rate >= 10_000, f"{rate:,.0f} images a second"


def test_a_set_s_chunk_has_the_cpu_s_images_and_facts() -> None:
    law, found = pathfinder_law(64, 9), []
    images, expected = np.zeros((300, 4096), np.uint8), np.zeros((300, 4096), np.uint8)
    draw_into(GpuGenerator(law), 5, 70, images, lambda first, rows, facts: found.append((first, facts)))
    facts = draw_chunk(law, 5, 70, expected).facts
    assert np.array_equal(images, expected)
    assert len(found) == 1 and found[0][0] == 0 and np.array_equal(found[0][1], facts)
