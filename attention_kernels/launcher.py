"""Loads compiled kernels through the CUDA driver and launches them on torch's current stream.

Called by cuda_ops.py. A kernel takes one block of parameters by value (struct Params in csrc/common/types.cuh), packed
here; cuLaunchKernel copies it, so nothing must outlive the call and CUDA graphs capture it as it is. Knows plans and
addresses, nothing of attention.
"""

import ctypes
import struct
from functools import cache
from threading import Lock
from typing import Any

import torch

from attention_kernels.kernel_plan import Plan

# struct Params: 20 pointers, 7 strides of three and 5 more 64-bit numbers, 9 ints, 2 unsigned, 3 floats.
PARAMETERS = struct.Struct("<20Q26q9i2I3f")
_DEFAULT_SHARED_BYTES = 48 * 1024
_lock = Lock()
_functions: dict[tuple[int, int], tuple[Plan, Any]] = {}


class LaunchError(RuntimeError):
    """The driver refused to load or to launch a kernel."""


def launch(plan: Plan, device: torch.device, blocks: int, parameters: tuple[int | float, ...]) -> None:
    """Launch `blocks` blocks of the plan's kernel on the device's current stream; builds it first where needed."""
    if blocks == 0:
        return
    driver = _driver()
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index):
        _make_context_current(driver, index)
        function = _function(plan, index)
        packed = ctypes.create_string_buffer(PARAMETERS.pack(*parameters), PARAMETERS.size)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(packed))
        stream = torch.cuda.current_stream(index).cuda_stream
        shape = (blocks, 1, 1, plan.threads, 1, 1, plan.shared_bytes)
        (status,) = driver.cuLaunchKernel(function, *shape, stream, ctypes.addressof(pointers), 0)
        _check(driver, status, f"launch {plan.name} with {blocks} blocks")


def fits(plan: Plan, device: torch.device) -> bool:
    """Return whether a block's shared memory is within the device's limit."""
    return plan.shared_bytes <= _shared_limit(device)


@cache
def is_hopper(device: torch.device) -> bool:
    """Return whether the device is of compute capability 9.0."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def blocks_at_a_time(plan: Plan, device: torch.device) -> int:
    """Return how many blocks of a plan run on the device at once."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count) * plan.tiles.min_blocks


@cache
def _shared_limit(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


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


def _function(plan: Plan, index: int) -> Any:
    # Why by identity: plans are made once (kernel_plan.plan is cached), and hashing one costs more than a launch.
    found = _functions.get((id(plan), index))
    if found is not None and found[0] is plan:
        return found[1]
    with _lock:
        function = _loaded(plan, index)
    _functions[id(plan), index] = (plan, function)
    return function


@cache
def _loaded(plan: Plan, index: int) -> Any:
    """Return the kernel's handle, its shared memory limit raised on this device."""
    # Why here: `python -m attention_kernels.compiler` imports the package first, and then runs that module once more.
    from attention_kernels import compiler

    driver = _driver()
    kernel = _kernel(plan, compiler.architecture(torch.cuda.get_device_capability(index)))
    if plan.shared_bytes > _DEFAULT_SHARED_BYTES:
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
