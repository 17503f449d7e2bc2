"""Training: one linear loop, read top to bottom. It names no task and no backend."""

from __future__ import annotations

from collections import deque

from lra.base.console import progress
from lra.base.errors import Stopped
from lra.config import RunConfig
from lra.distributed import World
from lra.evaluate import evaluate
from lra.feed import Data, batch_feed, make_batches
from lra.learner import Best, Learner, make_learner, restore, save
from lra.preempt import StopRequest
from lra.run_dir import RunDir
from lra.step import Numbers, check_arrived, update
from lra.train_log import Logger, StartUp

# Steps that the GPU may be behind the host: enough that neither waits for the other.
MAX_UNREAD = 3
# Processes that share a run ask one another so often, on GPUs, whether to stop: each time all wait for all.
STOP_EVERY = 16


def train(config: RunConfig, data: Data, run: RunDir, world: World, stop: StopRequest) -> Learner:
    """Train until `config.train.steps`, from the newest checkpoint if there is one.

    Raises Stopped after a checkpoint when `stop` asks for it, NonFiniteLossError with the weights as they were before
    the update that would have used a NaN, DiskFullError with the last checkpoint intact.
    """
    start_up = StartUp()
    learner = make_learner(config, world)
    restore(learner, config, run, world)
    start_up.model_is_there(learner)
    batches = make_batches(config, data, world)
    feed = batch_feed(batches, learner.step, config.train.steps, world.device)
    logger = Logger(config, run, world, learner)
    pause = None
    try:
        with progress(config.train.steps, f"train {config.run_name}", "steps", learner.step) as bar:
            unread: deque[Numbers] = deque()

            def read(keep: int) -> None:
                """Take in the numbers of every step but the newest `keep`."""
                while len(unread) > keep:
                    numbers = unread.popleft()
                    with learner.watch.measure("train"):
                        loss, grad_norm = check_arrived(learner, config, numbers, world, run)
                    logger.after_step(numbers.step + 1, loss, grad_norm, numbers.micro_batches)
                    bar.advance(1, f"loss {loss:.4f}")
                    start_up.after_step(learner, world)

            while True:
                if validation_due(learner, config):
                    read(keep=0)
                    validate(learner, config, data, run, world, stop, logger)
                if learner.step == config.train.steps:
                    break
                if stop_asked(learner.step, world, stop):
                    read(keep=0)
                    raise Stopped(f"Stopped at step {learner.step:,} of {config.train.steps:,}: {stop.why}.")
                with learner.watch.measure("train"):
                    with learner.watch.measure("data"):
                        micro_batches = next(feed)
                    unread.append(update(learner, config, micro_batches, world, run))
                read(keep=MAX_UNREAD if learner.gate is not None and start_up.over else 0)
                if learner.step % config.train.checkpoint_every == 0:
                    read(keep=0)
                    save(learner, config, run, world)
    except Stopped as e:
        pause = e
    finally:
        feed.close()
        logger.close()
        start_up.note_compiling(learner)
    save(learner, config, run, world)
    if pause is not None:
        raise Stopped(pause.cause, run.how_to_resume)
    return learner


def stop_asked(step: int, world: World, stop: StopRequest) -> bool:
    """Whether to stop before this step; all processes get the same answer."""
    if world.size > 1 and world.device.type == "cuda" and step % STOP_EVERY:
        return False
    return world.any(stop.reason is not None)


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
            learner.model,
            config,
            data.cache,
            data.splits["val"],
            world,
            stop=stop,
            partial=partial,
            title="validate",
        )
    learner.evaluated_step = learner.step
    # Logged before the checkpoint says that it was validated: a kill in between repeats the line and never loses it.
    logger.after_validation(scores)
    if learner.best is None or scores.accuracy > learner.best.summary["accuracy"]:
        learner.best = Best(learner.step, scores.summary())
        save(learner, config, run, world)
