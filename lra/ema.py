"""Exponential moving average of the weights: what is evaluated when a recipe sets train.ema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Keeps average <- decay * average + (1 - decay) * weight for every trainable parameter.

    Early on the decay is at most (1 + t) / (10 + t) after t updates, so that the average leaves the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        # On the device, so that a recorded step (CUDA graph) finds the weight of its own time here.
        self.weight = torch.zeros((), device=next(iter(self.average.values())).device)

    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights; call after each optimizer step."""
        self.advance()
        self.move(model)

    def advance(self) -> None:
        """Count an update: the part that the host does."""
        self.num_updates += 1
        self.weight.fill_(1.0 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)))

    @torch.no_grad()
    def move(self, model: nn.Module, alive: Tensor | None = None) -> None:
        """Move the average: the part that the device does. `alive` (a scalar, 1 or 0) lets it stay where it is."""
        weights, averages = dict(model.named_parameters()), list(self.average.values())
        steps = torch._foreach_sub([weights[name] for name in self.average], averages)
        torch._foreach_mul_(steps, self.weight if alive is None else self.weight * alive)
        torch._foreach_add_(averages, steps)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Put the average into the model for the length of a `with`, then the weights back."""
        weights = dict(model.named_parameters())
        kept = {name: weights[name].detach().clone() for name in self.average}
        self._fill(weights, self.average)
        try:
            yield
        finally:
            self._fill(weights, kept)

    @staticmethod
    @torch.no_grad()
    def _fill(weights: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            weights[name].copy_(value)
