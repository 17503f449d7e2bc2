"""What an optimizer step does to the weights, and what a NaN must not do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lra.base.errors import NonFiniteLossError
from lra.distributed import World
from lra.ema import Ema
from lra.experiment import open_data
from lra.feed import make_batches
from lra.learner import Learner, make_learner
from lra.run_dir import RunDir
from lra.step import MAX_FP16_OVERFLOWS, check_finite, update
from tests.reliability.test_resume import differing, everything
from tests.reliability.tools import ALONE, Server, outcome, tiny_config


def steps(config: Any, num_steps: int, folder: Path) -> tuple[Learner, list[tuple[float, float]]]:
    """Do some optimizer steps; return the learner, and loss and gradient norm of each."""
    learner = make_learner(config, ALONE)
    batches = make_batches(config, open_data(config), ALONE)
    return learner, [update(learner, config, batches.at(i), ALONE, RunDir(folder)).read() for i in range(num_steps)]


POISONS = ["weight-nan", "weight-inf", "loss-nan", "loss-inf", "gradient-nan", "gradient-inf"]


@pytest.mark.parametrize("what", POISONS)
def test_a_poisoned_step_makes_no_update(what: str, server: Server, recipe: Path, tmp_path: Path) -> None:
    child = server.run(
        "train", recipe, f"runs_folder={tmp_path}", "name=run", "train.checkpoint_every=5",
        code=3, faults=(("poison", 10, what),),
    )  # fmt: skip
    run = tmp_path / "run"
    assert "At step 10" in child.text() and "nonfinite.json" in child.text() and "Traceback" not in child.text()
    report = json.loads((run / "nonfinite.json").read_text())
    assert report["step"] == 10 and not (
        math.isfinite(float(report["loss"])) and math.isfinite(float(report["grad_norm"]))
    )
    bad = [n for n, v in report["largest_weights"].items() if not math.isfinite(float(v))]
    assert bad == (["embed.table.weight"] if what.startswith("weight") else [])
    assert not all(math.isfinite(float(v)) for v in report["largest_gradients"].values())
    result = RunDir(run).result()
    assert result is not None and (result["status"], result["step"]) == ("failed", 10)
    # The last checkpoint is that of step 10, before the update; without the fault the run goes on from it.
    server.run("train", "--resume", run)
    assert outcome(run)[2]["status"] == "finished"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_weights_and_optimizer_stay_those_of_the_step_before(what: str, data: Path, tmp_path: Path) -> None:
    config = tiny_config(data)
    learner, _ = steps(config, 3, tmp_path)
    before = everything(learner)
    if what == "gradient":
        next(learner.model.parameters()).register_hook(lambda g: g.index_fill(0, torch.tensor([3]), math.nan))
    else:
        forward = learner.forward
        learner.forward = lambda batch: forward(batch) * math.inf
    batches = make_batches(config, open_data(config), ALONE)
    with pytest.raises(NonFiniteLossError):
        update(learner, config, batches.at(3), ALONE, RunDir(tmp_path))
    assert differing(everything(learner), before) == []
    assert learner.step == 3


def test_fp16_overflows_are_counted_and_fifty_in_a_row_are_an_end(data: Path, tmp_path: Path) -> None:
    learner, _ = steps(tiny_config(data), 1, tmp_path)
    learner.scaler = SimpleNamespace(is_enabled=lambda: True)  # type: ignore[assignment]
    run = RunDir(tmp_path)
    for _ in range(MAX_FP16_OVERFLOWS):
        check_finite(learner, tiny_config(data), 1.0, math.inf, run, ALONE)
    assert learner.overflows == MAX_FP16_OVERFLOWS
    with pytest.raises(NonFiniteLossError):
        check_finite(learner, tiny_config(data), 1.0, math.inf, run, ALONE)
    check_finite(learner, tiny_config(data), 1.0, 1.0, run, ALONE)
    assert learner.overflows == 0
    with pytest.raises(NonFiniteLossError):
        check_finite(learner, tiny_config(data), math.nan, 1.0, run, ALONE)


def test_an_fp16_overflow_skips_the_update_and_halves_the_scale(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data)
    learner, _ = steps(config, 2, tmp_path)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=True)
    batches = make_batches(config, open_data(config), ALONE)
    before = everything(learner)
    hook = next(learner.model.parameters()).register_hook(lambda g: g * math.inf)
    update(learner, config, batches.at(2), ALONE, RunDir(tmp_path))
    moved = differing(everything(learner), before)
    assert [n for n in moved if not n.startswith("ema.")] == []
    assert (learner.step, learner.overflows, learner.scaler.get_scale()) == (3, 1, 2.0)
    hook.remove()
    update(learner, config, batches.at(3), ALONE, RunDir(tmp_path))
    assert learner.overflows == 0 and differing(everything(learner), before) != []


def test_every_step_and_every_process_draws_its_own_masks(data: Path, tmp_path: Path) -> None:
    config, seeds = tiny_config(data), set()
    batches = make_batches(config, open_data(config), ALONE)
    for rank in (0, 1):
        learner = make_learner(config, ALONE)
        for step in range(3):
            update(learner, config, batches.at(step), World(rank, 1, ALONE.device), RunDir(tmp_path))
            seeds.add(torch.initial_seed())
    assert len(seeds) == 6


def test_accumulation_equals_one_big_batch(data: Path, tmp_path: Path) -> None:
    plain = ["model.dropout=0.0", "model.attention_dropout=0.0", "train.clip_norm=null", "train.ema=null"]
    losses = {}
    for accumulate in (1, 2, 4, 8):
        config = tiny_config(data, *plain, f"train.accumulate={accumulate}")
        losses[accumulate] = torch.tensor(steps(config, 10, tmp_path)[1], dtype=torch.float64)
    for accumulate in (2, 4, 8):
        torch.testing.assert_close(losses[accumulate], losses[1], rtol=1e-5, atol=0.0)


def test_clipping_caps_the_gradient_and_reports_the_norm_before(data: Path, tmp_path: Path) -> None:
    taken: list[Tensor] = []

    def watch(learner: Learner) -> None:
        real = learner.optimizer.step

        def step(*arguments: Any) -> Any:
            gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
            taken.append(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]).double()))
            return real(*arguments)

        learner.optimizer.step = step  # type: ignore[method-assign]

    for clip in ("0.01", "null"):
        config = tiny_config(data, f"train.clip_norm={clip}")
        learner = make_learner(config, ALONE)
        watch(learner)
        batches = make_batches(config, open_data(config), ALONE)
        _, norm = update(learner, config, batches.at(0), ALONE, RunDir(tmp_path)).read()
        assert norm > 0.1
        assert float(taken[-1]) == pytest.approx(0.01 if clip == "0.01" else norm, rel=1e-4)


def test_the_average_follows_its_formula() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(model, decay=0.5)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    for t in range(1, 12):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * t)
        ema.update(model)
        decay = min(0.5, (1 + t) / (10 + t))
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    assert ema.num_updates == 11
    for name, average in ema.average.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_the_average_is_swapped_in_and_out_also_through_an_error() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    weight = model.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), ema.swapped_in(model):
        assert torch.equal(model.weight, ema.average["weight"])
        raise ZeroDivisionError
    assert torch.equal(model.weight, weight)
    assert not torch.equal(ema.average["weight"], weight)
