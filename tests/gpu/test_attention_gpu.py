"""The public face of attention_kernels on a GPU, against float64 on the CPU and against PyTorch in the same dtype."""

from itertools import pairwise

import pytest
import torch

import attention_kernels as ak
from attention_kernels import BlockLayout

LENGTHS = [1, 0, 63, 64, 65, 300, 1000]


def inputs(dtype: torch.dtype, head_dim: int = 32) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return q, k, v, gradient of out as (T, 2, head_dim) on the GPU, and cu_seqlens."""
    torch.manual_seed(0)
    tensors = [torch.randn(sum(LENGTHS), 2, head_dim).to(dtype).cuda() for _ in range(4)]
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    return tensors, cu.cuda()


def truth(tensors: list[torch.Tensor], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Return out, dq, dk, dv of the plain formula in `dtype`, sequence by sequence."""
    q, k, v, grad = (t.detach().to(device, dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    outs = []
    for a, b in pairwise([0, *torch.tensor(LENGTHS).cumsum(0).tolist()]):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b]) * q.shape[-1] ** -0.5
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[a:b]))
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def attend(kind: str, tensors: list[torch.Tensor], cu: torch.Tensor, **more: object) -> list[torch.Tensor]:
    q, k, v, grad = tensors
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    if kind == "flash":
        out = ak.flash_attention_varlen(q, k, v, cu, cu, 1000, 1000, **more)
    else:
        layout = BlockLayout.dense(1000, block_size=64).to(q.device)
        out = ak.block_sparse_attention_varlen(q, k, v, layout, cu, 1000, **more)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


# PyTorch's own, in the thread that runs its backward, if nothing there has used the GPU before.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("kind", ["flash", "block_sparse"])
def test_float32_which_no_kernel_takes_errs_at_most_twice_as_pytorch(kind: str) -> None:
    tensors, cu = inputs(torch.float32)
    exact = truth(tensors, torch.float64, "cpu")
    plain = truth(tensors, torch.float32, "cuda")
    ours = attend(kind, tensors, cu)
    for name, factor, e, p, o in zip(("out", "dq", "dk", "dv"), (2, 3, 3, 3), exact, plain, ours, strict=True):
        theirs = (p.cpu().double() - e).abs().max().item()
        assert (o.cpu().double() - e).abs().max().item() <= factor * theirs + 1e-5, name


def test_dropout_draws_one_mask_on_cpu_and_gpu() -> None:
    tensors, cu = inputs(torch.float32)
    seed = torch.tensor([7, 11], dtype=torch.int64)
    on_gpu = attend("flash", tensors, cu, dropout_p=0.2, dropout_seed=seed.cuda())
    on_cpu = attend("flash", [t.cpu() for t in tensors], cu.cpu(), dropout_p=0.2, dropout_seed=seed)
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["flash", "block_sparse"])
def test_twenty_repeats_give_the_same_bits(kind: str) -> None:
    tensors, cu = inputs(torch.bfloat16)
    first = attend(kind, tensors, cu, deterministic=True)
    for _ in range(20):
        again = attend(kind, tensors, cu, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_path256_length_needs_no_square_matrix() -> None:
    q = torch.randn(1, 65_536, 1, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    ak.flash_attention(q, q, q).sum().backward()
    # The square of the scores alone would be 8.6 GB in bf16.
    assert torch.cuda.max_memory_allocated() < 2e9
    assert q.grad is not None and q.grad.isfinite().all()


def test_compiled_with_inductor_in_one_graph() -> None:
    tensors, cu = inputs(torch.bfloat16)
    q, k, v, _ = tensors

    def scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return 2 * ak.flash_attention_varlen(q * 0.5, k, v, cu, cu, 1000, 1000)

    torch.testing.assert_close(torch.compile(scaled, fullgraph=True)(q, k, v), scaled(q, k, v), rtol=2e-2, atol=2e-2)
