"""Training on a GPU: every backend and precision runs, a resumed run repeats the undisturbed one bit by bit.

The recorded step (CUDA graphs) gives the plain step's bits, the compiled one its curve; nothing is compiled twice; a
NaN changes no weight although the host hears of it late.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lra.base.errors import NonFiniteLossError, Stopped
from lra.config import RunConfig
from lra.distributed import World, join_world
from lra.experiment import open_data, run_training
from lra.feed import batch_feed, make_batches
from lra.graphs import Graphs
from lra.learner import Learner, make_learner
from lra.preempt import StopRequest
from lra.recipes import load_config
from lra.run_dir import RunDir
from lra.step import check_arrived, update
from lra.train import train
from tasks.batches import Batch

SMALL = [
    "train.steps=20", "train.eval_every=10", "train.checkpoint_every=7", "train.log_every=5", "task.count=500",
    "task.min_length=20", "task.max_length=200", "data.max_length=200", "model.attention_dropout=0.1",
    "model.dropout=0.1", "train.precision=bf16",
]  # fmt: skip
ALONE = World(0, 1, torch.device("cuda", 0))


def small(tmp_path: Path, *overrides: str) -> RunConfig:
    folders = [f"data.folder={tmp_path / 'data'}", f"runs_folder={tmp_path / 'runs'}"]
    return load_config("listops/smoke", [*SMALL, *folders, *overrides])


@pytest.fixture(autouse=True)
def _by_itself() -> Iterator[None]:
    """Let no test see what another compiled, and tell at once which one left the stream in a capture."""
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not torch.cuda.is_current_stream_capturing()


def steps(config: RunConfig, count: int, folder: Path) -> tuple[Learner, list[float]]:
    """Do some steps as the loop does, the numbers read at the end; return the learner and the losses."""
    learner = make_learner(config, ALONE)
    feed = batch_feed(make_batches(config, open_data(config), ALONE), 0, count, ALONE.device)
    numbers = [update(learner, config, batches, ALONE, RunDir(folder)) for batches in feed]
    return learner, [check_arrived(learner, config, n, ALONE, RunDir(folder))[0] for n in numbers]


@pytest.mark.parametrize("backend", ["standard", "flash", "block_sparse", "sdpa"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_backend_trains_in_every_precision(backend: str, precision: str, tmp_path: Path) -> None:
    result = run_training(small(tmp_path, f"attention={backend}", f"train.precision={precision}", "train.ema=0.9"))
    assert result["status"] == "finished" and result["peak_memory_bytes"] > 0
    assert result["test"]["last"]["loss"] < 3


class StopAt(StopRequest):
    """Asks to stop after so many questions."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    @property
    def reason(self) -> str | None:
        self.left -= 1
        return "the test says so" if self.left < 0 else None


def trained(config: RunConfig, folder: Path, stops: list[int]) -> Learner:
    with join_world() as world:
        data, run = open_data(config), RunDir(folder)
        for after in stops:
            with pytest.raises(Stopped):
                train(config, data, run, world, StopAt(after))
        return train(config, data, run, world, StopRequest())


def same_weights(a: Learner, b: Learner) -> None:
    """Demand equal bits."""
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    ("backend", "compile_it"),
    [("standard", "false"), ("flash", "false"), ("block_sparse", "false"), ("flash", "true")],
)
def test_a_resumed_run_gives_the_same_bits(backend: str, compile_it: str, tmp_path: Path) -> None:
    config = small(
        tmp_path, f"attention={backend}", "train.deterministic=true", "attention.deterministic=true",
        f"train.compile={compile_it}",
    )  # fmt: skip
    torch.use_deterministic_algorithms(True)
    try:
        whole = trained(config, tmp_path / "whole", [])
        broken = trained(config, tmp_path / "broken", [3, 9])
    finally:
        torch.use_deterministic_algorithms(False)
    same_weights(whole, broken)


@pytest.mark.parametrize("backend", ["standard", "flash", "block_sparse"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_recorded_step_is_the_plain_one_bit_by_bit(backend: str, optimizer: str, tmp_path: Path) -> None:
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for graph in ("off", "auto"):
            config = small(
                tmp_path, f"attention={backend}", "train.deterministic=true", "attention.deterministic=true",
                "train.ema=0.9", f"train.cuda_graph={graph}", f"train.optimizer={optimizer}", "train.clip_norm=1.0",
            )  # fmt: skip
            found.append(steps(config, 40, tmp_path))
    finally:
        torch.use_deterministic_algorithms(False)
    plain, recorded = found[0][0], found[1][0]
    assert plain.graphs is None and recorded.graphs is not None and recorded.graphs.recorded
    assert found[0][1] == found[1][1]
    same_weights(plain, recorded)
    assert plain.ema is not None and recorded.ema is not None
    assert all(torch.equal(plain.ema.average[n], recorded.ema.average[n]) for n in plain.ema.average)


def test_compiled_standard_attention_trains_with_dropout(tmp_path: Path) -> None:
    # Its mask is drawn by compiled code too, whose 64-bit products once met 32-bit index arithmetic.
    config = small(tmp_path, "attention=standard", "train.compile=true", "train.precision=bf16")
    losses = steps(config, 20, tmp_path)[1]
    plain = steps(small(tmp_path, "attention=standard", "train.precision=bf16"), 20, tmp_path)[1]
    assert all(math.isfinite(x) for x in losses)
    assert sum(losses[-5:]) / 5 == pytest.approx(sum(plain[-5:]) / 5, abs=0.3)


@pytest.mark.parametrize("backend", ["flash", "block_sparse"])
def test_compiled_and_recorded_training_follows_the_plain_one_and_compiles_once(backend: str, tmp_path: Path) -> None:
    # Without dropout: the compiled form draws other masks.
    plain = ["model.attention_dropout=0.0", "model.dropout=0.0", f"attention={backend}"]
    eager = steps(small(tmp_path, *plain, "train.cuda_graph=off", "train.compile=false"), 20, tmp_path)[1]
    learner, fast = steps(small(tmp_path, *plain, "train.compile=true"), 40, tmp_path)
    assert learner.graphs is not None and learner.graphs.recorded
    assert counters["stats"]["unique_graphs"] == 3  # before the layers, one layer, behind them
    assert fast[:20] == pytest.approx(eager, rel=0.02)


def test_evaluation_of_compiled_weights_agrees_and_compiles_once(tmp_path: Path) -> None:
    result = run_training(small(tmp_path, "attention=flash", "train.compile=true", "name=compiled"))
    assert counters["stats"]["unique_graphs"] == 6  # training and evaluation
    assert result["status"] == "finished" and result["test"]["last"]["loss"] < 3


@pytest.mark.parametrize(("compile_it", "graph"), [("false", "off"), ("false", "auto"), ("true", "auto")])
def test_a_nan_changes_nothing_although_it_is_read_late(compile_it: str, graph: str, tmp_path: Path) -> None:
    config = small(tmp_path, "attention=flash", f"train.compile={compile_it}", f"train.cuda_graph={graph}")
    bad = 15
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    learner = make_learner(config, ALONE)
    assert learner.gate is not None
    feed = batch_feed(make_batches(config, open_data(config), ALONE), 0, 20, ALONE.device)
    before: dict[str, torch.Tensor] = {}
    numbers = []
    for step, batches in enumerate(feed):
        if step == bad:
            before = {k: v.clone() for k, v in learner.model.state_dict().items()}
            rate = learner.gate.alive
            # As a NaN of the forward pass: whatever is multiplied with it.
            parameter = next(p for p in learner.model.parameters() if p.dim() == 2)
            kept = parameter.detach()[10, 0].clone()
            parameter.detach()[10, 0] = math.nan
        numbers.append(update(learner, config, batches, ALONE, run))
        if step == bad:
            parameter.detach()[10, 0] = kept
    assert rate.item() == 0
    for k, v in learner.model.state_dict().items():
        assert torch.equal(v, before[k]), k
    with pytest.raises(NonFiniteLossError, match=f"At step {bad}"):
        for n in numbers:
            check_arrived(learner, config, n, ALONE, run)
    assert learner.step == bad and json.loads((run.path / "nonfinite.json").read_text())["step"] == bad


@pytest.mark.parametrize("backend", ["linformer", "linear", "performer", "local", "reformer", "smyrf"])
def test_the_approximate_methods_are_recorded_too(backend: str, tmp_path: Path) -> None:
    learner, losses = steps(small(tmp_path, f"attention={backend}"), 25, tmp_path)
    assert learner.graphs is not None and learner.graphs.recorded
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("backend", ["flash", "block_sparse"])
def test_what_the_kernels_refuse_is_not_recorded(backend: str, tmp_path: Path) -> None:
    learner, losses = steps(small(tmp_path, f"attention={backend}", "train.precision=fp32"), 6, tmp_path)
    assert learner.graphs is None and learner.gate is not None
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("how", ["synchronize", "error"])
def test_after_a_recording_that_broke_everything_works_as_before(how: str, tmp_path: Path) -> None:
    config = small(tmp_path, "attention=flash", "train.ema=0.9")
    learner, world = make_learner(config, ALONE), ALONE
    assert learner.graphs is not None
    feed = batch_feed(make_batches(config, open_data(config), world), 0, 4, world.device)
    batch = next(feed)[0]
    feed.close()
    total = torch.zeros((), device=world.device)

    def work(batches: list[Batch]) -> None:
        total.add_(torch.nn.functional.dropout(batches[0].tokens_T.float(), 0.5).mean())
        if torch.cuda.is_current_stream_capturing():
            if how == "error":
                raise RuntimeError("no")
            # CUDA itself then calls the capture invalid.
            torch.cuda.current_stream().synchronize()

    def sums(graphs: Graphs | None) -> list[float]:
        found = []
        total.zero_()
        for seed in range(5):
            torch.manual_seed(seed)
            work([batch.to(world.device)]) if graphs is None else graphs.run(batch, work)
            found.append(total.item())
        return found

    broken = learner.graphs
    assert sums(broken) == sums(None) and broken.given_up and not broken.recorded
    # And the process can still record.
    learner, losses = steps(config, 20, tmp_path)
    assert learner.graphs is not None and learner.graphs.recorded and all(math.isfinite(loss) for loss in losses)
