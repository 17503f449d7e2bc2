"""Recording steps, with a stand-in for CUDA's graphs that does the recorded work again: what is filled in, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lra import graphs
from lra.base.errors import RunError
from lra.graphs import WARM_UP, Graphs
from tasks.batches import Batch, rounded
from tests.train.test_step import batch_of


class FakeGraph:
    """Keeps what is done between begin and end, and does it at every replay."""

    recording: FakeGraph | None = None

    def __init__(self) -> None:
        self.work: Any = None

    def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        FakeGraph.recording = self

    def capture_end(self) -> None:
        FakeGraph.recording = None

    def replay(self) -> None:
        self.work()


@contextmanager
def fake_stream(stream: object) -> Iterator[None]:
    yield


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    fakes = {
        "Stream": lambda device: None, "graph_pool_handle": lambda: None, "CUDAGraph": FakeGraph,
        "stream": fake_stream, "synchronize": lambda device: None,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(graphs.torch.cuda, name, fake)
    return Graphs(torch.device("cpu"))


def test_every_size_is_recorded_at_its_third_time_and_then_filled_anew(recorder: Graphs) -> None:
    seen: list[tuple[str, list[int], list[int]]] = []

    def work(batches: list[Batch]) -> None:
        (batch,) = batches

        def do(how: str) -> None:
            seen.append((how, batch.tokens_T[:4].tolist(), batch.labels_B.tolist()))

        if FakeGraph.recording is None:
            do("plain")
        else:
            FakeGraph.recording.work = lambda: do("replayed")

    torch.manual_seed(0)
    batches = [rounded(batch_of([60, 50]), 64) for _ in range(5)]
    other = rounded(batch_of([10, 5]), 64, num_examples=3)
    for batch in [*batches[:3], other, *batches[3:]]:
        recorder.run(batch, work)
    hows = ["plain"] * WARM_UP + ["replayed", "plain", "replayed", "replayed"]
    expected = [*batches[:3], other, *batches[3:]]
    assert seen == [(h, b.tokens_T[:4].tolist(), b.labels_B.tolist()) for h, b in zip(hows, expected, strict=True)]
    assert len(recorder.recorded) == 1


def test_tensors_that_come_again_are_not_copied_again(recorder: Graphs) -> None:
    def work(batches: list[Batch]) -> None:
        if FakeGraph.recording is not None:
            FakeGraph.recording.work = lambda: None

    batch = rounded(batch_of([60, 50], keys=True), 64)
    for _ in range(3):
        recorder.run(batch, work)
    (recorded,) = recorder.recorded.values()
    # Ours to keep: what was handed in may change.
    assert all(a is not b for a, b in zip(recorded.batch.tensors(), batch.tensors(), strict=True))
    recorded.batch.positions_T.fill_(7)
    recorder.run(batch, work)
    assert (recorded.batch.positions_T == 7).all()
    recorder.run(batch.clone(), work)
    assert torch.equal(recorded.batch.positions_T, batch.positions_T)


def test_a_step_that_cannot_be_recorded_is_told_in_words(recorder: Graphs) -> None:
    def work(batches: list[Batch]) -> None:
        if FakeGraph.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    batch = rounded(batch_of([60, 50]), 64)
    with pytest.raises(RunError, match="not permitted when stream is capturing") as caught:
        for _ in range(3):
            recorder.run(batch, work)
    FakeGraph.recording = None
    assert "cuda_graph=off" in caught.value.remedy
