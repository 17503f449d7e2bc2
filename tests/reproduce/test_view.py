"""Where a finished model looks: the picture is of the path that has the markers, and the numbers are probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lra.attention_view import VIEW_FILE, find_scene, view, write_view
from lra.chain_figures import attention_grid, looks_along_path, read_view
from lra.config import RunConfig
from lra.distributed import World
from lra.experiment import open_data
from lra.model import Classifier
from lra.recipes import load_config
from lra.run_dir import RunDir

ALONE = World(0, 1, torch.device("cpu"))
SMALL = [
    "task.count=80", "model.depth=2", "model.width=32", "model.num_heads=2", "model.mlp_width=32",
    "train.precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


def small(sets: Path, *overrides: str, recipe: str = "path64/best") -> RunConfig:
    return load_config(recipe, [*SMALL, f"data.folder={sets}", *overrides])


@pytest.mark.parametrize("seed", [0, 5])
def test_the_scene_is_a_connected_test_image_and_its_points_run_along_the_markers_path(sets: Path, seed: int) -> None:
    config = small(sets, f"task.seed={seed}")
    data = open_data(config)
    scene = find_scene(config, data)
    assert scene is not None and scene.example in data.splits["test"] and scene.drawn.label == 1
    assert np.array_equal(scene.drawn.image.reshape(-1), data.cache.example(scene.example)[0])
    points = scene.points
    assert points[0].tolist() == list(scene.drawn.markers[0]) and points[-1].tolist() == list(scene.drawn.markers[1])
    # Along one path: steps of about a paddle and its gap.
    assert np.abs(np.diff(points, axis=0)).max() <= 12
    kinds = scene.kinds
    assert (kinds[points[:, 0], points[:, 1]] == 0).all()
    # Bright pixels of each path, as the generator tells them, have that path's kind where paths do not meet.
    for kind, owners in ((0, [scene.path + 1]), (1, [2 - scene.path]), (2, range(3, 40))):
        here = np.isin(scene.drawn.owners, list(owners))
        assert (kinds[here] == kind).mean() > 0.85
    assert (kinds[scene.drawn.image == 0] == 3).mean() > 0.9


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("path64/best", ["attention=sdpa"]),
        ("path64/best", ["attention=flash"]),
        ("path64/fly", ["attention=block_sparse", "model.qkv_width=32"]),
    ],
)
def test_weights_are_probabilities_on_what_is_drawn(recipe: str, overrides: list[str], sets: Path) -> None:
    config = small(sets, *overrides, recipe=recipe)
    data = open_data(config)
    scene = find_scene(config, data)
    assert scene is not None
    torch.manual_seed(0)
    model = Classifier(config).eval()
    found = view(model, config, scene, data, ALONE.device)
    depth, heads = 2, 2
    torch.testing.assert_close(found["shares"].sum(-1), torch.ones(depth, heads), atol=1e-4, rtol=0)
    torch.testing.assert_close(found["from_marker"].float().sum((2, 3)), torch.ones(depth, heads), atol=2e-2, rtol=0)
    peak = found["from_marker"].flatten(2).argmax(-1)
    rows, columns = found["peaks"][:, :, 0].unbind(-1)
    top = found["from_marker"].flatten(2).amax(-1)
    assert (found["from_marker"][torch.arange(2)[:, None], torch.arange(2), rows, columns] >= 0.99 * top).all(), peak
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_local_start_is_seen_in_the_view(sets: Path) -> None:
    config = small(sets, "attention=sdpa", "model.local_start=[6.0]", "model.qk_gain=8.0")
    data = open_data(config)
    scene = find_scene(config, data)
    assert scene is not None
    torch.manual_seed(0)
    found = view(Classifier(config).eval(), config, scene, data, ALONE.device)
    # The first head looks 6 columns to the right at first.
    step = (found["peaks"][0, 0] - found["points"]).float().median(0).values
    assert abs(float(step[0])) <= 2 and 4 <= float(step[1]) <= 8


def test_what_cannot_be_looked_at_is_left_out(sets: Path, tmp_path: Path) -> None:
    config = small(sets, "attention=linear", "model.key_weights=false", "data.weigh_kept=false")
    assert not write_view(RunDir(tmp_path), config, ALONE, [tmp_path]) and not (tmp_path / VIEW_FILE).exists()


def test_pictures_are_drawn(sets: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = small(sets, "attention=sdpa")
    data = open_data(config)
    scene = find_scene(config, data)
    assert scene is not None
    save_file(view(Classifier(config), config, scene, data, ALONE.device), tmp_path / VIEW_FILE)
    read = read_view(tmp_path / VIEW_FILE)
    assert read is not None
    assert len(attention_grid(read).axes) == 4 and len(looks_along_path(read).axes) == 4
