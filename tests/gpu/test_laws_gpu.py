"""How the kernels' answers must change when the question does, and single rows of sequences too long for a formula."""

import random

import pytest
import torch
from torch import Tensor

import attention_kernels as ak
from tests.gpu.cases import SEED

QUESTIONS = range(30)
EVERY_DIM = (8, 16, 32, 64, 96, 128)


class Question:
    """Random tensors of a random shape; `ask` returns out, dq, dk, dv under one gradient of out."""

    def __init__(self, number: int) -> None:
        self.rng = random.Random(f"law {number}")
        self.batch, self.heads = self.rng.randint(1, 4), self.rng.randint(1, 4)
        self.length, head_dim = self.rng.randint(1, 400), EVERY_DIM[number % len(EVERY_DIM)]
        torch.manual_seed(number)
        shape = (self.batch, self.length, self.heads, head_dim)
        self.tensors = [torch.randn(shape).to("cuda", torch.bfloat16) for _ in range(4)]
        self.rule = {"causal": self.rng.random() < 0.5, "deterministic": True}

    def permutation(self, size: int) -> Tensor:
        return torch.tensor(self.rng.sample(range(size), size), device="cuda")


def ask(tensors: list[Tensor], **rule: object) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = ak.flash_attention(*leaves, **rule)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("number", QUESTIONS)
def test_permuted_samples_and_heads_give_the_same_bits(family: str, number: int) -> None:
    question = Question(number)
    samples, heads = question.permutation(question.batch), question.permutation(question.heads)
    moved = ask([x[samples][:, :, heads] for x in question.tensors], **question.rule)
    assert same(moved, [x[samples][:, :, heads] for x in ask(question.tensors, **question.rule)])


@pytest.mark.parametrize("number", QUESTIONS)
def test_a_batch_is_its_samples_alone_is_its_packed_form_in_bits(family: str, number: int) -> None:
    question = Question(number)
    whole = ask(question.tensors, **question.rule)
    for b in range(question.batch):
        alone = ask([x[b : b + 1] for x in question.tensors], **question.rule)
        assert same(alone, [x[b : b + 1] for x in whole])
    leaves = [x.flatten(0, 1).requires_grad_() for x in question.tensors[:3]]
    offsets = torch.arange(question.batch + 1, dtype=torch.int32, device="cuda") * question.length
    longest = question.length + question.rng.choice((0, 300))
    out = ak.flash_attention_varlen(*leaves, offsets, offsets, longest, longest, **question.rule)
    packed = [out.detach(), *torch.autograd.grad(out, leaves, question.tensors[3].flatten(0, 1))]
    assert same(packed, [x.flatten(0, 1) for x in whole])


@pytest.mark.parametrize("number", QUESTIONS)
def test_appended_padding_changes_no_bit(family: str, number: int) -> None:
    question = Question(number)
    rule = question.rule | {"causal": False, "dropout_p": 0.2, "dropout_seed": torch.tensor(SEED, device="cuda")}
    q, k, v, dout = question.tensors
    extra = question.rng.randint(1, 200)
    k_padded, v_padded = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, extra), value=float("nan")) for x in (k, v))
    lengths = torch.full((question.batch,), question.length, device="cuda")
    out, dq, dk, dv = ask([q, k_padded, v_padded, dout], key_lengths=lengths, **rule)
    assert same([out, dq, dk[:, : question.length], dv[:, : question.length]], ask(question.tensors, **rule))
    assert not dk[:, question.length :].any() and not dv[:, question.length :].any()


@pytest.mark.parametrize("number", QUESTIONS)
def test_values_four_times_as_large_give_an_output_four_times_as_large_in_bits(family: str, number: int) -> None:
    q, k, v, dout = (question := Question(number)).tensors
    rule = question.rule | {"dropout_p": 0.2, "dropout_seed": torch.tensor(SEED, device="cuda")}
    out, dq, dk, dv = ask([q, k, v, dout], **rule)
    assert same(ask([q, k, v * 4, dout], **rule), [out * 4, dq * 4, dk * 4, dv])


@pytest.mark.parametrize("number", QUESTIONS)
def test_permuted_keys_with_their_values_change_little(family: str, number: int) -> None:
    q, k, v, dout = (question := Question(number)).tensors
    order = question.permutation(question.length)
    out, dq, dk, dv = ask([q, k, v, dout], deterministic=True)
    moved = ask([q, k[:, order], v[:, order], dout], deterministic=True)
    for x, y in zip(moved, (out, dq, dk[:, order], dv[:, order]), strict=True):
        assert (x - y).abs().max() <= 2e-2 * y.abs().max() + 1e-3


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("length", [16_384, 65_536])
def test_rows_of_long_sequences_against_float64(family: str, length: int, head_dim: int) -> None:
    torch.manual_seed(length + head_dim)
    data = [torch.randn(1, length, 2, head_dim, device="cuda").bfloat16() for _ in range(4)]
    # Values with a mean: what is left out of a sum of 65,536 terms around zero would hardly be seen.
    data[2] += 1
    leaves = [x.requires_grad_() for x in data[:3]]
    out, lse = ak.flash_attention(*leaves, return_lse=True)
    dq, dk, dv = torch.autograd.grad(out, leaves, data[3])
    rows = torch.tensor([0, 1, 63, 64, 127, length - 1, *random.Random(1).sample(range(length), 58)], device="cuda")
    q, k, v, dout = (x[0].detach().double().transpose(0, 1) for x in data)  # (H, L, D)
    scale = head_dim**-0.5
    scores = q[:, rows] @ k.mT * scale
    weights = scores.softmax(-1)
    exact_out = weights @ v
    # D of the output as it is stored, 16 bits an element: that is the algorithm (FlashAttention-2, algorithm 2, line
    # 4), and values with a mean make its rounding larger than dQ, whose terms cancel.
    delta = (dout[:, rows] * out[0].detach()[rows].double().transpose(0, 1)).sum(-1, keepdim=True)
    exact_dq = weights * (dout[:, rows] @ v.mT - delta) @ k * scale
    # The columns of keys `rows` need every row's lse and D: those of the kernel, whose lse was just found right.
    torch.testing.assert_close(lse[0][:, rows].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-4)
    columns = (k[:, rows] @ q.mT * scale - lse[0].double()[:, None]).exp()
    deltas = (dout * out[0].detach().double().transpose(0, 1)).sum(-1)[:, None]
    exact_dv = columns @ dout
    exact_dk = columns * (v[:, rows] @ dout.mT - deltas) @ q * scale
    for name, x, exact in (("out", out, exact_out), ("dq", dq, exact_dq), ("dk", dk, exact_dk), ("dv", dv, exact_dv)):
        error = (x[0].detach()[rows].double().transpose(0, 1) - exact).abs().max() / exact.abs().max()
        assert error <= 2e-2, f"{name}: {error:.1e} of the largest"
