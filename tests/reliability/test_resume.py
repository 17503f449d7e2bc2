"""A run that was broken off and resumed is bit by bit the run that was not; what cannot be so is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lra import checkpoint as checkpoints
from lra import learner as learners
from lra import train as training
from lra.base.errors import RunError, Stopped
from lra.config import RunConfig
from lra.experiment import open_data
from lra.feed import Data, make_batches
from lra.learner import Learner
from lra.preempt import StopRequest
from lra.recipes import make_config
from lra.run_dir import RunDir
from lra.train import train
from tasks.cache import build_cache
from tasks.registry import get
from tests.reliability.tools import ALONE, same_numbers, tiny_config, tiny_values
from tests.tasks.fixtures import make_cifar

EPOCH = 10  # limit_train=85 in batches of 8
BREAKS = [1, 7, EPOCH - 1, EPOCH, EPOCH + 1]


class StopAt(StopRequest):
    """Asks the run to leave once the learner has done so many steps; None: never."""

    def __init__(self, step: int | None) -> None:
        super().__init__()
        self.step = step
        self.learner: Learner | None = None

    @property
    def reason(self) -> str | None:
        reached = self.step is not None and self.learner is not None and self.learner.step >= self.step
        return "the test's wish" if reached else None


def train_until(
    config: RunConfig, data: Data, folder: Path, step: int | None, monkeypatch: pytest.MonkeyPatch
) -> Learner:
    """Train in `folder`, from its checkpoint if there is one, and stop after `step`; return the learner."""
    stop, made = StopAt(step), []
    real = learners.make_learner

    def make(*arguments: Any) -> Learner:
        made.append(real(*arguments))
        stop.learner = made[0]
        return made[0]

    monkeypatch.setattr(training, "make_learner", make)
    run = RunDir(folder)
    folder.mkdir(exist_ok=True)
    try:
        train(config, data, run, ALONE, stop)
    except Stopped:
        assert step is not None
    return made[0]


def everything(learner: Learner) -> dict[str, Tensor]:
    """Return weights, optimizer slots and averages under one flat mapping of copies."""
    found = {f"model.{k}": v for k, v in learner.model.state_dict().items()}
    for index, slots in learner.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{k}": v for k, v in slots.items()}
    if learner.ema is not None:
        found |= {f"ema.{k}": v for k, v in learner.ema.average.items()}
    return {k: v.clone() for k, v in found.items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Name the tensors that are not the same bits."""
    return sorted(a.keys() ^ b.keys()) + [k for k in a.keys() & b.keys() if not torch.equal(a[k], b[k])]


def image_config(folder: Path, *overrides: str) -> RunConfig:
    """Return the tiny recipe on CIFAR-10's first 64 pixels, with a CLS token and black pixels left out."""
    values = tiny_values(folder)
    values["task"] = {"name": "image"}
    values["data"] |= {"max_length": 64}
    values["model"] |= {"pooling": "cls"}
    return make_config(values, overrides, "tests")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder with a small image cache."""
    folder = tmp_path_factory.mktemp("cifar")
    make_cifar(folder / "raw", count=52)
    task = get("image")
    build_cache(task, task.options(name="image"), folder / "raw", folder / "data")
    return folder / "data"


@pytest.mark.parametrize("backend", ["standard", "flash", "block_sparse"])
@pytest.mark.parametrize("task", ["listops", "image"])
def test_a_broken_run_goes_on_bit_by_bit(
    task: str, backend: str, data: Path, cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"attention={backend}", "train.steps=13", "train.log_every=1", "train.eval_every=100",
                 "train.checkpoint_every=100", "data.limit_eval=8"]  # fmt: skip
    config = tiny_config(data, *overrides) if task == "listops" else image_config(cifar, *overrides)
    opened = open_data(config)
    assert make_batches(config, opened, ALONE).steps_per_epoch == EPOCH
    whole = train_until(config, opened, tmp_path / "whole", None, monkeypatch)
    expected = same_numbers(RunDir(tmp_path / "whole").metrics())
    assert len(expected) == 14
    for step in BREAKS:
        folder = tmp_path / f"broken-{step}"
        assert train_until(config, opened, folder, step, monkeypatch).step == step
        resumed = train_until(config, opened, folder, None, monkeypatch)
        assert resumed.num_resumed == 1
        assert same_numbers(RunDir(folder).metrics()) == expected
        assert differing(everything(resumed), everything(whole)) == []


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        config = tiny_config(data, f"seed={seed}", "train.steps=50", "train.checkpoint_every=50")
        learner = train_until(config, open_data(config), tmp_path / str(number), None, monkeypatch)
        runs.append(everything(learner))
    assert differing(runs[0], runs[1]) == []
    moving = [name for name in runs[0] if not name.endswith(".step")]
    assert set(differing(runs[0], runs[2])) >= set(moving) - {"model.table.sinusoids"}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change the newest checkpoint of a run and seal it again, as a save that forgot something would have."""
    newest = checkpoints.load_newest(folder / "checkpoints")
    assert newest is not None
    change(newest.tensors, newest.state)
    checkpoints.save(folder / "checkpoints", newest.step, newest.tensors, newest.state, set())


@pytest.fixture(scope="module")
def broken_at_seven(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Data, Path]:
    """Return a run that was stopped at step 7, in the middle of a window of the log, with a validation at 6."""
    config = tiny_config(data, "train.steps=13", "train.checkpoint_every=100", "data.limit_eval=8")
    folder = tmp_path_factory.mktemp("seven") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        train_until(config, open_data(config), folder, 7, monkeypatch)
    return config, open_data(config), folder


def resume_changed(
    broken: tuple[RunConfig, Data, Path],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Tensor], dict[str, Any]], None],
) -> tuple[dict[str, Tensor], list[Any], Any] | Exception:
    """Resume a copy of the broken run after a change of its checkpoint; return what came out, or the error."""
    import shutil

    config, opened, source = broken
    shutil.copytree(source, folder)
    rewrite(folder, change)
    try:
        learner = train_until(config, opened, folder, None, monkeypatch)
    except (RunError, KeyError, TypeError, RuntimeError) as e:
        return e
    counters = (learner.num_resumed, learner.overflows, learner.best, sorted(learner.watch.seconds))
    return everything(learner), same_numbers(RunDir(folder).metrics()), counters


def same(a: Any, b: Any) -> bool:
    return not isinstance(b, Exception) and differing(a[0], b[0]) == [] and a[1:] == b[1:]


def test_every_key_of_the_state_matters(
    broken_at_seven: tuple[RunConfig, Data, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    whole = resume_changed(broken_at_seven, tmp_path / "whole", monkeypatch, lambda t, s: keys.extend(s))
    again = resume_changed(broken_at_seven, tmp_path / "again", monkeypatch, lambda t, s: None)
    assert same(whole, again)
    assert len(keys) >= 11
    unnoticed = []
    for key in keys:
        broken = resume_changed(broken_at_seven, tmp_path / key, monkeypatch, lambda t, s, key=key: s.pop(key))
        if same(whole, broken):
            unnoticed.append(key)
    # fp32 runs have no loss scale: an empty state is all there is to it.
    assert unnoticed == ["scaler"]


def test_every_group_of_tensors_matters(
    broken_at_seven: tuple[RunConfig, Data, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    whole = resume_changed(broken_at_seven, tmp_path / "whole", monkeypatch, lambda t, s: names.extend(t))
    slots = {name.rsplit(".", 1)[1] for name in names if name.startswith("optimizer.")}
    assert slots == {"step", "exp_avg", "exp_avg_sq"}
    groups: dict[str, Callable[[str], bool]] = {
        "model": lambda n: n.startswith("model."),
        "ema": lambda n: n.startswith("ema."),
        "optimizer": lambda n: n.startswith("optimizer."),
        **{slot: lambda n, slot=slot: n.endswith(f".{slot}") for slot in slots},
    }
    for group, belongs in groups.items():

        def drop(tensors: dict[str, Tensor], state: dict[str, Any], belongs: Any = belongs) -> None:
            for name in [n for n in tensors if belongs(n)]:
                del tensors[name]

        assert not same(whole, resume_changed(broken_at_seven, tmp_path / group, monkeypatch, drop)), group


CHANGES = [
    "seed=2", "train.steps=99", "train.batch_size=4", "train.learning_rate=0.01", "train.weight_decay=0.5",
    "train.precision=bf16", "train.ema=0.5", "train.clip_norm=9", "model.depth=2", "model.dropout=0.5",
    "attention=flash", "data.max_length=30", "data.limit_train=80", "task.seed=5",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_config_is_refused_by_name(
    change: str, broken_at_seven: tuple[RunConfig, Data, Path], tmp_path: Path
) -> None:
    config, _, _ = broken_at_seven
    run = RunDir(tmp_path / "run")
    (tmp_path / "run").mkdir()
    run.start(config)
    run.check_resume(config)
    changed = make_config(config.model_dump(mode="json"), [change], "tests")
    name = {"attention": "attention.backend"}.get(change.partition("=")[0], change.partition("=")[0])
    with pytest.raises(RunError, match=name.replace(".", r"\.")):
        run.check_resume(changed)


def test_a_checkpoint_of_another_config_is_refused(
    broken_at_seven: tuple[RunConfig, Data, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, opened, folder = broken_at_seven
    other = make_config(config.model_dump(mode="json"), ["train.learning_rate=0.5"], "tests")
    with pytest.raises(RunError, match="another config"):
        train_until(other, opened, folder, None, monkeypatch)


def test_what_decides_no_update_may_change(
    broken_at_seven: tuple[RunConfig, Data, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = broken_at_seven[0]
    changes = ["train.log_every=1", "train.eval_every=5", "train.checkpoint_every=2", "train.eval_batch_size=3"]
    freer = make_config(config.model_dump(mode="json"), changes, "tests")
    run = RunDir(tmp_path)
    run.start(config)
    run.check_resume(freer)
    whole = resume_changed(broken_at_seven, tmp_path / "a", monkeypatch, lambda t, s: None)
    other = resume_changed((freer, *broken_at_seven[1:]), tmp_path / "b", monkeypatch, lambda t, s: None)
    assert not isinstance(whole, Exception) and not isinstance(other, Exception)
    assert differing(whole[0], other[0]) == []


def test_a_run_killed_before_its_first_checkpoint_logs_nothing_twice(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, "train.steps=6", "train.log_every=1", "train.checkpoint_every=100")
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "metrics.jsonl", "w", encoding="utf-8") as f:
        f.write('{"kind": "train", "step": 1, "loss": 9.0}\n{"kind": "train", "st')
    train_until(config, open_data(config), tmp_path / "run", None, monkeypatch)
    records = RunDir(tmp_path / "run").metrics()
    assert [(r["kind"], r["step"]) for r in records] == [*(("train", i) for i in range(1, 7)), ("eval", 6)]
    assert records[0]["loss"] < 9


def test_the_final_checkpoint_knows_the_best_validation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The validation of the last step comes after the checkpoint of the last step: `eval` must not miss it.
    config = tiny_config(data, "train.steps=6", "train.eval_every=3", "train.checkpoint_every=3")
    learner = train_until(config, open_data(config), tmp_path / "run", None, monkeypatch)
    newest = checkpoints.load_newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and learner.best is not None
    assert newest.state["best"] == {"step": learner.best.step, "summary": learner.best.summary}
    assert newest.state["evaluated_step"] == 6


def test_a_lost_best_checkpoint_is_said_and_chosen_anew(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(data, "train.steps=12", "train.eval_every=3", "train.checkpoint_every=3")
    opened = open_data(config)
    train_until(config, opened, tmp_path / "run", 9, monkeypatch)
    rewrite(tmp_path / "run", lambda t, s: s["best"].update(step=2))
    resumed = train_until(config, opened, tmp_path / "run", None, monkeypatch)
    assert "step 2" in capsys.readouterr().err
    assert resumed.best is not None and resumed.best.step > 2


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stopped_validation_goes_on_where_it_was(
    batch: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lra import evaluate as evaluation

    config = tiny_config(data, "train.steps=6")
    opened = open_data(config)
    whole = train_until(config, opened, tmp_path / "whole", None, monkeypatch)
    seen: list[int] = []
    real = evaluation.collate

    def collate(cache: Any, examples: np.ndarray, **more: Any) -> Any:
        seen.extend(examples.tolist())
        return real(cache, examples, **more)

    class StopInEvaluation(StopAt):
        calls = 0

        @property
        def reason(self) -> str | None:
            if self.learner is not None and self.learner.step == 6:
                self.calls += 1
            return "the test's wish" if self.calls >= batch else None

    monkeypatch.setattr(evaluation, "collate", collate)
    with monkeypatch.context() as inner:
        inner.setattr("tests.reliability.test_resume.StopAt", StopInEvaluation)
        train_until(config, opened, tmp_path / "run", 99, monkeypatch)
    partial = tmp_path / "run" / "partial-val-step6.json"
    assert json.loads(partial.read_text())["done"] == 4 * batch
    seen.clear()
    resumed = train_until(config, opened, tmp_path / "run", None, monkeypatch)
    assert seen == opened.splits["val"][4 * batch :].tolist()
    assert not partial.exists()
    assert same_numbers(RunDir(tmp_path / "run").metrics()) == same_numbers(RunDir(tmp_path / "whole").metrics())
    assert resumed.best == whole.best
    newest = checkpoints.load_newest(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.state["best"]["step"] == 6
