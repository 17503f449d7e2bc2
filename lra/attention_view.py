"""Where a finished Pathfinder model looks: attention from the points of one path, kept for the report's pictures.

Called at the end of a chain. The file holds numbers only (safetensors): the report draws without torch or model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import attention_kernels as ak
from lra.attention import Backend, BlockSparse, backend_class
from lra.base.files import write_bytes_atomic
from lra.config import RunConfig
from lra.distributed import World
from lra.evaluate import autocast
from lra.experiment import open_data
from lra.feed import Data
from lra.model import Classifier
from lra.run_dir import RunDir
from lra.transfer import checkpoint_of, tested_weights
from tasks.batches import collate
from tasks.registry import get

if TYPE_CHECKING:
    from tasks.pathfinder_describe import PathfinderImage

VIEW_FILE = "attention.safetensors"
NEAR = 1.5
"""Pixels from a paddle's middle line that count as the paddle; twice as many around a marker."""
CANDIDATES = 200
"""Images of the test split that are looked through for a connected one."""


@dataclass(frozen=True)
class Scene:
    """A connected image of the test split, by its number in the set, and what is drawn in it."""

    example: int
    drawn: PathfinderImage

    @property
    def path(self) -> int:
        """Which of the two targets has the markers: 0 or 1. It begins in the first one."""
        starts = [target[0, 0] for target in self.drawn.targets]
        return int(np.argmin([np.abs(start - np.array(self.drawn.markers[0])).sum() for start in starts]))

    @property
    def points(self) -> np.ndarray:
        """(P, 2) int64 pixels (y, x): the first marker, the middle of each paddle along the path, the other marker."""
        first, last = (np.array([marker], np.float64) for marker in self.drawn.markers)
        points = np.concatenate((first, self.drawn.targets[self.path].mean(1), last)).round().astype(np.int64)
        return points.clip(0, self.drawn.image.shape[0] - 1)

    @property
    def kinds(self) -> np.ndarray:
        """(S, S) int64: 0 the markers' own path and both markers, 1 the other target, 2 distractors, 3 background.

        By distance from the middle lines: faint paddles of the path count as the bright ones do.
        """
        y, x = np.mgrid[: self.drawn.image.shape[0], : self.drawn.image.shape[0]]
        kinds = np.full(y.shape, 3, np.int64)
        own, other = self.drawn.targets[self.path], self.drawn.targets[1 - self.path]
        along = np.linspace(0.0, 1.0, 11)[:, None, None]
        for kind, paths in ((2, self.drawn.distractors), (1, (other,)), (0, (own,))):
            for path in paths:
                for cy, cx in ((1 - along) * path[:, 0] + along * path[:, 1]).reshape(-1, 2):
                    kinds[(y - cy) ** 2 + (x - cx) ** 2 <= NEAR**2] = kind
        for cy, cx in self.drawn.markers:
            kinds[(y - cy) ** 2 + (x - cx) ** 2 <= (2 * NEAR) ** 2] = 0
        return kinds


def write_view(run: RunDir, config: RunConfig, world: World, folders: Sequence[Path]) -> bool:
    """Write the view of a run's chosen weights into each folder; return False where there is nothing to look at.

    That is: attention that has no weights for every pixel, or a set that the generator did not draw. The first process
    alone calls it.
    """
    if not backend_class(config.attention.backend).exact or config.data.black_pixels != "token":
        return False
    data = open_data(config)
    scene = find_scene(config, data)
    if scene is None:
        return False
    model = Classifier(config).to(world.device)
    model.load_state_dict(tested_weights(checkpoint_of(run, config.train.checkpoint_choice)))
    about = {"task": config.task.name, "example": str(scene.example)}
    content = save(view(model, config, scene, data, world.device), about)
    for folder in folders:
        write_bytes_atomic(folder / VIEW_FILE, content)
    return True


def find_scene(config: RunConfig, data: Data) -> Scene | None:
    """Return the first connected test image that the generator draws again just as the set has it, or None."""
    from tasks.pathfinder_describe import describe

    task = get(config.task.name)
    if task.grid is None or not task.generated:
        return None
    knobs = config.task.model_dump(exclude={"name", "count"})
    for example in data.splits["test"][:CANDIDATES].tolist():
        if data.cache.labels[example] != 1:
            continue
        drawn = describe(task.grid[0], **knobs, index=example)
        same = np.array_equal(drawn.image.reshape(-1), data.cache.example(example)[0])
        return Scene(example, drawn) if same else None
    return None


def view(model: Classifier, config: RunConfig, scene: Scene, data: Data, device: torch.device) -> dict[str, Tensor]:
    """Return what the report draws, for D layers, H heads, P points on the path and S x S pixels.

    image (S, S) uint8; points (P, 2) int64; from_marker (D, H, S, S) float16, the attention of the first point;
    peaks (D, H, P, 2) int64, the pixel that each point looks at most; shares (D, H, 4) float32, the mean share of the
    points' attention on their own path, the other one, distractors and background; logits (2,) float32.
    """
    side, points = scene.drawn.image.shape[0], torch.from_numpy(scene.points).to(device)
    rows_P = points[:, 0] * side + points[:, 1]
    found: list[Tensor] = []
    backends = [module for module in model.modules() if isinstance(module, Backend)]
    hooks = [b.register_forward_pre_hook(looks(rows_P, found), with_kwargs=True) for b in backends]
    cls, example = config.model.pooling == "cls", np.array([scene.example])
    batch = collate(data.cache, example, max_length=config.max_length, cls=cls).to(device)
    model.eval()
    with torch.no_grad(), autocast(config, device):
        logits_BC = model(batch)
    for hook in hooks:
        hook.remove()
    weights_DHPL = torch.stack(found)[..., : side * side].cpu()
    kind_L = torch.from_numpy(scene.kinds).flatten()
    peak_DHP = weights_DHPL.argmax(-1)
    return {
        "image": torch.from_numpy(scene.drawn.image.copy()),
        "points": points.cpu(),
        "from_marker": weights_DHPL[:, :, 0].unflatten(-1, (side, side)).half().contiguous(),
        "peaks": torch.stack((peak_DHP // side, peak_DHP % side), -1),
        "shares": torch.stack([weights_DHPL[..., kind_L == kind].sum(-1).mean(-1) for kind in range(4)], -1),
        "logits": logits_BC[0].cpu(),
    }


def looks(rows_P: Tensor, found: list[Tensor]) -> Any:
    """Return a hook before a backend that appends the attention (H, P, L) of the given rows of a single sequence."""

    def hook(backend: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        q, k, v = (x_THD[None] for x_THD in args[:3])
        scale = kwargs["softmax_scale"]
        layout = backend.layout if isinstance(backend, BlockSparse) else None
        if layout is None:
            _, lse = ak.flash_attention(q, k, v, softmax_scale=scale, return_lse=True)
        else:
            _, lse = ak.block_sparse_attention(q, k, v, layout, softmax_scale=scale, return_lse=True)
        found.append(ak.attention_rows(q, k, lse, rows_P, softmax_scale=scale, layout=layout)[0])

    return hook
