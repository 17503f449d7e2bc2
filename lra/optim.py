"""The optimizer and the published learning-rate schedules, as pure functions of the step."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn

from lra.config import ScheduleConfig, TrainConfig
from lra.muon import Muon, MuonAdamW


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of update number `step`, counted from 0.

    rsqrt: base * min(1, t/W) / sqrt(max(t, W)), base is not the peak (google LRA, train_utils).
    cosine_google: base * min(1, t/W) * (1 + cos(pi * ((t - W)/total mod 1))) / 2; it ends slightly above 0 because
        the divisor is the total, not total - W (google LRA).
    cosine: the same with divisor total - W, ending at 0.
    one_cycle: linear from base/25 to base at step W - 1, then linear to base/250,000 at the last step; torch's
        OneCycleLR without momentum cycling (Nystromformer).
    wsd: base after the warm-up, then linear to 0 over the last `decay` of all steps (warm-up, stable, decay).
    constant: base after a linear warm-up.
    """
    base, schedule, total = config.learning_rate, config.schedule, config.steps
    warm = min(1.0, step / schedule.warmup) if schedule.warmup else 1.0
    match schedule.name:
        case "rsqrt":
            return base * warm / math.sqrt(max(step, schedule.warmup, 1))
        case "cosine_google":
            turn = (max(step - schedule.warmup, 0) / total) % 1.0
            return base * warm * 0.5 * (1.0 + math.cos(math.pi * turn))
        case "cosine":
            turn = max(step - schedule.warmup, 0) / max(total - schedule.warmup, 1)
            return base * warm * 0.5 * (1.0 + math.cos(math.pi * min(turn, 1.0)))
        case "one_cycle":
            return _one_cycle(step, base, schedule, total)
        case "wsd":
            return base * warm * min(1.0, (total - step) / max(schedule.decay * total, 1.0))
        case _:
            return base * warm


def _one_cycle(step: int, base: float, schedule: ScheduleConfig, total: int) -> float:
    start, end = base / 25, base / 25 / 1e4
    top = schedule.warmup - 1
    if step <= top:
        return start + (base - start) * (step / top if top else 1.0)
    return base + (end - base) * min((step - top) / max(total - 1 - top, 1), 1.0)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over all trainable parameters; the loop sets the learning rate before each step.

    `muon` moves the weight matrices of the layers (lra/muon.py) and AdamW everything else: tables, norms, biases, the
    head, and what an approximate attention learns for itself.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [name for name, p in named.items() if config.optimizer == "muon" and is_hidden_matrix(name, p)]
    others = [p for name, p in named.items() if name not in matrices]
    on_gpu = others[0].is_cuda
    # The first steps of a recorded run, and every step of some, are plain ones.
    warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
    adamw = torch.optim.AdamW(
        others,
        # A tensor on the GPU can change under a recorded step (CUDA graph).
        lr=torch.tensor(config.learning_rate, device=others[0].device) if on_gpu else config.learning_rate,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=on_gpu or None,
        capturable=on_gpu,
    )
    if config.optimizer == "adamw":
        return adamw
    adamw.param_groups[0]["rate_factor"] = (config.adamw_learning_rate or config.learning_rate) / config.learning_rate
    # One matrix holds q, k and v: each part is orthogonalised for itself.
    fused = [named[name] for name in matrices if name.endswith(".qkv.weight")]
    whole = [named[name] for name in matrices if not name.endswith(".qkv.weight")]
    muon = Muon([(whole, 1), (fused, 3)], momentum=config.momentum, weight_decay=config.weight_decay)
    return MuonAdamW(adamw, muon)


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight matrix of the encoder's layers, and not one of an approximate attention."""
    return name.startswith("layers.") and parameter.ndim == 2 and ".attention.backend." not in name


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of all parameter groups; a group's own `rate_factor` multiplies it."""
    for group in optimizer.param_groups:
        rate = value * group.get("rate_factor", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
