"""An estimate of a run's peak memory before it starts, so that what cannot fit is refused with a number."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lra.base.errors import MemoryShortError
from lra.config import RunConfig
from tasks.registry import get

# Copies of the L x L scores that standard attention keeps for its backward or holds at once: scores, softmax and its
# gradient; with dropout the kept mask and the dropped probabilities come on top.
SCORE_COPIES, SCORE_COPIES_DROPOUT = 3, 5
# Vectors of the model width that a layer keeps for its backward: two norms and their inputs in fp32, the residual
# stream, dropout; the attention and MLP widths are counted apart.
WIDTH_COPIES = 8


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device."""

    parameters: int
    """Weights, gradients, two optimizer moments and the EMA, in fp32."""
    activations: int
    scores: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.parameters + self.activations + self.scores

    def __str__(self) -> str:
        parts = f"weights and optimizer {self.parameters / 2**30:.2f}, activations {self.activations / 2**30:.2f}"
        return f"{self.total / 2**30:.2f} GiB ({parts}, attention scores {self.scores / 2**30:.2f})"


def estimate(config: RunConfig, num_parameters: int, world_size: int = 1) -> Estimate:
    """Estimate the peak of a training step with every sequence at its full length (or at the most tokens it keeps)."""
    model, train = config.model, config.train
    sequences = get(config.task.name).documents * train.batch_size // train.accumulate // world_size
    length = min(max(config.data.keep_tokens, default=config.max_length), config.max_length)
    length += int(model.pooling == "cls")
    activations = sequences * length * (model.depth * row_bytes(config) + 4 * 4 * model.width)
    if train.denoise is not None:
        # Guesses over 256 bytes for every row, in float32 and in the training's precision, and their gradients.
        activations += sequences * length * 256 * 2 * (4 + element_bytes(config))
    scores = 0
    if config.attention.backend == "standard":
        copies = SCORE_COPIES_DROPOUT if model.attention_dropout else SCORE_COPIES
        # The backward keeps the probabilities (and mask) of every layer; the others live in one layer at a time.
        kept = copies - 2
        scores = sequences * model.num_heads * length**2 * element_bytes(config) * (kept * model.depth + 2)
        if config.data.keep_tokens:
            examples = train.eval_batch_size or max(train.batch_size // train.accumulate, 1)
            scores = max(scores, evaluation_scores(config, -(-examples // world_size)))
    return Estimate(num_parameters * 4 * (5 if train.ema else 4), activations, scores)


def element_bytes(config: RunConfig) -> int:
    """Return the bytes of a number in the training's precision."""
    return 4 if config.train.precision == "fp32" else 2


def row_bytes(config: RunConfig) -> int:
    """Return what a layer holds for one token."""
    model = config.model
    return WIDTH_COPIES * 4 * model.width + element_bytes(config) * (5 * model.attention_width + 3 * model.mlp_width)


def evaluation_estimate(config: RunConfig, num_parameters: int, examples: int) -> Estimate:
    """Estimate the peak of an evaluation with batches of so many whole examples: one layer at a time, no gradients."""
    rows = get(config.task.name).documents * examples * (config.max_length + int(config.model.pooling == "cls"))
    scores = evaluation_scores(config, examples) if config.attention.backend == "standard" else 0
    return Estimate(num_parameters * 4, rows * (row_bytes(config) + 4 * 4 * config.model.width), scores)


def evaluation_scores(config: RunConfig, examples: int) -> int:
    """Return the bytes of the scores that standard attention holds at once in an evaluation of whole examples."""
    sequences = get(config.task.name).documents * examples
    return 2 * sequences * config.model.num_heads * config.max_length**2 * element_bytes(config)


def available_bytes(device: torch.device) -> int:
    """Return the memory that a run can have: the GPU's, or the host's (its control group's limit if lower)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as f:
                host = min(host, int(f.read()))
        except (OSError, ValueError):
            continue
    return host


def check_fits(config: RunConfig, num_parameters: int, device: torch.device, world_size: int = 1) -> Estimate:
    """Return the estimate of training, or raise MemoryShortError with the numbers and the largest batch that fits."""
    train = config.train

    def remedy(fits: int) -> str:
        accumulate = next(a for a in range(1, train.batch_size + 1) if train.batch_size // a <= fits)
        while train.batch_size % accumulate:
            accumulate += 1
        return f"About {fits} examples fit at once: set train.accumulate={accumulate * 1}."

    micro_batch = train.batch_size // train.accumulate // world_size
    return fitting(config, config.task.name, estimate(config, num_parameters, world_size), device, micro_batch, remedy)


def check_evaluation_fits(config: RunConfig, num_parameters: int, device: torch.device, examples: int) -> Estimate:
    """Return the estimate for batches of `examples`, or raise MemoryShortError with the largest batch that fits."""

    def remedy(fits: int) -> str:
        return f"Set train.eval_batch_size={fits} or less."

    what = f"Testing {config.task.name}, {examples} examples at once,"
    return fitting(config, what, evaluation_estimate(config, num_parameters, examples), device, examples, remedy)


def fitting(
    config: RunConfig,
    what: str,
    needed: Estimate,
    device: torch.device,
    examples: int,
    remedy: Callable[[int], str],
) -> Estimate:
    """Return `needed`, an estimate for so many examples at once, or raise MemoryShortError.

    `remedy` says what to do where so many examples fit.
    """
    available = available_bytes(device)
    if needed.total <= available:
        return needed
    fits = int(examples * (available - needed.parameters) / max(needed.total - needed.parameters, 1))
    raise MemoryShortError(
        f"{what} with attention={config.attention.backend} needs about {needed}, and "
        f"{available / 2**30:.1f} GiB are there.",
        remedy(fits)
        if fits >= 1
        else "Not one example fits: use attention=flash, whose memory grows with the length and not its square.",
    )
