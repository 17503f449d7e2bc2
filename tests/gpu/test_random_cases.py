"""2,000 random calls of the CUDA kernels against float64: every argument drawn at once, in every kernel family."""

import pytest

import attention_kernels as ak
from tests.gpu.cases import Guard
from tests.gpu.random_cases import check

COUNT = 2000
ITEMS = 80  # so that test workers share them evenly


@pytest.mark.parametrize("item", range(ITEMS))
def test_random_cases(item: int, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(monkeypatch)
    with ak.using("cuda"):
        wrong = [text for number in range(item, COUNT, ITEMS) for text in check(number, guard=guard)]
    assert not wrong, f"{len(wrong)} complaints\n" + "\n".join(wrong)
