"""Which batches a run trains on: read by a thread ahead of time, or made by the GPU from images in its memory."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lra.base.errors import ConfigError
from lra.base.seeds import torch_seed
from lra.config import RunConfig
from lra.distributed import World
from tasks.batches import Batch, TrainBatches, prefetch
from tasks.cache import Cache
from tasks.image_batches import FreshImages, ImageBatches, SetImages
from tasks.registry import get


@dataclass
class Data:
    """An opened cache and the example indices of its splits under the recipe's rule."""

    cache: Cache
    splits: dict[str, np.ndarray]
    split_rule: str


def batch_feed(
    batches: TrainBatches | ImageBatches, step: int, stop: int, device: torch.device
) -> Generator[list[Batch]]:
    """Yield the batches of steps step ... stop - 1: by a thread ahead of time, unless they are made on the GPU."""
    steps = (batches.at(number) for number in range(step, stop))
    if isinstance(batches, ImageBatches) and batches.on_device:
        yield from steps
        return
    on_gpu = device.type == "cuda"
    with prefetch(_made_for(device, steps), depth=3, pin=on_gpu) as ahead:
        yield from ahead


def _made_for(device: torch.device, steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    """Yield the batches, in whatever thread: each has a current GPU of its own, whose memory pinning would take."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    yield from steps


def make_batches(config: RunConfig, data: Data, world: World) -> TrainBatches | ImageBatches:
    """Return the training batches of this process as a pure function of the step."""
    train = config.train
    if train.batch_size % (train.accumulate * world.size):
        raise ConfigError(
            f"train.batch_size={train.batch_size} cannot be cut into {train.accumulate} micro-batches on each of "
            f"{world.size} processes.",
            "Make it a multiple of train.accumulate times the number of processes.",
        )
    batches = TrainBatches(
        data.cache,
        data.splits["train"],
        batch_size=train.batch_size,
        seed=config.seed,
        max_length=config.max_length,
        cls=config.model.pooling == "cls",
        black_pixels=config.data.black_pixels,
        rank=world.rank,
        world=world.size,
        accumulate=train.accumulate,
        rounding=world.device.type == "cuda",
        shuffle=get(config.task.name).shuffle if config.data.shuffle_operands else None,
    )
    side = side_of_whole_images(config)
    return batches if side is None else image_batches(config, batches, side, world)


def side_of_whole_images(config: RunConfig) -> int | None:
    """Return the pixels on a side of the task's square images if batches hold them whole, else None."""
    task = get(config.task.name)
    if task.grid is None or task.grid[0] != task.grid[1] or config.data.black_pixels != "token":
        return None
    return task.grid[0] if config.max_length == task.max_length else None


def image_batches(config: RunConfig, batches: TrainBatches, side: int, world: World) -> ImageBatches:
    """Return the batches of an image task, made on this process's device."""
    images: SetImages | FreshImages
    make = get(config.task.name).fresh
    if config.data.fresh and make is not None:
        lengths = config.data.fresh_lengths
        laws = [config.task.model_copy(update={"contour_length": n}) for n in lengths] or [config.task]
        # 31 bits are what the generator takes as a seed.
        images = FreshImages(make(laws, torch_seed(config.seed, "fresh") >> 32, world.device), batches.batch_size)
    else:
        images = SetImages(batches, world.device)
    return ImageBatches(
        images,
        side=side,
        batch_size=batches.batch_size,
        seed=config.seed,
        device=world.device,
        keep_tokens=config.data.keep_tokens,
        foreground=config.data.foreground,
        weigh_kept=config.data.weigh_kept,
        dihedral=config.data.dihedral,
        mirror=config.data.mirror,
        shift=config.data.shift,
        cls=config.model.pooling == "cls",
        rank=world.rank,
        world=world.size,
        accumulate=config.train.accumulate,
    )
