"""Training batches of images, made where the model is: whole sets in GPU memory, turned and thinned out there.

The same examples come in the same order as from tasks.batches.TrainBatches, and without thinning and turning the same
tokens. A batch is a pure function of (seed, step) for one kind of device; how many processes share it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lra.base.errors import ConfigError
from lra.base.seeds import generator, torch_seed
from tasks.batches import Batch, TrainBatches
from tasks.cache import Cache

if TYPE_CHECKING:
    from tasks.registry import FreshDrawer

RESIDENT_SHARE = 0.3  # of the free GPU memory that a set may take
_COPY_ROWS_BYTES = 256 << 20
_FRESH_IMAGES = 8192  # drawn at once: enough to fill a GPU
_RANDOM_BITS = 30


class SetImages:
    """The images of a set, in the order of TrainBatches; in the device's memory if they fit there.

    `rows(step, first, stop)` gives images first ... stop - 1 of a step's batch: (n, pixels) uint8, labels (n,) int64.
    """

    def __init__(self, batches: TrainBatches, device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.images_NL = host_images(batches.cache)
        self.resident = device.type == "cuda" and fits(self.images_NL.nbytes, device)
        if self.resident:
            self.images = copied(self.images_NL, device)
            self.labels = torch.from_numpy(batches.cache.labels.astype(np.int64)).to(device)
        self._order: tuple[int, Tensor] | None = None

    def rows(self, step: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return images and labels on the device."""
        if self.resident:
            chosen = self._on_device(step)[first:stop]
            return self.images[chosen], self.labels[chosen]
        examples = self.batches.examples(step)[first:stop]
        images = torch.from_numpy(self.images_NL[examples])
        labels = torch.from_numpy(self.batches.cache.labels[examples].astype(np.int64))
        return images.to(self.device), labels.to(self.device)

    def _on_device(self, step: int) -> Tensor:
        """Return the examples of a step; the order is copied once an epoch, so that no step waits for a copy."""
        epoch, batch = divmod(step, self.batches.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, torch.from_numpy(self.batches.epoch(epoch)).to(self.device)
        size = self.batches.batch_size
        return self._order[1][batch * size : (batch + 1) * size]


class FreshImages:
    """New images at every step; image i of step t is the drawer's number t * batch_size + i."""

    resident = True

    def __init__(self, draw: FreshDrawer, batch_size: int) -> None:
        self.draw, self.batch_size = draw, batch_size
        self.steps = max(1, _FRESH_IMAGES // batch_size)
        self._chunk: tuple[int, Tensor, Tensor] | None = None

    def rows(self, step: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return images and labels of a step's batch, as SetImages does."""
        chunk, place = divmod(step, self.steps)
        if self._chunk is None or self._chunk[0] != chunk:
            count = self.steps * self.batch_size
            self._chunk = chunk, *self.draw(chunk * count, count)
        at = place * self.batch_size
        return self._chunk[1][at + first : at + stop], self._chunk[2][at + first : at + stop]


class ImageBatches:
    """The training batches of one rank, already on its device.

    keep_tokens: numbers of tokens an image keeps, one drawn for each step: every pixel of at least `foreground` as far
    as they fit, and random others. weigh_kept: each kept token stands for those like it (foreground or not) that were
    left out (Batch.log_weight_T). dihedral: each image is flipped and turned at random. mirror: half of them have left
    and right exchanged. shift: each moves by up to so many pixels, black coming in. Positions are those of the
    (changed) whole image, in ascending order. `cls` adds one slot at each sequence's end.
    """

    def __init__(
        self,
        images: SetImages | FreshImages,
        *,
        side: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        keep_tokens: list[int] | None = None,
        foreground: int = 8,
        weigh_kept: bool = False,
        dihedral: bool = False,
        mirror: bool = False,
        shift: int = 0,
        cls: bool = False,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        if batch_size % (world * accumulate):
            raise ConfigError(
                f"A batch of {batch_size} cannot be split over {world} processes and {accumulate} micro-batches.",
                "Choose a batch_size that is a multiple of their product.",
            )
        self.images, self.side, self.batch_size, self.seed, self.device = images, side, batch_size, seed, device
        self.keep_tokens, self.foreground, self.cls = keep_tokens or [], foreground, cls
        self.weigh_kept = weigh_kept
        self.turns_GL = dihedral_maps(side).to(device) if dihedral else None
        self.mirror, self.shift = mirror, shift
        self.accumulate, self.micro_batch = accumulate, batch_size // (world * accumulate)
        self.first = rank * accumulate * self.micro_batch
        # Made where batches are used; a set that stays on the host is better read ahead by a thread.
        self.on_device = images.resident
        self._frames: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of optimizer step `step` (counted from 0)."""
        stop = self.first + self.accumulate * self.micro_batch
        images_BL, labels_B = self.images.rows(step, self.first, stop)
        # Drawn for the whole batch by every process: what an image gets does not depend on who has it.
        random = torch.Generator(self.device).manual_seed(torch_seed(self.seed, "images", step))
        if self.turns_GL is not None:
            turn_B = torch.randint(8, (self.batch_size,), generator=random, device=self.device)[self.first : stop]
            images_BL = images_BL.gather(1, self.turns_GL[turn_B])
        if self.mirror or self.shift:
            choice = (self.batch_size, 2)
            moves_B2 = torch.randint(2 * self.shift + 1, choice, generator=random, device=self.device) - self.shift
            mirrored_B = torch.randint(2, choice[:1], generator=random, device=self.device).bool() & self.mirror
            images_BL = moved(images_BL, moves_B2[self.first : stop], mirrored_B[self.first : stop], self.side)
        kept = self.num_kept(step)
        positions_BK = log_weight_BK = None
        if kept < self.side**2:
            dice_BL = torch.randint(
                2**_RANDOM_BITS,
                (self.batch_size, self.side**2),
                generator=random,
                device=self.device,
                dtype=torch.int32,
            )[self.first : stop]
            positions_BK = kept_positions(images_BL, dice_BL, kept, self.foreground)
            if self.weigh_kept:
                log_weight_BK = log_weights(images_BL, positions_BK, self.foreground)
            images_BL = images_BL.gather(1, positions_BK)
        pieces = [slice(i * self.micro_batch, (i + 1) * self.micro_batch) for i in range(self.accumulate)]
        return [
            self._pack(
                images_BL[piece],
                None if positions_BK is None else positions_BK[piece],
                None if log_weight_BK is None else log_weight_BK[piece],
                labels_B[piece],
            )
            for piece in pieces
        ]

    def num_kept(self, step: int) -> int:
        """Return how many tokens each image has at a step."""
        whole = self.side**2
        if not self.keep_tokens:
            return whole
        chosen = generator(self.seed, "keep", step).integers(len(self.keep_tokens))
        return min(self.keep_tokens[int(chosen)], whole)

    def starting(self, step: int, stop: int) -> Iterator[list[Batch]]:
        """Yield at(step) ... at(stop - 1)."""
        for number in range(step, stop):
            yield self.at(number)

    def _pack(
        self, images_BK: Tensor, positions_BK: Tensor | None, log_weight_BK: Tensor | None, labels_B: Tensor
    ) -> Batch:
        kept = images_BK.shape[1]
        cu_seqlens, whole_T = self._frame(kept)
        positions_T = whole_T
        if positions_BK is not None:
            positions_T = self._with_cls(positions_BK.to(torch.int32), self.side**2).flatten()
        return Batch(
            tokens_T=self._with_cls(images_BK, 0).flatten(),
            positions_T=positions_T,
            cu_seqlens=cu_seqlens,
            max_length=kept + self.cls,
            labels_B=labels_B,
            cls=self.cls,
            uniform=True,
            log_weight_T=None if log_weight_BK is None else self._with_cls(log_weight_BK, 0).flatten(),
        )

    def _frame(self, kept: int) -> tuple[Tensor, Tensor]:
        """Return cu_seqlens and the positions of whole images; made once for each number of tokens."""
        if kept not in self._frames:
            bounds = torch.arange(self.micro_batch + 1, dtype=torch.int32, device=self.device) * (kept + self.cls)
            line = torch.arange(self.side**2 + self.cls, dtype=torch.int32, device=self.device)
            self._frames[kept] = bounds, line.repeat(self.micro_batch)
        return self._frames[kept]

    def _with_cls(self, rows_BK: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(rows_BK, (0, 1), value=value) if self.cls else rows_BK


def kept_positions(images_BL: Tensor, dice_BL: Tensor, kept: int, foreground: int) -> Tensor:
    """Return (B, kept) int64 ascending: the foreground pixels first, then those with the highest dice.

    dice_BL: int32 below 2^30. Where an image has more foreground than places, some of it is left out at random.
    """
    rank_BL = dice_BL + (images_BL >= foreground).to(torch.int32) * 2**_RANDOM_BITS
    return rank_BL.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values


def log_weights(images_BL: Tensor, positions_BK: Tensor, foreground: int) -> Tensor:
    """Return (B, K) float32: log(pixels / kept pixels) among the foreground or the others, whichever a kept one is of.

    With that added to its scores a kept pixel weighs in the softmax as much as all it stands for: sums over the kept
    are unbiased estimates of the sums over the whole image (importance sampling).
    """
    bright_BL = images_BL >= foreground
    bright_BK = bright_BL.gather(1, positions_BK)
    bright, kept = bright_BL.sum(1, keepdim=True), bright_BK.sum(1, keepdim=True)
    dark, kept_dark = images_BL.shape[1] - bright, positions_BK.shape[1] - kept
    # A kind without kept pixels has no place for its weight.
    return torch.where(bright_BK, bright / kept.clamp(min=1), dark / kept_dark.clamp(min=1)).log()


def moved(images_BL: Tensor, moves_B2: Tensor, mirrored_B: Tensor, side: int) -> Tensor:
    """Return images with left and right exchanged where asked, then moved by (rows, columns); 0 comes in."""
    line = torch.arange(side, device=images_BL.device)
    rows_BS = line - moves_B2[:, :1]
    columns_BS = line - moves_B2[:, 1:2]
    inside_BSS = ((rows_BS >= 0) & (rows_BS < side))[:, :, None] & ((columns_BS >= 0) & (columns_BS < side))[:, None]
    columns_BS = torch.where(mirrored_B[:, None], side - 1 - columns_BS, columns_BS).clamp(0, side - 1)
    places_BL = (rows_BS.clamp(0, side - 1)[:, :, None] * side + columns_BS[:, None]).flatten(1)
    return images_BL.gather(1, places_BL) * inside_BSS.flatten(1)


def dihedral_maps(side: int) -> Tensor:
    """Return (8, side * side) int64: row g says which pixel each place takes under flip or turn g; row 0 none."""
    grid = np.arange(side * side).reshape(side, side)
    turned = [np.rot90(flipped, quarter) for flipped in (grid, grid.T) for quarter in range(4)]
    return torch.from_numpy(np.stack([g.reshape(-1) for g in turned]))


def host_images(cache: Cache) -> np.ndarray:
    """Return a view (N, pixels) of a cache of images. Raises ConfigError if its sequences differ in length."""
    if cache.grid is None or cache.documents != 1:
        raise ConfigError(f"{cache.manifest.task} has no images.", "Leave options for images out.")
    return cache.tokens.reshape(cache.num_examples, cache.grid[0] * cache.grid[1])


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether a set may stay in a GPU's memory beside a model in training."""
    free, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= RESIDENT_SHARE * free


def copied(images_NL: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy on the device, brought there in pieces of 256 MB."""
    out = torch.empty(images_NL.shape, dtype=torch.uint8, device=device)
    rows = max(1, _COPY_ROWS_BYTES // images_NL.shape[1])
    for start in range(0, len(images_NL), rows):
        # A copy, for the file's map cannot be written to and torch refuses such memory.
        out[start : start + rows].copy_(torch.from_numpy(np.array(images_NL[start : start + rows])))
    return out
