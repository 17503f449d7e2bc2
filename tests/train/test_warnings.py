"""What a run says when it learns nothing, and what it refuses before it starts."""

import math
from types import SimpleNamespace

import pytest
import torch

from lra.base.errors import MemoryShortError
from lra.config import RunConfig
from lra.distributed import World
from lra.memory import check_evaluation_fits, check_fits, estimate, evaluation_estimate
from lra.recipes import load_config
from lra.train_log import Logger

CPU = torch.device("cpu")


def warned(config: RunConfig, losses: list[float], capsys: pytest.CaptureFixture[str]) -> bool:
    logger = Logger.__new__(Logger)  # without its TensorBoard writer
    logger.config, logger.is_main, logger.warned = config, True, False
    logger.learner = SimpleNamespace(window=SimpleNamespace(num_stuck=0))
    capsys.readouterr()
    for loss in losses:
        logger.watch_chance(loss)
    return "0.6931" in capsys.readouterr().err


def test_ten_windows_at_ln_2_warn_once_on_pathfinder(capsys) -> None:
    stuck = [math.log(2) + 5e-4] * 12
    pathfinder, listops = load_config("pathfinder/smoke"), load_config("listops/smoke")
    assert warned(pathfinder, stuck, capsys)
    assert not warned(pathfinder, stuck[:9], capsys)
    assert not warned(pathfinder, [*stuck[:9], 0.5, *stuck[:9]], capsys)
    assert not warned(listops, stuck, capsys)


def test_the_estimate_grows_with_the_square_under_standard_attention_only() -> None:
    def total(task: str, backend: str, *more: str) -> int:
        return estimate(load_config(f"{task}/google", [f"attention={backend}", *more]), 500_000).total

    # Path-256 has 4 times the tokens of Path-X; widths differ, so compare the scores alone.
    def scores(task: str) -> int:
        same = ["model.num_heads=2", "model.depth=1", "train.batch_size=32", "model.qkv_width=16"]
        return estimate(load_config(f"{task}/google", ["attention=standard", *same]), 0).scores

    # With the CLS token of Path-256 it is a little more than 16 times.
    assert scores("path256") / scores("pathx") == pytest.approx(16, rel=1e-3)
    assert estimate(load_config("pathx/google"), 0).scores == 0
    assert total("pathx", "standard") > 100 * total("pathx", "flash")
    assert total("listops", "flash", "train.accumulate=4") < total("listops", "flash")


def test_what_does_not_fit_is_refused_with_the_batch_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("text/nystrom", ["attention=standard"])
    need = estimate(config, 400_000).total
    monkeypatch.setattr("lra.memory.available_bytes", lambda device: need // 3)
    with pytest.raises(MemoryShortError) as caught:
        check_fits(config, 400_000, CPU)
    assert f"{need / 2**30:.2f} GiB" in caught.value.cause and caught.value.exit_code == 5
    # A third of the memory takes about a third of 32 examples; 4 micro-batches of 8 is the first cut that fits.
    assert "set train.accumulate=4" in caught.value.remedy
    fitting = load_config("text/nystrom", ["attention=standard", "train.accumulate=4"])
    assert check_fits(fitting, 400_000, CPU).total <= need // 3
    monkeypatch.setattr("lra.memory.available_bytes", lambda device: 10**8)
    with pytest.raises(MemoryShortError, match="attention=flash"):
        check_fits(config, 400_000, CPU)


def test_a_test_needs_one_layer_at_a_time_of_its_own_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights trained in batches of 256 on a large GPU can be tested on a small machine."""
    config = load_config("pathx/best")
    need = evaluation_estimate(config, 800_000, 2).total
    assert need < estimate(config, 800_000).total / 20
    assert evaluation_estimate(config, 0, 4).total == 2 * evaluation_estimate(config, 0, 2).total
    assert (
        evaluation_estimate(load_config("pathx/best", ["attention=standard"]), 0, 2).scores == 2 * 2 * 2 * 16384**2 * 2
    )
    monkeypatch.setattr("lra.memory.available_bytes", lambda device: need)
    assert check_evaluation_fits(config, 800_000, CPU, 2).total == need
    with pytest.raises(MemoryShortError, match=r"eval_batch_size=[23] "):
        check_evaluation_fits(config, 800_000, CPU, 3)
    with pytest.raises(MemoryShortError, match="attention=flash"):
        check_evaluation_fits(load_config("pathx/best", ["attention=standard"]), 800_000, CPU, 1)


def test_two_processes_need_half_each() -> None:
    config = load_config("pathx/google", ["attention=flash"])
    assert estimate(config, 0, world_size=2).total == pytest.approx(estimate(config, 0).total / 2, rel=1e-6)
    assert World(0, 2, CPU).is_main and not World(1, 2, CPU).is_main
