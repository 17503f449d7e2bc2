"""Builds the kernels of calls to come in the background, so that a first step does not wait for one after the other.

Called by whoever knows what attention it will ask for and has something else to do meanwhile.
"""

import threading
from contextlib import suppress

import torch
from torch import Tensor

from attention_kernels import compiler, dispatch, launcher
from attention_kernels.kernel_call import DTYPES, takes_hopper
from attention_kernels.kernel_plan import Kernel, Plan, plan
from attention_kernels.layouts import BlockLayout


def build_ahead(
    q: Tensor, *, dropout: bool = False, deterministic: bool = False, layout: BlockLayout | None = None
) -> list[threading.Thread]:
    """Begin to build every kernel that forward and backward of calls like q will launch; return what builds them.

    q is (B, L, H, D) or (T, H, D), of which only dtype, device and D count; `layout` makes it block-sparse attention.
    With dropout the forward without it, an evaluation's, is built too. Nothing is built where the kernels take no such
    call. Errors are left to the call itself, which meets them again and tells them.
    """
    if dispatch.why_not(q, q, q, layout=layout) is not None:
        return []
    arch = compiler.architecture(torch.cuda.get_device_capability(q.device))
    threads = []
    for one in plans_of(q, dropout, deterministic, 0 if layout is None else layout.block_size):
        thread = threading.Thread(target=_build, args=(one, arch), name=f"build {one.name}", daemon=True)
        thread.start()
        threads.append(thread)
    return threads


def plans_of(q: Tensor, dropout: bool, deterministic: bool, sparse: int) -> list[Plan]:
    """Return the kernels that cuda_ops.py launches for calls like q, each once; `sparse`: a layout's blocks, or 0."""
    index = torch.cuda.current_device() if q.device.index is None else q.device.index
    hopper = takes_hopper(index)

    def of(kernel: Kernel, drops: bool) -> Plan:
        return plan(kernel, -(-q.shape[-1] // 8) * 8, DTYPES[q.dtype], drops, hopper, sparse)

    found = [of("forward", dropout), of("preprocess", dropout)]
    if found[0].hopper:
        found.append(of("order", False))
    whole = of("backward", dropout)
    if deterministic or not launcher.fits(whole, index):
        found += [of("backward_queries", dropout), of("backward_keys", dropout)]
    else:
        found += [whole, of("postprocess", dropout)]
    return [*found, of("forward", False)] if dropout else found


def _build(one: Plan, arch: str) -> None:
    with suppress(compiler.CompileError, OSError):
        compiler.build(one, arch)
