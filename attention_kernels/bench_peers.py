"""The methods that the benchmark compares: ours, PyTorch's, and flash_attn where it is installed.

A method turns a case's tensors into a `Call`; what it cannot do it refuses with `Unsupported` and the reason.
"""

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attention_kernels.bench_cases import Case, Inputs
from attention_kernels.block_sparse import block_sparse_attention
from attention_kernels.dispatch import Choice, using
from attention_kernels.flash import flash_attention, flash_attention_varlen
from attention_kernels.layouts import BlockLayout
from attention_kernels.standard import standard_attention

__all__ = ["DENSE", "Call", "Method", "Unsupported", "make_methods", "methods_of", "ours"]

# Our dense attention beside a block-sparse case.
DENSE = "ours, dense"

# Bytes a score under the math backend, forward + backward: it computes in float32 and keeps several copies.
_MATH_BYTES = 20
_CPU_BYTES = 4 << 30


class Unsupported(Exception):
    """A method cannot take a case; the text is the reason."""


@dataclass(frozen=True)
class Call:
    """A method on a case's tensors: what it runs, what it differentiates, and how its tensors map to the case's."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    canonical: Callable[[Tensor], Tensor] = lambda x: x
    # Entered around every call, outside the timed part: how torch and we are told which implementation to take.
    context: Callable[[], AbstractContextManager[None]] = nullcontext

    def gradients(self) -> tuple[Tensor, ...]:
        """Run forward and backward; return dq, dk, dv."""
        return torch.autograd.grad(self.forward(), self.leaves, self.dout)


@dataclass(frozen=True)
class Method:
    """A name, a group ("ours", "sdpa", "other") and the function of (inputs, dropout probability).

    One that computes something else than the case (`checked` false) is timed beside it and not compared.
    """

    name: str
    group: str
    build: Callable[[Inputs, float], Call]
    checked: bool = True


def methods_of(case: Case, tiled: bool = False) -> list[Method]:
    """Return the methods that a case compares, ours first."""
    if case.contest == "all":
        return make_methods(tiled)
    forms: list[Choice] = ["cuda", "tiled"] if tiled else ["cuda"]
    ours_first = [Method(f"ours ({form})", "ours", _bind(ours, form)) for form in forms]
    if case.contest == "runtime":
        butterfly = Method("block-sparse butterfly", "other", _butterfly, checked=False)
        return [*ours_first, Method("standard", "other", _standard), butterfly]
    dense = Method(DENSE, "other", _bind(_dense, "auto"), checked=False)
    return [*ours_first, dense, *([Method("FlexAttention", "other", _flex)] if case.contest == "flex" else [])]


def make_methods(tiled: bool = False) -> list[Method]:
    """Return every method of the benchmark, ours first; the tiled PyTorch form only on request."""
    backends = {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
    }
    forms: list[Choice] = ["cuda", "tiled"] if tiled else ["cuda"]
    return [
        *(Method(f"ours ({form})", "ours", _bind(ours, form)) for form in forms),
        *(Method(f"SDPA {name}", "sdpa", _bind(_sdpa, backend)) for name, backend in backends.items()),
        Method("torch varlen", "other", _torch_varlen),
        Method("FlexAttention", "other", _flex),
        Method("flash_attn", "other", _flash_attn),
    ]


def _bind(build: Callable[[Inputs, float, Any], Call], choice: Any) -> Callable[[Inputs, float], Call]:
    return lambda inputs, dropout: build(inputs, dropout, choice)


def ours(inputs: Inputs, dropout: float, form: Choice = "auto") -> Call:
    """Return our attention, by the named implementation and no other unless "auto"."""
    q, k, v = leaves = (inputs.q, inputs.k, inputs.v)
    rule: dict[str, Any] = {"dropout_p": dropout, "causal": inputs.case.causal}

    def forward() -> Tensor:
        if inputs.layout is not None:
            return _blocks(leaves, inputs.layout, rule)
        if inputs.cu_seqlens is None:
            out = flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **rule)
            assert isinstance(out, Tensor)
            return out.transpose(1, 2)
        offsets, most = inputs.cu_seqlens, inputs.max_length
        out = flash_attention_varlen(q, k, v, offsets, offsets, most, most, **rule)
        assert isinstance(out, Tensor)
        return out

    return Call(forward, leaves, inputs.dout, context=lambda: using(form))


def _blocks(leaves: tuple[Tensor, Tensor, Tensor], layout: BlockLayout, rule: dict[str, Any]) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = block_sparse_attention(q, k, v, layout, **rule)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _dense(inputs: Inputs, dropout: float, form: Choice) -> Call:
    """Return our dense attention on a block-sparse case's tensors."""
    return ours(replace(inputs, layout=None), dropout, form)


def _butterfly(inputs: Inputs, dropout: float) -> Call:
    """Return our block-sparse attention under the butterfly that FlashAttention used, in blocks of 64."""
    layout = BlockLayout.butterfly(inputs.max_length).to(inputs.q.device)
    return ours(replace(inputs, layout=layout), dropout)


def _standard(inputs: Inputs, dropout: float) -> Call:
    """Return attention that keeps all its scores in memory, as FlashAttention's papers compare with."""
    _refuse_large_scores(inputs)
    leaves, causal = (inputs.q, inputs.k, inputs.v), inputs.case.causal

    def forward() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in leaves)
        return standard_attention(q, k, v, dropout_p=dropout, causal=causal).transpose(1, 2)

    return Call(forward, leaves, inputs.dout)


def _sdpa(inputs: Inputs, dropout: float, backend: SDPBackend) -> Call:
    """Return SDPA with one backend; a packed case is padded beforehand and its pads masked, as SDPA's users do."""
    if backend == SDPBackend.MATH:
        _refuse_large_scores(inputs)
    mask, canonical = None, lambda x: x
    leaves, dout = (inputs.q, inputs.k, inputs.v), inputs.dout
    if inputs.cu_seqlens is not None:
        if inputs.case.causal:
            raise Unsupported("SDPA takes no causal rule beside a padding mask")
        rows_T, columns_T, inside = _padding(inputs)
        mask = inside[:, None, None].expand(-1, inputs.case.heads, inside.shape[1], -1)

        def pad(x: Tensor) -> Tensor:
            padded = x.new_zeros((*inside.shape, *x.shape[1:]))
            padded[rows_T, columns_T] = x.detach()
            return padded.transpose(1, 2).contiguous()

        def canonical(x: Tensor) -> Tensor:
            return x.transpose(1, 2)[rows_T, columns_T]

        leaves = tuple(pad(x).requires_grad_() for x in leaves)  # type: ignore[assignment]
        dout = pad(dout)

    def forward() -> Tensor:
        return scaled_dot_product_attention(*leaves, mask, dropout, inputs.case.causal)

    return Call(forward, leaves, dout, canonical, lambda: sdpa_kernel(backend))


def _padding(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return each packed row's sequence and position, and which padded positions (B, L) are real."""
    assert inputs.cu_seqlens is not None
    lengths = inputs.cu_seqlens.diff()
    inside = torch.arange(inputs.max_length, device=lengths.device) < lengths[:, None]
    rows, columns = inside.nonzero(as_tuple=True)
    return rows, columns, inside


def _refuse_large_scores(inputs: Inputs) -> None:
    case = inputs.case
    need = _MATH_BYTES * case.batch * case.heads * inputs.max_length**2
    free = torch.cuda.mem_get_info(inputs.q.device)[0] if inputs.q.is_cuda else _CPU_BYTES
    if need > free:
        raise Unsupported(f"its scores need about {need / 2**30:,.0f} GiB and {free / 2**30:,.0f} GiB are free")


def _on_gpu(inputs: Inputs) -> bool:
    return inputs.q.is_cuda


def _torch_varlen(inputs: Inputs, dropout: float) -> Call:
    """Return torch's packed attention (FlashAttention-2 inside)."""
    if inputs.cu_seqlens is None:
        raise Unsupported("takes packed cases only")
    if dropout:
        raise Unsupported("has no dropout")
    if inputs.case.causal:
        raise Unsupported("is timed without a causal mask only")
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise Unsupported(f"torch {torch.__version__} has no torch.nn.attention.varlen")
    if not _on_gpu(inputs):
        raise Unsupported("runs on CUDA GPUs only")
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    leaves, offsets, most = (inputs.q, inputs.k, inputs.v), inputs.cu_seqlens, inputs.max_length
    return Call(lambda: attend(*leaves, offsets, offsets, most, most), leaves, inputs.dout)


def _flex(inputs: Inputs, dropout: float) -> Call:
    """Return compiled FlexAttention; packed sequences are told apart by a block mask made beforehand."""
    if dropout:
        raise Unsupported("has no dropout")
    if not _on_gpu(inputs):
        raise Unsupported("is timed on CUDA GPUs only: elsewhere it has no backward")
    if inputs.case.causal:
        raise Unsupported("is timed without a causal mask only")
    module = importlib.import_module("torch.nn.attention.flex_attention")
    # A fresh graph a case: dynamo gives up on a function compiled for too many shapes.
    torch._dynamo.reset()
    attend = torch.compile(module.flex_attention, dynamic=False)
    leaves = (inputs.q, inputs.k, inputs.v)
    if inputs.layout is not None:
        listed = _flex_blocks(inputs.layout, module.BlockMask)
        return Call(lambda: attend(*leaves, block_mask=listed), leaves, inputs.dout)
    if inputs.cu_seqlens is None:
        return Call(lambda: attend(*leaves), leaves, inputs.dout)
    total = len(inputs.q)
    sequence = torch.repeat_interleave(inputs.cu_seqlens.diff().long())

    def alike(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return sequence[row] == sequence[column]

    blocks = module.create_block_mask(alike, None, None, total, total, device=inputs.q.device)

    def forward() -> Tensor:
        out: Tensor = attend(*(x.transpose(0, 1)[None] for x in leaves), block_mask=blocks)
        return out[0].transpose(0, 1)

    return Call(forward, leaves, inputs.dout)


def _flex_blocks(layout: BlockLayout, block_mask: Any) -> Any:
    """Return the layout as FlexAttention takes it: all blocks whole, none to be masked within."""
    mask = layout.to_mask()[:1]
    count = mask.sum(-1, dtype=torch.int32)[None]
    order = torch.argsort(mask.int(), dim=-1, descending=True, stable=True).int()[None].contiguous()
    return block_mask.from_kv_blocks(torch.zeros_like(count), order, count, order, BLOCK_SIZE=layout.block_size)


def _flash_attn(inputs: Inputs, dropout: float) -> Call:
    """Return the package flash_attn."""
    if importlib.util.find_spec("flash_attn") is None:
        raise Unsupported("flash_attn is not installed")
    package = importlib.import_module("flash_attn")
    leaves, rule = (inputs.q, inputs.k, inputs.v), {"dropout_p": dropout, "causal": inputs.case.causal}
    if inputs.cu_seqlens is None:

        def forward() -> Tensor:
            out: Tensor = package.flash_attn_func(*(x.transpose(1, 2) for x in leaves), **rule)
            return out.transpose(1, 2)

        return Call(forward, leaves, inputs.dout)
    offsets, most = inputs.cu_seqlens, inputs.max_length
    return Call(
        lambda: package.flash_attn_varlen_func(*leaves, offsets, offsets, most, most, **rule), leaves, inputs.dout
    )
