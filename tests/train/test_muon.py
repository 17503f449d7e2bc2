"""Muon against torch's own, one matrix at a time; what goes to which rule; checkpoints keep its momentum."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lra.muon import Muon, MuonAdamW, orthogonalized
from lra.optim import learning_rate, make_optimizer, set_learning_rate
from lra.recipes import load_config
from tests.model.helpers import model_of, small

SHAPES = [(16, 16), (32, 16), (16, 32), (32, 16)]


def matrices() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def test_singular_values_end_near_one_and_directions_stay() -> None:
    x = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(1))
    y = orthogonalized(x).float()
    assert y.shape == x.shape
    singular = torch.linalg.svdvals(y)
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    # The exact answer u v differs from it in the singular values alone.
    assert torch.allclose(u.mT @ y @ v.mT, torch.diag_embed(torch.linalg.diagonal(u.mT @ y @ v.mT)), atol=0.05)


def test_steps_equal_torch_muon() -> None:
    ours, theirs = matrices(), matrices()
    mine = Muon([(ours, 1)], momentum=0.9, weight_decay=0.1)
    set_learning_rate(mine, 0.03)
    torchs = torch.optim.Muon(theirs, lr=0.03, momentum=0.9, weight_decay=0.1)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        # Both compute in bfloat16; batched products round in another order.
        assert torch.allclose(a, b, atol=3e-3), float((a - b).abs().max())


def test_where_found_inf_is_set_nothing_moves() -> None:
    ours, theirs = matrices(), matrices()
    mine, other = (Muon([(p, 1)], weight_decay=0.1) for p in (ours, theirs))
    for step, bad in enumerate((False, True, False)):
        set_gradients(ours, step)
        if bad:
            ours[0].grad = torch.full(SHAPES[0], float("nan"))
        mine.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
        mine.step()
        if not bad:
            set_gradients(theirs, step)
            other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_rate_in_memory_is_a_rate() -> None:
    ours, theirs = matrices(), matrices()
    for parameters, rate in ((ours, torch.tensor(0.05)), (theirs, 0.05)):
        optimizer = Muon([(parameters, 1)], weight_decay=0.1)
        optimizer.param_groups[0]["lr"] = rate
        set_gradients(parameters, 0)
        set_learning_rate(optimizer, 0.03)
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_a_fused_weight_is_orthogonalised_part_by_part() -> None:
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(48, 16))
    parts = [nn.Parameter(part.detach().clone()) for part in fused.chunk(3)]
    gradient = torch.randn(48, 16)
    fused.grad = gradient.clone()
    for part, piece in zip(parts, gradient.chunk(3), strict=True):
        part.grad = piece.clone()
    for optimizer in (Muon([([fused], 3)]), Muon([(parts, 1)])):
        optimizer.step()
    assert torch.equal(fused.detach(), torch.cat([part.detach() for part in parts]))


def test_hidden_matrices_go_to_muon_and_the_rest_to_adamw_with_its_own_rate() -> None:
    config = small("train.optimizer=muon", "train.learning_rate=0.02", "train.adamw_learning_rate=3e-4")
    model = model_of(config)
    optimizer = make_optimizer(model, config.train)
    assert isinstance(optimizer, MuonAdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon = {names[id(p)] for group in optimizer.muon.param_groups for p in group["params"]}
    expected = {"attention.qkv.weight", "attention.out.weight", "up.weight", "down.weight"}
    assert of_muon == {f"layers.{i}.{name}" for i in range(config.model.depth) for name in expected}
    assert len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    set_learning_rate(optimizer, 0.01)  # half of the base
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1.5e-4, 0.01, 0.01])


def test_state_goes_through_a_state_dict_and_back() -> None:
    config = small("train.optimizer=muon", "train.learning_rate=0.02")
    first = model_of(config)
    second = copy.deepcopy(first)
    a, b = make_optimizer(first, config.train), make_optimizer(second, config.train)
    for step in range(3):
        set_gradients(list(first.parameters()), step)
        a.step()
    second.load_state_dict(first.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for model, optimizer in ((first, a), (second, b)):
        set_gradients(list(model.parameters()), 9)
        optimizer.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_wsd_warms_up_stays_and_falls_to_zero() -> None:
    config = load_config(
        "listops/smoke",
        ["train.steps=100", "train.learning_rate=0.5", "train.schedule={name: wsd, warmup: 10, decay: 0.2}"],
    ).train
    assert learning_rate(0, config) == 0.0
    assert learning_rate(5, config) == pytest.approx(0.25)
    assert {learning_rate(step, config) for step in range(10, 81)} == {0.5}
    assert learning_rate(90, config) == pytest.approx(0.25)
    assert learning_rate(99, config) == pytest.approx(0.025)
