"""Building the CUDA kernels without a GPU: plans, the cache and its dangers, messages, and a few real builds."""

import os
import re
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention_kernels import compiler, cuda_ops, kernel_call, kernel_plan, launcher
from attention_kernels.kernel_plan import Plan, Tiles, plan

pytest.importorskip("cuda.bindings")

SMALL = plan("preprocess", 0, "bfloat16", False)
LOOPS = ("forward", "backward", "backward_keys", "backward_queries")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kernels with a space"
    monkeypatch.setenv("ATTENTION_KERNELS_CACHE", str(folder))
    return folder


@pytest.mark.parametrize(("head_dim", "width"), [(8, 16), (16, 16), (24, 32), (40, 64), (72, 96), (96, 96), (104, 128)])
def test_a_head_dim_is_read_into_the_next_width(head_dim: int, width: int) -> None:
    assert plan("forward", head_dim, "float16", False).width == width


def test_plans_refuse_what_no_kernel_takes() -> None:
    with pytest.raises(ValueError, match="head_dim must be at most 128"):
        plan("forward", 136, "float16", False)
    with pytest.raises(ValueError, match="dtype must be float16 or bfloat16"):
        plan("forward", 32, "float32", False)


def test_a_build_holds_the_dense_and_the_block_sparse_kernel() -> None:
    for kernel in LOOPS:
        dense, sparse = plan(kernel, 40, "float16", True), plan(kernel, 40, "float16", True, sparse=True)
        assert sparse.entry == f"{dense.entry}_sparse" and sparse.shared_bytes == dense.shared_bytes
        assert compiler.key(sparse, "80") == compiler.key(dense, "80")
        source = (compiler.SOURCES / sparse.source).read_text()
        assert all(f" {one.entry}(const __grid_constant__" in source for one in (dense, sparse))
    assert not any(one.sparse and not one.hopper for one in kernel_plan.all_plans())


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_hopper_block_sparse_kernels_have_tiles_of_their_own_or_the_dense_build(
    kernel: kernel_plan.Kernel, dropout: bool
) -> None:
    for width in (32, 64, 96, 128):
        dense, sparse = (plan(kernel, width, "bfloat16", dropout, hopper=True, sparse=s) for s in (False, True))
        assert sparse.hopper and sparse.entry == f"{dense.entry}_sparse" and sparse.tiles.tile == 64
        assert dense.defines["DENSE"] == sparse.defines["SPARSE"] == 1
        same = dense.tiles == sparse.tiles
        assert (compiler.key(dense, "90a") == compiler.key(sparse, "90a")) is same
        assert dense.defines["SPARSE"] == sparse.defines["DENSE"] == int(same)
        assert (sparse in kernel_plan.all_plans()) is not same and dense in kernel_plan.all_plans()
    narrow = plan(kernel, 16, "bfloat16", dropout, hopper=True, sparse=True)
    deterministic = plan("backward_keys", 64, "bfloat16", dropout, hopper=True, sparse=True)
    assert narrow.sparse and not narrow.hopper and deterministic.sparse and not deterministic.hopper


def test_teams_that_follow_one_list_lie_in_one_block() -> None:
    for kernel in ("forward", "backward"):
        for width in (32, 64, 96, 128):
            for dropout in (False, True):
                for block in (64, 128):
                    one = plan(kernel, width, "bfloat16", dropout, hopper=True, sparse=block)
                    assert one.defines["ONE_LIST"] == 0 or one.rows <= block


def test_there_are_at_most_170_variants_and_each_fits_its_gpu() -> None:
    plans = kernel_plan.all_plans()
    assert len(set(plans)) == len(plans) <= 170
    for one in plans:
        # A block of an A100 has 163 KB, of an H100 or H200 227.
        assert one.shared_bytes <= (227 if one.hopper else 163) * 1024 and one.threads <= 1024, one.name
        if one.kernel in LOOPS:
            # Shared memory of 8.6 and 8.9: only the atomic backward may want more, and then the other form runs.
            assert one.shared_bytes <= 99 * 1024 or (one.kernel == "backward" and one.width >= 96), one.name
            assert one.rows % 32 == 0 and one.tiles.tile % 16 == 0


def test_the_covering_set_has_every_kernel_at_every_width() -> None:
    found = {(p.kernel, p.width) for p in kernel_plan.cover_plans()}
    assert {(k, w) for k in LOOPS for w in kernel_plan.WIDTHS} <= found
    assert {p.source for p in kernel_plan.cover_plans()} == {p.source for p in kernel_plan.all_plans()}
    assert {p.name for p in compiler.SOURCES.glob("*.cu")} == {p.source for p in kernel_plan.all_plans()}


def test_kernel_sources_stay_short_and_their_parameters_match_the_launcher() -> None:
    for path in compiler.SOURCES.rglob("*.cu*"):
        assert path.read_text().count("\n") < 500, path
        assert path.read_text().isascii(), path
    text = (compiler.SOURCES / "common/types.cuh").read_text()
    body = re.sub(r"//.*", "", text[text.index("struct Params {") : text.index("};", text.index("struct Params {"))])
    fields = [line.strip() for line in body.splitlines()[1:] if line.strip()]
    size = 0
    for line in fields:
        kind = line.removeprefix("const ").split()[0]
        width = 8 if "*" in line else {"Strides": 24, "i64": 8, "int": 4, "u32": 4, "float": 4}[kind]
        size += width * (line.count(",") + 1)
    assert launcher.PARAMETERS.size == size


def test_the_parameters_of_a_call_fill_the_struct() -> None:
    q = torch.zeros(2, 5, 3, 16, dtype=torch.bfloat16)
    call = kernel_call.KernelCall(q, q, None, None, None, 5, 5).with_rule(torch.tensor([1, 2]), 0.1, 0.25, True)
    call.place(q=q, k=q, v=q, out_written=q)
    fields = launcher.PARAMETERS.unpack(launcher.PARAMETERS.pack(*call.fields))
    assert fields[:3] == (q.data_ptr(),) * 3 and fields[21:24] == (5 * 48, 48, 16)


def test_aligned_views_are_read_in_place_and_others_copied() -> None:
    fused = torch.zeros(2, 7, 3, 4, 24, dtype=torch.float16)
    assert all(cuda_ops.readable(x) is x for x in fused.unbind(2))
    for odd in (torch.zeros(2, 7, 4, 20), torch.zeros(2, 7, 16, 4).transpose(2, 3), torch.zeros(2, 7, 4, 25)[..., :24]):
        made = cuda_ops.readable(odd.half())
        assert made.is_contiguous() and made.shape[-1] % 8 == 0 and torch.equal(made[..., : odd.shape[-1]], odd.half())


@pytest.mark.parametrize(("capability", "target"), [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((12, 0), "120")])
def test_target_of_a_gpu(capability: tuple[int, int], target: str) -> None:
    assert compiler.architecture(capability) == target


def test_a_built_kernel_is_kept_and_read_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compiler.cubin(SMALL, "80")
    assert code[:4] == b"\x7fELF" and stat.S_IMODE(cache.stat().st_mode) == 0o700
    monkeypatch.setattr(subprocess, "run", None)
    assert compiler.cubin(SMALL, "80") == code
    assert sorted(p.suffix for p in cache.iterdir()) == [".cubin", ".json"]


def test_a_changed_macro_source_target_or_compiler_is_another_kernel(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = plan("forward", 32, "float16", False)
    keys = {compiler.key(one, "80"), compiler.key(one, "90a")}
    keys |= {compiler.key(plan("forward", 32, "float16", True), "80")}
    keys |= {compiler.key(replace(one, tiles=replace(one.tiles, stages=4)), "80")}
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "99.9")
    keys |= {compiler.key(one, "80")}
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    keys |= {compiler.key(one, "80")}
    (tmp_path / "x.cuh").write_text("1")
    assert len(keys | {compiler.key(one, "80")}) == 7


def test_two_builders_at_once_leave_one_whole_kernel(cache: Path) -> None:
    found: list[bytes] = []
    builders = [threading.Thread(target=lambda: found.append(compiler.cubin(SMALL, "90a"))) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert not list(cache.glob(".tmp-*"))


def test_leftovers_of_killed_builders_go_after_an_hour(cache: Path) -> None:
    cache.mkdir(mode=0o700)
    old, new = cache / ".tmp-old", cache / ".tmp-new"
    for path in (old, new):
        path.write_bytes(b"half a kernel")
    os.utime(old, (time.time() - 4000,) * 2)
    compiler.build(SMALL, "80")
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_cache_that_others_can_write_is_refused(cache: Path, mode: int) -> None:
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(compiler.CompileError, match=r"can be written by others.*chmod go-w"):
        compiler.cubin(SMALL, "80")


def test_an_unusable_cache_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTENTION_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(compiler.CompileError, match="Set ATTENTION_KERNELS_CACHE to a folder of yours"):
        compiler.cubin(SMALL, "80")


def test_the_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTENTION_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / "attention_kernels"


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.nvrtc_version.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(compiler.CompileError, match=r"NVRTC, and it was not found.*pip install 'nvidia-cuda-nvrtc"):
        compiler.nvrtc_version()


def test_a_compiler_error_shows_what_the_compiler_said(cache: Path) -> None:
    impossible = Plan("forward", 32, "float16", False, Tiles(4, 2, 16, 32, 2, 3))
    with pytest.raises(
        compiler.CompileError, match=r"failed on forward 32 float16 for sm_80(.|\n)*a stage is whole steps"
    ):
        compiler.cubin(impossible, "80")
    assert not list(cache.glob("*.cubin"))


def test_a_crash_of_the_compiler_does_not_take_us_along(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.CompletedProcess([], -11, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: dead)
    with pytest.raises(compiler.CompileError, match=r"crashed \(signal 11\)"):
        compiler.cubin(SMALL, "80")


@pytest.mark.parametrize("kernel", LOOPS)
def test_main_loops_build_without_spills(cache: Path, kernel: kernel_plan.Kernel) -> None:
    _, report = compiler.build(plan(kernel, 32, "bfloat16", True), "80")
    assert report.spill_bytes == 0 and 0 < report.registers <= 255


def test_the_covering_set_builds_for_both_targets(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiler.main(["--cover", "--arch", "80,90a"]) == 0
    assert "0 with spills" in capsys.readouterr().out
