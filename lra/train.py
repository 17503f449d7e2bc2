"""Training: one linear loop, read top to bottom. It names no task and no backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lra.base.console import progress
from lra.base.errors import NonFiniteLossError, Stopped
from lra.base.files import write_json_atomic
from lra.base.seeds import torch_seed
from lra.config import RunConfig
from lra.distributed import World
from lra.evaluate import autocast, evaluate
from lra.feed import Data, batch_feed, make_batches
from lra.learner import Best, Learner, make_learner, restore, save
from lra.optim import learning_rate, set_learning_rate
from lra.preempt import StopRequest
from lra.run_dir import RunDir
from lra.train_log import Logger
from tasks.batches import Batch

MAX_FP16_OVERFLOWS = 50


def train(config: RunConfig, data: Data, run: RunDir, world: World, stop: StopRequest) -> Learner:
    """Train until `config.train.steps`, from the newest checkpoint if there is one.

    Raises Stopped after a checkpoint when `stop` asks for it, NonFiniteLossError before the update that would have
    used a NaN, DiskFullError with the last checkpoint intact.
    """
    learner = make_learner(config, world)
    restore(learner, config, run, world)
    batches = make_batches(config, data, world)
    feed = batch_feed(batches, learner.step, config.train.steps)
    logger = Logger(config, run, world, learner)
    pause = None
    try:
        with progress(config.train.steps, f"train {config.run_name}", "steps", learner.step) as bar:
            while True:
                if validation_due(learner, config):
                    validate(learner, config, data, run, world, stop, logger)
                if learner.step == config.train.steps:
                    break
                if world.any(stop.reason is not None):
                    raise Stopped(f"Stopped at step {learner.step:,} of {config.train.steps:,}: {stop.why}.")
                micro_batches = next(feed)
                with learner.watch.measure("train"):
                    loss, grad_norm = update(learner, config, micro_batches, world, run)
                logger.after_step(loss, grad_norm, micro_batches)
                bar.advance(1, f"loss {loss:.4f}")
                if learner.step % config.train.checkpoint_every == 0:
                    save(learner, config, run, world)
    except Stopped as e:
        pause = e
    finally:
        feed.close()
        logger.close()
    save(learner, config, run, world)
    if pause is not None:
        raise Stopped(pause.cause, run.how_to_resume)
    return learner


def update(
    learner: Learner, config: RunConfig, micro_batches: list[Batch], world: World, run: RunDir
) -> tuple[float, float]:
    """Do one optimizer step; return the mean loss over all processes and the global gradient norm.

    The generator of dropout is seeded by (seed, step, rank): a step's randomness does not depend on how the run
    came to it, so a resumed run repeats the undisturbed one bit by bit.
    """
    torch.manual_seed(torch_seed(config.seed, "step", learner.step, world.rank))
    set_learning_rate(learner.optimizer, learning_rate(learner.step, config.train))
    total_loss = torch.zeros((), device=world.device)
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        batch = batch.to(world.device)
        with sync_gradients(learner.forward, last), autocast(config, world.device):
            logits_BC = learner.forward(batch)
            loss = F.cross_entropy(logits_BC, batch.labels_B) / len(micro_batches)
            learner.scaler.scale(loss).backward()
        total_loss += loss.detach()
    learner.scaler.unscale_(learner.optimizer)
    limit = config.train.clip_norm or math.inf
    grad_norm = nn.utils.clip_grad_norm_(learner.model.parameters(), limit)
    # Summed, so that all processes judge the same numbers and a NaN in one of them stops all.
    loss_value, norm_value = (world.sum(torch.stack((total_loss, grad_norm))) / world.size).tolist()
    check_finite(learner, config, loss_value, norm_value, run, world)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.ema is not None:
        learner.ema.update(learner.model)
    learner.step += 1
    return loss_value, norm_value


def sync_gradients(forward: Callable[[Batch], Tensor], last: bool) -> Any:
    """Context of a micro-batch: under data parallelism only the last one exchanges gradients."""
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return nullcontext()


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


def validation_due(learner: Learner, config: RunConfig) -> bool:
    """Whether this step's weights are to be validated and have not been."""
    step = learner.step
    due = step > 0 and (step % config.train.eval_every == 0 or step == config.train.steps)
    return due and learner.evaluated_step != step


def validate(
    learner: Learner, config: RunConfig, data: Data, run: RunDir, world: World, stop: StopRequest, logger: Logger
) -> None:
    """Score the validation split; keep a checkpoint if it is the best so far."""
    partial = run.path / f"partial-val-step{learner.step}.json"
    with learner.watch.measure("eval"), learner.evaluated_weights():
        scores = evaluate(
            learner.model, config, data.cache, data.splits["val"], world, stop=stop, partial=partial, title="validate"
        )
    learner.evaluated_step = learner.step
    # Logged before the checkpoint says that it was validated: a kill in between repeats the line and never loses it.
    logger.after_validation(scores)
    if learner.best is None or scores.accuracy > learner.best.summary["accuracy"]:
        learner.best = Best(learner.step, scores.summary())
        save(learner, config, run, world)
