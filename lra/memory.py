"""An estimate of a run's peak memory before it starts, so that what cannot fit is refused with a number."""

from __future__ import annotations

import os
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
    element = 4 if train.precision == "fp32" else 2
    row = row_bytes(config)
    activations = sequences * length * (model.depth * row + 4 * 4 * model.width)
    if train.denoise is not None:
        # Guesses over 256 bytes for every row, in float32 and in the training's precision, and their gradients.
        activations += sequences * length * 256 * 2 * (4 + element)
    scores = 0
    if config.attention.backend == "standard":
        copies = SCORE_COPIES_DROPOUT if model.attention_dropout else SCORE_COPIES
        # The backward keeps the probabilities (and mask) of every layer; the others live in one layer at a time.
        kept = copies - 2
        scores = sequences * model.num_heads * length**2 * element * (kept * model.depth + 2)
        if config.data.keep_tokens:
            scores = max(scores, evaluation_scores(config, world_size) * element)
    return Estimate(num_parameters * 4 * (5 if train.ema else 4), activations, scores)


def row_bytes(config: RunConfig) -> int:
    """Return what a layer holds for one token."""
    model, element = config.model, 4 if config.train.precision == "fp32" else 2
    return WIDTH_COPIES * 4 * model.width + element * (5 * model.attention_width + 3 * model.mlp_width)


def evaluation_estimate(config: RunConfig, num_parameters: int, examples: int) -> Estimate:
    """Estimate the peak of an evaluation with batches of so many whole examples: one layer at a time, no gradients."""
    model, sequences = config.model, get(config.task.name).documents * examples
    length = config.max_length + int(model.pooling == "cls")
    activations = sequences * length * (row_bytes(config) + 4 * 4 * model.width)
    scores = 0
    if config.attention.backend == "standard":
        scores = 2 * sequences * model.num_heads * length**2 * (4 if config.train.precision == "fp32" else 2)
    return Estimate(num_parameters * 4, activations, scores)


def check_evaluation_fits(config: RunConfig, num_parameters: int, device: torch.device, examples: int) -> Estimate:
    """Return the estimate for batches of `examples`, or raise MemoryShortError with the largest batch that fits."""
    needed, available = evaluation_estimate(config, num_parameters, examples), available_bytes(device)
    if needed.total <= available:
        return needed
    fits = int(examples * (available - needed.parameters) / max(needed.total - needed.parameters, 1))
    remedy = "Not one example fits: use attention=flash, whose memory grows with the length and not its square."
    if fits >= 1:
        remedy = f"Set train.eval_batch_size={fits} or less."
    raise MemoryShortError(
        f"Testing {config.task.name} with attention={config.attention.backend} and {examples} examples at once needs "
        f"about {needed}, and {available / 2**30:.1f} GiB are there.",
        remedy,
    )


def evaluation_scores(config: RunConfig, world_size: int) -> int:
    """Return how many scores an evaluation of whole sequences holds at once where training keeps few tokens."""
    train = config.train
    examples = train.eval_batch_size or max(train.batch_size // train.accumulate, 1)
    sequences = get(config.task.name).documents * -(-examples // world_size)
    return 2 * sequences * config.model.num_heads * config.max_length**2


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
    """Return the estimate, or raise MemoryShortError with the numbers and the largest batch that fits."""
    needed = estimate(config, num_parameters, world_size)
    available = available_bytes(device)
    if needed.total <= available:
        return needed
    micro_batch = config.train.batch_size // config.train.accumulate // world_size
    fits = int(micro_batch * (available - needed.parameters) / max(needed.total - needed.parameters, 1))
    if fits >= 1:
        accumulate = next(a for a in range(1, config.train.batch_size + 1) if config.train.batch_size // a <= fits)
        while config.train.batch_size % accumulate:
            accumulate += 1
        remedy = f"About {fits} examples fit at once: set train.accumulate={accumulate * 1}."
    else:
        remedy = "Not one example fits: use attention=flash, whose memory grows with the length and not its square."
    raise MemoryShortError(
        f"{config.task.name} with attention={config.attention.backend} needs about {needed}, and "
        f"{available / 2**30:.1f} GiB are there.",
        remedy,
    )
