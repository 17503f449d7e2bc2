"""The open track's ingredients together: resume bit by bit, restart by rule, weights from another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lra import train_log
from lra.base.errors import ConfigError, Stopped
from lra.config import RunConfig
from lra.experiment import open_data, run_evaluation, run_training
from lra.feed import make_batches
from lra.learner import make_learner
from lra.recipes import load_config
from lra.restarts import attempt_config, attempts
from lra.run_dir import RunDir
from lra.transfer import duplicated, misfits
from tests.model.helpers import small
from tests.reliability.test_resume import differing, everything, train_until
from tests.reliability.tools import ALONE, same_numbers


def open_config(data: Path, *overrides: str) -> RunConfig:
    """Return a tiny model on the tiny images with every ingredient switched on."""
    base = [
        f"data.folder={data}", "task.count=200000", "data.black_pixels=token", "data.keep_tokens=[200, 300]",
        "data.dihedral=true", "data.limit_train=80", "data.limit_eval=16", "model.width=32", "model.num_heads=1",
        "model.qk_norm=true", "model.qk_gain=2.0", "model.rotary_base=100.0", "model.local_start=[2.0, 4.0]",
        "model.pooling=max", "train.optimizer=muon", "train.learning_rate=0.02", "train.adamw_learning_rate=1e-3",
        "train.ema=0.9", "train.batch_size=8", "train.steps=13", "train.schedule={name: wsd, warmup: 3, decay: 0.4}",
        "train.log_every=1", "train.eval_every=100", "train.checkpoint_every=100",
    ]  # fmt: skip
    return load_config("pathfinder/smoke", [*base, *overrides])


def test_a_broken_run_goes_on_bit_by_bit(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_config(tiny_data)
    opened = open_data(config)
    whole = train_until(config, opened, tmp_path / "whole", None, monkeypatch)
    expected = same_numbers(RunDir(tmp_path / "whole").metrics())
    for step in (1, 9, 10, 11):
        folder = tmp_path / f"broken-{step}"
        train_until(config, opened, folder, step, monkeypatch)
        resumed = train_until(config, opened, folder, None, monkeypatch)
        assert same_numbers(RunDir(folder).metrics()) == expected
        assert differing(everything(resumed), everything(whole)) == []


def test_training_sees_few_tokens_and_evaluation_all(tiny_data: Path, tmp_path: Path) -> None:
    config = open_config(tiny_data, "train.steps=2", f"runs_folder={tmp_path}", "name=few")
    assert {b.max_length for step in range(9) for b in make_batches(config, open_data(config), ALONE).at(step)} == {
        200,
        300,
    }
    seen: list[int] = []
    from lra.model import Classifier

    forward = Classifier.forward

    def watched(self: Any, batch: Any) -> Any:
        if not self.training:
            seen.append(batch.max_length)
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "forward", watched)
        result = run_training(config)
    assert set(seen) == {1024} and result["restarts"] == 0


RULE = "train.restart={after: 3, steps: 4, low: 0.0, high: 5.0, limit: 2}"


def test_a_stuck_run_begins_again_with_the_next_seed_and_says_so(
    tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = open_config(tiny_data, RULE, f"runs_folder={tmp_path}", "name=stuck", "train.log_every=2")
    result = run_training(config)
    run = RunDir(tmp_path / "stuck")
    told = attempts(run)
    assert result["status"] == "finished" and result["restarts"] == 2 and result["step"] == 13
    # Windows end at steps 2, 4, 6: those after step 3 count, two steps each.
    assert [attempt["step"] for attempt in told] == [6, 6]
    assert len({attempt["seed"] for attempt in told} | {attempt_config(config, 2).seed}) == 3
    assert result["lost_s"] == pytest.approx(sum(a["seconds"]["train"] + a["seconds"].get("eval", 0.0) for a in told))
    assert [r["step"] for r in run.metrics() if r["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert "Stuck at chance" in "".join(capfd.readouterr())
    assert not list((tmp_path / "stuck/attempt-1").glob("step_*"))
    assert (tmp_path / "stuck/attempt-1/metrics.jsonl").is_file()


def test_losses_outside_the_band_restart_nothing(tiny_data: Path, tmp_path: Path) -> None:
    rule = "train.restart={after: 0, steps: 2, low: 0.1, high: 0.2, limit: 2}"
    result = run_training(open_config(tiny_data, rule, f"runs_folder={tmp_path}", "name=fine"))
    assert result["restarts"] == 0


def test_a_restarted_run_stopped_and_resumed_is_the_undisturbed_one(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_config(tiny_data, RULE, f"runs_folder={tmp_path}", "name=whole", "train.log_every=2")
    whole = run_training(config)
    real, calls = train_log.watch_stuck, []

    def watched(learner: Any, config: Any, step: int, loss: float) -> None:
        calls.append(step)
        if len(calls) == 5:  # in the second attempt
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        real(learner, config, step, loss)

    monkeypatch.setattr(train_log, "watch_stuck", watched)
    broken = config.model_copy(update={"name": "broken"})
    with pytest.raises(Stopped):
        run_training(broken)
    result = run_training(broken, resume=tmp_path / "broken")
    assert result["restarts"] == 2 and result["test"]["last"]["loss"] == whole["test"]["last"]["loss"]
    a, b = (same_numbers(RunDir(tmp_path / name).metrics()) for name in ("whole", "broken"))
    assert a == b


def test_a_run_begins_with_the_averaged_weights_of_another(tiny_data: Path, tmp_path: Path) -> None:
    first = open_config(tiny_data, f"runs_folder={tmp_path}", "name=first", "train.steps=5", "train.test=chosen",
                        "train.checkpoint_choice=last")  # fmt: skip
    run_training(first)
    tested = run_evaluation(tmp_path / "first", first, None, "last", False)
    second = open_config(tiny_data, f"train.start_from={tmp_path / 'first'}", "seed=9")
    learner = make_learner(second, ALONE)
    config = first.model_copy(update={"train": first.train.model_copy(update={"start_from": str(tmp_path / "first")})})
    from lra.evaluate import evaluate

    data = open_data(config)
    scores = evaluate(learner.model, config, data.cache, data.splits["test"], ALONE)
    assert scores.loss == tested["loss"]
    assert learner.ema is not None
    weights = dict(learner.model.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in learner.ema.average.items())


def test_weights_that_do_not_fit_are_refused_in_words(tiny_data: Path, tmp_path: Path) -> None:
    run_training(open_config(tiny_data, f"runs_folder={tmp_path}", "name=first", "train.steps=1"))
    other = open_config(tiny_data, f"train.start_from={tmp_path / 'first'}", "model.width=64")
    with pytest.raises(ConfigError, match=r"do not fit.*model.width: 32 -> 64"):
        make_learner(other, ALONE)


def test_position_tables_are_duplicated_place_by_place() -> None:
    table = torch.randn(2 * 3 + 1, 4)
    fine = duplicated(table, (2, 3), (4, 9))
    for row in range(4):
        for column in range(9):
            assert torch.equal(fine[row * 9 + column], table[row // 2 * 3 + column // 3])
    assert fine.shape == (37, 4) and torch.equal(fine[-1], table[-1])


def test_chains_that_cannot_fit_are_named() -> None:
    learned = ["model.positions=learned", "data.max_length=null", "data.black_pixels=token"]
    path64, pathx = (small(*learned, recipe=f"{task}/smoke") for task in ("path64", "pathx"))
    assert misfits(path64, pathx) == []
    assert "resolution" in misfits(pathx, path64)[0]
    assert misfits(path64, small(*learned, "model.num_positions=20000", recipe="pathx/smoke"))
    assert misfits(path64, small(*learned, "model.qk_norm=true", recipe="pathx/smoke")) == [
        "model.qk_norm: False -> True"
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.keep_tokens=[100]", "attention=block_sparse"], "aligned with image rows"),
        (["data.dihedral=true", "track=sequence"], "open track"),
        (["data.fresh=true", "track=paper"], "open track"),
        (["data.keep_tokens=[100]", "data.black_pixels=dropped"], "whole images"),
    ],
)
def test_options_that_exclude_each_other_are_explained(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config("pathfinder/smoke", ["data.black_pixels=token", *overrides])


def test_fresh_data_train_without_touching_the_set(tmp_path: Path) -> None:
    config = load_config(
        "pathfinder/smoke",
        ["task.count=40", "task.contour_length=6", "data.fresh=true", "data.black_pixels=token",
         f"data.folder={tmp_path}", "train.steps=2", f"runs_folder={tmp_path}", "name=fresh", "train.eval_every=2"],
    )  # fmt: skip
    assert run_training(config)["status"] == "finished"
    assert json.loads((tmp_path / "fresh/result.json").read_text())["source"] == "generated"
