"""The faults that tests/gpu plants fit the sources as they are: each text stands there once, and compiles."""

from pathlib import Path

import pytest

from attention_kernels import compiler
from tests.gpu.faults import FAULTS, Fault, build
from tests.gpu.test_planted_faults import plant


def test_each_text_stands_exactly_once_in_its_file() -> None:
    for fault in FAULTS:
        assert (compiler.SOURCES / fault.file).read_text().count(fault.old) == 1, fault.what
        assert fault.new != fault.old, fault.what
    assert len({(fault.family, fault.what) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.family}: {fault.what}")
def test_a_planted_fault_compiles(fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings")
    plant(fault, tmp_path)
    monkeypatch.setattr(compiler, "SOURCES", tmp_path / "attention_kernels" / "csrc")
    monkeypatch.setenv("ATTENTION_KERNELS_CACHE", str(tmp_path / "cache"))
    build(fault.family, fault.head_dim, fault.dtype, fault.where, "90a")
