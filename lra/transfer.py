"""A run that begins with another run's weights: which checkpoint, whether it fits, positions brought to a new grid."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lra import checkpoint as checkpoints
from lra.base.errors import ConfigError, RunError
from lra.config import RunConfig
from lra.run_dir import RunDir
from tasks.registry import get

TABLE, DENOISER = "table.table", "denoiser."
# What two models must share for the weights of one to mean the same in the other.
SHARED = [
    *(
        "depth",
        "width",
        "attention_width",
        "num_heads",
        "mlp_width",
        "positions",
        "pooling",
        "norm",
        "qk_norm",
        "key_weights",
    ),
    *("attention_bias", "input", "vocab_size", "head_widths", "pair_features"),
]


def misfits(old: RunConfig, new: RunConfig) -> list[str]:
    """Name what keeps a model of `new` from beginning with the weights of one of `old`; empty if nothing does."""
    fields = [*SHARED, "rotary_base"] if "rotary" in new.model.positions else SHARED
    found = [
        f"model.{field}: {getattr(old.model, field)} -> {getattr(new.model, field)}"
        for field in fields
        if getattr(old.model, field) != getattr(new.model, field)
    ]
    before, after = get(old.task.name), get(new.task.name)
    if before.num_classes != after.num_classes or before.documents != after.documents:
        found.append(f"classes of {before.name} and {after.name}")
    if new.model.positions != "learned" or found:
        return found
    if old.padded_length == new.padded_length:
        return []
    for task, config in ((before, old), (after, new)):
        if task.grid is None or config.padded_length != task.grid[0] * task.grid[1]:
            return [f"a table of {config.padded_length} positions, which are not the pixels of {task.name}"]
    assert before.grid is not None and after.grid is not None
    if any(now % then for then, now in zip(before.grid, after.grid, strict=True)):
        found.append(f"resolution: {before.grid} -> {after.grid} is no whole multiple")
    return found


def begin_with(model: nn.Module, folder: Path, config: RunConfig) -> None:
    """Fill a fresh model with the tested (averaged) weights of the run in `folder`.

    Raises ConfigError naming what does not fit, RunError if there is no run or no readable checkpoint.
    """
    source = RunDir(folder)
    old = source.config()
    wrong = misfits(old, config)
    if wrong:
        raise ConfigError(
            f"The weights of {folder} do not fit this model ({'; '.join(wrong)}).",
            "Give both the same model, or another train.start_from.",
        )
    saved = checkpoint_of(source, old.train.checkpoint_choice)
    weights = tested_weights(saved)
    before, after = get(old.task.name).grid, get(config.task.name).grid
    if TABLE in weights and before is not None and after is not None and before != after:
        weights[TABLE] = duplicated(weights[TABLE], before, after)
    # Guessing hidden tokens is a matter of training: a stage that does it need not come before another that does.
    own = {n: value for n, value in model.state_dict().items() if n.startswith(DENOISER)}
    model.load_state_dict(own | {n: v for n, v in weights.items() if n in own or not n.startswith(DENOISER)})


def tested_weights(saved: checkpoints.Checkpoint) -> dict[str, Tensor]:
    """Return the model's weights of a checkpoint, averaged ones where it has them."""
    weights = {n.removeprefix("model."): value for n, value in saved.tensors.items() if n.startswith("model.")}
    return weights | {n.removeprefix("ema."): value for n, value in saved.tensors.items() if n.startswith("ema.")}


def duplicated(table_PE: Tensor, before: tuple[int, int], after: tuple[int, int]) -> Tensor:
    """Return a position table for a finer grid: each place's vector stands in all places that it is cut into.

    FlashAttention's grid-wise duplication (its appendix E.3). Rows past the grid, such as a CLS row, stay as they are.
    """
    rows, columns = before
    down, across = after[0] // rows, after[1] // columns
    grid = table_PE[: rows * columns].view(rows, columns, -1)
    fine = grid.repeat_interleave(down, 0).repeat_interleave(across, 1)
    return torch.cat((fine.flatten(0, 1), table_PE[rows * columns :]))


def checkpoint_of(run: RunDir, which: str) -> checkpoints.Checkpoint:
    """Read the `last` or the `best_val` checkpoint of a run. Raises RunError if it has none."""
    last = checkpoints.load_newest(run.checkpoints)
    if last is None:
        raise RunError(f"The run {run.path} has no checkpoint.", "Train it first.")
    best = last.state["best"]
    if which == "best_val" and best is None:
        raise RunError(f"The run {run.path} has not been validated yet.", "Add --checkpoint last.")
    if which == "last" or best["step"] == last.step:
        return last
    return checkpoints.load(saved_weights(run, best["step"]))


def saved_weights(run: RunDir, step: int) -> Path:
    """Return the checkpoint folder of a step. Raises RunError if it is gone."""
    path = checkpoints.step_dir(run.checkpoints, step)
    if not path.is_dir():
        raise RunError(f"The checkpoint of step {step:,} is not in {run.checkpoints}.", "Test the last one instead.")
    return path
