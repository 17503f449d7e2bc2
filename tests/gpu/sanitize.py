"""compute-sanitizer over the CUDA kernels: every kernel, width and feature on 42 small calls a family.

    python -m tests.gpu.sanitize                       # all four tools, every family that runs here
    python -m tests.gpu.sanitize --tools memcheck

Each tool runs this file again as its target (`--calls FAMILY`). What must not be read (keys past key_lengths, rows
after the last sequence) is memory that nobody wrote, so that initcheck sees a kernel that reads it; every output is
copied back whole, so that it sees an element that was left unwritten. racecheck knows shared memory only: races in
global memory are what the 250 repeats of test_cuda_kernels.py are for.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import torch
from torch import Tensor

import attention_kernels as ak
from tests.gpu.cases import FAMILIES_HERE

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
HEAD_DIMS = (8, 16, 32, 40, 64, 96, 128)
LIMIT_S = 400


def calls(family: str) -> int:
    """Run the small calls on one family's kernels; return how many."""
    count = 0
    with ak.using("cuda"), ak.cuda_family(family):  # type: ignore[arg-type]
        for head_dim, deterministic in product(HEAD_DIMS, (False, True)):
            dtype = torch.float16 if count % 2 == 0 else torch.bfloat16
            _packed(head_dim, dtype, deterministic)
            _fixed(head_dim, dtype, deterministic)
            _sparse(head_dim, dtype, deterministic)
            count += 3
    torch.cuda.synchronize()
    return count


def _packed(head_dim: int, dtype: torch.dtype, deterministic: bool) -> None:
    """An empty sequence, one without keys, causal, dropout, a tail of rows that belong to nobody."""
    cu_q, cu_k = (
        torch.tensor(n, dtype=torch.int32, device="cuda") for n in ([0, 70, 70, 75, 93], [0, 40, 49, 49, 180])
    )
    q, k, v = _partly(100, [93], head_dim, dtype), *(_partly(190, [180], head_dim, dtype) for _ in range(2))
    seed = torch.tensor([1, 2], device="cuda")
    rule = {"dropout_p": 0.2, "dropout_seed": seed, "causal": True, "deterministic": deterministic}
    _differentiate(*ak.flash_attention_varlen(q, k, v, cu_q, cu_k, 80, 140, return_lse=True, **rule), (q, k, v))


def _fixed(head_dim: int, dtype: torch.dtype, deterministic: bool) -> None:
    """Samples with all, some and no keys."""
    lengths = torch.tensor([150, 65, 0], device="cuda")
    q = _partly(3 * 66, [3 * 66], head_dim, dtype).detach().unflatten(0, (3, 66)).requires_grad_()
    k, v = (
        _partly(3 * 150, [150, 150 + 65], head_dim, dtype).detach().unflatten(0, (3, 150)).requires_grad_()
        for _ in range(2)
    )
    rule = {"key_lengths": lengths, "deterministic": deterministic}
    _differentiate(*ak.flash_attention(q, k, v, return_lse=True, **rule), (q, k, v))


def _sparse(head_dim: int, dtype: torch.dtype, deterministic: bool) -> None:
    """A layout with a block without keys, blocks of 64 and of 128, a tail of rows that belong to nobody."""
    size = 128 if deterministic else 64
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[0, 1] = mask[1] = mask[2, 0] = False
    layout = ak.BlockLayout.from_mask(mask, size).to("cuda")
    offsets = torch.tensor([0, 170, 170, 233], dtype=torch.int32, device="cuda")
    q, k, v = (_partly(240, [233], head_dim, dtype) for _ in range(3))
    rule = {"dropout_p": 0.2, "dropout_seed": torch.tensor([1, 2], device="cuda"), "deterministic": deterministic}
    out, lse = ak.block_sparse_attention_varlen(q, k, v, layout, offsets, 170, return_lse=True, causal=True, **rule)
    _differentiate(out, lse, (q, k, v))


def _partly(rows: int, ends: list[int], head_dim: int, dtype: torch.dtype) -> Tensor:
    """Return a leaf (rows, 1, head_dim) of which only the rows before ends[-1] have ever been written."""
    x = torch.empty(rows, 1, head_dim, dtype=dtype, device="cuda")
    x[: ends[-1]] = torch.randn(ends[-1], 1, head_dim).to(dtype).cuda()
    return x.requires_grad_()


def _differentiate(out: Tensor, lse: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Run the backward, gradient of lse included, and copy every result back."""
    into = (torch.ones_like(out), torch.ones_like(lse))
    for x in (out, lse, *torch.autograd.grad((out, lse), leaves, into)):
        assert not x.detach().cpu().isnan().any()


def run(tool: str, family: str) -> tuple[str, str, float]:
    """Return a tool's verdict on a family ("clean" or its own summary), its output, and the seconds."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    # Why: the bindings look up driver symbols that this driver may lack; that is no error of a kernel.
    command += ["--report-api-errors", "no"]
    if tool == "synccheck":
        # Why: it counts a block's mbarriers by itself, finds too few, and then a launch fails that is sound.
        command += ["--num-cuda-barriers", "256"]
    if tool != "initcheck":  # which must see who wrote the inputs
        command += ["--kernel-regex", "kns=attention_"]
    target = [sys.executable, "-m", "tests.gpu.sanitize", "--calls", family]
    # Why: inside torch's cached blocks an access past a tensor's end is still inside an allocation.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *target], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {LIMIT_S} s", "", time.monotonic() - start
    text = done.stdout + done.stderr
    summary = re.findall(r"SUMMARY: (.*)", text)
    clean = done.returncode == 0 and f"{family}: " in text and summary and re.match(r"0 (errors|hazards)", summary[-1])
    verdict = "clean" if clean else f"exit {done.returncode}, {summary[-1] if summary else 'no summary'}"
    return verdict, text, time.monotonic() - start


def main() -> int:
    """Run every tool on every family; 1 where one is not clean."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitize", description=main.__doc__)
    parser.add_argument("--tools", default=",".join(TOOLS), help=f"comma-separated (default {','.join(TOOLS)})")
    parser.add_argument("--families", default=",".join(FAMILIES_HERE), help="comma-separated")
    parser.add_argument("--jobs", type=int, default=4, help="tools at a time")
    parser.add_argument("--logs", default="", help="folder for each tool's whole output")
    parser.add_argument("--calls", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.calls is not None:
        print(f"{asked.calls}: {calls(asked.calls)} calls")
        return 0
    if shutil.which("compute-sanitizer") is None or not torch.cuda.is_available():
        print("error: compute-sanitizer and a GPU are needed.\n  Install the CUDA toolkit (it is part of it).")
        return 2
    for family in asked.families.split(","):
        calls(family)  # builds the kernels, so that the tools do not watch the compiler
    work = list(product(asked.families.split(","), asked.tools.split(",")))
    with ThreadPoolExecutor(asked.jobs) as pool:
        found = list(pool.map(lambda one: run(one[1], one[0]), work))
    for (family, tool), (verdict, text, seconds) in zip(work, found, strict=True):
        print(f"{family:<8} {tool:<10} {seconds:>5.0f} s  {verdict}")
        if verdict != "clean":
            print("\n".join(text.splitlines()[:40]))
        if asked.logs:
            os.makedirs(asked.logs, exist_ok=True)
            with open(os.path.join(asked.logs, f"sanitize_{family}_{tool}.log"), "w", encoding="utf-8") as file:
                file.write(text)
    return int(any(verdict != "clean" for verdict, *_ in found))


if __name__ == "__main__":
    sys.exit(main())
