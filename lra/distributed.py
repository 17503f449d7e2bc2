"""Data parallel over processes that torchrun starts: one process a GPU, or gloo processes on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lra.base.console import console
from lra.base.errors import RunError


@dataclass(frozen=True)
class World:
    """This process's place among all, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process, so that all leave at the same step."""
        if self.size == 1:
            return flag
        shared = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared.item())

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Join the process group that torchrun's environment describes, or stand alone; leave it at the end.

    Within another join_world it gives that one's group.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(here)
    if dist.is_initialized():
        # A run within a chain: the chain's group outlives it.
        yield World(rank, size, here)
        return
    if size == 1:
        yield World(0, 1, here)
        return
    # One voice is enough; errors still come from every process.
    console.quiet = rank > 0
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=size)
    try:
        yield World(rank, size, here)
    except RuntimeError as e:
        # DistError is one of these; gloo reports a lost connection as a bare RuntimeError.
        if not isinstance(e, dist.DistError) and not any(word in str(e) for word in ("gloo", "Gloo", "NCCL")):
            raise
        raise RunError(
            f"Process {rank} of {size} lost the others ({str(e).splitlines()[0][:200]}).",
            "The message of the process that failed first says why; --resume goes on from the last checkpoint.",
        ) from e
    finally:
        dist.destroy_process_group()
