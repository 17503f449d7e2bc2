"""Run a sweep: prepare its data once, mark what cannot fit in memory, run the rest, say what became of each job.

A call may be a slice of the work: the run folders are its only memory, so the next call goes on from them.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lra.base.console import info
from lra.base.errors import ConfigError, DataError, RunError, Stopped
from lra.config import RunConfig
from lra.experiment import open_data
from lra.feed import Data
from lra.memory import estimate
from lra.preempt import StopRequest, catch_signals, raise_on_signals
from lra.run_dir import RunDir
from lra.sweep_jobs import Job, check_unchanged, count_states, job_command, make_jobs, state_of
from lra.sweep_marks import Sizes, fail, mark, measure
from lra.sweep_pool import Limits, Pool, Slot, Status
from lra.sweep_slurm import check_not_queued, submit
from lra.sweep_view import show_jobs

GO_ON = "Give the same command again: finished jobs are kept, stopped ones go on."


@dataclass(frozen=True)
class Options:
    """What the command line says beside the sweep's file."""

    overrides: Sequence[str] = ()
    out: Path | None = None
    minutes: float | None = None
    job_minutes: float | None = None
    slots: int | None = None
    retry_failed: bool = False


def run_sweep(
    path: Path,
    options: Options,
    *,
    command: Callable[[Job], list[str]] = job_command,
    slots: Sequence[Slot] | None = None,
    grace_s: float | None = None,
) -> None:
    """Run the jobs of a sweep's file on this machine until all are done or the time is over.

    Raises Stopped (exit code 75) while jobs are left, RunError if all ended and some failed. `command`, `slots` and
    `grace_s` are for tests.
    """
    begun = time.monotonic()
    folder, jobs = make_jobs(path, options.overrides, options.out)
    slots = find_slots(options.slots) if slots is None else slots
    with RunDir(folder).claimed("sweep", "give another --out"):
        todo = make_ready(folder, jobs, options)
        with catch_signals(stop := StopRequest()):
            left = None if options.minutes is None else options.minutes - (time.monotonic() - begun) / 60
            limits = Limits(left, options.job_minutes, *(() if grace_s is None else (grace_s,)))
            fitting = [job for job, sizes in todo if not sizes.too_large]
            known = {job.name: sizes for job, sizes in todo}
            pool = Pool(fitting, slots, limits, stop, command, lambda job, why: fail(job, known[job.name], why))
            with show_jobs(jobs) as view:
                others = {job.name: Status(*state_of(job.folder)) for job in jobs}
                pool.run(lambda status: view(others | status))
                view(others | pool.status, last=True)
        for job, sizes in todo:
            # A process that was stopped before it began a run has left nothing: the report still needs a note.
            if state_of(job.folder)[0] == "waiting":
                mark(job, sizes)
    conclude(folder, jobs, pool.stopping)


def submit_sweep(path: Path, options: Options, *, cluster: str = "slurm") -> list[Any]:
    """Send the jobs that are left to Slurm as one array and return submitit's handles; they outlive this process.

    `options.minutes` is the time limit of a job, after which it goes back into the queue. `cluster` is for tests:
    submitit's "local" or "debug".
    """
    folder, jobs = make_jobs(path, options.overrides, options.out)
    if options.job_minutes is not None or options.slots is not None:
        raise ConfigError("--job-minutes and --slots do not act on Slurm.", "Give a job's time limit by --minutes.")
    with RunDir(folder).claimed("sweep", "give another --out"):
        # Whether a job fits is for the machine to say that it lands on: this one may have no GPU.
        todo = make_ready(folder, jobs, options, fit=False)
        if todo:
            handles = submit(folder, todo, options.minutes, cluster)
            ids = f"{handles[0].job_id} to {handles[-1].job_id}"
            print(f"{len(handles)} jobs went to {cluster}: {ids}; submitit's logs are in {folder}/slurm/")
            return handles
    conclude(folder, jobs)
    return []


def make_ready(folder: Path, jobs: Sequence[Job], options: Options, *, fit: bool = True) -> list[tuple[Job, Sizes]]:
    """Return the jobs that are left to do; see to their data, and mark in their folders that they wait or do not fit.

    The caller holds the sweep's folder.
    """
    with raise_on_signals(GO_ON):
        check_not_queued(folder)
        check_unchanged(jobs)
        left = []
        for job in jobs:
            state, _ = state_of(job.folder)
            if state != "finished" and (state != "failed" or options.retry_failed):
                check_free(job)
                left.append(job)
        data = prepare_data([job.config for job in left])
        device = smallest_device() if fit else None
        todo = [(job, measure(job, data[data_key(job.config)], device)) for job in left]
        for job, sizes in todo:
            mark(job, sizes)
    return todo


def check_free(job: Job) -> None:
    """Raise RunError if a process holds the run: perhaps an orphan of a killed sweep, on a GPU that we would use."""
    if (job.folder / "lock").exists():
        with RunDir(job.folder).claimed("run", "give another --out"):
            pass


def find_slots(num_slots: int | None) -> list[Slot]:
    """Return one slot a GPU that this process may see; without a GPU `num_slots` (default 1) slots on the CPU."""
    count = torch.cuda.device_count()
    if count == 0:
        number = num_slots or 1
        threads = str(max(1, (os.cpu_count() or 1) // number))
        shared = {} if number == 1 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}
        return [Slot("CPU" if number == 1 else f"CPU {i}", shared) for i in range(number)]
    if num_slots is not None and num_slots > count:
        raise ConfigError(f"--slots {num_slots}: there are {count} GPUs.", "Two jobs never share a GPU; give fewer.")
    # Numbers or UUIDs: whatever the caller's own list says is handed on.
    named = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    names = [v.strip() for v in named] or [str(i) for i in range(count)]
    return [Slot(f"GPU {v}", {"CUDA_VISIBLE_DEVICES": v}) for v in names[: min(count, num_slots or count)]]


def smallest_device() -> torch.device:
    """Return the GPU with the least memory, or the CPU: a job must fit wherever it lands."""
    count = torch.cuda.device_count()
    if count == 0:
        return torch.device("cpu")
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(count)]
    return torch.device("cuda", sizes.index(min(sizes)))


def data_key(config: RunConfig) -> str:
    """Return what tells one task's examples from another's."""
    return f"{config.task.model_dump_json()} {config.data.model_dump_json(exclude={'max_length', 'black_pixels'})}"


def prepare_data(configs: Sequence[RunConfig]) -> dict[str, Data]:
    """Open every data set that the configs need, generating what is missing: once, and before the first job.

    Raises DataError naming all tasks whose files have not been prepared.
    """
    data: dict[str, Data] = {}
    missing: dict[str, DataError] = {}
    for config in configs:
        if data_key(config) in data or config.task.name in missing:
            continue
        try:
            data[data_key(config)] = open_data(config)
        except DataError as e:
            missing[config.task.name] = e
    if missing:
        raise DataError(
            " ".join(e.cause for e in missing.values()), " ".join(e.remedy for e in missing.values())
        ) from next(iter(missing.values()))
    return data


def conclude(folder: Path, jobs: Sequence[Job], stopped: str = "") -> None:
    """Say where everything lies; raise Stopped while jobs are left, RunError if some failed."""
    states = {job.name: state_of(job.folder) for job in jobs}
    counts = count_states([state for state, _ in states.values()])
    for name, (state, reason) in states.items():
        if state in ("failed", "too large"):
            info(f"{name}: {state}: {reason}")
    report = f"run_lra.py report {shlex.quote(str(folder))} --out {shlex.quote(f'reports/{folder.name}')}"
    print(f"{len(jobs)} jobs: {counts}\n  Runs:    {folder}/\n  Report:  {report}")
    names = {state: [n for n, (s, _) in states.items() if s == state] for state in ("stopped", "waiting", "failed")}
    num_left = len(names["stopped"]) + len(names["waiting"])
    if num_left:
        because = f" ({stopped})" if stopped else ""
        raise Stopped(f"{num_left} of {len(jobs)} jobs are left{because}.", GO_ON)
    if names["failed"]:
        raise RunError(
            f"{len(names['failed'])} of {len(jobs)} jobs failed: {', '.join(names['failed'][:5])}"
            f"{' ...' if len(names['failed']) > 5 else ''}.",
            f"{folder}/JOB/log.txt has their words; --retry-failed tries them again.",
        )


def dry_run(path: Path, options: Options) -> str:
    """Return the job list with states, steps and memory estimates as lines of text."""
    folder, jobs = make_jobs(path, options.overrides, options.out)
    device = smallest_device()
    lines = []
    for job in jobs:
        sizes = measure(job, None, device)
        needs = f"{estimate(job.config, sizes.parameters).total / 2**30:7.2f} GiB"
        state = "too large" if sizes.too_large else state_of(job.folder)[0]
        lines.append(f"{job.name:44} {state:10} {job.config.train.steps:>7,} steps {needs}")
    where = "this machine" if device.type == "cpu" else "one GPU"
    return "\n".join([f"{len(jobs)} jobs in {folder}/, memory at most, against {where}:", *lines])
