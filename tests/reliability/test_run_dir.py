"""One process holds a run; what a dead one left is taken over; torn lines harm nobody."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from lra.base.errors import RunError
from lra.run_dir import RunDir, Stopwatch
from tests.reliability.tools import Server, assert_same_outcome, tiny_config


def wait_for_steps(child: Any, run: Path) -> None:
    """Wait until a run has logged something."""
    while not (run / "metrics.jsonl").exists():
        assert child.poll() is None, child.text()
        time.sleep(0.01)


def test_a_second_process_is_refused_and_a_dead_ones_claim_is_taken_over(
    server: Server, recipe: Path, tmp_path: Path, undisturbed: Any
) -> None:
    run = tmp_path / "run"
    first = server.start("train", recipe, f"runs_folder={tmp_path}", "name=run", faults=(("slow_steps", 0.15),))
    wait_for_steps(first, run)
    for command in (
        ["train", "--resume", run],
        ["train", recipe, f"runs_folder={tmp_path}", "name=run"],
        ["eval", run],
    ):
        second = server.run(*command, code=2)
        assert f"in use by process {first.pid} on {socket.gethostname()}" in second.text()
    first.signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert (run / "holder.json").exists()
    server.run("train", "--resume", run)
    assert not (run / "holder.json").exists()
    assert_same_outcome(run, undisturbed)


def test_a_claim_ends_with_an_error_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), run.claimed():
        assert (run.path / "holder.json").exists()
        raise ZeroDivisionError
    assert not (run.path / "holder.json").exists()
    with run.claimed():
        pass


def test_a_claim_sweeps_what_other_hosts_left(tmp_path: Path) -> None:
    left = tmp_path / "run" / "checkpoints" / f".tmp-step_00000003-otherhost-{os.getpid()}-0123456789abcdef"
    left.mkdir(parents=True)
    with RunDir(tmp_path / "run").claimed():
        assert not left.exists()


def test_a_folder_that_holds_a_run_is_not_begun_again(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data)
    run = RunDir(tmp_path / "a run")
    run.path.mkdir()
    run.start(config)
    with pytest.raises(RunError, match=r"--resume '.*a run'"):
        run.start(config)
    assert run.config() == config


def test_a_start_that_was_killed_half_way_can_be_repeated(data: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "environment.json").write_text("{")
    run.start(tiny_config(data))
    assert run.config() == tiny_config(data)


def test_torn_lines_are_passed_over_and_cut_away(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (1, 2):
        run.log({"kind": "train", "step": step})
    run.log({"kind": "eval", "step": 2})
    with open(run.metrics_path, "ab") as f:
        f.write(b'{"kind": "train", "step": 3, "lo\xff\x00')
    assert [(r["kind"], r["step"]) for r in run.metrics()] == [("train", 1), ("train", 2), ("eval", 2)]
    run.truncate_metrics(2, 2)
    run.log({"kind": "train", "step": 3})
    assert [r["step"] for r in run.metrics()] == [1, 2, 2, 3]
    # The validation of step 2 was not part of the checkpoint: it will come again.
    run.truncate_metrics(2, 1)
    assert [(r["kind"], r["step"]) for r in run.metrics()] == [("train", 1), ("train", 2)]


def test_a_runs_folder_that_is_a_file_is_the_users_error(server: Server, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    child = server.run("train", recipe, f"runs_folder={tmp_path / 'file'}", "name=run", code=2)
    assert "could not be written" in child.text() and "Traceback" not in child.text()


def test_time_is_kept_by_the_clock_and_of_all_processes() -> None:
    alone = Stopwatch()
    alone.add("train", 3.0, 3.0)
    shared = Stopwatch(alone.seconds, processes=8)
    with shared.measure("train"):
        pass
    spent = shared["train"] - 3.0
    assert spent > 0 and shared.of_all("train") == pytest.approx(3.0 + 8 * spent)
    assert alone["train"] == alone.of_all("train") == 3.0 and alone["eval"] == alone.of_all("eval") == 0.0
