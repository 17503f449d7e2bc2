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

from attention_kernels.captures import forget_capture
from lra.base.console import warn
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
    averages, numbers) was allocated before. Where a step cannot be recorded, all go on plainly, which is told once;
    `demanded` makes it a RunError.
    """

    def __init__(self, device: torch.device, *, demanded: bool = False) -> None:
        self.device, self.demanded = device, demanded
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.recorded: dict[tuple[int, ...], _Recorded] = {}
        self.given_up = False

    def run(self, batch: Batch, work: Work) -> None:
        """Do `work` on the batch, which may still be in (pinned) host memory."""
        found = self._recording_of(batch, work)
        if found is None:
            work([batch.to(self.device)])
            return
        tensors = batch.tensors()
        for i, (target, source) in enumerate(zip(found.batch.tensors(), tensors, strict=True)):
            if source is not found.filled_from[i]:
                target.copy_(source, non_blocking=True)
        found.filled_from = tensors
        found.graph.replay()

    def _recording_of(self, batch: Batch, work: Work) -> _Recorded | None:
        """Return the recording of the batch's size, made now if it is time; None: run this step plainly."""
        size = size_of(batch)
        if self.given_up or size in self.recorded:
            return self.recorded.get(size)
        self.seen[size] += 1
        if self.seen[size] <= WARM_UP:
            return None
        try:
            self.recorded[size] = self._record(batch, work)
        except RuntimeError as e:
            cause = f"A training step could not be recorded as a CUDA graph ({str(e).splitlines()[0][:300]})."
            if self.demanded:
                raise RunError(
                    cause, "Set train.cuda_graph=auto or off; if the attention is your own, set its `static` to False."
                ) from e
            warn(f"{cause} The run goes on without: the same numbers, a little slower.")
            self.given_up = True
        if self.given_up:
            # Outside the handler: the error's traceback holds what the broken recording had allocated.
            self.recorded.clear()
            torch.cuda.empty_cache()
        return self.recorded.get(size)

    def _record(self, batch: Batch, work: Work) -> _Recorded:
        """Record the step; nothing of it runs. Raises RuntimeError where CUDA refuses, and can go on after it."""
        # Clones: the next batch is copied over these, and a batch made on the GPU may share tensors with others.
        own = batch.to(self.device).clone()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            try:
                # thread_local: the thread that reads ahead allocates pinned memory whenever it likes.
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                work([own])
            except BaseException:
                self._end_broken(graph)
                raise
            try:
                graph.capture_end()
            except RuntimeError:
                forget_capture(self.pool, self.device)
                raise
        return _Recorded(graph, own, batch.tensors())

    def _end_broken(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture whose work failed: until then the stream takes no more work."""
        try:
            graph.capture_end()
        except RuntimeError:
            forget_capture(self.pool, self.device)


def size_of(batch: Batch) -> tuple[int, ...]:
    """Return all the numbers that a recording depends on."""
    shapes = [t.shape[0] for t in batch.tensors()]
    keys = () if batch.keys is None else (batch.keys.max_length,)
    return *shapes, batch.max_length, int(batch.uniform), *keys
