"""What a chain would do, in words and before it does it: `reproduce --dry-run`. Called by the command."""

from __future__ import annotations

import torch

from lra.chain import Chain
from lra.config import RunConfig
from lra.experiment import build_on_meta
from lra.memory import available_bytes, estimate
from lra.model import num_parameters
from tasks.registry import get


def plan(chain: Chain, device: torch.device) -> str:
    """Return the chain's stages with sizes, tokens, memory on this machine and how one begins where another ends.

    That the stages fit together was checked when the chain was loaded; memory is said for one process.
    """
    lines = [f"{chain.file.name}, {chain.file.track} track, seed {chain.seed}: {chain.folder}"]
    total_images = total_tokens = 0
    for index, config in enumerate(chain.configs):
        tokens = training_tokens(config)
        total_images += config.train.steps * config.train.batch_size
        total_tokens += tokens
        lines += [f"{index + 1}. {config.name}: {get(config.task.name).title}", *stage_lines(chain, index, device)]
    lines.append(f"In all: {total_images:,} images, {total_tokens / 1e9:,.2f} billion tokens. The stages fit together.")
    probe = chain.file.probe
    sets = [f"contour length {n}" for n in probe.contour_lengths] + [f"{n} distractors" for n in probe.distractors]
    if sets:
        lines.append(f"Then tested on {probe.images:,} images each of: {', '.join(sets)}.")
    return "\n".join(lines)


def stage_lines(chain: Chain, index: int, device: torch.device) -> list[str]:
    """Return the lines about one stage."""
    config = chain.configs[index]
    train, whole = config.train, config.max_length
    parameters = num_parameters(build_on_meta(config))
    kept = [n for n in config.data.keep_tokens if n < whole]
    sizes = f"{', '.join(f'{n:,}' for n in sorted(set(kept)))} of {whole:,}" if kept else f"{whole:,}"
    needed, there = estimate(config, parameters), available_bytes(device)
    verdict = "fits" if needed.total <= there else "DOES NOT FIT"
    tested = config.data.limit_eval
    return [
        f"   {begins(chain, index)}; {parameters:,} parameters, attention {config.attention.backend}",
        f"   {train.steps:,} steps of {train.batch_size} images, {sizes} tokens each: "
        f"{training_tokens(config) / 1e9:,.2f} billion tokens",
        f"   test: {whole:,} tokens an image, {f'{tested:,} images' if tested else 'the whole test split'}",
        f"   memory, at most: {needed}; {verdict} in {there / 2**30:.1f} GiB",
    ]


def begins(chain: Chain, index: int) -> str:
    """Say with which weights a stage begins, and what becomes of its positions."""
    if index == 0:
        return "from random weights"
    before, config = chain.configs[index - 1], chain.configs[index]
    text = f"from {before.name}"
    if config.model.positions != "learned" or before.padded_length == config.padded_length:
        return text
    then, now = get(before.task.name).grid, get(config.task.name).grid
    assert then is not None and now is not None
    return f"{text}, learned positions of {then[0]}x{then[1]} duplicated to {now[0]}x{now[1]}"


def training_tokens(config: RunConfig) -> int:
    """Return the tokens that a stage trains on, counting each keep_tokens as drawn equally often."""
    kept = [min(n, config.max_length) for n in config.data.keep_tokens] or [config.max_length]
    return config.train.steps * config.train.batch_size * sum(kept) // len(kept)
