"""What a sweep writes into the folder of a run that its own process did not write: it waits, cannot fit, or died."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from lra import checkpoint as checkpoints
from lra.base.errors import EXIT_OUT_OF_MEMORY, LraError, MemoryShortError
from lra.base.files import disk_errors, write_text_atomic
from lra.experiment import build_on_meta, describe, describe_config
from lra.feed import Data
from lra.memory import check_fits
from lra.model import num_parameters
from lra.recipes import dump_config
from lra.run_dir import RunDir
from lra.sweep_jobs import MARK, Job, State, is_marked

WAITING = "It waits for its turn in the sweep."


@dataclass(frozen=True)
class Sizes:
    """What is known of a job before it starts."""

    parameters: int
    too_large: str
    """Why it cannot fit in memory, or nothing."""
    data: Data | None = None


def measure(job: Job, data: Data | None, device: torch.device | None) -> Sizes:
    """Count a job's parameters and find out whether it fits on `device`, if one is named."""
    parameters = num_parameters(build_on_meta(job.config))
    if device is None:
        return Sizes(parameters, "", data)
    try:
        check_fits(job.config, parameters, device)
    except MemoryShortError as e:
        return Sizes(parameters, f"{e.cause} {e.remedy}", data)
    return Sizes(parameters, "", data)


def mark(job: Job, sizes: Sizes) -> None:
    """Write into the folder of a run that has not begun that it waits, or why it will not begin.

    So a report shows every cell of the table from the first minute on.
    """
    if (job.folder / "config.yaml").is_file() and not is_marked(job.folder):
        if sizes.too_large:
            fail(job, sizes, sizes.too_large)
        return
    note: State = "too large" if sizes.too_large else "waiting"
    write_note(job, sizes, note, sizes.too_large or WAITING)


def write_note(job: Job, sizes: Sizes, note: State, reason: str) -> None:
    """Write config.yaml and result.json of a run that never began."""
    with disk_errors(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    status = "stopped" if note == "waiting" else "failed"
    known = describe_config(job.config, sizes.data, job.name, sizes.parameters)
    # First the result: a config alone would mean that the run has begun.
    memory = {"exit_code": EXIT_OUT_OF_MEMORY} if note == "too large" else {}
    RunDir(job.folder).write_result(known | {"status": status, "reason": reason, "step": 0, MARK: note} | memory)
    write_text_atomic(job.folder / "config.yaml", dump_config(job.config))


def fail(job: Job, sizes: Sizes, reason: str) -> None:
    """Write down that a run failed, for a process that could not do so itself."""
    # What went wrong is worth more than that it could not be written down too.
    with suppress(LraError):
        if not (job.folder / "config.yaml").is_file() or is_marked(job.folder):
            write_note(job, sizes, "failed", reason)
            return
        saved = checkpoints.published(job.folder / "checkpoints")
        step = checkpoints.step_of(saved[-1]) if saved else 0
        run = RunDir(job.folder)
        known = describe(job.config, sizes.data, run, sizes.parameters)
        run.write_result(known | {"status": "failed", "reason": reason, "step": step})
