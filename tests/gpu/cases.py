"""What the GPU tests of attention share: cases, the formula in any dtype, the rule of errors, guard bands.

The rule: against float64, at most 2 times (gradients 3 times) the error of the formula in the kernels' own dtype, in
the largest element. PyTorch's error is a sample: where a call has few elements, or the terms of a difference cancel
exactly (a row of one key), it may come out as zero by luck. So a second yardstick stands beside it, `rounding_model`:
what the roundings to 16 bits that no such kernel can avoid amount to, propagated in float64 as a root of squares.
Over many elements PyTorch's maximum is the larger of the two and the model decides nothing.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import attention_kernels as ak
from attention_kernels import families, kernel_call, philox

NAMES = ("out", "dq", "dk", "dv")
FACTORS = (2, 3, 3, 3)
SEED = (0x1234_5678_9ABC_DEF0, 0x0FED_CBA9_8765_4321)
NAN = float("nan")
BAND = 4096


def _runs_here(family: families.Family) -> bool:
    return family == "generic" or (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0))


FAMILIES_HERE = [family for family in families.BUILT if _runs_here(family)]


class Rule(NamedTuple):
    """How a case's scores become weights."""

    causal: bool = False
    dropout_p: float = 0.0
    scale: float | None = None
    seed: tuple[int, int] = SEED


class Case(NamedTuple):
    """A call's tensors, where each sequence lies in their rows laid flat, and the public function with the rest bound.

    q, k, v and the gradient of out are (T, H, D) or (B, L, H, D); `call` returns out flat, (T, H, D), and lse (H, T).
    """

    tensors: list[Tensor]
    dlse: Tensor | None  # (H, T) float32
    q_ranges: list[tuple[int, int]]
    k_ranges: list[tuple[int, int]]
    offsets: list[int]  # causal: row r sees column c when c <= r + offset
    call: Callable[..., tuple[Tensor, Tensor]]
    layout: ak.BlockLayout | None = None  # block-sparse calls

    def visible(self, rows: int, columns: int, causal: bool, offset: int) -> Tensor:
        """Return what a sequence's rows may see, (1 or H, rows, columns)."""
        device = self.tensors[0].device
        row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
        seen = column <= row[:, None] + offset if causal else torch.ones_like(column > row[:, None])
        if self.layout is None:
            return seen[None]
        patterns = self.layout.to_mask()[self.layout.head_to_pattern.long()]
        size = self.layout.block_size
        return seen & patterns[:, row // size][:, :, column // size]

    def flat(self, dtype: torch.dtype) -> list[Tensor]:
        """Return q, k, v and the gradient of out as (T, H, D)."""
        return [flat(x.detach()).to(dtype) for x in self.tensors]

    def scale(self, rule: Rule) -> float:
        """Return the factor of the scores."""
        return self.tensors[0].shape[-1] ** -0.5 if rule.scale is None else rule.scale


def flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1) if x.dim() == 4 else x


def _softmax(q: Tensor, k: Tensor, case: Case, rule: Rule, offset: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights (H, Lq, Lk), lse (H, Lq) and which rows see a key (1 or H, Lq) of one sequence."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * case.scale(rule)
    visible = case.visible(len(q), len(k), rule.causal, offset)
    # Why: the gradient of softmax is NaN in a row of -inf, and would be in every key's sum.
    seen = visible.any(-1)
    scores = scores.masked_fill(~visible & seen[..., None], -torch.inf)
    return scores.softmax(-1) * seen[..., None], torch.where(seen, scores.logsumexp(-1), -torch.inf), seen


def _dropped(weights: Tensor, case: Case, rule: Rule, sample: int) -> Tensor:
    """Return a sequence's weights (H, Lq, Lk) after dropout."""
    if not rule.dropout_p:
        return weights
    device, count = weights.device, philox.drop_count(rule.dropout_p)
    which = (torch.tensor([sample], device=device), torch.arange(len(weights), device=device))
    sizes = [(0, n) for n in weights.shape[1:]]
    keep = philox.keep_mask(torch.tensor(rule.seed, device=device), count, *which, *sizes)[0]
    return weights * keep.to(weights.dtype) * philox.keep_scale(count)


def formula(case: Case, dtype: torch.dtype, rule: Rule) -> list[Tensor]:
    """Return out, dq, dk, dv, lse of the plain formula in `dtype`, one sequence after another, by autograd."""
    q, k, v, dout = case.flat(dtype)
    answers = [torch.zeros_like(x) for x in (q, q, k, v)]
    lse_HT = torch.full((q.shape[1], len(q)), -torch.inf, dtype=dtype, device=q.device)
    for sample, ((a, b), (c, d), offset) in enumerate(zip(case.q_ranges, case.k_ranges, case.offsets, strict=True)):
        if a == b or c == d:
            continue
        leaves = [x.clone().requires_grad_() for x in (q[a:b], k[c:d], v[c:d])]
        weights, lse, seen = _softmax(*leaves[:2], case, rule, offset)
        out = torch.einsum("hqk,khd->qhd", _dropped(weights, case, rule, sample), leaves[2])
        zero = torch.zeros_like(lse)
        dlse = zero if case.dlse is None else torch.where(seen, case.dlse[:, a:b].to(dtype), 0.0)
        grads = torch.autograd.grad((out, torch.where(seen, lse, 0.0)), leaves, (dout[a:b], dlse))
        lse_HT[:, a:b] = lse.detach()
        parts = (slice(a, b), slice(a, b), slice(c, d), slice(c, d))
        for x, part, piece in zip(answers, parts, (out, *grads), strict=True):
            x[part] = piece.detach().nan_to_num()
    return [*answers, lse_HT]


@torch.no_grad()
def rounding_model(case: Case, rule: Rule) -> dict[str, float]:
    """Return the expected rounding error of the largest elements of out, dq, dk and dv, in float64.

    Rounded to the kernels' dtype are: the weights before they meet v (and dO), dS before it meets k (and q), and every
    result. D = rowsum(dO * out) takes out as it was saved. Errors of different elements are taken as independent; one
    that a whole row shares (D's) stays common to it. float32's own part is 4 of its roundings of the terms of D.
    """
    u = torch.finfo(case.tensors[0].dtype).eps / 2
    q, k, v, dout = case.flat(torch.float64)
    scale = case.scale(rule)
    worst = dict.fromkeys(NAMES, 0.0)
    for sample, ((a, b), (c, d), offset) in enumerate(zip(case.q_ranges, case.k_ranges, case.offsets, strict=True)):
        if a == b or c == d:
            continue
        q_s, k_s, v_s, dout_s = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d], dout[a:b]))  # (H, L, D)
        weights, _, seen = _softmax(q[a:b], k[c:d], case, rule, offset)
        dropped = _dropped(weights, case, rule, sample)
        out = dropped @ v_s
        out_error = u**2 * (out**2 + dropped**2 @ v_s**2)
        delta = (dout_s * out).sum(-1, keepdim=True)
        delta_error = (dout_s**2 * out_error).sum(-1, keepdim=True)
        delta_error += (2.0**-22 * (dout_s * out).abs().sum(-1, keepdim=True)) ** 2
        if case.dlse is not None:
            delta = delta - torch.where(seen, case.dlse[:, a:b].double(), 0.0)[..., None]
        ds = dropped * (dout_s @ v_s.mT) - weights * delta
        dq, dk, dv = ds @ k_s * scale, ds.mT @ q_s * scale, dropped.mT @ dout_s
        squares = {
            "out": out_error,
            "dq": scale**2 * (delta_error * (weights @ k_s) ** 2 + u**2 * (ds**2 @ k_s**2)) + (u * dq) ** 2,
            "dk": scale**2 * ((weights**2 * delta_error).mT @ q_s**2 + u**2 * (ds.mT**2 @ q_s**2)) + (u * dk) ** 2,
            "dv": u**2 * (dropped.mT**2 @ dout_s**2 + dv**2),
        }
        for name, square in squares.items():
            worst[name] = max(worst[name], square.max().item() ** 0.5)
    return worst


def ours(case: Case, rule: Rule, **more: object) -> list[Tensor]:
    """Return out, dq, dk, dv, lse of the public function, gradients laid flat."""
    q, k, v, dout = case.tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    seed = torch.tensor(rule.seed, device=q.device)
    named = {} if rule.scale is None else {"softmax_scale": rule.scale}
    out, lse = case.call(*leaves, causal=rule.causal, dropout_p=rule.dropout_p, dropout_seed=seed, **named, **more)
    made, into = ((out,), (flat(dout),)) if case.dlse is None else ((out, lse), (flat(dout), case.dlse))
    grads = torch.autograd.grad(made, leaves, into)
    return [out.detach(), *(flat(x) for x in grads), lse.detach()]


def compare(case: Case, rule: Rule, exact: list[Tensor], plain: list[Tensor], found: list[Tensor]) -> list[str]:
    """Return what is wrong in `found`: errors beyond the rule, elements that are not finite, a wrong lse."""
    wrong = []
    model: dict[str, float] = {}
    for name, factor, e, p, o in zip(NAMES, FACTORS, exact, plain, found, strict=False):
        theirs, mine = ((x.double() - e).abs().max().item() if e.numel() else 0.0 for x in (p, o))
        if mine <= factor * theirs + 1e-5:
            continue
        model = model or rounding_model(case, rule)
        if not mine <= factor * model[name] + 1e-5:
            wrong.append(f"{name} error {mine:.2e}, PyTorch's {theirs:.2e}, model's {model[name]:.2e}")
    lse, its = found[4].double(), exact[4]
    # lse is float32: its error is a share of the largest score that a row may have.
    q, k = (x.double().nan_to_num().norm(dim=-1).max().item() if x.numel() else 0.0 for x in case.tensors[:2])
    most = 1e-4 + 2e-6 * abs(case.scale(rule)) * q * k
    if not torch.equal(lse.isneginf(), its.isneginf()):
        wrong.append("lse is -inf elsewhere")
    elif not torch.allclose(lse.nan_to_num(neginf=0, nan=1e9), its.nan_to_num(neginf=0), rtol=1e-5, atol=most):
        wrong.append(f"lse error {(lse - its).abs().nan_to_num(nan=1e9).max():.2e}, at most {most:.1e}")
    return wrong


class Guard:
    """Outputs and scratch of the kernels lie between bands of 4 KiB that must stay as they are.

    They start as NaN, and whole numbers as 0: the first piece of work, so that an order with a gap does it twice.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bands: list[Tensor] = []
        monkeypatch.setattr(kernel_call, "empty", self._make)

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.full((size + 2 * BAND,), 0x5A, dtype=torch.uint8, device=device)
        inner = whole[BAND : BAND + size].view(dtype)
        inner.fill_(NAN if dtype.is_floating_point else 0)
        self.bands += [whole[:BAND], whole[BAND + size :]]
        return inner.view(shape)

    def intact(self) -> bool:
        """Return whether no band was written, and forget them."""
        bands, self.bands = self.bands, []
        return bool(bands) and bool((torch.cat(bands) == 0x5A).all())


def complaints(
    case: Case,
    rule: Rule,
    deterministic: Sequence[bool] = (False, True),
    clean: Case | None = None,
    guard: Guard | None = None,
) -> list[str]:
    """Return what is wrong in the given forms of the backward, in every family of kernels.

    `clean` is what the formula gets where the case holds NaN that no kernel may read.
    """
    clean = clean or case
    exact, plain = formula(clean, torch.float64, rule), formula(clean, case.tensors[0].dtype, rule)
    wrong = []
    for family, fixed_order in product(FAMILIES_HERE, deterministic):
        with ak.cuda_family(family):
            found = ours(case, rule, deterministic=fixed_order)
        said = compare(clean, rule, exact, plain, found)
        if guard is not None and not guard.intact():
            said.append("a guard band was written")
        wrong += [f"{family}{', deterministic' if fixed_order else ''}: {text}" for text in said]
    return wrong
