"""Asking for one family of CUDA kernels: the block, the environment, and names that there are not."""

import pytest

from attention_kernels import families


@pytest.fixture(autouse=True)
def _nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_asked", None)
    monkeypatch.delenv(families.VARIABLE, raising=False)


def test_a_block_asks_and_gives_back() -> None:
    assert families.asked() == "auto"
    with families.cuda_family("generic"):
        assert families.asked() == "generic"
        with families.cuda_family("auto"):
            assert families.asked() == "auto"
        assert families.asked() == "generic"
    assert families.asked() == "auto"


def test_the_environment_asks_for_a_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(families.VARIABLE, "generic")
    assert families.asked() == "generic"
    monkeypatch.setattr(families, "_asked", None)
    monkeypatch.setenv(families.VARIABLE, "volta")
    with pytest.raises(ValueError, match=r"ATTENTION_KERNELS_FAMILY must be \"auto\", \"generic\".*got 'volta'"):
        families.asked()


def test_a_family_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "BUILT", ("generic",))
    with (
        pytest.raises(ValueError, match=r"name must be \"auto\", \"generic\", got 'hopper'"),
        families.cuda_family("hopper"),
    ):
        pass
