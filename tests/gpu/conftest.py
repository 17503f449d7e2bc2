"""Tests that need a CUDA GPU: skipped without one, run on one before a change of kernels or training lands."""

from collections.abc import Iterator

import pytest
import torch

import attention_kernels as ak
from attention_kernels import families
from tests.gpu.cases import FAMILIES_HERE


@pytest.fixture(params=FAMILIES_HERE)
def family(request: pytest.FixtureRequest) -> Iterator[families.Family]:
    """Run on the CUDA kernels of one family, or fail."""
    with ak.using("cuda"), ak.cuda_family(request.param):
        yield request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
