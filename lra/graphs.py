"""CUDA graphs of the whole training step, one for each size of batch: a step then costs one launch.

Random numbers: a graph reads seed and offset of torch's default generator at every replay, so `torch.manual_seed`
before a replay means what it means before the plain step, and both draw the same masks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lra.base.errors import RunError
from tasks.batches import Batch

# Times that a size is run plainly before it is recorded: lazily loaded kernels and tuned ones must be there, and sizes
# that hardly ever come are not worth a recording.
WARM_UP = 2

Work = Callable[[list[Batch]], None]


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    batch: Batch
    """The tensors that the graph reads."""
    filled_from: list[Tensor]
    """What they were last filled from: a tensor that comes again is not copied again."""


class Graphs:
    """Runs a step by replaying its recording for the batch's size, recorded at that size's third time.

    All recordings share one pool of memory: nothing in it outlives a replay, for what a step leaves behind (weights,
    averages, numbers) was allocated before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.recorded: dict[tuple[int, ...], _Recorded] = {}

    def run(self, batch: Batch, work: Work) -> None:
        """Do `work` on the batch, which may still be in (pinned) host memory."""
        size = size_of(batch)
        found = self.recorded.get(size)
        if found is None:
            self.seen[size] += 1
            if self.seen[size] <= WARM_UP:
                work([batch.to(self.device)])
                return
            found = self.recorded[size] = self._record(batch, work)
        tensors = batch.tensors()
        for i, (target, source) in enumerate(zip(found.batch.tensors(), tensors, strict=True)):
            if source is not found.filled_from[i]:
                target.copy_(source, non_blocking=True)
        found.filled_from = tensors
        found.graph.replay()

    def _record(self, batch: Batch, work: Work) -> _Recorded:
        """Record the step; nothing of it runs. Raises RunError where CUDA refuses."""
        # Clones: the next batch is copied over these, and a batch made on the GPU may share tensors with others.
        own = batch.to(self.device).clone()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        try:
            with torch.cuda.stream(self.stream):
                # thread_local: the thread that reads ahead allocates pinned memory whenever it likes.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                work([own])
                graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            raise RunError(
                f"A training step could not be recorded as a CUDA graph ({str(e).splitlines()[0][:300]}).",
                "Set train.cuda_graph=off in a new run; if the attention is your own, set its `static` to False.",
            ) from e
        return _Recorded(graph, own, batch.tensors())


def size_of(batch: Batch) -> tuple[int, ...]:
    """Return all the numbers that a recording depends on."""
    shapes = [t.shape[0] for t in batch.tensors()]
    keys = () if batch.keys is None else (batch.keys.max_length,)
    return *shapes, batch.max_length, int(batch.uniform), *keys
