"""Builds the CUDA kernels with NVRTC when they are first needed, and keeps the cubins.

Called by launcher.py (`cubin`), and as `python -m attention_kernels.compiler` to build all without a GPU. Each build
runs in a child process: NVRTC 13.0 is known to crash on some inputs, and several can run at a time. The child is this
very file run as a script, so it imports neither torch nor the package. Knows nothing of tensors.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attention_kernels.kernel_plan import Plan

SOURCES = Path(__file__).parent / "csrc"
_FORMAT = 1
_lock = Lock()
_turns: dict[str, Lock] = {}  # by name of the cubin
_STALE_S = 3600
_MISSING = (
    "The CUDA kernels are compiled at first use by NVRTC, and it was not found ({reason}). "
    "PyTorch's CUDA builds bring it; else: pip install 'nvidia-cuda-nvrtc==13.0.*' 'cuda-bindings==13.0.*'."
)


class CompileError(RuntimeError):
    """The compiler is missing, failed or crashed, or its cache cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Report:
    """What ptxas said of one variant."""

    registers: int
    spill_bytes: int
    shared_bytes: int  # static
    seconds: float


def architecture(capability: tuple[int, int]) -> str:
    """Return the target for a GPU's compute capability: "80", "86", "90a", "120"."""
    major, minor = capability
    return f"{major}{minor}a" if (major, minor) == (9, 0) else f"{major}{minor}"


def cache_folder() -> Path:
    """Return the folder of the cubins, made if missing; CompileError where others could write to it."""
    named = os.environ.get("ATTENTION_KERNELS_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(home) / "attention_kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise CompileError(
            f"The kernel cache {folder} cannot be used ({error.strerror}). "
            "Set ATTENTION_KERNELS_CACHE to a folder of yours."
        ) from error
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
        raise CompileError(
            f"The kernel cache {folder} can be written by others, and what lies in it runs on the GPU. "
            f"Run: chmod go-w {folder} (and own it), or set ATTENTION_KERNELS_CACHE to a folder of yours."
        )
    return folder


def options(plan: "Plan", arch: str) -> list[str]:
    """Return NVRTC's options for a variant, without the folders of the headers."""
    macros = [f"-D{name}={value}" for name, value in sorted(plan.defines.items())]
    return [f"--gpu-architecture=sm_{arch}", "--std=c++17", "--ptxas-options=-v", "--generate-line-info", *macros]


def key(plan: "Plan", arch: str) -> str:
    """Return the name of a variant's cubin: a hash of every source, the options and the compiler's version."""
    parts = [str(_FORMAT), plan.source, *options(plan, arch), nvrtc_version(), _source_hash()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def cubin(plan: "Plan", arch: str) -> bytes:
    """Return the machine code of a variant, built now unless the cache has it."""
    path, _ = build(plan, arch)
    return path.read_bytes()


def build(plan: "Plan", arch: str) -> tuple[Path, Report]:
    """Build a variant unless the cache has it; return where its cubin lies and what ptxas said.

    Safe against other builders: each writes its own temporary file and renames it, whole, onto the same name.
    """
    folder = cache_folder()
    name = key(plan, arch)
    with _lock:
        turn = _turns.setdefault(name, Lock())
    # Who asks for what another thread is building (ahead.py) waits for that.
    with turn:
        return _build_once(plan, arch, folder, name)


def _build_once(plan: "Plan", arch: str, folder: Path, name: str) -> tuple[Path, Report]:
    path, report_path = folder / f"{name}.cubin", folder / f"{name}.json"
    if path.exists() and report_path.exists():
        return path, Report(**json.loads(report_path.read_text()))
    _sweep(folder)
    before = time.monotonic()
    code, log = _build_in_child(plan, arch)
    report = _report(log, time.monotonic() - before)
    # The cubin last: it is what says that the variant is there.
    _write_atomic(report_path, json.dumps(asdict(report)).encode())
    _write_atomic(path, code)
    return path, report


@lru_cache(maxsize=1)
def nvrtc_version() -> str:
    """Return NVRTC's version, like "13.0"; CompileError with the remedy where it is missing."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # Why so wide: the bindings raise their own types for a library that is not found.
        raise CompileError(_MISSING.format(reason=f"{type(error).__name__}: {error}".splitlines()[0])) from error
    if int(status) != 0:
        raise CompileError(_MISSING.format(reason=f"nvrtcVersion gave {status}"))
    return f"{major}.{minor}"


def _source_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.cu*")):
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _build_in_child(plan: "Plan", arch: str) -> tuple[bytes, str]:
    nvrtc_version()
    with tempfile.TemporaryDirectory(prefix="attention_kernels-") as scratch:
        output = Path(scratch) / "kernel.cubin"
        request = {
            "source": str(SOURCES / plan.source),
            "options": [*options(plan, arch), f"-I{SOURCES}", f"-I{SOURCES / 'common'}"],
            "output": str(output),
        }
        # -P: the folder of this script must not shadow modules of the same names.
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--child"]
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
        if done.returncode != 0 or not output.exists():
            said = (done.stdout + done.stderr).strip() or "no message"
            how = f"crashed (signal {-done.returncode})" if done.returncode < 0 else "failed"
            raise CompileError(f"The CUDA compiler {how} on {plan.name} for sm_{arch}:\n{said}")
        return output.read_bytes(), done.stdout


def _report(log: str, seconds: float) -> Report:
    def total(pattern: str) -> int:
        return sum(int(number) for number in re.findall(pattern, log))

    # Why: products that the compiler makes wait for each other for want of registers cost like spills, and more.
    if "instructions are serialized" in log:
        raise CompileError(f"The compiler serialised the products of a kernel:\n{log}")
    spills = total(r"(\d+) bytes spill stores") + total(r"(\d+) bytes spill loads")
    # A build holds a dense kernel and, in most sources, a block-sparse one: the larger numbers count.
    registers, shared = (max(map(int, re.findall(p, log)), default=0) for p in (r"Used (\d+) reg", r"(\d+) bytes smem"))
    return Report(registers, spills, shared, round(seconds, 2))


def _write_atomic(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sweep(folder: Path) -> None:
    """Remove what builders killed an hour ago or more have left."""
    for path in folder.glob(".tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
        except FileNotFoundError:
            continue  # its builder renamed it meanwhile


def _child() -> int:
    """Compile the request on stdin, print the compiler's log, write the cubin; the process's exit status."""
    from cuda.bindings import nvrtc

    request = json.loads(sys.stdin.read())
    source = Path(request["source"]).read_bytes()
    _, program = nvrtc.nvrtcCreateProgram(source, os.path.basename(request["source"]).encode(), 0, [], [])
    flags = [option.encode() for option in request["options"]]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = b" " * size
    nvrtc.nvrtcGetProgramLog(program, log)
    print(log.decode(errors="replace").rstrip("\0 \n"))
    if int(status) != 0:
        return 1
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = b" " * size
    nvrtc.nvrtcGetCUBIN(program, code)
    Path(request["output"]).write_bytes(code)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Build all variants (or a covering set), print a table, return 1 if one spills more than its plan knows of."""
    from attention_kernels.kernel_plan import all_plans, cover_plans

    parser = argparse.ArgumentParser(prog="python -m attention_kernels.compiler", description=main.__doc__)
    parser.add_argument("--arch", default="80,90a", help="targets, comma-separated (default 80,90a)")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every variant")
    which.add_argument("--cover", action="store_true", help="every kernel and width, not every combination")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    asked = parser.parse_args(arguments)
    plans = all_plans() if asked.all else cover_plans()
    work = [(plan, arch) for arch in asked.arch.split(",") for plan in plans if arch == "90a" or not plan.hopper]
    try:
        with ThreadPoolExecutor(asked.jobs) as pool:
            reports = [report for _, report in pool.map(lambda one: build(*one), work)]
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'kernel':<44} {'target':>6} {'registers':>9} {'spills':>7} {'shared':>8} {'built in':>8}")
    for (plan, arch), report in zip(work, reports, strict=True):
        shared = plan.shared_bytes + report.shared_bytes
        print(
            f"{plan.name:<44} {'sm_' + arch:>6} {report.registers:>9} {report.spill_bytes:>5} B {shared:>6} B "
            f"{report.seconds:>6.1f} s"
        )
    found = [(plan, report.spill_bytes) for (plan, _), report in zip(work, reports, strict=True) if report.spill_bytes]
    unknown = [plan.name for plan, spilled in found if spilled > plan.spills]
    print(f"{len(work)} variants, {len(found)} with spills, in {cache_folder()}")
    print(
        "\n".join(["Spills that no plan knows of:", *unknown]) if unknown else "No spills but those that plans know of."
    )
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(_child() if sys.argv[1:] == ["--child"] else main())
