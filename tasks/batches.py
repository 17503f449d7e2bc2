"""Packed batches from a cache: which examples come when, and their tokens one after another.

The order is a pure function of (seed, epoch) and a batch one of (seed, step), so a resumed run needs no saved
loader state. Tokens stay one byte each until they are on the GPU. Called by training and evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from lra.base.errors import ConfigError
from lra.base.seeds import generator, torch_seed
from tasks.cache import Cache
from tasks.prefetch import prefetch

__all__ = ["Batch", "BlackPixels", "EvalBatches", "Keys", "TrainBatches", "collate", "order", "prefetch", "rounded"]

BlackPixels = Literal["token", "not_key", "dropped"]


@dataclass(frozen=True)
class Keys:
    """The rows of a packed batch that may be attended to.

    `index_K` int64 rows in ascending order, `cu_seqlens` int32 (S + 1) their bounds by sequence, `max_length` the
    most that one sequence has, or an upper bound. Entries of index_K after the last bound are T, no row of the batch.
    """

    index_K: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int


@dataclass(frozen=True)
class Batch:
    """S sequences one after another, T tokens in all, of B examples (S = B, or 2 B for pairs).

    `tokens_T` uint8; `positions_T` int32, the index within the original sequence (a dropped pixel leaves a gap, a
    CLS slot has the recipe's max_length); `cu_seqlens` int32 (S + 1); `labels_B` int64. With `cls` each sequence
    ends in one slot whose byte is 0. `max_length` is the longest sequence or an upper bound. `uniform` says that every
    sequence has max_length rows and no rows follow the last, so packed and padded are one and the same memory.
    A rounded batch (`rounded`) has rows of zeros after cu_seqlens[-1], which belong to no sequence.
    `log_weight_T` float32: a key stands for exp(that) tokens, of which it alone was kept; None: each for itself.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    labels_B: torch.Tensor
    keys: Keys | None = None
    cls: bool = False
    uniform: bool = False
    log_weight_T: torch.Tensor | None = None
    num_spare: int = 0
    """Rows after the last sequence."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch, CLS slots included."""
        return len(self.tokens_T) - self.num_spare

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Return the batch on another device."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU run in the background."""
        return self._each(torch.Tensor.pin_memory)

    def clone(self) -> Batch:
        """Return the batch in memory of its own."""
        return self._each(torch.Tensor.clone)

    def tensors(self) -> list[torch.Tensor]:
        """Return everything that `to` copies, in one order."""
        own = [self.tokens_T, self.positions_T, self.cu_seqlens, self.labels_B]
        weights = [] if self.log_weight_T is None else [self.log_weight_T]
        keys = [] if self.keys is None else [self.keys.index_K, self.keys.cu_seqlens]
        return own + weights + keys

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        keys = self.keys
        if keys is not None:
            keys = replace(keys, index_K=change(keys.index_K), cu_seqlens=change(keys.cu_seqlens))
        return replace(
            self,
            tokens_T=change(self.tokens_T),
            positions_T=change(self.positions_T),
            cu_seqlens=change(self.cu_seqlens),
            labels_B=change(self.labels_B),
            keys=keys,
            log_weight_T=None if self.log_weight_T is None else change(self.log_weight_T),
        )


def order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation (int64) in which epoch `epoch` visits the examples: pure."""
    return generator(seed, "order", epoch).permutation(num_examples)


def collate(
    cache: Cache,
    example_indices: np.ndarray,
    *,
    max_length: int,
    cls: bool = False,
    black_pixels: BlackPixels = "token",
) -> Batch:
    """Pack some examples, in the order given; each sequence keeps its first `max_length` tokens.

    `black_pixels` is about byte 0 of image tasks: an ordinary token; `not_key`: a token that nothing attends to (the
    batch then names its keys); `dropped`: out of the batch, the others keep their positions. A CLS slot is always a
    key. Raises ConfigError if black pixels of a task without pixels are to be treated specially.
    """
    if black_pixels != "token" and cache.grid is None:
        raise ConfigError(
            f"black_pixels={black_pixels} means nothing to {cache.manifest.task}, which has no pixels.",
            "Leave it at `token`.",
        )
    example_indices = np.asarray(example_indices, np.int64)
    tokens, positions, cu_seqlens = _pack(cache, example_indices, max_length, cls)
    keys = None
    if black_pixels != "token":
        kept = (tokens != 0) | (positions == max_length)
        bounds = np.concatenate([[0], np.cumsum(kept)])[cu_seqlens]
        rows = np.flatnonzero(kept)  # taking rows is four times as quick as a boolean mask
        if black_pixels == "dropped":
            tokens, positions, cu_seqlens = tokens[rows], positions[rows], bounds
        else:
            keys = Keys(torch.from_numpy(rows), _int32(bounds), _longest(bounds))
    return Batch(
        tokens_T=torch.from_numpy(tokens),
        positions_T=torch.from_numpy(positions),
        cu_seqlens=_int32(cu_seqlens),
        max_length=_longest(cu_seqlens),
        labels_B=torch.from_numpy(cache.labels[example_indices].astype(np.int64)),
        keys=keys,
        cls=cls,
        uniform=len(tokens) == _longest(cu_seqlens) * (len(cu_seqlens) - 1),
    )


def rounded(batch: Batch, bound: int, num_examples: int | None = None) -> Batch:
    """Return the batch in buffers of one of at most 64 sizes, so that compiled code and CUDA graphs meet few shapes.

    `bound` is the most rows that a sequence can have; it becomes `max_length`. `num_examples` adds empty sequences up
    to that number, with the label -100 that cross-entropy leaves out. Rows and keys are rounded up to multiples of a
    64th of the most that there can be, at least 128: 1 or 2% more rows at lengths that vary.
    """
    missing = 0 if num_examples is None else num_examples - len(batch.labels_B)
    num_sequences = len(batch.cu_seqlens) - 1
    extra = missing * num_sequences // max(len(batch.labels_B), 1)
    most = (num_sequences + extra) * bound
    num_rows = _round_up(len(batch.tokens_T), most)
    spare = num_rows - len(batch.tokens_T)
    keys = batch.keys
    if keys is not None:
        added = _round_up(len(keys.index_K), most) - len(keys.index_K)
        keys = Keys(_extend(keys.index_K, added, num_rows), _extend(keys.cu_seqlens, extra), bound)
    return replace(
        batch,
        tokens_T=_extend(batch.tokens_T, spare, 0),
        positions_T=_extend(batch.positions_T, spare, 0),
        cu_seqlens=_extend(batch.cu_seqlens, extra),
        max_length=bound,
        labels_B=_extend(batch.labels_B, missing, -100),
        keys=keys,
        uniform=batch.uniform and not extra and batch.max_length == bound,
        num_spare=spare,
    )


def _round_up(size: int, most: int) -> int:
    """Return the next multiple of a 64th of `most` (itself a multiple of 128), at most `most`."""
    step = 128 * max(1, -(-most // (64 * 128)))
    return min(-(-size // step) * step, most)


def _extend(values: torch.Tensor, count: int, fill: int | None = None) -> torch.Tensor:
    """Return values with `count` more entries of `fill`, or of the last value."""
    if count == 0:
        return values
    last = values[-1:] if fill is None else torch.full((1,), fill, dtype=values.dtype)
    return torch.cat([values, last.expand(count)])


def _pack(cache: Cache, examples: np.ndarray, max_length: int, cls: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens uint8 (T,), positions int32 (T,) and cu_seqlens int64 (S + 1)."""
    sequences = (examples[:, None] * cache.documents + np.arange(cache.documents)).reshape(-1)
    starts = cache.offsets[sequences]
    kept = np.minimum(cache.offsets[sequences + 1] - starts, max_length)
    lengths = kept + cls
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    num_tokens = int(cu_seqlens[-1])
    tokens = np.zeros(num_tokens, np.uint8)
    flat = cache.tokens
    for start, size, at in zip(starts.tolist(), kept.tolist(), cu_seqlens[:-1].tolist(), strict=True):
        tokens[at : at + size] = flat[start : start + size]
    positions = np.arange(num_tokens, dtype=np.int32)
    positions -= np.repeat(cu_seqlens[:-1].astype(np.int32), lengths)
    if cls:
        positions[cu_seqlens[1:] - 1] = max_length
    return tokens, positions, cu_seqlens


def _int32(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int32))


def _longest(bounds: np.ndarray) -> int:
    return int(np.diff(bounds).max(initial=0))


class TrainBatches:
    """The training batches of one rank: `at(step)` is a pure function of (seed, step).

    `batch_size` is the whole batch of an optimizer step. Each rank takes a consecutive piece of it and each
    micro-batch a consecutive piece of that; the last, incomplete batch of an epoch is left out. `rounding` gives the
    packed buffers one of few sizes (`rounded`). `shuffle` is the task's (tasks/registry.py).
    """

    def __init__(
        self,
        cache: Cache,
        indices: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        max_length: int,
        cls: bool = False,
        black_pixels: BlackPixels = "token",
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        rounding: bool = False,
        shuffle: Callable[[np.ndarray, np.ndarray, int], None] | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % (world * accumulate):
            raise ConfigError(
                f"A batch of {batch_size} cannot be split over {world} processes and {accumulate} micro-batches.",
                "Choose a batch_size that is a multiple of their product.",
            )
        if len(indices) < batch_size:
            raise ConfigError(
                f"The training set has {len(indices):,} examples, fewer than one batch of {batch_size:,}.",
                "Choose a smaller batch_size or prepare more data.",
            )
        self.cache, self.indices = cache, np.asarray(indices, np.int64)
        self.batch_size, self.seed, self.max_length = batch_size, seed, max_length
        self.cls, self.black_pixels = cls, black_pixels
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.rounding, self.shuffle = rounding, shuffle
        self.steps_per_epoch = len(indices) // batch_size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def examples(self, step: int) -> np.ndarray:
        """Return the cache indices of the whole batch of `step`, all ranks together."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.epoch(epoch)
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def epoch(self, number: int) -> np.ndarray:
        """Return the cache indices in the order in which an epoch visits them, int64 (N,)."""
        return self.indices[order(len(self.indices), self.seed, number)]

    def at(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of optimizer step `step` (counted from 0)."""
        pieces = np.split(self.examples(step), self.world * self.accumulate)
        own = pieces[self.rank * self.accumulate : (self.rank + 1) * self.accumulate]
        batches = [
            collate(self.cache, piece, max_length=self.max_length, cls=self.cls, black_pixels=self.black_pixels)
            for piece in own
        ]
        if self.shuffle is not None:
            for number, batch in enumerate(batches):
                ends = batch.cu_seqlens.numpy().astype(np.int64)
                bounds = np.stack([ends[:-1], ends[1:] - self.cls], axis=1)
                place = self.rank * self.accumulate + number
                # A step's batch is cut into pieces: each has a seed of its own.
                seed = torch_seed(self.seed, "shuffle", step, place, self.world * self.accumulate)
                self.shuffle(batch.tokens_T.numpy(), bounds, seed)
        return [rounded(b, self.max_length + self.cls) for b in batches] if self.rounding else batches

    def starting(self, step: int) -> Iterator[list[Batch]]:
        """Yield at(step), at(step + 1), ... without end."""
        while True:
            yield self.at(step)
            step += 1


class EvalBatches:
    """Batches in index order, the last one incomplete; rank r of w takes batches r, r + w, ...

    Yields (cache indices int64, Batch). Every example is in exactly one rank's batches.
    """

    def __init__(
        self,
        cache: Cache,
        indices: np.ndarray,
        *,
        batch_size: int,
        max_length: int,
        cls: bool = False,
        black_pixels: BlackPixels = "token",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}.", "It must be at least 1.")
        self.cache, self.indices = cache, np.asarray(indices, np.int64)
        self.batch_size, self.max_length = batch_size, max_length
        self.cls, self.black_pixels = cls, black_pixels
        self._starts = range(rank * batch_size, len(indices), world * batch_size)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Batch]]:
        for start in self._starts:
            chosen = self.indices[start : start + self.batch_size]
            yield (
                chosen,
                collate(
                    self.cache,
                    chosen,
                    max_length=self.max_length,
                    cls=self.cls,
                    black_pixels=self.black_pixels,
                ),
            )
