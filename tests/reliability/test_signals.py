"""A signal at any moment: the run saves, leaves with 75 within seconds, and goes on bit by bit."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lra.base.errors import Stopped
from lra.preempt import SIGNALS, StopRequest, catch_signals
from lra.run_dir import RunDir
from tests.reliability.tools import Server, assert_same_outcome, stale_files

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
# (phase, occurrence): the tenth step; the second of five batches of the first validation; the third save.
PHASES = {"train": ("train", 10), "eval": ("eval-batch", 2), "save": ("save", 3)}
QUICK = [(TERM, True, "train"), (INT, False, "eval"), (USR1, True, "save")]
ALL = [(number, group, phase) for number in (TERM, INT, USR1) for group in (False, True) for phase in PHASES]


def stop_and_go_on(
    server: Server, recipe: Path, folder: Path, undisturbed: Any, number: int, group: bool, phase: str
) -> None:
    """Send a signal in the middle of a phase, demand a clean stop, resume and compare."""
    run = folder / "run"
    fault = ("signal_in", *PHASES[phase], int(number), group)
    begin = time.monotonic()
    child = server.run("train", recipe, f"runs_folder={folder}", "name=run", code=75, faults=(fault,))
    assert time.monotonic() - begin < 10
    assert f"signal {signal.Signals(number).name}" in child.text()
    assert f"--resume {run}" in child.text() and "Traceback" not in child.text()
    stopped = RunDir(run).result()
    assert stopped is not None and (stopped["status"], stopped["step"] < 24) == ("stopped", True)
    server.run("train", "--resume", run)
    assert_same_outcome(run, undisturbed)
    assert stale_files(run) == []


@pytest.mark.parametrize(("number", "group", "phase"), QUICK)
def test_a_signal_saves_and_the_run_goes_on(
    server: Server, recipe: Path, tmp_path: Path, undisturbed: Any, number: int, group: bool, phase: str
) -> None:
    stop_and_go_on(server, recipe, tmp_path, undisturbed, number, group, phase)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "group", "phase"), [case for case in ALL if case not in QUICK])
def test_every_signal_in_every_phase(
    server: Server, recipe: Path, tmp_path: Path, undisturbed: Any, number: int, group: bool, phase: str
) -> None:
    stop_and_go_on(server, recipe, tmp_path, undisturbed, number, group, phase)


def test_a_signal_while_the_data_are_generated_leaves_at_once(server: Server, recipe: Path, tmp_path: Path) -> None:
    fault = ("signal_in", "build", 1, int(TERM), False)
    child = server.run(
        "train", recipe, f"data.folder={tmp_path}/data", f"runs_folder={tmp_path}", "name=run", code=75, faults=(fault,)
    )
    assert "signal SIGTERM" in child.text()
    assert not list((tmp_path / "data" / "listops").glob("*/manifest.json"))
    assert stale_files(tmp_path) == []


def test_a_signal_during_eval_keeps_what_was_tested(server: Server, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    server.run("train", recipe, f"runs_folder={tmp_path}", "name=run")
    fault = ("signal_in", "eval-batch", 3, int(TERM), True)
    child = server.run("eval", run, code=75, faults=(fault,))
    assert re.search(r"Stopped after evaluating \d+ of 20 examples: signal SIGTERM", child.text())
    assert "again" in child.text()
    server.run("eval", run)
    tested = json.loads((run / "eval-standard-best_val.json").read_text())
    result = RunDir(run).result()
    assert result is not None
    assert {k: tested[k] for k in ("correct", "total", "loss")} == {
        k: result["test"]["best_val"][k] for k in ("correct", "total", "loss")
    }


def test_a_second_interrupt_leaves_at_once(server: Server, recipe: Path, tmp_path: Path) -> None:
    child = server.start(
        "train", recipe, f"runs_folder={tmp_path}", "name=run", "train.log_every=1", faults=(("slow_steps", 3.0),)
    )
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert child.poll() is None, child.text()
        time.sleep(0.01)
    time.sleep(1.0)  # into the next step: between two steps the first request would be obeyed at once
    child.signal(INT)
    time.sleep(0.1)
    child.signal(INT)
    assert child.wait(5) == 130


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_is_a_request_and_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    stop = StopRequest()
    with catch_signals(stop):
        assert stop.reason is None
        signal.raise_signal(number)
        assert stop.reason == f"signal {signal.Signals(number).name}"
        with pytest.raises(Stopped), stop.at_once():
            raise AssertionError("a request from before must be heard")
    assert signal.getsignal(number) == before


def test_minutes_are_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stop = StopRequest(minutes=2)
    clock[0] = 219.9
    assert stop.reason is None
    clock[0] = 220.0
    assert stop.reason is not None and "--minutes" in stop.reason
