"""Which implementation takes a call: the CUDA kernels where they can, the tiled PyTorch form elsewhere.

Called by the operators (ops.py) at every call. A kernel joins by `add_cuda(operator name, function)`; the public
functions never change. What ran is logged once and kept for `what_ran()`. Refusals are pure functions of shapes,
dtypes and devices (`why_not`), and an error only where the kernels were asked for by name (`using("cuda")`).
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from attention_kernels.layouts import BlockLayout

Choice = Literal["auto", "cuda", "tiled"]
Function = Callable[..., tuple[Tensor, ...]]

MAX_HEAD_DIM = 128
CUDA_BLOCK_SIZES = (64, 128)
OPERATORS = ("flash_forward", "flash_backward", "sparse_forward", "sparse_backward")

_log = logging.getLogger("attention_kernels")
_cuda_functions: dict[str, Function] = {}
_ran: dict[str, str] = {}
# Choices made before: what runs, and what to say of it. A call is asked about each time and must cost next to nothing.
_picked: dict[tuple[object, ...], tuple[Function, str]] = {}
_asked: Choice = "auto"
_without_kernel = "this version has no CUDA kernel for it"


def add_cuda(operator: str, function: Function) -> None:
    """Let `function`, which takes the operator's own arguments, run its calls on CUDA tensors.

    Raises ValueError for an unknown operator.
    """
    if operator not in OPERATORS:
        raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, got {operator!r}.")
    _cuda_functions[operator] = function


def explain(reason: str) -> None:
    """Keep why no CUDA kernel joined, for `why_not` and the log."""
    global _without_kernel
    _without_kernel = reason
    _picked.clear()


@contextmanager
def using(implementation: Choice) -> Iterator[None]:
    """Run attention by the named implementation inside the block, in the whole process.

    "cuda" makes a call that the CUDA kernels cannot take a ValueError with the reason; "tiled" takes the PyTorch
    form everywhere; "auto" is the default: the kernels where they can.
    """
    global _asked
    if implementation not in ("auto", "cuda", "tiled"):
        raise ValueError(f'implementation must be "auto", "cuda" or "tiled", got {implementation!r}.')
    before, _asked = _asked, implementation
    try:
        yield
    finally:
        _asked = before


def what_ran() -> dict[str, str]:
    """Return what ran each operator last, and why: {"flash_forward": "tiled PyTorch on cpu, float32: ..."}."""
    return dict(_ran)


def why_not(q: Tensor, k: Tensor, v: Tensor, *, layout: BlockLayout | None = None) -> str | None:
    """Return why the CUDA kernels cannot take these tensors, in words, or None if they can.

    q, k and v are (B, L, H, D) or (T, H, D); `layout` only where the call is a block-sparse one.
    """
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            return f"{name} is {x.dtype} on {x.device}, but q is {q.dtype} on {q.device}"
    block_size = None if layout is None else layout.block_size
    return _refusal("flash_forward" if layout is None else "sparse_forward", q, block_size)


def pick(operator: str, tiled: Function, q: Tensor, block_size: int | None) -> Function:
    """Return the function that takes this call, and record it; `tiled` is the PyTorch form.

    Raises ValueError where the CUDA kernels were asked for by name and cannot take it.
    """
    key = (operator, _cuda_functions.get(operator), q.device, q.dtype, q.shape[-1], block_size, _asked)
    found = _picked.get(key)
    if found is None:
        found = _picked[key] = _choose(operator, tiled, q, block_size)
    _record(operator, found[1])
    return found[0]


def _choose(operator: str, tiled: Function, q: Tensor, block_size: int | None) -> tuple[Function, str]:
    reason = "it was asked for by name" if _asked == "tiled" else _refusal(operator, q, block_size)
    if _asked == "cuda" and reason is not None:
        raise ValueError(f"The CUDA kernels cannot take this call: {reason}.")
    what = "CUDA kernel" if reason is None else "tiled PyTorch"
    because = "" if reason is None else f": {reason}"
    text = f"{what} on {q.device.type}, {str(q.dtype).removeprefix('torch.')}{because}"
    return _cuda_functions[operator] if reason is None else tiled, text


def _record(operator: str, text: str) -> None:
    if _ran.get(operator) != text:
        _ran[operator] = text
        _log.info("%s: %s", operator, text)


def _refusal(operator: str, q: Tensor, block_size: int | None) -> str | None:
    device, dtype, head_dim = q.device, q.dtype, q.shape[-1]
    if device.type != "cuda":
        return f"the tensors are on the device {device.type}; the kernels run on CUDA GPUs"
    if operator not in _cuda_functions:
        return _without_kernel
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"q is {dtype}; the kernels take float16 and bfloat16"
    if head_dim > MAX_HEAD_DIM:
        return f"q has head dim {head_dim}; the kernels take at most {MAX_HEAD_DIM}"
    if block_size is not None and block_size not in CUDA_BLOCK_SIZES:
        return f"layout has blocks of {block_size}; the kernels take 64 and 128"
    return None
