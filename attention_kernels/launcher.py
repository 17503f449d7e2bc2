"""Loads compiled kernels through the CUDA driver and launches them on torch's current stream.

Called by cuda_ops.py. A kernel takes one block of parameters by value (struct Params in csrc/common/types.cuh), packed
here; cuLaunchKernel copies it, so nothing must outlive the call and CUDA graphs capture it as it is. Knows plans and
addresses, nothing of attention.
"""

import ctypes
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import torch

from attention_kernels.kernel_plan import Plan

# struct Params: 21 pointers, 7 strides of three and 5 more 64-bit numbers, 11 ints, 2 unsigned, 2 ints, 3 floats.
PARAMETERS = struct.Struct("<21Q26q11i2I2i3f")
# A block gets 48 KB without being asked for, static arrays counted in: a kernel that may come near asks.
_UNASKED_SHARED_BYTES = 32 * 1024
_lock = Lock()


class LaunchError(RuntimeError):
    """The driver refused to load or to launch a kernel."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A plan loaded on a device."""

    plan: Plan
    function: Any
    threads: int
    shared_bytes: int


class _Here(threading.local):
    """What a thread needs at each launch, made once."""

    def __init__(self) -> None:
        # cuLaunchKernel copies the parameters before it returns: the next launch may write over them.
        self.parameters = ctypes.create_string_buffer(PARAMETERS.size)
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.parameters))
        self.address = ctypes.addressof(self.pointers)
        self.devices: set[int] = set()  # those whose context has been seen current
        self.config: Any = None

    def overlapping(self, driver: Any, shape: tuple[int, ...], stream: int) -> Any:
        """Return the configuration of a launch that may begin before the kernel before it has ended."""
        if self.config is None:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self.config = driver.CUlaunchConfig()
            self.config.attrs, self.config.numAttrs = [attribute], 1
        c = self.config
        c.gridDimX, c.gridDimY, c.gridDimZ, c.blockDimX, c.blockDimY, c.blockDimZ, c.sharedMemBytes = shape
        c.hStream = driver.CUstream(stream)
        return c


_here = _Here()
_ready: dict[tuple[int, int], _Ready] = {}


def launch(plan: Plan, index: int, blocks: int, parameters: Sequence[int | float], overlap: bool = False) -> None:
    """Launch `blocks` blocks of the plan's kernel on the current stream of CUDA device `index`; builds it if need be.

    `parameters` are the fields of struct Params (csrc/common/types.cuh). `overlap` lets it begin before the kernel in
    front of it has ended (programmatic dependent launch, from 9.0 on), where both are written for that (overlap.cuh).
    """
    if blocks == 0:
        return
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(plan, index, blocks, parameters, overlap)
    driver, here = _driver(), _here
    if index not in here.devices:
        _make_context_current(driver, index)
        here.devices.add(index)
    # Why by identity: plans are made once (kernel_plan.plan is cached), and hashing one costs more than a launch.
    ready = _ready.get((id(plan), index))
    if ready is None or ready.plan is not plan:
        ready = _get_ready(plan, index)
    here.parameters.raw = PARAMETERS.pack(*parameters)
    shape = (blocks, 1, 1, ready.threads, 1, 1, ready.shared_bytes)
    if overlap:
        config = here.overlapping(driver, shape, _stream(index))
        (status,) = driver.cuLaunchKernelEx(config, ready.function, here.address, 0)
    else:
        (status,) = driver.cuLaunchKernel(ready.function, *shape, _stream(index), here.address, 0)
    if status != 0:
        _check(driver, status, f"launch {plan.name} with {blocks} blocks")


def _stream(index: int) -> int:
    """Return the handle of torch's current stream, which torch.cuda.current_stream wraps at ten times the cost."""
    return int(torch._C._cuda_getCurrentRawStream(index))


def _get_ready(plan: Plan, index: int) -> _Ready:
    with _lock:
        function = _loaded(plan, index)
    ready = _ready[id(plan), index] = _Ready(plan, function, plan.threads, plan.shared_bytes)
    return ready


def fits(plan: Plan, index: int) -> bool:
    """Return whether a block's shared memory is within the device's limit."""
    return plan.shared_bytes <= _limits(index)[1]


def blocks_at_a_time(plan: Plan, index: int) -> int:
    """Return how many blocks of a plan run on the device at once."""
    return _limits(index)[0] * plan.tiles.min_blocks


@cache
def is_hopper(index: int) -> bool:
    """Return whether the device is of compute capability 9.0."""
    return torch.cuda.get_device_capability(index) == (9, 0)


@cache
def _limits(index: int) -> tuple[int, int]:
    """Return a device's multiprocessors and the most shared memory that a block can have."""
    properties: Any = torch.cuda.get_device_properties(index)
    return int(properties.multi_processor_count), int(properties.shared_memory_per_block_optin)


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _make_context_current(driver: Any, index: int) -> None:
    """Make the device's primary context current in a thread that torch has not used yet."""
    status, context = driver.cuCtxGetCurrent()
    if int(status) == 0 and int(context) != 0:
        return
    status, context = driver.cuDevicePrimaryCtxRetain(index)
    _check(driver, status, f"take the context of CUDA device {index}")
    (status,) = driver.cuCtxSetCurrent(context)
    _check(driver, status, f"make the context of CUDA device {index} current")


@cache
def _loaded(plan: Plan, index: int) -> Any:
    """Return the kernel's handle, its shared memory limit raised on this device."""
    # Why here: `python -m attention_kernels.compiler` imports the package first, and then runs that module once more.
    from attention_kernels import compiler

    driver = _driver()
    kernel = _kernel(plan, compiler.architecture(torch.cuda.get_device_capability(index)))
    if plan.shared_bytes > _UNASKED_SHARED_BYTES:
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = driver.cuKernelSetAttribute(limit, plan.shared_bytes, kernel, index)
        _check(driver, status, f"give {plan.name} {plan.shared_bytes} bytes of shared memory")
    # The driver takes a CUkernel wherever it takes a CUfunction; it resolves it for the current context.
    return driver.CUfunction(int(kernel))


@cache
def _kernel(plan: Plan, arch: str) -> Any:
    from attention_kernels import compiler

    driver = _driver()
    code = compiler.cubin(plan, arch)
    status, library = driver.cuLibraryLoadData(code, [], [], 0, [], [], 0)
    _check(driver, status, f"load {plan.name} for sm_{arch}")
    status, kernel = driver.cuLibraryGetKernel(library, plan.entry.encode())
    _check(driver, status, f"find {plan.entry} in its cubin")
    return kernel


def _check(driver: Any, status: Any, what: str) -> None:
    if int(status) == 0:
        return
    _, text = driver.cuGetErrorString(status)
    raise LaunchError(f"Could not {what}: {text.decode() if text else 'unknown error'} ({int(status)}).")
