"""What the tests of this folder share: a tiny run, the server's client, and what counts as equal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lra import checkpoint as checkpoints
from lra.config import RunConfig
from lra.distributed import World
from lra.recipes import make_config
from lra.run_dir import RunDir

ROOT = Path(__file__).resolve().parent.parent.parent
ALONE = World(0, 1, torch.device("cpu"))
LIMIT_S = 60.0
# What may differ between two equal runs: clocks, how the run came about, what else happens in the checkout.
CLOCKS = {
    "examples_per_s", "tokens_per_s", "train_s", "eval_s", "train_gpu_s", "eval_gpu_s", "compile_s", "wall_s",
    "steps_per_s", "steady_steps_per_s", "date",
}  # fmt: skip
ORIGINS = {"resumed", "name", "commit", "dirty", "code"}


def tiny_values(data: Path) -> dict[str, Any]:
    """Return a recipe of a few thousand weights with dropout, EMA and clipping: 10 steps an epoch, saved often."""
    return {
        "task": {"name": "listops", "count": 1000, "min_length": 8, "max_length": 40, "max_depth": 3},
        "data": {"folder": str(data), "max_length": 40, "limit_train": 85},
        "model": {"depth": 1, "width": 16, "num_heads": 2, "mlp_width": 32, "positions": "learned"},
        "attention": {"backend": "standard"},
        "train": {
            "steps": 24, "batch_size": 8, "eval_batch_size": 4, "learning_rate": 0.02, "precision": "fp32",
            "schedule": {"name": "cosine", "warmup": 3}, "clip_norm": 1.0, "ema": 0.9, "weight_decay": 0.01,
            "log_every": 4, "eval_every": 6, "checkpoint_every": 3,
        },
    }  # fmt: skip


def tiny_config(data: Path, *overrides: str) -> RunConfig:
    """Return the tiny run's config with overrides."""
    return make_config(tiny_values(data), overrides, "tests")


@dataclass
class Child:
    """A process that the server forked."""

    server: Server
    pid: int
    log: Path
    code: int | None = None

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to its whole group."""
        (os.killpg if group else os.kill)(self.pid, number)

    def poll(self) -> int | None:
        """Return the exit code (negative: the signal that killed it), or None while it runs."""
        if self.code is None:
            self.code = self.server.ask({"poll": self.pid})
        return self.code

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Return the exit code; kill the process and fail after `limit_s`."""
        end = time.monotonic() + limit_s
        while self.poll() is None:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"still running after {limit_s} s:\n{self.text()}")
            time.sleep(0.003)
        assert self.code is not None
        return self.code

    def text(self) -> str:
        """Return what the process said."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


class Server:
    """Client of tests/reliability/server.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_started = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("PYTEST_CURRENT_TEST", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self.process.stdout is not None
        assert "ready" in json.loads(self.process.stdout.readline())

    def ask(self, request: dict[str, Any]) -> Any:
        """Send one request and return the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *args: object,
        faults: tuple[tuple[Any, ...], ...] = (),
        call: tuple[Any, ...] | None = None,
        env: dict[str, str] | None = None,
    ) -> Child:
        """Start a command line (or `call` a function of faults.py) in a child after installing `faults`."""
        self.num_started += 1
        log = self.folder / f"log-{self.num_started}.txt"
        what = {
            "args": [str(a) for a in args],
            "faults": [(name, [str(a) if isinstance(a, Path) else a for a in rest]) for name, *rest in faults],
            "call": None if call is None else (call[0], [str(a) if isinstance(a, Path) else a for a in call[1:]]),
            "env": env or {},
            "cwd": str(self.folder),
            "log": str(log),
        }
        return Child(self, self.ask({"run": what}), log)

    def run(self, *args: object, code: int = 0, **more: Any) -> Child:
        """Start, wait, and demand an exit code."""
        child = self.start(*args, **more)
        got = child.wait()
        assert got == code, f"exit code {got} instead of {code}:\n{child.text()}"
        return child

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def same_numbers(value: Any) -> Any:
    """Return a copy of JSON values without clocks and origins."""
    if isinstance(value, dict):
        return {k: same_numbers(v) for k, v in value.items() if k not in CLOCKS | ORIGINS}
    return [same_numbers(v) for v in value] if isinstance(value, list) else value


def outcome(path: Path) -> tuple[dict[str, bytes], list[Any], Any]:
    """Return all that must be equal of two finished runs: tensors bit by bit, metrics, result."""
    run = RunDir(path)
    newest = checkpoints.load_newest(run.checkpoints)
    assert newest is not None
    tensors = {name: t.numpy().tobytes() for name, t in newest.tensors.items()}
    return tensors, same_numbers(run.metrics()), same_numbers(run.result())


def assert_same_outcome(path: Path, undisturbed: tuple[dict[str, bytes], list[Any], Any]) -> None:
    """Demand that a run ended bit by bit like the undisturbed one."""
    tensors, metrics, result = outcome(path)
    expected_tensors, expected_metrics, expected = undisturbed
    other = [(got, want) for got, want in zip(metrics, expected_metrics, strict=False) if got != want]
    assert metrics == expected_metrics, f"{len(metrics)} lines for {len(expected_metrics)}; {other[:2]}"
    changed = sorted(n for n in tensors.keys() | expected_tensors.keys() if tensors.get(n) != expected_tensors.get(n))
    assert not changed, changed
    told = {k: (result.get(k), expected.get(k)) for k in {*result, *expected} if result.get(k) != expected.get(k)}
    assert not told, told


def stale_files(path: Path) -> list[Path]:
    """Return temporary names anywhere beneath a folder."""
    return [p for p in path.rglob("*") if p.name.startswith(".tmp-")]
