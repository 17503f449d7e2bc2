"""Recording steps without a GPU: a stand-in for CUDA's graphs shows what is run, recorded, given up and cleaned up."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lra.attention import backend_class
from lra.base.errors import ConfigError, RunError
from lra.graphs import WARM_UP, Graphs
from lra.learner import make_learner
from tasks.batches import Batch
from tests.train.test_step import batch_of
from tests.train.test_training import ALONE, tiny


class StandIn:
    """A graph that notes what is asked of it; `invalid` makes CUDA refuse at the end of the capture."""

    invalid = False
    events: list[str] = []  # noqa: RUF012

    def capture_begin(self, **_: object) -> None:
        self.events.append("begin")

    def capture_end(self) -> None:
        self.events.append("end")
        if self.invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.events.append("replay")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(StandIn, "events", [])
    monkeypatch.setattr(StandIn, "invalid", False)
    for name, value in {
        "CUDAGraph": StandIn, "Stream": lambda device: None, "stream": lambda stream: nullcontext(),
        "synchronize": lambda device: None, "graph_pool_handle": lambda: (0, 1), "empty_cache": lambda: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("lra.graphs.forget_capture", lambda pool, device: StandIn.events.append("clean up"))
    return StandIn.events


def run(graphs: Graphs, times: int, breaks: BaseException | None = None) -> int:
    """Give the same batch so often; return how often the work was really done (and not recorded)."""
    done = 0

    def work(batches: list[Batch]) -> None:
        nonlocal done
        capturing = StandIn.events[-1:] == ["begin"]
        if capturing and breaks is not None:
            raise breaks
        done += not capturing

    batch = batch_of([10, 20])
    for _ in range(times):
        graphs.run(batch, work)
    return done


def test_a_size_is_recorded_at_its_third_time(events: list[str]) -> None:
    graphs = Graphs(torch.device("cpu"))
    assert run(graphs, 5) == WARM_UP and len(graphs.recorded) == 1
    assert events == ["begin", "end", "replay", "replay", "replay"]


@pytest.mark.parametrize("invalid", [False, True])
def test_a_recording_that_breaks_is_ended_and_all_steps_are_done_plainly(
    events: list[str], invalid: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StandIn, "invalid", invalid)
    graphs = Graphs(torch.device("cpu"))
    assert run(graphs, 6, RuntimeError("Cannot copy between CPU and CUDA tensors")) == 6
    assert events == ["begin", "end", *(["clean up"] if invalid else [])]
    assert not graphs.recorded and capsys.readouterr().err.count("could not be recorded") == 1


def test_a_capture_that_is_invalid_at_its_end_is_cleaned_up(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "invalid", True)
    assert run(Graphs(torch.device("cpu")), 4) == 4
    assert events == ["begin", "end", "clean up"]


def test_a_recording_that_was_demanded_and_breaks_is_an_error(events: list[str]) -> None:
    with pytest.raises(RunError, match="could not be recorded"):
        run(Graphs(torch.device("cpu"), demanded=True), 4, RuntimeError("no"))
    assert events == ["begin", "end"]


def test_an_interrupt_ends_the_capture_too(events: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Graphs(torch.device("cpu")), 4, KeyboardInterrupt())
    assert events == ["begin", "end"]


def test_graphs_are_refused_in_words_where_they_cannot_be(tiny_data: Path) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        make_learner(tiny("listops", tiny_data, "train.cuda_graph=on"), ALONE)


@pytest.mark.parametrize("backend", ["flash", "block_sparse"])
def test_the_tiled_form_is_not_recorded(backend: str, tiny_data: Path) -> None:
    config = tiny("listops", tiny_data, f"attention={backend}")
    found = backend_class(backend)
    assert found.why_not_recorded(config.attention, torch.zeros(1, 2, 16)) is not None
    assert backend_class("standard").why_not_recorded(config.attention, torch.zeros(1, 2, 16)) is None
