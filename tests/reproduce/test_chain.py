"""Chains of stages: what they refuse, that they run to the end, and that they go on wherever they were broken off."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from lra import chain as chains
from lra import reproduce, train_log
from lra.attention_view import VIEW_FILE
from lra.base.errors import ConfigError, MemoryShortError, RunError, Stopped
from lra.chain import Chain, chain_path, load_chain
from lra.experiment import run_evaluation
from lra.recipes import CONFIGS, load_config
from lra.reproduce import run_chain
from lra.run_dir import RunDir

TINY = [
    "task.count=80", "task.contour_length=6", "model.depth=1", "model.width=32", "model.num_heads=1",
    "model.mlp_width=32", "train.batch_size=8", "train.eval_batch_size=8", "train.steps=6", "train.eval_every=3",
    "train.checkpoint_every=2", "train.log_every=2", "train.schedule.warmup=2", "train.precision=fp32",
    "data.keep_tokens=[200, 300]", "attention=sdpa", "data.limit_eval=8", "data.limit_val=4", "train.test=both",
]  # fmt: skip
CHAIN = """\
name: tiny
track: open
stages:
  - {name: small, recipe: path64/best, overrides: [task=pathfinder]}
  - {name: large, recipe: path64/best, overrides: [train.steps=4]}
probe: {contour_lengths: [3, 6], distractors: [2], images: 10}
"""


@pytest.fixture
def chain_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CHAIN)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sets")


def load(path: Path, sets: Path, out: Path, *overrides: str, seed: int = 1) -> Chain:
    return load_chain(path, [*TINY, f"data.folder={sets}", "large.train.steps=4", *overrides], seed, out)


def last_loss(out: Path) -> float:
    return float(json.loads((out / "large/result.json").read_text())["test"]["last"]["loss"])


def test_a_chain_runs_to_the_end_and_a_second_call_trains_nothing(
    chain_file: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "whole"
    result = run_chain(load(chain_file, sets, out))
    assert json.loads((out / "chain.json").read_text()) == result
    assert [s["name"] for s in result["stages"]] == ["small", "large"] and result["status"] == "finished"
    assert [s["steps"] for s in result["stages"]] == [6, 4]
    assert set(result["probes"]) == {"contour_length=3", "contour_length=6", "num_distractors=2"}
    assert all(scores["total"] == 10 for scores in result["probes"].values())
    large = RunDir(out / "large").result()
    assert large is not None and result["test"] == large["test"]["last"] and result["test"]["total"] == 8
    minutes = result["gpu_minutes"]
    assert minutes["total"] == pytest.approx(sum(value for kind, value in minutes.items() if kind != "total"))
    assert len(result["stages"][0]["curve"]) == 2
    assert RunDir(out / "large").config().train.start_from == str(out / "small")

    monkeypatch.setattr(reproduce, "run_training", lambda *_: pytest.fail("a finished stage was trained again"))
    monkeypatch.setattr(reproduce, "write_view", lambda *_: pytest.fail("what is drawn already was drawn again"))
    assert run_chain(load(chain_file, sets, out))["test"] == result["test"]
    # The weights alone give the number again, from wherever they are.
    weights = RunDir(out / "weights")
    config = weights.config()
    assert config.train.start_from is None and config.data.folder == "data"
    changed = config.model_copy(update={"data": config.data.model_copy(update={"folder": str(sets)})})
    scores = run_evaluation(weights.path, changed, None, "last", False)
    assert (scores["accuracy"], scores["loss"]) == (result["test"]["accuracy"], result["test"]["loss"])
    assert sum(f.stat().st_size for f in weights.path.rglob("*.safetensors")) < 1_000_000
    assert json.loads((weights.path / "chain.json").read_text()) == result
    assert (out / VIEW_FILE).read_bytes() == (weights.path / VIEW_FILE).read_bytes()


@pytest.mark.parametrize("place", [1, 4])
def test_a_chain_broken_off_and_moved_is_the_undisturbed_one(
    place: int, chain_file: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_chain(load(chain_file, sets, tmp_path / "whole"))
    real, calls = train_log.watch_stuck, []

    def watched(*arguments: Any) -> None:
        calls.append(len(calls))
        if len(calls) == place:  # windows of two steps: 3 in the first stage, 2 in the second
            os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments)

    monkeypatch.setattr(train_log, "watch_stuck", watched)
    with pytest.raises(Stopped, match="same command"):
        run_chain(load(chain_file, sets, tmp_path / "here"))
    assert json.loads((tmp_path / "here/chain.json").read_text())["status"] == "stopped"
    os.rename(tmp_path / "here", tmp_path / "elsewhere")
    result = run_chain(load(chain_file, sets, tmp_path / "elsewhere"))
    assert result["status"] == "finished"
    assert last_loss(tmp_path / "elsewhere") == last_loss(tmp_path / "whole")


def test_hidden_tokens_are_guessed_in_one_stage_alone(chain_file: Path, sets: Path, tmp_path: Path) -> None:
    """The guessing layer stays behind; the stage after it begins with all other weights."""
    guess = "small.train.denoise={rate: 0.5, weight: 1.0, until: 1.0}"
    result = run_chain(load(chain_file, sets, tmp_path / "c", guess))
    assert result["status"] == "finished"
    assert result["stages"][0]["num_parameters"] == result["stages"][1]["num_parameters"] + 32 + 256 * 33
    back = run_chain(load(chain_file, sets, tmp_path / "d", guess.replace("small", "large")))
    assert back["status"] == "finished"


def test_a_chain_that_fails_says_so_and_keeps_what_is_known(
    chain_file: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        known = json.loads((tmp_path / "c/chain.json").read_text())
        assert known["status"] == "unfinished" and known["stages"][0]["status"] == "waiting"
        raise RunError("The disk is gone.", "Find it.")

    monkeypatch.setattr(reproduce, "run_stage", fail)
    with pytest.raises(RunError):
        run_chain(load(chain_file, sets, tmp_path / "c"))
    known = json.loads((tmp_path / "c/chain.json").read_text())
    assert (known["status"], known["reason"], known["test"]) == ("failed", "The disk is gone.", None)


def test_compiling_is_told_apart_from_steps(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert reproduce.start_up_seconds(run) == 0.0
    # Steps of 0.1 s; 30 s before the first line, and 5 s more after a resume between steps 40 and 50.
    times = {10: 31.0, 20: 32.0, 30: 33.0, 40: 34.0, 50: 40.0, 60: 41.0}
    for step, train_s in times.items():
        run.log({"kind": "train", "step": step, "train_gpu_s": train_s})
    assert reproduce.start_up_seconds(run) == pytest.approx(35.0)


def test_time_that_is_over_stops_before_the_next_stage(chain_file: Path, sets: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_chain(load(chain_file, sets, tmp_path / "c"), 1e-9)
    assert run_chain(load(chain_file, sets, tmp_path / "c"))["status"] == "finished"


def test_overrides_go_to_all_stages_or_to_one(chain_file: Path, sets: Path, tmp_path: Path) -> None:
    chain = load(chain_file, sets, tmp_path, "small.train.ema=0.5", "train.clip_norm=2.0", "probe.images=20", seed=4)
    assert [c.train.ema for c in chain.configs] == [0.5, 0.998]
    assert [c.train.clip_norm for c in chain.configs] == [2.0, 2.0]
    assert chain.file.probe.images == 20
    assert {c.seed for c in chain.configs} == {4} and {c.track for c in chain.configs} == {"open"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("smal.train.steps=3", "There is no key or stage 'smal'.*'small'"),
        ("small.train.stepz=3", "no key train.stepz.*'train.steps'"),
        ("small.seed=3", "decides this itself"),
        ("large.model.width=64", "Stage large cannot begin.*model.width: 32 -> 64"),
        ("large.model.qk_norm=false", "model.qk_norm: True -> False"),
        ("large.model.rotary_base=50.0", "rotary_base"),
        ("probe.images=none", "probe.images"),
        ("task.count=20", "fewer than one batch|epochs"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    override: str, words: str, chain_file: Path, sets: Path, tmp_path: Path
) -> None:
    more = ["epochs=2"] if override.startswith("task.count") else []
    more += ["train.batch_size=64"] if more else []
    with pytest.raises(ConfigError, match=words):
        load(chain_file, sets, tmp_path / "out", override, *more)
    assert not (tmp_path / "out").exists()


def test_a_stage_begun_under_another_config_is_named(chain_file: Path, sets: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_chain(load(chain_file, sets, tmp_path / "c"), 1e-9)
    (tmp_path / "c/small").mkdir()
    RunDir(tmp_path / "c/small").start(load(chain_file, sets, tmp_path / "c").configs[0])
    with pytest.raises(RunError, match=r"Stage small.*train.learning_rate: 0.02 -> 0.03"):
        run_chain(load(chain_file, sets, tmp_path / "c", "train.learning_rate=0.03"))


def test_too_little_memory_is_said_before_the_first_step(
    chain_file: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lra.memory.available_bytes", lambda device: 40 << 20)
    with pytest.raises(MemoryShortError, match=r"fit at once|Not one example"):
        run_chain(load(chain_file, sets, tmp_path / "c", "large.data.keep_tokens=[]", "large.train.batch_size=64"))
    assert not (tmp_path / "c/small").exists()


def test_epochs_are_one_knob(chain_file: Path, sets: Path, tmp_path: Path) -> None:
    chain = load(chain_file, sets, tmp_path, "epochs=5", "published_epochs=200")
    for config in chain.configs:
        assert config.train.steps == 5 * 8 and config.train.schedule.warmup == 8  # 64 images in batches of 8
        assert config.train.eval_every == 8


@pytest.mark.parametrize("path", sorted((CONFIGS / "reproduce").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_chains_are_sound(path: Path) -> None:
    task, track = path.stem.split("_")
    chain = load_chain(chain_path(task, track))
    assert chain.file.name == f"{task}-{track}" and chain.file.track == track
    assert chain.configs[-1].task.name == task
    assert chain.configs[-1].data.limit_eval is None  # the final test is on all test images
    assert not chain.configs[-1].data.fresh or track == "open"


def test_tracks_keep_their_rules(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CHAIN.replace("track: open", "track: paper").replace("]}", ", data.dihedral=false]}", 2))
    with pytest.raises(ConfigError, match="2-D positions in the paper track"):
        load_chain(path)
    path.write_text(
        CHAIN.replace("track: open", "track: sequence").replace(
            "]}", ", data.dihedral=false, model.positions=rotary]}", 2
        )
    )
    with pytest.raises(ConfigError, match="another set of pathfinder than the last one in the sequence"):
        load_chain(path)


def test_a_chain_ends_on_the_task_that_was_asked_for() -> None:
    with pytest.raises(ConfigError, match="last stage is on path64, and the chain is asked for pathx"):
        load_chain(chain_path("pathx", "open"), ["long.task=path64"], task="pathx")


def test_easier_images_are_another_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another set of pathx"):
        load_chain(chain_path("pathx", "sequence"), ["denoise.task.contour_length=6"], task="pathx")
    (config,) = load_chain(chain_path("pathx", "open"), ["long.task.contour_length=9"], task="pathx").configs[-1:]
    assert reproduce.changed_options(config) == {"contour_length": 9}


def test_a_track_without_a_chain_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chains, "CONFIGS", tmp_path)
    with pytest.raises(ConfigError, match="no chain for pathx in the paper track"):
        chain_path("pathx", "paper")


def test_recipes_of_the_chains_stand_alone_too() -> None:
    for task in ("path64", "pathx", "path256"):
        assert load_config(f"{task}/best").train.start_from is None
