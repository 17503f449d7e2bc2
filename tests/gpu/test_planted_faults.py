"""Faults planted in copies of the kernels: at least 11 of 12 must be noticed by a handful of cases.

Each fault has a process of its own, which imports a copy of the package: one that reads outside its buffers ends no
other's GPU context.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attention_kernels import compiler
from tests.gpu.cases import FAMILIES_HERE
from tests.gpu.faults import FAULTS, NOTHING, NOTICED, SOUND, Fault

REPOSITORY = Path(__file__).parents[2]
HANGS_AFTER_S = 180
AT_ONCE = 8  # processes on one GPU, each compiling what its fault reaches; the cache names kernels by their sources


def plant(fault: Fault, folder: Path) -> None:
    """Copy the package into the folder, with the fault in it."""
    shutil.copytree(compiler.SOURCES.parent, folder / "attention_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "attention_kernels" / compiler.SOURCES.name / fault.file
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.what}: its text stands {text.count(fault.old)} times in {fault.file}"
    path.write_text(text.replace(fault.old, fault.new))


def judge(fault: Fault, folder: Path) -> tuple[int, str]:
    """Return the detector's exit status and what it printed; a process that hangs has noticed."""
    plant(fault, folder)
    paths = os.pathsep.join([str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, SOUND: str(compiler.SOURCES)}
    command = [sys.executable, "-m", "tests.gpu.faults", fault.family, str(fault.head_dim), fault.dtype, fault.where]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS_AFTER_S, check=False
        )
    except subprocess.TimeoutExpired:
        return NOTICED, f"still running after {HANGS_AFTER_S} s"
    if done.returncode < 0:
        return NOTICED, f"ended by signal {-done.returncode}"
    return done.returncode, done.stdout.strip() or done.stderr.strip()[-2000:]


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_eleven_of_twelve_faults_are_noticed(family: str, tmp_path: Path) -> None:
    faults = [fault for fault in FAULTS if fault.family == family]
    for fault in list(faults):
        # What is noticed must be the fault: without it, the same cases have to pass.
        sound = fault._replace(what="none", file="common/types.cuh", old="#pragma once\n", new="#pragma once\n")
        if sound not in faults:
            faults.append(sound)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        folders = [tmp_path / str(number) for number in range(len(faults))]
        found = list(pool.map(judge, faults, folders))
    survived = []
    for fault, (status, said) in zip(faults, found, strict=True):
        first = said.splitlines()[0] if said else "nothing"
        print(f"{'noticed' if status else 'NOT NOTICED':<12} {fault.what}: {first}")
        assert status in (NOTHING, NOTICED), f"{fault.what}: the detector itself failed ({status}):\n{said}"
        if fault.what == "none":
            assert status == NOTHING, f"the kernels as they are, head dim {fault.head_dim}:\n{said}"
        elif status == NOTHING:
            survived.append(fault.what)
    planted = sum(fault.what != "none" for fault in faults)
    assert planted >= 12 and 12 * len(survived) <= planted, f"not noticed, of {planted}: {survived}"
