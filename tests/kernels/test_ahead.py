"""Kernels built ahead: the ones that a call will launch, each by one builder, and none where no call can be taken."""

from threading import Barrier, Thread

import pytest
import torch

from attention_kernels import ahead, compiler, dispatch, launcher
from attention_kernels.kernel_plan import Plan, plan


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Plan, str]]:
    """Stand in for a 9.0 device and note what is built."""
    found: list[tuple[Plan, str]] = []
    monkeypatch.setattr(dispatch, "why_not", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launcher, "is_hopper", lambda _: True)
    monkeypatch.setattr(launcher, "fits", lambda *_: True)
    monkeypatch.setattr(compiler, "build", lambda one, arch: found.append((one, arch)))
    return found


@pytest.mark.parametrize(
    ("dropout", "deterministic", "kernels"),
    [
        (False, False, ["hopper_backward", "hopper_forward", "order", "postprocess", "preprocess"]),
        (True, False, ["hopper_backward", "hopper_forward", "hopper_forward", "order", "postprocess", "preprocess"]),
        (False, True, ["backward_keys", "backward_queries", "hopper_forward", "order", "preprocess"]),
    ],
)
def test_what_forward_and_backward_launch_is_built(
    built: list[tuple[Plan, str]], dropout: bool, deterministic: bool, kernels: list[str]
) -> None:
    q = torch.empty(1, 2, 64, dtype=torch.bfloat16)
    for thread in ahead.build_ahead(q, dropout=dropout, deterministic=deterministic):
        thread.join()
    assert sorted(one.kernel for one, _ in built) == kernels
    assert {arch for _, arch in built} == {"90a"} and len(set(built)) == len(kernels)


def test_nothing_is_built_where_the_kernels_take_nothing() -> None:
    assert ahead.build_ahead(torch.empty(1, 2, 64)) == []


def test_two_who_ask_for_one_kernel_get_one_build(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    calls, together = [], Barrier(2)
    monkeypatch.setenv("ATTENTION_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.0")
    monkeypatch.setattr(compiler, "_build_in_child", lambda *_: (calls.append(1), (b"code", ""))[1])

    def ask() -> None:
        together.wait()
        compiler.cubin(plan("forward", 64, "bfloat16", False), "80")

    threads = [Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
