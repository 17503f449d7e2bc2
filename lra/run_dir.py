"""A run's folder: who holds it, its config, its environment, its metrics and its result. See docs/usage.md."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from lra.base.errors import RunError
from lra.base.files import disk_errors, fsync_file, sweep_stale_temps, write_json_atomic, write_text_atomic
from lra.config import RunConfig
from lra.recipes import differences, dump_config, load_config

ROOT = Path(__file__).resolve().parent.parent


class RunDir:
    """Reads and writes the files of one run. Only one process holds a run at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics_path = path / "metrics.jsonl"

    @property
    def how_to_resume(self) -> str:
        """What the user types to go on with a stopped run."""
        return f"Go on with: run_lra.py train --resume {shlex.quote(str(self.path))}"

    @contextmanager
    def claimed(self, what: str = "run", otherwise: str = "choose another name=") -> Iterator[None]:
        """Hold the folder for the length of a `with`. Raises RunError naming the holder if another process does.

        The lock is the operating system's: it falls with the process, so a dead holder blocks nobody.
        """
        lock = filelock.FileLock(self.path / "lock")
        holder = self.path / "holder.json"
        try:
            with disk_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0)
        except filelock.Timeout as e:
            who = read_json(holder) or {}
            raise RunError(
                f"The {what} {self.path} is in use by process {who.get('pid', '?')} on {who.get('host', '?')}.",
                f"Wait for it, stop it, or {otherwise}.",
            ) from e
        try:
            # Holding the lock, this is the only writer here: also a killed holder on another host left stale files.
            sweep_stale_temps(self.path, held=True)
            sweep_stale_temps(self.checkpoints, held=True)
            write_json_atomic(holder, {"pid": os.getpid(), "host": socket.gethostname()})
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def start(self, config: RunConfig) -> None:
        """Write config and environment of a new run. Raises RunError if the folder already holds one."""
        if (self.path / "config.yaml").exists():
            raise RunError(
                f"The folder {self.path} holds a run already.",
                f"Go on with --resume {shlex.quote(str(self.path))}, choose another name=, or remove it.",
            )
        write_json_atomic(self.path / "environment.json", environment())
        write_text_atomic(self.path / "config.yaml", dump_config(config))

    def config(self) -> RunConfig:
        """Read the resolved config back."""
        path = self.path / "config.yaml"
        if not path.is_file():
            remedy = "Give the folder of a run."
            if (self.path / "chain.json").is_file():
                remedy = "It is a chain: give the folder of one of its stages, or its folder weights."
            raise RunError(f"{self.path} is not a run: it has no config.yaml.", remedy)
        return load_config(str(path))

    def check_resume(self, config: RunConfig) -> None:
        """Raise RunError naming the fields if `config` would not continue the run that the folder holds."""
        changed = differences(self.config(), config)
        if changed:
            raise RunError(
                f"The run {self.path} cannot be resumed under a changed config ({'; '.join(changed)}).",
                "Drop these overrides, or start a new run with another name=.",
            )

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with disk_errors(self.metrics_path), open(self.metrics_path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record, allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a torn last line, left by a kill, is passed over."""
        if not self.metrics_path.exists():
            return []
        records = []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return [r for r in records if isinstance(r, dict)]

    def truncate_metrics(self, step: int, evaluated_step: int) -> None:
        """Drop what was trained after `step` or validated after `evaluated_step`: it will be logged again."""
        last = {"train": step, "eval": evaluated_step}
        kept = [json.dumps(r) + "\n" for r in self.metrics() if r["step"] <= last[r["kind"]]]
        write_text_atomic(self.metrics_path, "".join(kept))

    def sync_metrics(self) -> None:
        """Force metrics.jsonl to the disk: a checkpoint must not outlive the lines before it in a power cut."""
        if self.metrics_path.exists():
            with disk_errors(self.metrics_path):
                fsync_file(self.metrics_path)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json atomically."""
        write_json_atomic(self.path / "result.json", result)

    def result(self) -> dict[str, Any] | None:
        """Read result.json, or None if there is none yet."""
        return read_json(self.path / "result.json")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def now() -> str:
    """Return the present time in UTC as ISO text to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def git_commit() -> tuple[str | None, bool]:
    """Return the checkout's commit and whether tracked files differ from it; (None, False) outside git."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    return commit, bool(commit and _output("git", "-C", str(ROOT), "status", "--porcelain", "-uno"))


def code_digest() -> str:
    """Return 16 hex digits over all our source files: names the code where there is no git history."""
    digest = hashlib.sha256()
    for room in ("lra", "tasks", "attention_kernels"):
        for path in sorted(p for p in (ROOT / room).rglob("*") if p.suffix in (".py", ".cu", ".cuh")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Describe where a run takes place: versions, machine, GPU, commit, command."""
    import numpy
    import torch

    commit, dirty = git_commit()
    on_gpu = torch.cuda.is_available()
    return {
        "started": now(),
        "command": sys.argv,
        "commit": commit,
        "dirty": dirty,
        "code": code_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "host_cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_count": torch.cuda.device_count() if on_gpu else 0,
        "cuda": torch.version.cuda,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"),
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


class Stopwatch:
    """Seconds spent in named kinds of work, carried over resumes: by the clock, and of all processes together.

    A run may go on with another number of processes, so what it cost is not the clock's time by any one number.
    """

    def __init__(self, seconds: dict[str, float] | None = None, processes: int = 1) -> None:
        self.seconds, self.processes = dict(seconds or {}), processes

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Add the time of a `with` to `kind`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.add(kind, elapsed, elapsed * self.processes)

    def add(self, kind: str, seconds: float, of_all: float) -> None:
        """Add to `kind` time of the clock, and of all processes together."""
        for key, value in ((kind, seconds), (f"{kind}_of_all", of_all)):
            self.seconds[key] = self.seconds.get(key, 0.0) + value

    def of_all(self, kind: str) -> float:
        """Return the seconds of all processes together: GPU seconds."""
        return self[f"{kind}_of_all"]

    def __getitem__(self, kind: str) -> float:
        return self.seconds.get(kind, 0.0)
