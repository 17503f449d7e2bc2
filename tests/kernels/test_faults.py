"""The faults that tests/gpu plants fit the sources as they are: each text stands there once, and compiles."""

from pathlib import Path

import pytest
import torch

from attention_kernels import compiler
from attention_kernels.pieces import cut
from tests.gpu.faults import FAULTS, Fault, battery, build
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


def test_a_case_of_the_faults_is_cut_in_parts() -> None:
    # On an H200, in tiles of 192 keys: parts smaller than a tile, and a last round with gaps.
    cases = [one for one in battery(32, torch.bfloat16, "near") if one.kind == "fixed" and not one.rule.causal]
    heads = {one.number: len(one.k_lengths) * one.heads for one in cases}
    cuts = {one.number: cut(one.k_lengths[0], heads[one.number], 192, 132) for one in cases}
    assert any(c.part < 192 and (c.tiles + c.parts) * heads[n] % 132 for n, c in cuts.items() if c.parts)
