"""Keys that stand for several tokens: against attention in which they are repeated that often."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lra.base.errors import ConfigError
from lra.model import Classifier
from lra.recipes import load_config
from lra.weighing import spare_pair, with_weights
from tasks.batches import Batch


def attend(q_THD: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, scale: float) -> torch.Tensor:
    scores = torch.einsum("qhd,khd->hqk", q_THD, k_THD) * scale
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_THD)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_key_of_weight_n_is_n_equal_keys(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 2, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    times = torch.tensor([1, 2, 63, 1, 5, 700])
    weighed = with_weights(q, k, times.float().log(), 0.3)
    spare = list(spare_pair(16))
    q[..., spare] = k[..., spare] = 0  # which no longer carry content
    assert all(x.shape == q.shape and x.dtype == dtype for x in weighed)
    out = attend(*(x.double() for x in (*weighed, v)), 0.3)
    repeated = attend(*(x.double() for x in (q, k.repeat_interleave(times, 0), v.repeat_interleave(times, 0))), 0.3)
    assert (out - repeated).abs().max() < (1e-6 if dtype == torch.float64 else 2e-3)
    plain = attend(*(x.double() for x in (*with_weights(q, k, None, 0.3), v)), 0.3)
    assert torch.allclose(plain, attend(q.double(), k.double(), v.double(), 0.3))


def tiny(*overrides: str) -> Classifier:
    base = [
        "data.black_pixels=token", "data.keep_tokens=[100]", "model.depth=1", "model.num_heads=1", "model.width=16",
        "model.qk_norm=true", "model.rotary_base=100.0", "model.key_weights=true", "train.precision=fp32",
        "model.pooling=mean",
    ]  # fmt: skip
    torch.manual_seed(1)
    return Classifier(load_config("pathfinder/smoke", [*base, *overrides])).eval()


def thinned(images: torch.Tensor, places: torch.Tensor, log_weight: torch.Tensor | None) -> Batch:
    return Batch(
        tokens_T=images[places],
        positions_T=places.int(),
        cu_seqlens=torch.tensor([0, len(places)], dtype=torch.int32),
        max_length=len(places),
        labels_B=torch.zeros(1, dtype=torch.int64),
        log_weight_T=log_weight,
    )


@pytest.mark.parametrize("backend", ["standard", "flash", "sdpa"])
def test_thinned_attention_estimates_attention_among_all(backend: str) -> None:
    """Over many draws a kept pixel's output has the mean of its output among all; without weights it is off."""
    model = tiny(f"attention={backend}")
    generator = torch.Generator().manual_seed(2)
    image = torch.zeros(1024, dtype=torch.uint8)
    bright = torch.randperm(1024, generator=generator)[:60].sort().values
    image[bright] = 255
    dark = (image == 0).nonzero()[:, 0]
    with torch.no_grad():
        whole, _ = model.encode(thinned(image, torch.arange(1024), None))
        means = {}
        for weighed in (True, False):
            sums = torch.zeros(60, 16)
            for _ in range(40):
                some = dark[torch.randperm(len(dark), generator=generator)[:240]]
                places = torch.cat([bright, some]).sort().values
                weights = torch.where(image[places] > 0, 0.0, math.log(len(dark) / 240))
                out, _ = model.encode(thinned(image, places, weights if weighed else None))
                sums += out[image[places] > 0]
            means[weighed] = sums / 40
    error = {weighed: (mean - whole[bright]).norm() / whole[bright].norm() for weighed, mean in means.items()}
    assert error[True] < 0.01 and error[False] > 5 * error[True]


def test_weights_of_one_change_nothing() -> None:
    model = tiny("attention=sdpa")
    image = torch.randint(0, 256, (1024,), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    batch = thinned(image, torch.arange(1024), None)
    with torch.no_grad():
        plain, weighed = model(batch), model(replace(batch, log_weight_T=torch.zeros(1024)))
    assert torch.allclose(plain, weighed, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attention=performer"], r"model\.key_weights=false"),
        (["model.key_weights=false", "data.weigh_kept=true"], r"model\.key_weights=true"),
        (["data.keep_tokens=[]", "data.weigh_kept=true"], r"data\.keep_tokens"),
    ],
)
def test_what_weights_need_is_told(overrides: list[str], words: str) -> None:
    asked = ["data.black_pixels=token", "data.keep_tokens=[100]", "model.key_weights=true", *overrides]
    with pytest.raises(ConfigError, match=words):
        load_config("pathfinder/smoke", asked)
