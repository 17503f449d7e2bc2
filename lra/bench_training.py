"""`run_lra.py bench training`: a training step of every model size, the literature's baselines beside ours, in one run.

Each way to train is a process of its own (lra/bench_worker.py): all compile at once, then each is timed alone. A way
that fails, or does not fit in memory, is marked and ends nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attention_kernels.bench import Parser
from attention_kernels.bench_timing import describe_machine, gpu_state
from lra.base.errors import ConfigError
from lra.bench_cases import CASES, TABLE, Case, as_values
from lra.bench_padded import score_bytes
from lra.bench_report import DROPPED, FORMAT, Report, describe_result, markdown, read_report, write_report
from lra.config import RunConfig
from lra.memory import available_bytes
from lra.run_dir import ROOT, code_digest, git_commit, now
from tasks.registry import get

# What preparing takes of the GPU beside scores, at most: with and without compiling. All may take this share at once.
_PLAIN_BYTES, _IDLE_BYTES, _SHARE = 12 << 30, 1 << 30, 0.85
# The share of --limit after which nothing is waited for that has not been prepared.
_PREPARE_SHARE = 0.65
# What is measured first, if time runs out.
_ORDER = ("flash", "SDPA, compiled", DROPPED, "standard, eager", "block_sparse", "standard, compiled", "SDPA, eager")
_PROFILED = ("flash", DROPPED, "block_sparse", "SDPA, compiled")
_ANSWER_S = 300.0
WORKER = "lra.bench_worker"


@dataclass
class Job:
    """One way to train in one case, and its process."""

    case: Case
    method: dict[str, Any]
    spec: dict[str, Any]
    bytes_to_prepare: int
    result: dict[str, Any] | None = None
    process: subprocess.Popen[str] | None = None
    log: Path = Path()
    listener: threading.Thread | None = None
    answers: queue.Queue[str] = field(default_factory=queue.Queue)

    def start(self, folder: Path) -> None:
        """Start the process; its answers are collected by a thread."""
        self.log = folder / f"{self.case.name}-{self.method['name'].replace(' ', '-')}.log"
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": "2", **os.environ, "PYTHONPATH": python_path()}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self.tell(json.dumps(self.spec))
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.answers.put(line)
        self.answers.put("")

    def tell(self, line: str) -> None:
        """Write a line to the process, if it still listens."""
        assert self.process is not None and self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """Return the next answer, or None if none comes in time; a process that died is a failure."""
        try:
            line = self.answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            return None
        try:
            return dict(json.loads(line))
        except ValueError:
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return {"status": "failed", "reason": line.strip() or (said[-1][:400] if said else "the process died")}

    def end(self, result: dict[str, Any]) -> None:
        """Keep the result and end the process."""
        self.result = {"name": self.method["name"], "pieces": self.method.get("pieces", 1), **result}
        self.stop()

    def stop(self) -> None:
        """End the process, if there is one."""
        if self.process is None or self.listener is None:
            return
        self.process.kill()
        self.process.wait()
        self.listener.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self.process = None


def python_path() -> str:
    """Return PYTHONPATH for the workers: ours first, whatever the current folder is."""
    return os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)


def methods_of(case: Case, config: RunConfig, compiled: bool, memory: int) -> list[dict[str, Any]]:
    """Return the ways to train a case: name, kind, overrides of the recipe, pieces of the batch, estimated scores."""
    task = get(config.task.name)
    sequences = config.train.batch_size * task.documents
    methods: list[dict[str, Any]] = []
    if case.alone:
        return [{"name": "flash", "kind": "ours", "overrides": ["attention=flash"], "scores": 0}]
    for name, sdpa in (("standard", False), ("SDPA", True)):
        for with_compile in (False, True):
            if with_compile and not compiled:
                continue
            needed = 0 if sdpa else score_bytes(config.model, sequences, case.padded_length, compiled=with_compile)
            pieces = 1
            # Pairs are what the literature trained by accumulation; elsewhere a batch that does not fit is marked so.
            while task.documents > 1 and needed / pieces > _SHARE * memory and pieces < config.train.batch_size:
                pieces *= 2
            label = f"{name}, {'compiled' if with_compile else 'eager'}"
            shape = {"sdpa": sdpa, "compiled": with_compile, "pieces": pieces, "scores": needed // pieces}
            methods.append({"name": label, "kind": "padded", "overrides": [], **shape})
    for backend in ("flash", "block_sparse"):
        methods.append({"name": backend, "kind": "ours", "overrides": [f"attention={backend}"], "scores": 0})
    if case.dropped is not None:
        overrides = ["attention=flash", *case.dropped]
        methods.append({"name": DROPPED, "kind": "ours", "overrides": overrides, "scores": 0})
    return methods


def make_jobs(args: argparse.Namespace, cases: list[Case], folder: Path) -> list[Job]:
    """Write every case's inputs and return its jobs; those that cannot fit have their result already."""
    device = torch.device(args.device)
    memory = available_bytes(device)
    compiles = device.type == "cuda" and not args.no_compile
    jobs = []
    for case in cases:
        config = case.config(*common_overrides(args, case, compiles))
        file = start_inputs(case, config, folder)
        for method in methods_of(case, config, compiles, memory):
            if args.methods and method["name"] not in args.methods:
                continue
            overrides = [*common_overrides(args, case, compiles), *method["overrides"]]
            prepare = compiles and (method["kind"] == "ours" or method["compiled"])
            spec = {
                "case": as_values(case), "method": method, "overrides": overrides, "data": str(file),
                "device": args.device, "seconds": args.seconds, "prepare": prepare,
                "profile": method["name"] in _PROFILED,
            }  # fmt: skip
            job = Job(case, method, spec, method["scores"] + _PLAIN_BYTES if prepare else _IDLE_BYTES)
            if method["scores"] > memory:
                reason = f"the scores alone take about {method['scores'] / 2**30:.0f} GiB"
                job.end({"status": "does not fit", "reason": reason, "estimated_bytes": method["scores"]})
            jobs.append(job)
    return sorted(jobs, key=lambda job: (not job.case.name.endswith("google"), _ORDER.index(job.method["name"])))


def start_inputs(case: Case, config: RunConfig, folder: Path) -> Path:
    """Let a process of its own make a case's inputs, while others start and compile; return the file to come."""
    file = folder / f"{case.name}.npz"
    values = {"case": as_values(case), "batch": config.train.batch_size, "length": config.max_length, "file": str(file)}
    with open(folder / f"{case.name}-inputs.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lra.bench_cases"],
            stdin=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": python_path()},
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps(values) + "\n")
    process.stdin.close()
    threading.Thread(target=process.wait, daemon=True).start()
    return file


def common_overrides(args: argparse.Namespace, case: Case, compiles: bool) -> list[str]:
    """Return the overrides that hold for every way to train a case."""
    own = [f"train.compile={'true' if compiles else 'false'}"]
    if args.batch is not None:
        own.append(f"train.batch_size={args.batch}")
    if args.length is not None:
        own.append(f"data.max_length={min(args.length, case.padded_length)}")
    return own


def prepare_all(jobs: list[Job], args: argparse.Namespace, folder: Path, deadline: float) -> None:
    """Start every job and let those compile that do, as many at once as cores and memory allow."""
    waiting = [job for job in jobs if job.result is None]
    running: list[Job] = []
    memory = _SHARE * available_bytes(torch.device(args.device))
    while waiting or running:
        while waiting and len(running) < args.jobs:
            taken = sum(job.bytes_to_prepare for job in running)
            fitting = next((j for j in waiting if not running or taken + j.bytes_to_prepare <= memory), None)
            if fitting is None:
                break
            waiting.remove(fitting)
            fitting.start(folder)
            running.append(fitting)
        for job in list(running):
            answer = job.answer(0.05)
            if answer is None and time.monotonic() < deadline:
                continue
            running.remove(job)
            if answer is None:
                job.end({"status": "not run", "reason": "it was not prepared within --limit"})
            elif answer["status"] != "ready":
                job.end(answer)
            else:
                job.method["prepare_s"] = answer["prepare_s"]
        if time.monotonic() >= deadline:
            for job in waiting:
                job.end({"status": "not run", "reason": "it was not prepared within --limit"})
            waiting.clear()


def measure(job: Job, seconds_left: float) -> None:
    """Time one prepared job, alone, unless its result is known."""
    if job.result is not None:
        return
    if seconds_left <= 0:
        job.end({"status": "not run", "reason": "--limit was over"})
        return
    job.tell("go")
    answer = job.answer(min(_ANSWER_S, seconds_left))
    job.end(answer or {"status": "not run", "reason": "it was not timed within --limit"})


def run(args: argparse.Namespace, command: list[str]) -> Report:
    """Prepare and time everything; print and save each result as it comes."""
    start = time.monotonic()
    cases = [case for case in CASES if case.name in args.tasks]
    device = torch.device(args.device)
    commit, dirty = git_commit()
    report: Report = {
        "format": FORMAT, "date": now(), "command": command, "environment": describe_machine(device),
        "commit": commit, "dirty": dirty, "code": code_digest(), "clocks": {}, "cases": [],
        "settings": {"seconds": args.seconds, "batch": args.batch, "length": args.length},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if args.length is not None:
            cases = [shortened(case, args.length) for case in cases]
        jobs = make_jobs(args, cases, folder)
        try:
            # One protocol after the other: every job holds a process, and a machine cannot hold all of them.
            for protocol in dict.fromkeys(job.case.protocol for job in jobs):
                chosen = [job for job in jobs if job.case.protocol == protocol]
                now_s = time.monotonic()
                prepare_all(chosen, args, folder, now_s + _PREPARE_SHARE * (start + args.limit - now_s))
                print(f"{protocol}: prepared in {time.monotonic() - now_s:.0f} s", flush=True)
                report["clocks"].setdefault("before", gpu_state(device))
                for job in chosen:
                    measure(job, start + args.limit - time.monotonic())
                    print(f"{job.case.name:20} {describe_result(job.result or {})}", flush=True)
                    report["cases"] = collected(jobs, cases)
                    save(report, args.json)
                report["clocks"]["after"] = gpu_state(device)
        finally:
            for job in jobs:
                job.stop()
    save(report, args.json)
    return report


def save(report: Report, path: Path | None) -> None:
    """Write the report where a file was asked for."""
    if path is not None:
        write_report(report, path)


def shortened(case: Case, length: int) -> Case:
    """Return the case with sequences of at most `length`, for small machines."""
    values = as_values(case) | {"padded_length": min(case.padded_length, length), "floor": None, "dropped_floor": None}
    return Case(**values)


def collected(jobs: list[Job], cases: list[Case]) -> list[dict[str, Any]]:
    """Return the cases with what is known of each method by now, in the order of the tables."""
    entries = []
    for case in cases:
        own = [job for job in jobs if job.case.name == case.name and job.result is not None]
        config = case.config(*(own[0].spec["overrides"] if own else ()))
        task = get(config.task.name)
        entries.append(
            {
                "case": as_values(case),
                "in_table": task.name in TABLE,
                "sequences": config.train.batch_size * task.documents,
                "methods": [job.result | {"prepare_s": job.method.get("prepare_s")} for job in own if job.result],
            }
        )
    return entries


def main(arguments: Sequence[str] | None = None, prog: str = "python -m lra.bench_training") -> None:
    """Run the benchmark, or print the tables of an earlier one; a mistake of the user leaves with exit code 2."""
    parser = make_parser(prog)
    args = parser.parse_args(arguments)
    if args.from_json is not None:
        print(markdown(read_report(args.from_json)))
        return
    known = [case.name for case in CASES]
    args.tasks = known if args.tasks is None else args.tasks.split(",")
    for task in args.tasks:
        if task not in known:
            raise ConfigError(f"There is no case {task!r}.", f"There are: {', '.join(known)}.")
    args.methods = [name for name in _ORDER if args.methods is None or name in args.methods.split(";")]
    if not args.methods:
        raise ConfigError("No method has such a name.", f"There are: {'; '.join(_ORDER)}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("There is no GPU that torch can see.", "Add --device cpu, with --batch and --length.")
    print("\n" + markdown(run(args, [*prog.split(), *(sys.argv[3:] if arguments is None else arguments)])))


def make_parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(prog=prog, description="Time training steps: padded baselines, SDPA, and ours.")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--tasks", help=f"cases, comma between: {', '.join(case.name for case in CASES)}")
    parser.add_argument("--methods", help=f"semicolon between: {'; '.join(_ORDER)}")
    parser.add_argument("--device", default=default, choices=["cuda", "cpu"])
    parser.add_argument("--batch", type=int, help="examples a step, in place of the recipe's")
    parser.add_argument("--length", type=int, help="tokens of a sequence at most")
    parser.add_argument("--seconds", type=float, default=1.2, help="timing of a method, about (default 1.2)")
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="processes that compile")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, of ours too")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which nothing more is timed")
    parser.add_argument("--json", type=Path, help="file of the results, written after each")
    parser.add_argument("--from", dest="from_json", type=Path, help="measure nothing: print this JSON's tables")
    return parser


if __name__ == "__main__":
    main()
