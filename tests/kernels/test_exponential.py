"""The forward's exponential without the exponential unit (exp2_fma, csrc/common/mma.cuh), step by step in float32."""

import re
import struct

import torch
from torch import Tensor

from attention_kernels import compiler


def exp2_fma(x: Tensor) -> Tensor:
    text = (compiler.SOURCES / "common/mma.cuh").read_text()
    body = text[text.index("float exp2_fma(float x) {") :]
    found = re.findall(r"0f([0-9A-F]{8})", body[: body.index("\n}\n")])
    low, high, shift, same, *polynomial = (struct.unpack(">f", bytes.fromhex(number))[0] for number in found)
    assert (low, high, shift, same) == (-126.0, 126.0, 1.5 * 2**23, shift) and len(polynomial) == 4
    c = x.clamp(low, high)
    whole = c + shift
    rest = c - (whole - shift)
    # The highest power comes first; a fused product is rounded once.
    y = torch.full_like(rest, polynomial[0])
    for constant in polynomial[1:]:
        y = (y.double() * rest.double() + constant).float()
    return (y.view(torch.int32) + (whole.view(torch.int32) << 23)).view(torch.float32)


def test_its_error_is_below_a_sixth_of_float16s() -> None:
    x = torch.cat([torch.linspace(-125.5, 126, 2_000_001), torch.arange(-125, 127).float()])
    error = (exp2_fma(x).double() / torch.exp2(x.double()) - 1).abs().max().item()
    assert error < 2**-13.7, error


def test_what_is_out_of_range_stays_small_or_fails_every_sum() -> None:
    small = exp2_fma(torch.tensor([-torch.inf, -500.0, -126.0]))
    large = exp2_fma(torch.tensor([126.0, 500.0, torch.inf]))
    assert (small >= 0).all() and (small < 2.0**-125.9).all()
    assert (large > 2.0**125).all() and large.isfinite().all()
    # The GPU's NaN through the last two steps.
    bits = (0x7FFFFFFF + (0x7FFFFFFF << 23)) & 0xFFFFFFFF
    assert struct.unpack(">f", bits.to_bytes(4, "big"))[0] == torch.finfo(torch.float32).max
