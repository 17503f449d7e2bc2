"""The step on the device: nothing that is not finite gets through its gate, sizes of batches are few, code is one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from lra.compiling import compile_parts
from lra.config import RunConfig
from lra.distributed import World
from lra.evaluate import eval_batches
from lra.experiment import open_data
from lra.feed import make_batches
from lra.graphs import size_of
from lra.learner import Gate, Learner, make_learner, wants_compile
from lra.model import Classifier
from lra.objective import Objective
from lra.packing import look_up, take_rows
from lra.step import gated_work
from tasks.batches import Batch, Keys, rounded
from tests.reliability.test_resume import differing, everything
from tests.train.test_training import ALONE, tiny

CUDA = torch.device("cuda")


def batch_of(lengths: list[int], keys: bool = False) -> Batch:
    """Return a packed batch of random text."""
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    tokens = torch.randint(0, 15, (sum(lengths),), dtype=torch.uint8)
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    chosen = None
    if keys:
        kept = tokens > 6
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])[cu_seqlens.long()].to(torch.int32)
        chosen = Keys(kept.nonzero().flatten(), bounds, int(bounds.diff().max()))
    labels = torch.randint(0, 2, (len(lengths),))
    uniform = len(set(lengths)) == 1
    return Batch(tokens, positions, cu_seqlens, max(lengths), labels, chosen, uniform=uniform)


@pytest.mark.parametrize("keys", [False, True])
def test_a_rounded_batch_is_the_same_batch_with_spare_rows(keys: bool) -> None:
    batch = batch_of([100, 30, 256, 7], keys)
    wide = rounded(batch, 256, num_examples=6)
    assert wide.tokens_T.shape[0] == 512 and wide.num_tokens == 393 and wide.max_length == 256
    assert torch.equal(wide.tokens_T[:393], batch.tokens_T) and not wide.tokens_T[393:].any()
    assert wide.cu_seqlens.tolist() == [*batch.cu_seqlens.tolist(), 393, 393]
    assert wide.labels_B.tolist() == [*batch.labels_B.tolist(), -100, -100]
    if batch.keys is not None and wide.keys is not None:
        count = len(batch.keys.index_K)
        assert torch.equal(wide.keys.index_K[:count], batch.keys.index_K)
        assert (wide.keys.index_K[count:] == 512).all() and len(wide.keys.index_K) % 128 == 0


def test_whole_sequences_stay_uniform_and_full_buffers_of_others_do_not() -> None:
    assert rounded(batch_of([64, 64]), 64).uniform
    assert not rounded(batch_of([64, 64]), 64, num_examples=3).uniform
    nearly_full = rounded(batch_of([64, 63]), 64)
    assert len(nearly_full.tokens_T) == 128 and not nearly_full.uniform


def test_sizes_are_few() -> None:
    lengths = torch.randint(1, 4097, (500, 32)).tolist()
    assert len({size_of(rounded(batch_of(n), 4096)) for n in lengths}) <= 64


@pytest.mark.parametrize("pooling", ["cls", "mean", "padded_mean", "max", "attention"])
@pytest.mark.parametrize("backend", ["flash", "standard"])
def test_spare_rows_change_no_logit_and_no_gradient(pooling: str, backend: str, tiny_data: Path) -> None:
    config = tiny("listops", tiny_data, f"attention={backend}", f"model.pooling={pooling}")
    model = Classifier(config).eval()
    cls = int(pooling == "cls")
    batch = batch_of([10, 30 + cls, 64 + cls, 7])
    found = []
    for given in (batch, rounded(batch, 64 + cls, num_examples=5)):
        logits = model(given)
        model.zero_grad()
        F.cross_entropy(logits, given.labels_B).backward()
        found.append((logits[:4].detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_taken_rows_and_their_gradient() -> None:
    x = torch.randn(20, 2, 3, requires_grad=True)
    index = torch.tensor([1, 4, 19, 20, 20])
    weight = torch.randn(5, 2, 3)
    take_rows(x, index).mul(weight).sum().backward()
    assert torch.equal(take_rows(x, index)[:3], x[[1, 4, 19]])
    expected = torch.zeros(20, 2, 3)
    expected[[1, 4, 19]] = weight[:3]
    assert x.grad is not None and torch.equal(x.grad, expected)


@pytest.mark.parametrize("copies", [1, 64])
def test_looked_up_rows_and_their_gradient(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if copies > 1:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    table = torch.randn(7, 5, requires_grad=True)
    index = torch.randint(0, 7, (500,))
    index[:400] = 2
    weight = torch.randn(500, 5)
    (look_up(table, index) * weight).sum().backward()
    other = table.detach().clone().requires_grad_()
    (F.embedding(index, other) * weight).sum().backward()
    assert torch.equal(look_up(table, index), F.embedding(index, table))
    assert table.grad is not None and other.grad is not None
    torch.testing.assert_close(table.grad, other.grad, rtol=1e-5, atol=1e-5)


EVERY = ["flash", "block_sparse", "standard", "sdpa"]
MIXERS = ["linformer", "linear", "performer", "local", "reformer", "smyrf"]


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Let torch.compile only trace, and count how often it does."""
    torch._dynamo.reset()
    counter, real = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=counter, **options))
    return counter


def traced(config: RunConfig) -> Objective:
    objective = Objective(Classifier(config), config.train)
    compile_parts(objective, traced_whole=True)
    return objective


@pytest.mark.parametrize("backend", [*EVERY, *(pytest.param(m, marks=pytest.mark.slow) for m in MIXERS)])
def test_one_compilation_serves_every_layer_and_number_of_rows(
    backend: str, tiny_data: Path, counter: CompileCounterWithBackend
) -> None:
    extra = ["model.depth=3", "train.denoise.rate=0.15"] if backend == "flash" else []
    objective = traced(tiny("listops", tiny_data, f"attention={backend}", *extra))
    sizes = ([10, 60, 64, 5], [64, 64, 64, 60], [3, 4, 5, 6], [64, 30, 64, 64], [64, 64, 64, 63])
    for lengths in sizes:
        objective(rounded(batch_of(lengths), 64)).backward()
    assert counter.frame_count == 3  # before the layers, one layer, behind them
    objective.eval()
    with torch.no_grad():
        for lengths in sizes:
            objective.model(rounded(batch_of(lengths), 64))
    assert counter.frame_count == 6


@pytest.mark.parametrize("backend", ["flash", "standard"])
def test_whole_sequences_of_several_lengths_need_one_compilation_too(
    backend: str, tiny_data: Path, counter: CompileCounterWithBackend
) -> None:
    config = tiny("listops", tiny_data, f"attention={backend}", "model.pooling=max")
    objective, plain = Objective(Classifier(config), config.train), Objective(Classifier(config), config.train)
    compile_parts(objective, traced_whole=True, whole_vary=True)
    plain.load_state_dict(objective.state_dict())
    for length in (24, 56, 64, 32):
        batch = batch_of([length] * 4)
        loss = objective(batch)
        torch.testing.assert_close(loss, plain(batch), rtol=1e-4, atol=1e-5)
        loss.backward()
    assert counter.frame_count == 3


def test_dropped_keys_need_one_compilation_too(tiny_data: Path, counter: CompileCounterWithBackend) -> None:
    config = tiny("image", tiny_data, "data.black_pixels=not_key", "attention=flash")
    objective = traced(config).eval()
    plain = Classifier(config).eval()
    plain.load_state_dict(objective.model.state_dict())
    for _ in range(4):
        batch = rounded(batch_of([1024] * 2, keys=True), 1024)
        torch.testing.assert_close(objective.model(batch), plain(batch), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 3


def test_the_last_batch_of_whole_sequences_has_the_form_of_all_others(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    config = tiny("image", tiny_data, "train.eval_batch_size=4")
    cache = open_data(config).cache
    batches = [b for _, _, b in eval_batches(config, cache, np.arange(6), World(0, 1, CUDA), 0) if b is not None]
    assert [size_of(b) for b in batches] == [size_of(batches[0])] * 2 and batches[1].uniform
    assert batches[1].labels_B.tolist() == [*cache.labels[4:6].tolist(), -100, -100]
    assert torch.equal(batches[1].tokens_T[:1024], torch.from_numpy(np.array(cache.tokens[4 * 1024 : 5 * 1024])))


def gated(config: RunConfig) -> tuple[Learner, Gate]:
    """Return a learner whose updates go through a gate, as on a GPU: the fused optimizer has a CPU form."""
    learner = make_learner(config, ALONE)
    learner.optimizer = torch.optim.AdamW(learner.model.parameters(), lr=1e-3, fused=True)
    learner.gate = Gate(ALONE.device)
    return learner, learner.gate


def test_a_closed_gate_lets_nothing_through_any_more(tiny_data: Path) -> None:
    config = tiny("listops", tiny_data, "train.ema=0.9", "train.clip_norm=1.0", "train.batch_size=4")
    learner, gate = gated(config)
    batches = make_batches(config, open_data(config), ALONE)
    assert learner.ema is not None

    def step(number: int) -> None:
        assert learner.ema is not None
        learner.ema.advance()
        gated_work(learner, gate, config, ALONE, batches.at(number))

    step(0)
    step(1)
    before = everything(learner)
    assert gate.alive.item() == 1 and gate.numbers.isfinite().all()
    parameter = next(learner.model.parameters())
    hook = parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), math.nan))
    step(2)
    assert gate.alive.item() == 0 and not gate.numbers.isfinite().all()
    assert differing(everything(learner), before) == []
    hook.remove()
    step(3)
    # Finite again, but the steps behind a bad one are held back until the host has heard of it.
    assert gate.numbers.isfinite().all() and gate.alive.item() == 0
    assert differing(everything(learner), before) == []


def test_the_gate_is_no_different_from_reading_first(tiny_data: Path) -> None:
    config = tiny("listops", tiny_data, "train.batch_size=4", "train.clip_norm=1.0")
    batches = make_batches(config, open_data(config), ALONE)
    learner, gate = gated(config)
    plain, _ = gated(config)
    for number in range(3):
        torch.manual_seed(number)
        gated_work(learner, gate, config, ALONE, batches.at(number))
        torch.manual_seed(number)
        plain.optimizer.zero_grad()
        plain.forward(batches.at(number)[0]).backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        plain.optimizer.step()
    for a, b in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_compilation_by_itself_is_for_long_runs_on_a_gpu(tiny_data: Path) -> None:
    long = tiny("listops", tiny_data, "train.steps=5000", "attention=flash")
    assert wants_compile(long, CUDA) and not wants_compile(long, ALONE.device)
    assert not wants_compile(tiny("listops", tiny_data, "train.steps=400", "attention=flash"), CUDA)
    assert all(wants_compile(tiny("listops", tiny_data, "train.steps=5000", f"attention={m}"), CUDA) for m in MIXERS)
    assert wants_compile(tiny("listops", tiny_data, "train.steps=5", "train.compile=true"), ALONE.device)
    assert not wants_compile(tiny("listops", tiny_data, "train.steps=5000", "train.compile=false"), CUDA)
