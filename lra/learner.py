"""Everything that an optimizer step changes, and its way into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lra import checkpoint as checkpoints
from lra.attention import backend_class
from lra.base.console import info, warn
from lra.base.errors import ConfigError, RunError
from lra.base.seeds import torch_seed
from lra.compiling import compile_parts, start_compiler_workers
from lra.config import RunConfig
from lra.distributed import World
from lra.ema import Ema
from lra.graphs import Graphs
from lra.memory import available_bytes, estimate
from lra.model import Classifier, num_parameters
from lra.objective import Objective
from lra.optim import make_optimizer
from lra.recipes import fingerprint
from lra.run_dir import RunDir, Stopwatch
from lra.transfer import begin_with
from tasks.batches import Batch

# In the name of every weight that belongs to an attention backend (Linformer's projections, Performer's features).
_OF_ATTENTION = ".attention.backend."
# Fewer steps than these do not win back the half minute that torch.compile takes.
COMPILE_FROM_STEPS = 1000


@dataclass
class Best:
    """The best validation so far."""

    step: int
    summary: dict[str, Any]


@dataclass
class Window:
    """What was collected since the last line of metrics.jsonl; kept in checkpoints, so that a resumed line is whole."""

    losses: list[float] = field(default_factory=list)
    num_examples: int = 0
    num_tokens: int = 0
    start_s: float = 0.0
    num_stuck: int = 0
    stuck_steps: int = 0
    """Steps in a row whose windows lay in the band of train.restart."""


class Gate:
    """Holds updates back on the device, for good from the first step on that is not finite.

    `alive` float32 (): 1, or 0 from then on. `numbers` float32 (2,): loss and gradient norm of the newest step.
    """

    def __init__(self, device: torch.device) -> None:
        self.alive = torch.ones((), device=device)
        self.numbers = torch.zeros(2, device=device)


@dataclass
class Learner:
    """Everything that one optimizer step changes, and how far it is."""

    model: Classifier
    objective: Objective
    forward: Callable[[Batch], Tensor]
    """The objective, perhaps replicated: the loss of a batch."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    gate: Gate | None = None
    """None: the host reads every step's numbers before the update."""
    graphs: Graphs | None = None
    step: int = 0
    evaluated_step: int = 0
    best: Best | None = None
    num_resumed: int = 0
    overflows: int = 0
    window: Window = field(default_factory=Window)
    watch: Stopwatch = field(default_factory=Stopwatch)
    saved: tuple[int, int] | None = None
    """Step and evaluated step of the newest checkpoint: saving the same again would change nothing."""

    def evaluated_weights(self) -> Any:
        """Context in which the model holds the weights that are evaluated: the average, if there is one."""
        return nullcontext() if self.ema is None else self.ema.swapped_in(self.model)


def make_learner(config: RunConfig, world: World) -> Learner:
    """Build model, optimizer and the rest on this process's device, with the weights of `config.seed`."""
    compiles, attention = wants_compile(config, world.device), backend_class(config.attention.backend)
    dropout = config.model.attention_dropout > 0
    attention.prepare(config.attention, like_q(config, world.device), dropout=dropout)
    if compiles and world.device.type == "cuda":
        start_compiler_workers()
    torch.manual_seed(torch_seed(config.seed, "weights"))
    model = Classifier(config).to(world.device)
    if config.train.start_from is not None:
        begin_with(model, Path(config.train.start_from), config)
    objective = Objective(model, config.train).to(world.device)
    wrapped: nn.Module = objective
    if world.size > 1:
        wrapped = DistributedDataParallel(objective, device_ids=[world.device] if world.device.type == "cuda" else None)
    if compiles:
        compile_parts(objective, attention.static, whole_vary=len(config.data.keep_tokens) > 1)
    if compiles and config.train.deterministic:
        # Newer compilers measure which of several forms is quickest; another choice has other bits.
        from torch._inductor import config as inductor

        inductor.deterministic = True
    learner = Learner(
        model=model,
        objective=objective,
        forward=wrapped,
        optimizer=make_optimizer(model, config.train),
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.train.precision == "fp16"),
        ema=None if config.train.ema is None else Ema(model, config.train.ema),
        watch=Stopwatch(processes=world.size),
    )
    # The attribute is torch's own sign of an optimizer that honours found_inf.
    holds_back = getattr(learner.optimizer, "_step_supports_amp_scaling", False)
    if world.device.type == "cuda" and holds_back and not learner.scaler.is_enabled():
        learner.gate = Gate(world.device)
    if config.train.cuda_graph != "off":
        reason = why_no_graphs(learner, config, world)
        if reason is None:
            learner.graphs = Graphs(world.device, demanded=config.train.cuda_graph == "on")
        elif config.train.cuda_graph == "on":
            raise ConfigError(
                f"Training steps cannot be recorded as CUDA graphs: {reason}.", "Set train.cuda_graph=auto."
            )
    return learner


def wants_compile(config: RunConfig, device: torch.device) -> bool:
    """Whether the recipe's `train.compile` means compilation on this device."""
    train = config.train
    if train.compile != "auto":
        return train.compile
    whole = backend_class(config.attention.backend).static
    return device.type == "cuda" and whole and train.steps >= COMPILE_FROM_STEPS


def like_q(config: RunConfig, device: torch.device) -> Tensor:
    """Return a row (1, H, D) as the attention's queries are in dtype, device and head dim."""
    model, dtypes = config.model, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    shape = (1, model.num_heads, -(-model.head_dim // 8) * 8)
    return torch.empty(shape, dtype=dtypes[config.train.precision], device=device)


def why_no_graphs(learner: Learner, config: RunConfig, world: World) -> str | None:
    """Return why whole steps cannot be recorded, in words, or None if they can."""
    train = config.train
    if learner.gate is None:
        return "that needs a GPU, and neither fp16 nor an optimizer that the host must hold back"
    if train.accumulate > 1 or world.size > 1:
        return "train.accumulate and several processes make a step of several parts"
    reason = backend_class(config.attention.backend).why_not_recorded(config.attention, like_q(config, world.device))
    if reason is not None:
        return reason
    # Recordings have memory of their own beside that of steps run plainly.
    needed = 2 * estimate(config, num_parameters(learner.model)).total
    return None if needed <= available_bytes(world.device) else "the GPU has less than twice the estimated memory"


def save(learner: Learner, config: RunConfig, run: RunDir, world: World) -> None:
    """Write a checkpoint of this step unless the newest one says the same; the main process writes, others wait."""
    progress = (learner.step, learner.evaluated_step)
    if learner.saved == progress:
        return
    learner.saved = progress
    if world.is_main:
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in learner.model.state_dict().items()}
        for index, slots in learner.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{slot}": value for slot, value in slots.items()})
        if learner.ema is not None:
            tensors.update({f"ema.{k}": v for k, v in learner.ema.average.items()})
        state = {
            "step": learner.step,
            "fingerprint": fingerprint(config),
            "world_size": world.size,
            "evaluated_step": learner.evaluated_step,
            "best": None if learner.best is None else {"step": learner.best.step, "summary": learner.best.summary},
            "num_resumed": learner.num_resumed,
            "overflows": learner.overflows,
            "window": asdict(learner.window),
            "ema_updates": 0 if learner.ema is None else learner.ema.num_updates,
            "scaler": learner.scaler.state_dict(),
            "seconds": learner.watch.seconds,
        }
        protect = set() if learner.best is None else {learner.best.step}
        run.sync_metrics()
        checkpoints.save(run.checkpoints, learner.step, tensors, state, protect)
    world.barrier()


def restore(learner: Learner, config: RunConfig, run: RunDir, world: World) -> None:
    """Fill a fresh learner from the newest good checkpoint, if there is one, and cut the metrics back to it."""
    # Bad checkpoints are set aside by one process alone; then the others read the one that it took.
    found = checkpoints.load_newest(run.checkpoints) if world.is_main else None
    world.barrier()
    if not world.is_main:
        found = checkpoints.load_newest(run.checkpoints)
    if found is None:
        if world.is_main and run.metrics_path.exists():
            # Killed before its first checkpoint: all of it will be logged again.
            run.truncate_metrics(0, 0)
        return
    state = found.state
    if state["fingerprint"] != fingerprint(config):
        raise RunError(f"The checkpoint {found.path} was made under another config.", "Start a new run with name=.")
    load_tensors(learner, found.tensors)
    learner.step = state["step"]
    learner.evaluated_step = state["evaluated_step"]
    learner.best = known_best(run, state["best"])
    learner.num_resumed = state["num_resumed"] + 1
    learner.overflows = state["overflows"]
    learner.window = Window(**state["window"])
    learner.watch = Stopwatch(state["seconds"], world.size)
    learner.saved = (learner.step, learner.evaluated_step)
    if learner.scaler.is_enabled():
        learner.scaler.load_state_dict(state["scaler"])
    if learner.ema is not None:
        learner.ema.num_updates = state["ema_updates"]
    if world.is_main:
        run.truncate_metrics(learner.step, learner.evaluated_step)
        info(f"Resumed {run.path} at step {learner.step:,}.")
        if state["world_size"] != world.size:
            warn(
                f"The run had {state['world_size']} processes and goes on with {world.size}: the batches are the same, "
                "the dropout masks and the last bits are not."
            )


def known_best(run: RunDir, best: dict[str, Any] | None) -> Best | None:
    """Return the best validation that a checkpoint names, or None if its weights are gone."""
    if best is None or checkpoints.step_dir(run.checkpoints, best["step"]).is_dir():
        return None if best is None else Best(best["step"], best["summary"])
    warn(f"The best checkpoint so far (step {best['step']:,}) is not in {run.checkpoints}; a later one will be chosen.")
    return None


def load_tensors(learner: Learner, tensors: dict[str, Tensor]) -> None:
    """Copy weights, optimizer slots and averages out of a checkpoint's flat mapping."""
    load_weights(learner.model, tensors, averaged=False)
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, slot = rest.partition(".")
            slots.setdefault(int(index), {})[slot] = value
    state = learner.optimizer.state_dict()
    learner.optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})
    if learner.ema is not None:
        for name, average in learner.ema.average.items():
            average.copy_(tensors[f"ema.{name}"])


def load_weights(model: nn.Module, tensors: dict[str, Tensor], *, averaged: bool) -> None:
    """Load a checkpoint's weights; `averaged` takes the moving average where the checkpoint has one.

    Raises RunError where the model's attention has weights that the checkpoint, of another attention, has not.
    """
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if averaged:
        weights.update({n.removeprefix("ema."): v for n, v in tensors.items() if n.startswith("ema.")})
    known = model.state_dict()
    if any(_OF_ATTENTION in name and name not in weights for name in known):
        raise RunError(
            "This attention has weights of its own, and the checkpoint was trained with another one.",
            "Take the attention that the run was trained with, or an exact one.",
        )
    # What another attention learned for itself is of no use to this one.
    model.load_state_dict({n: value for n, value in weights.items() if n in known or _OF_ATTENTION not in n})
