"""Muon: momentum whose matrices are made orthogonal before the step (Jordan et al. 2024), batched over equal shapes.

torch.optim.Muon computes the same, one matrix at a time; six small layers would spend more time on its launches than on
the model, and it cannot tell the three matrices in a fused q, k, v weight apart. It serves as the oracle of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

# The quintic's coefficients and its number of steps are the author's; singular values end near 1 (0.7 to 1.2).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_STEPS = 5
EPS = 1e-7


def orthogonalized(x_NRC: Tensor) -> Tensor:
    """Return each of N matrices with its singular values moved near 1, by Newton-Schulz steps in bfloat16.

    x_NRC is (N, R, C) of any float dtype with R <= C; the result is bfloat16.
    """
    a, b, c = COEFFICIENTS
    y = x_NRC.bfloat16()
    y = y / y.float().norm(dim=(1, 2), keepdim=True).clamp(min=EPS).bfloat16()
    for _ in range(NUM_STEPS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y


class Muon(Optimizer):
    """W <- (1 - lr wd) W - lr max(1, rows / columns)^0.5 orthogonalized(Nesterov momentum).

    `groups` are (2-D parameters, number of matrices that each holds one below the other). No host synchronisation.
    """

    def __init__(
        self, groups: list[tuple[list[nn.Parameter], int]], *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        common: dict[str, Any] = {"lr": 0.02, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": list(p), "parts": parts} for p, parts in groups if p], common)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; where `found_inf` (a scalar, set by the loop) is 1, none."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            alive: float | Tensor = 1.0
            if found_inf is not None:
                # Zero times NaN is NaN: what is not finite must not reach a sum at all.
                gradients = [torch.where(found_inf > 0, 0.0, gradient) for gradient in gradients]
                alive = 1.0 - found_inf
            momenta = [self._momentum(p) for p in parameters]
            steps = torch._foreach_sub(gradients, momenta)
            torch._foreach_mul_(steps, (1.0 - group["momentum"]) * alive)
            torch._foreach_add_(momenta, steps)
            updates = list(torch._foreach_lerp(gradients, momenta, group["momentum"]))
            rate = group["lr"] * alive
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1.0 - rate * group["weight_decay"])
            _move(parameters, updates, group["parts"], rate)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _move(parameters: list[nn.Parameter], updates: list[Tensor], parts: int, rate: float | Tensor) -> None:
    """Subtract the orthogonalised updates times `rate`, matrices of one shape at once."""
    by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for parameter, update in zip(parameters, updates, strict=True):
        for weight, change in zip(parameter.chunk(parts), update.chunk(parts), strict=True):
            by_shape.setdefault((change.shape[0], change.shape[1]), []).append((weight, change))
    for (rows, columns), pairs in by_shape.items():
        stack = torch.stack([change for _, change in pairs])
        tall = rows > columns
        stack = orthogonalized(stack.mT if tall else stack)
        stack = (stack.mT if tall else stack).to(pairs[0][0].dtype) * (rate * math.sqrt(max(1.0, rows / columns)))
        torch._foreach_sub_([weight for weight, _ in pairs], list(stack.unbind()))


class MuonAdamW(Optimizer):
    """One optimizer for the loop and the checkpoints: Muon's groups behind AdamW's, each stepped by its own rule."""

    def __init__(self, adamw: AdamW, muon: Muon) -> None:
        self.adamw, self.muon = adamw, muon
        # torch's own sign of an optimizer that does nothing where `found_inf` is 1; AdamW's fused form does.
        self._step_supports_amp_scaling = bool(adamw.defaults["fused"])
        if isinstance(adamw.defaults["lr"], Tensor):
            # Rates in memory can change under a recorded step (CUDA graph).
            for group in muon.param_groups:
                group["lr"] = torch.zeros_like(adamw.defaults["lr"])
        super().__init__([*adamw.param_groups, *muon.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do AdamW's step and Muon's."""
        cut = len(self.adamw.param_groups)
        for part, groups in ((self.adamw, self.param_groups[:cut]), (self.muon, self.param_groups[cut:])):
            # State and groups are this object's: loading a checkpoint replaces them.
            part.param_groups, part.state = groups, self.state
            setattr(part, "found_inf", getattr(self, "found_inf", None))  # noqa: B010
            part.step()
