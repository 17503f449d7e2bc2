"""Batches of images made where the model is, against TrainBatches and against plain loops over pixels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tasks.batches import Batch, TrainBatches
from tasks.cache import Cache, build_cache, open_cache
from tasks.image_batches import FreshImages, ImageBatches, SetImages, dihedral_maps
from tasks.registry import get
from tests.tasks.fixtures import make_pathfinder

SIDE, CPU = 32, torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    root = tmp_path_factory.mktemp("images")
    make_pathfinder(root / "raw", SIDE, count=80)
    task = get("pathfinder")
    return open_cache(build_cache(task, task.options(name="pathfinder"), root / "raw", root / "data"))


def set_images(cache: Cache, batch_size: int = 8) -> SetImages:
    indices = np.arange(cache.num_examples)[::-1].copy()
    return SetImages(TrainBatches(cache, indices, batch_size=batch_size, seed=3, max_length=SIDE**2), CPU)


def batches(cache: Cache, **options: object) -> ImageBatches:
    return ImageBatches(set_images(cache), side=SIDE, batch_size=8, seed=3, device=CPU, **options)  # type: ignore[arg-type]


def images_of(batch: Batch) -> list[dict[int, int]]:
    """Return each image as position -> byte."""
    cu = batch.cu_seqlens.tolist()
    return [
        dict(zip(batch.positions_T[a:b].tolist(), batch.tokens_T[a:b].tolist(), strict=True)) for a, b in pairwise(cu)
    ]


def same(a: Batch, b: Batch) -> bool:
    fields = ("tokens_T", "positions_T", "cu_seqlens", "labels_B")
    equal = all(
        torch.equal(getattr(a, f), getattr(b, f)) and getattr(a, f).dtype == getattr(b, f).dtype for f in fields
    )
    return equal and a.max_length == b.max_length and a.cls == b.cls


@pytest.mark.parametrize("cls", [False, True])
def test_whole_images_are_those_of_train_batches(cache: Cache, cls: bool) -> None:
    indices = np.arange(cache.num_examples)[::-1].copy()
    for rank in range(2):
        shared = {"cls": cls, "rank": rank, "world": 2, "accumulate": 2}
        ours = batches(cache, **shared)
        theirs = TrainBatches(cache, indices, batch_size=8, seed=3, max_length=SIDE**2, **shared)  # type: ignore[arg-type]
        for step in (0, 1, 9, 10, 25):  # over the ends of epochs
            for a, b in zip(ours.at(step), theirs.at(step), strict=True):
                assert same(a, b)


def test_kept_tokens_are_all_foreground_and_random_others(cache: Cache) -> None:
    thinned, whole = batches(cache, keep_tokens=[500, 700], foreground=8), batches(cache)
    counts = set()
    backgrounds = []
    for step in range(12):
        (batch,) = thinned.at(step)
        counts.add(batch.max_length)
        assert batch.cu_seqlens.diff().tolist() == [batch.max_length] * 8
        for image, full in zip(images_of(batch), images_of(whole.at(step)[0]), strict=True):
            assert list(image) == sorted(image) and len(image) == batch.max_length
            assert all(full[place] == byte for place, byte in image.items())
            foreground = {place for place, byte in full.items() if byte >= 8}
            assert len(foreground) <= 500 and foreground <= image.keys()
            backgrounds.append(sorted(set(image) - foreground))
    assert counts == {500, 700}
    # Background places are spread evenly: their mean place is the middle of the image's background.
    assert abs(np.mean([np.mean(b) for b in backgrounds]) - SIDE**2 / 2) < 40
    assert backgrounds[0] != backgrounds[1]


def test_where_foreground_does_not_fit_only_foreground_is_kept(cache: Cache) -> None:
    (batch,) = batches(cache, keep_tokens=[20], foreground=8).at(0)
    assert batch.tokens_T.min() >= 8


def test_a_batch_is_a_function_of_seed_and_step_whoever_makes_it(cache: Cache) -> None:
    options = {"keep_tokens": [400, 600], "dihedral": True}
    whole = batches(cache, **options)
    whole.at(3)
    for step in (5, 2):
        (expected,) = whole.at(step)
        (again,) = batches(cache, **options).at(step)
        assert same(again, expected)
        parts = [
            batch for rank in range(2) for batch in batches(cache, rank=rank, world=2, accumulate=2, **options).at(step)
        ]
        assert torch.equal(torch.cat([part.tokens_T for part in parts]), expected.tokens_T)
        assert torch.equal(torch.cat([part.positions_T for part in parts]), expected.positions_T)
        assert torch.equal(torch.cat([part.labels_B for part in parts]), expected.labels_B)


def test_turns_are_the_eight_of_the_square_and_all_occur(cache: Cache) -> None:
    maps = dihedral_maps(5)
    square = np.random.default_rng(0).integers(0, 256, (5, 5))
    ours = {tuple(square.reshape(-1)[row]) for row in maps.numpy()}
    by_numpy = {tuple(np.rot90(s, k).reshape(-1)) for s in (square, np.fliplr(square)) for k in range(4)}
    assert ours == by_numpy and len(ours) == 8
    assert maps[0].tolist() == list(range(25))
    turned, whole = batches(cache, dihedral=True), batches(cache)
    found = set()
    for step in range(8):
        pairs = zip(turned.at(step)[0].tokens_T.view(8, -1), whole.at(step)[0].tokens_T.view(8, -1), strict=True)
        for after, before in pairs:
            matches = [g for g, row in enumerate(dihedral_maps(SIDE)) if torch.equal(before[row], after)]
            assert matches
            found.add(matches[0])
    assert found == set(range(8))


def test_fresh_images_come_from_the_drawer_by_number() -> None:
    calls = []

    def draw(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((start, count))
        numbers = torch.arange(start, start + count)
        return (numbers[:, None] % 251).to(torch.uint8).expand(-1, SIDE**2), numbers

    images = FreshImages(draw, 4)
    images.steps = 3
    made = ImageBatches(images, side=SIDE, batch_size=4, seed=0, device=CPU)
    labels = [made.at(step)[0].labels_B.tolist() for step in range(7)]
    assert labels == [list(range(4 * step, 4 * step + 4)) for step in range(7)]
    assert calls == [(0, 12), (12, 12), (24, 12)]
    half = ImageBatches(images, side=SIDE, batch_size=4, seed=0, device=CPU, rank=1, world=2)
    assert half.at(1)[0].labels_B.tolist() == [6, 7]


def test_the_generator_draws_images_that_are_in_no_set() -> None:
    task = get("path64")
    assert task.fresh is not None
    options = task.options(name="path64", contour_length=6, seed=5, count=10)
    images, labels = task.fresh([options], 5, CPU)(0, 4)
    from tasks.generate_pathfinder import fresh

    of_the_set, _ = fresh(64, 6, seed=5, count=4)
    drawn, drawn_labels = fresh(64, 6, seed=6, count=4)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert np.array_equal(images.numpy(), drawn) and labels.tolist() == drawn_labels.tolist()
    assert not np.array_equal(images.numpy(), of_the_set)


def test_laws_take_turns_whatever_the_range() -> None:
    task = get("path64")
    assert task.fresh is not None
    laws = [task.options(name="path64", contour_length=n) for n in (6, 7, 5)]
    from tasks.generate_pathfinder import fresh

    alone = [fresh(64, n, seed=9, count=6)[0] for n in (6, 7, 5)]
    draw = task.fresh(laws, 9, CPU)
    for start, count in ((0, 12), (4, 5), (7, 1), (11, 2)):
        images, labels = draw(start, count)
        assert len(labels) == count
        for i, image in enumerate(images.numpy(), start):
            assert np.array_equal(image, alone[i % 3][i // 3])


def test_kept_tokens_stand_for_those_like_them(cache: Cache) -> None:
    options = {"keep_tokens": [500, 700], "cls": True}
    weighed, whole = batches(cache, **options, weigh_kept=True), batches(cache)
    for step in range(4):
        (batch,) = weighed.at(step)
        assert batch.log_weight_T is not None
        assert batch.log_weight_T.dtype == torch.float32 and batch.log_weight_T.shape == batch.tokens_T.shape
        rows = batch.log_weight_T.view(8, -1).double()
        assert torch.equal(rows[:, -1], torch.zeros(8, dtype=torch.float64))  # the CLS slot stands for itself
        bright = batch.tokens_T.view(8, -1)[:, :-1] >= 8
        for weights, is_bright, full in zip(rows[:, :-1].exp(), bright, images_of(whole.at(step)[0]), strict=True):
            # Together they weigh as many as the image has of each kind.
            num_bright = sum(byte >= 8 for byte in full.values())
            assert weights[is_bright].sum().item() == pytest.approx(num_bright, rel=1e-5)
            assert weights[~is_bright].sum().item() == pytest.approx(SIDE**2 - num_bright, rel=1e-5)
        assert any(moved_one is batch.log_weight_T for moved_one in batch.tensors())
    shared = [batches(cache, rank=rank, world=2, **options, weigh_kept=True).at(3)[0] for rank in range(2)]
    parts = torch.cat([part.log_weight_T for part in shared])  # type: ignore[misc]
    assert torch.equal(parts, weighed.at(3)[0].log_weight_T)  # type: ignore[arg-type]
    assert batches(cache, **options).at(0)[0].log_weight_T is None
