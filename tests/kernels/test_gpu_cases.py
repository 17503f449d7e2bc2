"""What tests/gpu is made of, on the CPU: a drawn case is a function of its number, and the rule of errors can fail."""

from collections import Counter

import pytest
import torch

from tests.gpu.cases import Rule, compare, formula, ours, rounding_model
from tests.gpu.random_cases import LAYOUTS, Drawn, check, draw, make

SMALL = [number for number in range(200) if max(draw(number).q_lengths + draw(number).k_lengths) < 150][:24]


def test_a_case_is_a_function_of_its_number() -> None:
    assert [draw(number) for number in range(50)] == [draw(number) for number in range(50)]
    first, again = make(draw(3), "cpu"), make(draw(3), "cpu")
    for x, y in zip(first.tensors, again.tensors, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num()) and x.stride() == y.stride()


def test_two_thousand_cases_draw_every_feature() -> None:
    drawn = [draw(number) for number in range(2000)]
    for feature in (
        *(lambda d, kind=kind: d.kind == kind for kind in ("fixed", "key_lengths", "packed")),
        *(lambda d, layout=layout: layout in d.layouts for layout in (*LAYOUTS, "expanded rows", "expanded scalar")),
        *(lambda d, dtype=dtype: d.dtype == dtype for dtype in (torch.float16, torch.bfloat16)),
        lambda d: d.q_lengths != d.k_lengths,
        lambda d: 0 in d.q_lengths,
        lambda d: 0 in d.k_lengths,
        lambda d: 0 in d.keys,
        lambda d: d.head_dim % 8,
        lambda d: d.rule.causal,
        lambda d: d.rule.dropout_p > 0.5,
        lambda d: d.rule.scale == 0.0,
        lambda d: (d.rule.scale or 0) < 0,
        lambda d: sum(d.tail),
        lambda d: max(d.q_lengths) > 2500,
    ):
        assert sum(bool(feature(d)) for d in drawn) >= 30
    assert len(Counter(d.head_dim for d in drawn)) >= 60


@pytest.mark.parametrize("number", SMALL)
def test_the_tiled_form_passes_the_rule(number: int) -> None:
    assert check(number, "cpu") == []


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("which", range(5))
def test_the_rule_fails_for_an_answer_that_is_wrong_by_little(which: int, dropout_p: float) -> None:
    drawn = Drawn(1, "fixed", (90,) * 2, (110,) * 2, dtype=torch.float16, rule=Rule(dropout_p=dropout_p))
    case = make(drawn, "cpu")
    exact, plain = formula(case, torch.float64, drawn.rule), formula(case, torch.float16, drawn.rule)
    found = ours(case, drawn.rule)
    assert compare(case, drawn.rule, exact, plain, found) == []
    for wrong in (found[which] * 1.02, torch.full_like(found[which], float("nan")), found[which].roll(1, 0)):
        said = compare(case, drawn.rule, exact, plain, [*found[:which], wrong, *found[which + 1 :]])
        assert len(said) == 1 and said[0].startswith(("out", "dq", "dk", "dv", "lse")[which])


def test_the_model_is_what_rounding_to_sixteen_bits_amounts_to() -> None:
    drawn = Drawn(1, "fixed", (64,) * 2, (64,) * 2, dtype=torch.bfloat16, rule=Rule(dropout_p=0.2))
    case = make(drawn, "cpu")
    exact = formula(case, torch.float64, drawn.rule)
    found = ours(case, drawn.rule)
    for (name, expected), e, o in zip(rounding_model(case, drawn.rule).items(), exact, found, strict=False):
        error = (o.double() - e).abs().max().item()
        assert 0.1 * expected < error < 3 * expected, name
