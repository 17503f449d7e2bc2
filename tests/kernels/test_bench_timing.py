"""The benchmark's clocks, with stand-ins for what only a GPU has."""

import importlib.machinery
import json
import sys
import types

import pytest
import torch
from torch import Tensor

from attention_kernels import bench, bench_timing
from attention_kernels.bench_peers import Call
from attention_kernels.bench_timing import read_state

CPU = torch.device("cpu")


def test_the_state_of_the_gpu_is_read():
    assert read_state("1980, 3201, 120.5, 41\n")["clocks.sm"] == 1980
    assert read_state("1980, [N/A], 120.5, 41") == {"clocks.sm": 1980, "power.draw": 120.5, "temperature.gpu": 41}
    assert read_state("") is None and read_state("[N/A]") is None


def test_a_gpus_calls_are_timed_by_events_after_a_flush_each(monkeypatch):
    happened = []

    class Event:
        """Counts what was recorded before it, as a clock would tell the time."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")
            self.time = len(happened) ** 2

        def elapsed_time(self, end):
            return end.time - self.time

    real = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda x: (happened.append("flush"), real(x))[1])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("wait"))
    monkeypatch.setattr(bench_timing, "_FLUSH_BYTES", 8)
    median = bench_timing._time_by_events(lambda: happened.append("call"), CPU, 3)
    assert happened == [*["flush", "event", "call", "event"] * 3, "wait"]
    assert median == 8**2 - 6**2


def test_short_calls_go_to_do_bench_and_long_ones_do_not(monkeypatch):
    triton, testing = (types.ModuleType(name) for name in ("triton", "triton.testing"))
    triton.__spec__ = importlib.machinery.ModuleSpec("triton", None)
    asked = []
    testing.do_bench = lambda call, warmup, rep, return_mode: asked.append((warmup, rep, return_mode)) or 7.0
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    monkeypatch.setattr(bench_timing, "_time_by_events", lambda call, device, repeats: 100.0 + repeats)
    cuda = torch.device("cuda")
    assert bench_timing.time_call(lambda: None, cuda, 100.0, 2.0) == 7.0 and asked == [(25, 100, "median")]
    assert bench_timing.time_call(lambda: None, cuda, 100.0, 400.0) == 101.0
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert bench_timing.time_call(lambda: None, cuda, 100.0, 2.0) == 150.0


def test_the_clock_is_asked_of_the_gpu_in_use(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nassert sys.argv[-2:] == ['-i', 'GPU-abc']\nprint('1980, 3201, 1, 2')\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu = types.SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert bench_timing.gpu_state(torch.device("cuda"))["clocks.sm"] == 1980
    gpu.uuid = "another"
    assert bench_timing.gpu_state(torch.device("cuda")) is None
    assert bench_timing.gpu_state(CPU) is None


def test_peak_memory_counts_what_a_call_adds(monkeypatch):
    said = {"memory_allocated": 100, "max_memory_allocated": 350}
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    assert bench_timing.peak_bytes(lambda: None, torch.device("cuda")) == 250
    assert bench_timing.peak_bytes(lambda: None, CPU) is None


@pytest.mark.parametrize("asked", [False, True])
def test_backwards_run_in_the_thread_that_was_asked_for(monkeypatch, tmp_path, asked):
    seen = []

    def noting(call: Call) -> tuple[Tensor, ...]:
        seen.append(torch._C._is_multithreading_enabled())
        return torch.autograd.grad(call.forward(), call.leaves, call.dout)

    monkeypatch.setattr(Call, "gradients", noting)
    case = ["--shapes", "1x1x40x16", "--dtype", "float32", "--device", "cpu", "--peers", "math"]
    quick = ["--seconds", "0.006", "--rounds", "1", "--json", str(tmp_path / "r.json")]
    bench.main([*case, *quick, *["--caller-thread"] * asked])
    assert set(seen) == {not asked} and torch._C._is_multithreading_enabled()
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["caller_thread"] is asked
