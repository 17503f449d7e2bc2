"""Measures the bytes that attention moves through HBM: standard against flash, as the FlashAttention paper's Figure 2.

    python -m attention_kernels.bench_io --json results/bench_io.json

Nsight Compute (`ncu`) counts the bytes of every kernel of one forward + backward in a child process; the time is taken
here, without the profiler. The paper's numbers are of an A100, ours of the GPU at hand.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from attention_kernels.bench import Parser
from attention_kernels.bench_cases import Case, make_inputs
from attention_kernels.bench_peers import Call, make_methods
from attention_kernels.bench_report import write_values
from attention_kernels.bench_timing import describe_machine, first_estimate, free_memory, gpu_state, time_call

__all__ = ["Counted", "Row", "main", "ncu_command", "parse_ncu", "table"]

GPT2_MEDIUM = Case(batch=64, heads=16, length=1024, head_dim=64)
METHODS = ("standard", "SDPA math", "SDPA flash", "ours (cuda)")
METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
# Figure 2, left: GFLOPs, HBM traffic in GB, time in ms; forward + backward on an A100.
PAPER = {"standard": (66.6, 40.3, 41.7), "ours (cuda)": (75.2, 4.4, 7.3)}
_UNITS = {"": 1.0, "byte": 1.0, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9}


@dataclass(frozen=True)
class Counted:
    """What ncu counted over all kernels of a range."""

    read_bytes: float
    written_bytes: float
    kernels: int


@dataclass(frozen=True)
class Row:
    """One method: operations, traffic and time of a forward + backward; a reason where one is missing."""

    method: str
    gflop: float
    counted: Counted | None
    time_ms: float | None
    reason: str = ""


def parse_ncu(text: str) -> Counted:
    """Sum ncu's --csv output over its kernels.

    The table follows lines of ncu's own ("==PROF== ..."). Raises ValueError, with what ncu said, where there is no
    table, no kernel, or a metric is missing.
    """
    lines = text.splitlines()
    said = " ".join(line.strip() for line in lines if line.startswith("==ERROR==")) or "it reported no error"
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"ncu wrote no table of metrics; {said}.")
    sums = dict.fromkeys(METRICS, 0.0)
    kernels: dict[str, set[str]] = {name: set() for name in METRICS}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        name = row.get("Metric Name", "")
        if name in sums:
            sums[name] += _bytes(name, row["Metric Value"], row["Metric Unit"])
            kernels[name].add(row["ID"])
    counts = {len(ids) for ids in kernels.values()}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"ncu counted {', '.join(f'{k}: {len(v)} kernels' for k, v in kernels.items())}; {said}.")
    return Counted(sums[METRICS[0]], sums[METRICS[1]], counts.pop())


def _bytes(name: str, value: str, unit: str) -> float:
    try:
        return float(value.replace(",", "")) * _UNITS[unit.lower()]
    except (ValueError, KeyError):
        raise ValueError(f"ncu gives {name} as {value!r} {unit!r}, which is no number of bytes.") from None


def ncu_command(ncu: str, method: str, dropout: float, case: Case, cache_control: str = "all") -> list[str]:
    """Return the command that profiles one method in a child process."""
    shape = f"{case.batch}x{case.heads}x{case.length}x{case.head_dim}"
    child = [sys.executable, "-m", "attention_kernels.bench_io", "--child", method]
    # Compiling goes on in processes of its own, which the profiler is to leave alone.
    profile = ["--clock-control", "none", "--cache-control", cache_control, "--target-processes", "application-only"]
    # By cudaProfilerStart and not by an NVTX range: autograd launches the backward from a thread of its own, which a
    # pushed range of the main thread does not cover.
    chosen = ["--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    output = ["--csv", "--print-units", "base"]
    return [ncu, *profile, *chosen, *output, *child, "--dropout", str(dropout), "--shape", shape]


def make_call(method: str, case: Case, dropout: float, device: torch.device) -> Call:
    """Return a method on fresh float16 tensors. "standard" is attention written out in torch's own operators."""
    inputs = make_inputs(case, torch.float16, device)
    if method != "standard":
        return next(m for m in make_methods(tiled=True) if m.name == method).build(inputs, dropout)
    q, k, v = leaves = (inputs.q, inputs.k, inputs.v)

    def forward() -> Tensor:
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * case.head_dim**-0.5, dim=-1)
        return torch.matmul(torch.nn.functional.dropout(weights, dropout), v)

    return Call(forward, leaves, inputs.dout)


def run_child(method: str, case: Case, dropout: float, device: torch.device) -> None:
    """Run one forward + backward for the profiler; what comes before (compiling, warm-up) is not counted."""
    call = make_call(method, case, dropout, device)
    with call.context():
        for _ in range(2):
            call.gradients()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
        call.gradients()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()


def gflop(method: str, case: Case) -> float:
    """Return 10^9 operations of forward + backward: 6 products, and 7 where the backward computes the scores anew."""
    products = 7 if method in ("ours (cuda)", "SDPA flash") else 6
    return products / 2 * case.flops() / 1e9


def measure(case: Case, dropout: float, device: torch.device, profile: Callable[[str], Counted]) -> list[Row]:
    """Return a row for every method; one that fails says why."""
    rows = []
    for method in METHODS:
        counted, time_ms, reasons = None, None, []
        try:
            counted = profile(method)
        except (ValueError, OSError, subprocess.SubprocessError) as e:
            reasons.append(f"traffic: {e}")
        try:
            call = make_call(method, case, dropout, device)
            with call.context():
                step = partial(call.gradients)
                time_ms = time_call(step, device, 300.0, first_estimate(step, device))
            del call, step
        except Exception as e:
            reasons.append(f"time: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}")
        free_memory(device)
        rows.append(Row(method, gflop(method, case), counted, time_ms, "; ".join(reasons)))
    return rows


def profile_by_ncu(method: str, ncu: str, case: Case, dropout: float, cache_control: str) -> Counted:
    """Run ncu on one method. Raises ValueError with what it said if it failed."""
    command = ncu_command(ncu, method, dropout, case, cache_control)
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode != 0:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("==ERROR==")] or said[-3:]
        raise ValueError(f"ncu left with {done.returncode}: {' '.join(errors)}")
    return parse_ncu(done.stdout)


def table(rows: Sequence[Row], case: Case = GPT2_MEDIUM) -> str:
    """Return the Markdown table, the paper's numbers beside ours."""
    lines = [
        f"{case.name}, float16, forward + backward",
        "| method | GFLOP | HBM read GB | HBM written GB | HBM GB | time ms | paper (A100): GFLOP, HBM GB, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        c = row.counted
        traffic = [c.read_bytes, c.written_bytes, c.read_bytes + c.written_bytes] if c else []
        cells = [f"{x / 1e9:.2f}" for x in traffic] or ["-"] * 3
        paper = ", ".join(f"{x:g}" for x in PAPER[row.method]) if row.method in PAPER else "-"
        time = "-" if row.time_ms is None else f"{row.time_ms:.2f}"
        lines.append(f"| {row.method} | {row.gflop:.0f} | {' | '.join(cells)} | {time} | {paper} |")
    lines += [f"{row.method}: {row.reason}" for row in rows if row.reason]
    lines.append("GFLOP: ours follow from the shape (6 products, 7 for flash); the paper counts in its own way.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m attention_kernels.bench_io") -> None:
    """Measure and print; without a GPU or ncu, say so and leave with 2."""
    parser = Parser(prog=prog, description="Count HBM bytes of attention with Nsight Compute.")
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout probability, as GPT-2 trains (default 0.1)")
    parser.add_argument("--shape", default="64x16x1024x64", help="batch x heads x length x head dim (GPT-2 medium)")
    parser.add_argument("--ncu", default="ncu", help="path of Nsight Compute's ncu")
    parser.add_argument("--cache-control", choices=["all", "none"], default="all", help="flush L2 before each kernel")
    parser.add_argument("--json", type=Path, help="file of the results")
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        _run(args, [*prog.split(), *(sys.argv[1:] if arguments is None else arguments)])
    except (ValueError, OSError) as e:
        parser.error(str(e))


def _run(args: argparse.Namespace, command: list[str]) -> None:
    sizes = args.shape.split("x")
    if len(sizes) != 4 or not all(x.isdecimal() and int(x) > 0 for x in sizes) or not 0 <= args.dropout < 1:
        raise ValueError(
            f"--shape {args.shape} --dropout {args.dropout:g} is no shape BxHxLxD with a dropout in [0, 1)."
        )
    case = Case(*(int(x) for x in sizes))  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        raise ValueError("Counting HBM bytes needs a CUDA GPU; torch sees none.")
    device = torch.device("cuda")
    if args.child is not None:
        run_child(args.child, case, args.dropout, device)
        return
    ncu = shutil.which(args.ncu)
    if ncu is None:
        raise ValueError(f"{args.ncu} was not found: install Nsight Compute, or give its path with --ncu.")
    before = gpu_state(device)
    profile = partial(profile_by_ncu, ncu=ncu, case=case, dropout=args.dropout, cache_control=args.cache_control)
    rows = measure(case, args.dropout, device, profile)
    print(table(rows, case))
    if args.json is not None:
        values = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "environment": describe_machine(device),
            "settings": {"dropout": args.dropout, "cache_control": args.cache_control, "case": asdict(case)},
            "gpu": [before, gpu_state(device)],
            "rows": [asdict(row) for row in rows],
            "paper": PAPER,
        }
        write_values(values, args.json)


if __name__ == "__main__":
    main()
