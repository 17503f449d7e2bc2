"""The way past torch.ops that plain eager calls take: what it launches, and who is not sent that way.

The kernels' driver only takes notes (test_launcher.py), so that "CUDA" calls run on CPU tensors; values mean nothing.
"""

import weakref
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attention_kernels import (
    BlockLayout,
    block_sparse_attention,
    block_sparse_attention_varlen,
    cuda_ops,
    dispatch,
    flash_attention,
    flash_attention_varlen,
    ops,
)
from tests.kernels import test_launcher
from tests.kernels.cases import SEED, offsets
from tests.kernels.test_ops import through_dynamo

driver = test_launcher.driver
Call = Callable[..., Tensor]
RULE = {"dropout_p": 0.1, "dropout_seed": SEED, "causal": True}
# Of struct Params: what the caller brings, and so has one address in both ways; the rest is allocated by the call.
BROUGHT = [*range(3), 4, *range(13, 20)]


@pytest.fixture
def kernels(driver, monkeypatch):
    """Let the kernels take CPU tensors; return the driver's notes."""
    for name in ("_cuda_functions", "_picked", "_ran"):
        monkeypatch.setattr(dispatch, name, {})
    monkeypatch.setattr(dispatch, "_refusal", lambda *_: None)
    cuda_ops.register()
    return driver


@pytest.fixture
def through_ops(kernels, monkeypatch) -> list[str]:
    """Return the names of the operators that are called from now on."""
    called: list[str] = []

    def noting(name: str, operator: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: called.append(name) or operator(*arguments)

    monkeypatch.setattr(ops, "_OPERATORS", {name: noting(name, x) for name, x in ops._OPERATORS.items()})
    return called


def leaves(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float16).requires_grad_() for _ in range(3)]


def fixed_call() -> tuple[Call, list[Tensor]]:
    lengths = torch.tensor([300, 7], dtype=torch.int32)
    return lambda *x: flash_attention(*x, key_lengths=lengths, **RULE), leaves(2, 300, 3, 32)


def packed_call() -> tuple[Call, list[Tensor]]:
    cu = offsets([100, 200]).int()
    return lambda *x: flash_attention_varlen(*x, cu, cu, 200, 200, deterministic=True), leaves(320, 2, 64)


def sparse_call() -> tuple[Call, list[Tensor]]:
    layout = BlockLayout.butterfly(300)
    return lambda *x: block_sparse_attention(*x, layout, **RULE), leaves(2, 300, 2, 32)


def sparse_packed_call() -> tuple[Call, list[Tensor]]:
    layout, cu = BlockLayout.butterfly(300), offsets([100, 200]).int()
    return lambda *x: block_sparse_attention_varlen(*x, layout, cu, 200), leaves(320, 2, 32)


CALLS = [fixed_call, packed_call, sparse_call, sparse_packed_call]


class Sees(TorchDispatchMode):
    """Looks at every operator and changes none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    """Looks at every function and changes none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Mine(Tensor):
    """A class of tensors that changes nothing."""


def taken(notes, since: int) -> list[tuple[object, ...]]:
    """Return what was launched, each with the parameters that do not depend on where the call's tensors lie."""
    pairs = zip(notes.launches[since:], notes.fields[since:], strict=True)
    return [
        (*launch, [x if at >= 21 or at in BROUGHT else bool(x) for at, x in enumerate(fields)])
        for launch, fields in pairs
    ]


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("make", CALLS)
def test_both_ways_launch_the_same(driver, through_ops, monkeypatch, make, hopper) -> None:
    if hopper:
        test_launcher.on_hopper(monkeypatch, multiprocessors=3)
    call, inputs = make()
    dout = torch.randn_like(inputs[0])
    torch.autograd.grad(call(*inputs), inputs, dout)
    assert through_ops == [] and len(driver.launches) >= 4
    straight = taken(driver, 0)
    since = len(driver.launches)
    with Sees():
        torch.autograd.grad(call(*inputs), inputs, dout)
    assert [name.split("_")[1] for name in through_ops] == ["forward", "backward"]
    assert taken(driver, since) == straight


def test_a_graph_that_is_kept_launches_the_same_again(driver, through_ops) -> None:
    for make in CALLS:
        call, inputs = make()
        out, dout = call(*inputs), torch.randn_like(inputs[0])
        at = [len(driver.launches)]
        for _ in range(3):
            torch.autograd.grad(out, inputs, dout, retain_graph=True)
            at.append(len(driver.launches))
        first, second, third = (taken(driver, a)[: b - a] for a, b in pairwise(at))
        assert first == second == third
    assert through_ops == []


def test_tensors_that_saved_tensor_hooks_bring_back_are_the_ones_read(driver, through_ops) -> None:
    """As under offloading to the CPU: other addresses, other strides, and the saved offsets, not those of today."""
    cu = offsets([100, 200]).int()
    q, k, v = inputs = leaves(320, 2, 64)
    brought: list[Tensor] = []

    def bring(x: Tensor) -> Tensor:
        # The same values, rows further apart.
        brought.append(torch.nn.functional.pad(x, (0, 8))[..., : x.shape[-1]] if x.dim() == 3 else x.clone())
        return brought[-1]

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), bring):
        out = flash_attention_varlen(q, k, v, cu, cu, 200, 200)
    cu.zero_()
    since = len(driver.launches)
    torch.autograd.grad(out, inputs, torch.randn_like(out))
    addresses = {x.data_ptr() for x in brought}
    for fields in driver.fields[since:]:
        assert {*fields[:4], fields[9], *fields[13:15]} <= addresses  # q, k, v, out, lse, cu_q, cu_k
        assert all(fields[at + 1 : at + 3] == (2 * 72, 72) for at in (21, 24, 27, 30))
    assert through_ops == []


def test_a_strided_gradient_is_read_where_it_lies(driver, through_ops) -> None:
    call, inputs = fixed_call()
    dout = torch.randn(2, 3, 300, 32, dtype=torch.float16).transpose(1, 2)
    torch.autograd.grad(call(*inputs), inputs, dout)
    assert all(fields[4] == dout.data_ptr() and fields[33:36] == dout.stride()[:3] for fields in driver.fields[1:])


def test_nothing_outlives_the_graph(through_ops) -> None:
    """By counting references alone: no cycle that waits for the garbage collector."""
    for make in CALLS:
        call, inputs = make()
        copies = [x * 1 for x in inputs]
        out = call(*copies)
        watched = [weakref.ref(x) for x in (*copies, out)]
        torch.autograd.grad(out, inputs, torch.randn_like(out))
        del copies, out
        assert all(x() is None for x in watched)


def test_modes_and_profiles_see_the_operators(through_ops) -> None:
    call, inputs = sparse_call()
    dout = torch.randn_like(inputs[0])
    with Sees():
        torch.autograd.grad(call(*inputs), inputs, dout)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(call(*inputs), inputs, dout)
    assert through_ops == ["sparse_forward", "sparse_backward"] * 2
    names = {event.key for event in profile.key_averages()}
    assert {f"attention_kernels::{name}" for name in through_ops} <= names
    with SeesFunctions():
        call(*inputs)
    assert through_ops[4:] == ["sparse_forward"]


def test_tensors_of_another_class_go_through_the_operators(through_ops) -> None:
    call, inputs = fixed_call()
    torch.autograd.grad(call(inputs[0].as_subclass(Mine), *inputs[1:]), inputs, torch.randn_like(inputs[0]))
    assert through_ops == ["flash_forward", "flash_backward"]


def test_lazy_gradients_go_through_the_operators(driver, through_ops) -> None:
    call, inputs = fixed_call()
    out = call(*inputs)
    negative = torch._neg_view(torch.randn_like(out))
    for dout in (negative, torch._efficientzerotensor(out.shape, dtype=out.dtype)):
        since = len(driver.launches)
        torch.autograd.grad(out, inputs, dout, retain_graph=True)
        assert all(fields[4] not in (0, negative.data_ptr()) for fields in driver.fields[since:])
    batch = torch.randn(3, *out.shape, dtype=out.dtype)
    found = torch.autograd.grad(out, inputs, batch, is_grads_batched=True)
    assert [x.shape for x in found] == [(3, *x.shape) for x in inputs]
    assert through_ops == ["flash_backward"] * 3


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_records_the_operators(through_ops, mode) -> None:
    call, inputs = packed_call()

    def step(*x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*x), x, torch.ones_like(x[0]))

    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(*inputs).graph
    targets = {str(node.target) for node in graph.nodes}
    assert {f"attention_kernels.flash_{which}.default" for which in ("forward", "backward")} <= targets


@through_dynamo
@pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning")
def test_compiled_graphs_hold_the_operators(kernels) -> None:
    def attend(*x: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention(*x, causal=True, return_lse=True)

    def step(function: Callable[..., tuple[Tensor, Tensor]]) -> list[tuple[object, ...]]:
        since = len(kernels.launches)
        torch.autograd.grad(function(*inputs), inputs, (dout, torch.ones(2, 3, 300)))
        return taken(kernels, since)

    torch._dynamo.reset()
    backend = AotEagerAndRecordGraphs()
    inputs, dout = leaves(2, 300, 3, 32), torch.randn(2, 300, 3, 32, dtype=torch.float16)
    assert step(torch.compile(attend, fullgraph=True, backend=backend)) == step(attend)
    for graphs, name in ((backend.fw_graphs, "forward"), (backend.bw_graphs, "backward")):
        targets = [str(node.target) for node in graphs[0].graph.nodes]
        assert targets.count(f"attention_kernels.flash_{name}.default") == 1
