"""Calls recorded in CUDA graphs: a replay costs the host one launch, so that its time is that of the kernels alone."""

import functools
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch

from attention_kernels.bench_timing import first_estimate, free_memory, time_call
from attention_kernels.captures import forget_capture

__all__ = ["record", "time_graph"]

# As in PyTorch's documentation of CUDA graphs.
_WARM_UP = 3


def time_graph(call: Callable[[], object], device: torch.device, budget_ms: float) -> float:
    """Record a call and return the median time of its replay in ms, measured as time_call does.

    The recording is freed; free_memory then hands its memory back. Raises what `record` raises.
    """
    graph = record(call, device)
    try:
        return time_call(graph.replay, device, budget_ms, first_estimate(graph.replay, device))
    finally:
        graph.reset()


def record(call: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Run a call on a side stream until it is warm and record it there; what is recorded does not run.

    Raises the call's own error, or RuntimeError where CUDA refuses; torch can go on after either.
    """
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    # The recording takes memory of its own, and cannot ask for what others hold unused.
    free_memory(device)
    with torch.cuda.stream(side):
        return _capture(call, device)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for all recordings: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


def _capture(call: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Record a call on the current stream."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    error: BaseException | None = None
    graph.capture_begin(pool=pool)
    try:
        call()
    except BaseException as e:
        error = e
    # In any case: until the capture ends the stream takes no more work.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            graph.capture_end()
        except RuntimeError as e:
            _clean_up(pool, device)
            error = error or e
    if error is None and any("Graph is empty" in str(w.message) for w in said):
        error = RuntimeError("nothing was recorded: it runs on another stream")
    if error is not None:
        raise error
    return graph


def _clean_up(pool: tuple[int, int], device: torch.device) -> None:
    """Undo what torch leaves when CUDA calls a capture invalid, and let its pool go, which no other shares."""
    index = forget_capture(pool, device)
    # AttributeError: the name is torch's own and may change.
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_releasePool(index, pool)
