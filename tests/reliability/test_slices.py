"""Runs in slices of --minutes from the command line: they stop cleanly and end as if they had never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lra import checkpoint as checkpoints
from lra.run_dir import RunDir
from tests.reliability.tools import assert_same_outcome, same_numbers


def test_minutes_stop_training_and_a_second_call_ends_it_equally(
    server: Any, recipe: Path, tmp_path: Path, undisturbed: Any
) -> None:
    child = server.run(
        "train",
        recipe,
        f"runs_folder={tmp_path}",
        "name=run",
        "--minutes",
        0.03,
        code=75,
        faults=(("slow_steps", 0.3),),
    )
    assert "--minutes" in child.text() and f"train --resume {tmp_path}/run" in child.text()
    stopped = RunDir(tmp_path / "run").result()
    assert stopped is not None and stopped["status"] == "stopped"
    step = checkpoints.step_of(checkpoints.published(tmp_path / "run" / "checkpoints")[-1])
    assert 0 < step == stopped["step"] < 24
    child = server.run("train", "--resume", tmp_path / "run")
    assert f"Resumed {tmp_path}/run at step {step}." in child.text() and "24 of 24 steps" in child.text()
    assert_same_outcome(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("text", ["-1", "0", "nan", "inf", "soon"])
def test_minutes_must_be_a_time(text: str, server: Any, recipe: Path, tmp_path: Path) -> None:
    child = server.run("train", recipe, f"runs_folder={tmp_path}/runs", f"--minutes={text}", code=2)
    assert "--minutes" in child.text() and not (tmp_path / "runs").exists()


def test_a_recipe_beside_resume_is_explained(server: Any, recipe: Path, tmp_path: Path) -> None:
    assert "Leave" in server.run("train", recipe, "--resume", tmp_path, code=2).text()


def test_minutes_stop_the_final_test_and_the_evaluation(
    server: Any, recipe: Path, tmp_path: Path, undisturbed: Any
) -> None:
    # Batches 1 to 20 validate (5 each at steps 6, 12, 18, 24); the 22nd is in the middle of the first test.
    child = server.run(
        "train", recipe, f"runs_folder={tmp_path}", "name=run", code=75, faults=(("stop_after_eval_batches", 22),)
    )
    assert f"--resume {tmp_path}/run" in child.text()
    (partial,) = (tmp_path / "run").glob("partial-test-*")
    saved = json.loads(partial.read_text())
    assert 0 < saved["seconds"][0] == saved["seconds"][1]  # by the clock, and of the one process
    partial.write_text(json.dumps(saved | {"seconds": [100.0, 800.0]}))  # as if eight had spent them
    server.run("train", "--resume", tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert 100 < result["eval_s"] < 200 and result["eval_gpu_s"] == pytest.approx(result["eval_s"] + 700)
    assert result["train_gpu_s"] == pytest.approx(result["train_s"])
    assert list((tmp_path / "run").glob("partial-*")) == []
    assert_same_outcome(tmp_path / "run", undisturbed)

    server.run("eval", tmp_path / "run", "attention=flash")
    whole = json.loads((tmp_path / "run" / "eval-flash-best_val.json").read_text())
    (tmp_path / "run" / "eval-flash-best_val.json").unlink()
    child = server.run("eval", tmp_path / "run", "attention=flash", code=75, faults=(("stop_after_eval_batches", 2),))
    assert "again" in child.text()
    assert not (tmp_path / "run" / "eval-flash-best_val.json").exists()
    server.run("eval", tmp_path / "run", "attention=flash")
    assert same_numbers(json.loads((tmp_path / "run" / "eval-flash-best_val.json").read_text())) == same_numbers(whole)
