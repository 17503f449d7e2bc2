"""Exact attention in linear memory: standard, flash and block-sparse, for fixed and packed batches.

The public functions are imported here; README.md beside this file says what they take, refuse and why.
"""

from attention_kernels import cuda_ops as _cuda_ops
from attention_kernels.block_sparse import block_sparse_attention, block_sparse_attention_varlen
from attention_kernels.dispatch import using, what_ran, why_not
from attention_kernels.families import cuda_family
from attention_kernels.flash import flash_attention, flash_attention_varlen
from attention_kernels.layouts import BlockLayout
from attention_kernels.peers import sdpa_attention, sdpa_attention_varlen
from attention_kernels.reference import reference_attention
from attention_kernels.standard import attention_rows, standard_attention

__all__ = [
    "BlockLayout",
    "attention_rows",
    "block_sparse_attention",
    "block_sparse_attention_varlen",
    "cuda_family",
    "flash_attention",
    "flash_attention_varlen",
    "reference_attention",
    "sdpa_attention",
    "sdpa_attention_varlen",
    "standard_attention",
    "using",
    "what_ran",
    "why_not",
]

_cuda_ops.register_where_possible()
