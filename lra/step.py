"""One optimizer step: forward, backward, clipping, update; and the guard that keeps a NaN out of the weights.

Where the device can hold the update back by itself (`learner.gate`), the host never waits: it reads a step's loss and
gradient norm some steps later. A step that was not finite closes the gate for good, so that whenever the host learns of
it, weights, moments and averages are still those before it. Elsewhere the host reads the numbers before the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lra.base.errors import NonFiniteLossError
from lra.base.files import write_json_atomic
from lra.base.seeds import torch_seed
from lra.config import RunConfig
from lra.distributed import World
from lra.evaluate import autocast
from lra.learner import Gate, Learner
from lra.optim import learning_rate, set_learning_rate
from lra.run_dir import RunDir
from tasks.batches import Batch

MAX_FP16_OVERFLOWS = 50


@dataclass
class Numbers:
    """Loss and gradient norm of one step, perhaps still on their way to the host."""

    step: int
    """The step that they are of, counted from 0."""
    micro_batches: list[Batch]
    values: Tensor
    arrived: torch.cuda.Event | None
    """None: they are there, and were checked before the update."""

    def read(self) -> tuple[float, float]:
        """Return mean loss over all processes and global gradient norm; waits until they have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, grad_norm = self.values.tolist()
        return loss, grad_norm


def update(learner: Learner, config: RunConfig, micro_batches: list[Batch], world: World, run: RunDir) -> Numbers:
    """Do one optimizer step; return its numbers.

    The generator of dropout is seeded by (seed, step, rank): a step's randomness does not depend on how the run
    came to it, so a resumed run repeats the undisturbed one bit by bit.
    """
    torch.manual_seed(torch_seed(config.seed, "step", learner.step, world.rank))
    set_learning_rate(learner.optimizer, learning_rate(learner.step, config.train))
    learner.objective.begin(learner.step)
    if learner.gate is None:
        values = update_after_reading(learner, config, micro_batches, world, run)
        numbers = Numbers(learner.step, micro_batches, values, None)
    else:
        values = update_through_gate(learner, learner.gate, config, micro_batches, world)
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()
        numbers = Numbers(learner.step, micro_batches, values, arrived)
    learner.step += 1
    return numbers


def update_after_reading(
    learner: Learner, config: RunConfig, micro_batches: list[Batch], world: World, run: RunDir
) -> Tensor:
    """Update once the host has found loss and gradient norm finite; return both."""
    total_loss = add_gradients(learner, config, micro_batches, world)
    learner.scaler.unscale_(learner.optimizer)
    values = clip(learner, config, total_loss, world).cpu()
    loss, grad_norm = values.tolist()
    check_finite(learner, config, loss, grad_norm, run, world)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.ema is not None:
        learner.ema.update(learner.model)
    return values


def update_through_gate(
    learner: Learner, gate: Gate, config: RunConfig, micro_batches: list[Batch], world: World
) -> Tensor:
    """Update where the device finds loss and gradient norm finite; return both, on their way to pinned memory."""
    if learner.ema is not None:
        learner.ema.advance()
    work = partial(gated_work, learner, gate, config, world)
    if learner.graphs is not None:
        learner.graphs.run(micro_batches[0], work)
    else:
        work([batch.to(world.device) for batch in micro_batches])
    return torch.empty(2, pin_memory=True).copy_(gate.numbers, non_blocking=True)


def gated_work(learner: Learner, gate: Gate, config: RunConfig, world: World, micro_batches: list[Batch]) -> None:
    """Do everything of a step that the device does; nothing here waits for it, so CUDA graphs can record it."""
    learner.optimizer.zero_grad(set_to_none=True)
    total_loss = add_gradients(learner, config, micro_batches, world)
    gate.numbers.copy_(clip(learner, config, total_loss, world))
    gate.alive.mul_(gate.numbers.isfinite().all())
    # Fused optimizers do nothing, and count no step, where found_inf is 1: the protocol of torch's GradScaler.
    optimizer: Any = learner.optimizer
    optimizer.found_inf = 1.0 - gate.alive
    optimizer.step()
    if learner.ema is not None:
        learner.ema.move(learner.model, gate.alive)


def add_gradients(learner: Learner, config: RunConfig, micro_batches: list[Batch], world: World) -> Tensor:
    """Run forward and backward of all micro-batches; return this process's mean loss, a scalar on the device."""
    total_loss = torch.zeros((), device=world.device)
    for i, batch in enumerate(micro_batches):
        batch = batch.to(world.device)
        with sync_gradients(learner.forward, i == len(micro_batches) - 1):
            with autocast(config, world.device):
                loss = learner.forward(batch) / len(micro_batches)
            learner.scaler.scale(loss).backward()
        total_loss += loss.detach()
    return total_loss


def clip(learner: Learner, config: RunConfig, total_loss: Tensor, world: World) -> Tensor:
    """Clip the gradients; return loss and gradient norm before clipping, means over the processes.

    They are summed over the processes, so that all judge the same numbers and a NaN in one of them stops all.
    """
    limit = config.train.clip_norm or math.inf
    grad_norm = nn.utils.clip_grad_norm_(learner.model.parameters(), limit)
    return world.sum(torch.stack((total_loss, grad_norm))) / world.size


def sync_gradients(forward: Callable[[Batch], Tensor], last: bool) -> Any:
    """Context of a micro-batch: under data parallelism only the last one exchanges gradients."""
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return nullcontext()


def check_arrived(
    learner: Learner, config: RunConfig, numbers: Numbers, world: World, run: RunDir
) -> tuple[float, float]:
    """Return a step's loss and gradient norm; raise NonFiniteLossError if the device held its update back.

    The learner is then set back to that step, whose weights it still has, and its gradients are computed once more for
    the report: the steps behind it have overwritten them.
    """
    loss, grad_norm = numbers.read()
    if numbers.arrived is None or (math.isfinite(loss) and math.isfinite(grad_norm)):
        return loss, grad_norm
    learner.step = numbers.step
    if learner.ema is not None:
        learner.ema.num_updates = min(learner.ema.num_updates, numbers.step)
    torch.manual_seed(torch_seed(config.seed, "step", learner.step, world.rank))
    learner.objective.begin(learner.step)
    learner.optimizer.zero_grad(set_to_none=True)
    add_gradients(learner, config, numbers.micro_batches, world)
    check_finite(learner, config, loss, grad_norm, run, world)
    return loss, grad_norm


def check_finite(learner: Learner, config: RunConfig, loss: float, grad_norm: float, run: RunDir, world: World) -> None:
    """Raise NonFiniteLossError before the update if loss or gradient is NaN or infinite; write what is known.

    Under fp16 an infinite gradient is the loss scale's normal search: the scaler skips that step. Fifty in a row,
    or a loss that is itself not finite, are failures.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        learner.overflows = 0
        return
    if learner.scaler.is_enabled() and math.isfinite(loss) and learner.overflows < MAX_FP16_OVERFLOWS:
        learner.overflows += 1
        return
    if world.is_main:
        write_json_atomic(run.path / "nonfinite.json", nonfinite_report(learner, config, loss, grad_norm))
    raise NonFiniteLossError(
        f"At step {learner.step:,} the loss was {loss} and the gradient norm {grad_norm}; no update was made.",
        f"Lower train.learning_rate or set train.clip_norm; {run.path / 'nonfinite.json'} has the largest values.",
    )


def nonfinite_report(learner: Learner, config: RunConfig, loss: float, grad_norm: float) -> dict[str, Any]:
    """Return what a search for the cause needs; numbers are text, since JSON has no NaN.

    (seed, step) give the batch (TrainBatches.examples) and the dropout masks again.
    """
    parameters = dict(learner.model.named_parameters())
    return {
        "step": learner.step,
        "seed": config.seed,
        "loss": repr(loss),
        "grad_norm": repr(grad_norm),
        "largest_gradients": {n: largest(p.grad) for n, p in parameters.items() if p.grad is not None},
        "largest_weights": {n: largest(p.detach()) for n, p in parameters.items()},
    }


def largest(values: Tensor) -> str:
    """Return the largest absolute value as text."""
    return repr(float(values.abs().max()))
