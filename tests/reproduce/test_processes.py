"""A chain through the command line: two processes end where one does, and the weights that it leaves are the result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lra.chain_records import find_chains
from tests.reliability.tools import ROOT

OPTIONS = [
    "task.count=80", "task.contour_length=6", "model.depth=1", "model.width=32", "model.num_heads=1",
    "model.mlp_width=32", "train.batch_size=8", "train.eval_batch_size=4", "train.eval_every=3",
    "train.checkpoint_every=3", "train.log_every=1", "train.schedule.warmup=2", "train.precision=fp32",
    "data.keep_tokens=[200, 300]", "attention=sdpa", "data.limit_eval=8", "data.limit_val=4", "train.steps=6",
    "train.restart=null", "probe.images=10", "probe.contour_lengths=[6]", "probe.distractors=[]",
    "small.task.name=pathfinder", "grow.task.name=pathfinder", "long.task.name=pathx", "long.train.steps=1",
    "long.data.limit_eval=2", "long.data.limit_val=2",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(folder: Path, *arguments: str, before: list[str] | None = None) -> str:
    """Run the command in `folder` by another Python; return what it printed."""
    command = [sys.executable, *(before or []), str(ROOT / "run_lra.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one chain by one process and the same chain by two."""
    folder = tmp_path_factory.mktemp("processes")
    run(folder, "reproduce", "pathx", *OPTIONS, "--out", "one")
    run(folder, "reproduce", "pathx", *OPTIONS, "--out", "two", before=TORCHRUN)
    return folder


def losses(chain: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (chain / stage / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def test_two_processes_end_where_one_does(folder: Path) -> None:
    for stage in ("small", "grow", "long"):
        assert losses(folder / "two", stage) == pytest.approx(losses(folder / "one", stage), rel=1e-4)
    one, two = (json.loads((folder / name / "chain.json").read_text()) for name in ("one", "two"))
    assert two["num_processes"] == 2 and one["status"] == two["status"] == "finished"
    assert two["test"]["loss"] == pytest.approx(one["test"]["loss"], rel=1e-4)
    assert two["probes"]["contour_length=6"]["total"] == 10


def test_copied_weights_give_the_number_again_and_a_report(folder: Path) -> None:
    kept = folder / "results" / "weights" / "pathx-open-s1"
    shutil.copytree(folder / "one" / "weights", kept)
    told = json.loads((folder / "one" / "chain.json").read_text())["test"]
    shown = json.loads(run(folder, "eval", str(kept.relative_to(folder))))
    assert (shown["correct"], shown["total"]) == (told["correct"], told["total"])
    assert shown["loss"] == pytest.approx(told["loss"], rel=1e-6)
    weights = sum(f.stat().st_size for f in kept.rglob("*") if f.is_file())
    parameters = json.loads((kept / "result.json").read_text())["num_parameters"]
    assert weights < 4 * parameters + 1_000_000  # no optimizer; the picture of attention and the texts
    assert [c.name for c in find_chains([folder / "one", folder / "results"])] == ["one"]
