"""From a chain's file to its stages: recipes one after the other, each beginning with the weights of the one before.

A chain is a pure function of its file, the command line's overrides, the seed and the folder. lra/reproduce.py runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from lra.base import strict_yaml
from lra.base.errors import ConfigError
from lra.base.strict_yaml import KeyPath
from lra.config import NAME_PATTERN, Positive, RunConfig, Section
from lra.recipes import CONFIGS, explain, load_config, nearest, parse_override, set_path
from lra.transfer import misfits

TRACKS = ("paper", "sequence", "open")
# What the chain itself decides in every stage.
OWN_KEYS = (("name",), ("runs_folder",), ("seed",), ("track",), ("train", "start_from"))
# Positions that know rows and columns, and everything else that only the open track allows.
OPEN_ONLY = "2-D positions, flips and turns, fresh images and other sets than the task's own"


class Stage(Section):
    """One run of a chain."""

    name: str = Field(pattern=NAME_PATTERN)
    """Folder of the run beneath the chain's; before a key (`long.train.steps=100`) it makes an override the stage's."""
    recipe: str
    """As for `train`: task/protocol, or a path to a YAML file."""
    overrides: list[str] = Field(default_factory=list)
    """key=value, as on the command line."""


class Probe(Section):
    """Other sets of the last stage's task that the finished model is tested on."""

    contour_lengths: list[Annotated[int, Field(ge=3, le=64)]] = Field(default_factory=list)
    """Paddles of the paths, one set for each."""
    distractors: list[Annotated[int, Field(ge=0, le=200)]] = Field(default_factory=list)
    """Numbers of distractors at the task's own contour length, one set for each."""
    images: int = Field(default=1000, ge=10)
    """Generated images of each set."""


class ChainFile(Section):
    """What a chain's YAML file holds."""

    name: str = Field(pattern=NAME_PATTERN)
    """Start of the folder's name beneath runs/; the seed follows."""
    track: Literal["paper", "sequence", "open"]
    stages: list[Stage] = Field(min_length=1)
    epochs: Positive | None = None
    """Paper track: passes over the training set in every stage; sets train.steps, a warm-up of one epoch and a
    validation after each. null: as the recipes have it."""
    published_epochs: Positive | None = None
    """Epochs of the published protocol, of which the result states the fraction that was run."""
    overrides: list[str] = Field(default_factory=list)
    """key=value for every stage."""
    probe: Probe = Probe()


@dataclass(frozen=True)
class Chain:
    """A chain ready to run: its file and the resolved config of each stage."""

    file: ChainFile
    task: str
    seed: int
    folder: Path
    configs: tuple[RunConfig, ...]

    def stage_folder(self, index: int) -> Path:
        """Return the folder of a stage's run."""
        return self.folder / self.file.stages[index].name


def chain_path(task: str, track: str) -> Path:
    """Return the shipped file of a task and track. Raises ConfigError if there is none."""
    path = CONFIGS / "reproduce" / f"{task}_{track}.yaml"
    if not path.is_file():
        known = sorted(p.stem.replace("_", " --track ") for p in path.parent.glob("*.yaml"))
        raise ConfigError(f"There is no chain for {task} in the {track} track.", f"There are: {', '.join(known)}.")
    return path


def load_chain(
    path: Path, overrides: Sequence[str] = (), seed: int = 1, out: Path | None = None, task: str | None = None
) -> Chain:
    """Read a chain's file and resolve every stage, checked one by one and against the one before it.

    Raises ConfigError naming file, line, stage and key for whatever cannot be run, before anything is written.
    """
    values, lines = strict_yaml.load(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping.", "A chain has `name`, `track` and `stages`.")
    stage_names = [s.get("name") for s in values.get("stages") or [] if isinstance(s, dict)]
    of_chain, of_stages = sort_overrides(overrides, [str(name) for name in stage_names])
    overridden: dict[KeyPath, str] = {}
    for text in of_chain:
        key_path, value = parse_override(text)
        set_path(values, key_path, value, text)
        overridden[key_path] = text
    try:
        file = ChainFile.model_validate(values)
    except ValidationError as e:
        error = explain(e, str(path), lines, overridden, ChainFile)
        raise ConfigError(error.cause, "Correct it, or see docs/usage.md and configs/reproduce/.") from e
    if len(set(stage_names)) < len(stage_names):
        raise ConfigError(f"{path}: two stages have one name.", "Rename one of them.")
    folder = out or Path("runs") / f"{file.name}-s{seed}"
    configs = tuple(stage_config(file, index, of_stages, seed, folder) for index in range(len(file.stages)))
    check_stages(file, configs)
    if task is not None and configs[-1].task.name != task:
        raise ConfigError(
            f"The last stage is on {configs[-1].task.name}, and the chain is asked for {task}.",
            "Leave the task of the last stage as it is; `train` takes any recipe.",
        )
    return Chain(file, task or configs[-1].task.name, seed, folder, configs)


def sort_overrides(overrides: Sequence[str], stages: list[str]) -> tuple[list[str], list[tuple[str | None, str]]]:
    """Return the overrides of the chain's own keys, and those of one stage (with its name) or of all (None)."""
    of_chain: list[str] = []
    of_stages: list[tuple[str | None, str]] = []
    own = {"epochs", "probe", "published_epochs"}
    for text in overrides:
        key_path, _ = parse_override(text)
        if key_path[0] in own:
            of_chain.append(text)
        elif key_path[0] in stages and len(key_path) > 1:
            of_stages.append((str(key_path[0]), text.split(".", 1)[1]))
        else:
            known = [*RunConfig.model_fields, *own, *stages]
            if key_path[0] not in known:
                near = nearest(str(key_path[0]), known)
                raise ConfigError(f"There is no key or stage {key_path[0]!r}{near}.", f"Stages: {', '.join(stages)}.")
            of_stages.append((None, text))
    return of_chain, of_stages


def stage_config(
    file: ChainFile, index: int, overrides: list[tuple[str | None, str]], seed: int, folder: Path
) -> RunConfig:
    """Return the resolved config of a stage."""
    stage = file.stages[index]
    own = [text for name, text in overrides if name in (None, stage.name)]
    chosen = [*file.overrides, *stage.overrides, *own]
    for text in chosen:
        if parse_override(text)[0] in OWN_KEYS:
            raise ConfigError(f"{text}: the chain decides this itself.", "Use --seed, --track and --out.")
    chosen += [f"name={stage.name}", f"seed={seed}", f"track={file.track}"]
    config = load_config(stage.recipe, chosen)
    changes: dict[str, Any] = {"runs_folder": str(folder)}
    train = config.train
    if file.epochs is not None:
        train = by_epochs(config, file.epochs)
    if index > 0:
        train = train.model_copy(update={"start_from": str(folder / file.stages[index - 1].name)})
    return config.model_copy(update={**changes, "train": train})


def by_epochs(config: RunConfig, epochs: int) -> Any:
    """Return the training section for so many epochs, of which the first warms up."""
    rule = config.data.limit_train or training_examples(config)
    per_epoch = rule // config.train.batch_size
    if per_epoch < 1:
        raise ConfigError(
            f"{config.task.name} has {rule:,} training examples, fewer than one batch of {config.train.batch_size:,}.",
            "Choose a smaller train.batch_size or a larger task.count.",
        )
    schedule = config.train.schedule.model_copy(update={"warmup": per_epoch})
    changes = {"steps": epochs * per_epoch, "schedule": schedule, "eval_every": per_epoch}
    return config.train.model_copy(update=changes)


def training_examples(config: RunConfig) -> int:
    """Return the examples of the training split of a generated task, by its split rule's arithmetic."""
    count = int(getattr(config.task, "count", 0))
    return count - 2 * int(0.1 * count)


def check_stages(file: ChainFile, configs: Sequence[RunConfig]) -> None:
    """Raise ConfigError where stages do not fit together or leave their track."""
    for before, after in pairwise(configs):
        wrong = misfits(before, after)
        if wrong:
            raise ConfigError(
                f"Stage {after.name} cannot begin with the weights of stage {before.name} ({'; '.join(wrong)}).",
                "Give both the same model.",
            )
    for config in configs:
        if file.track != "open" and config.model.positions == "axial_rotary":
            raise ConfigError(
                f"Stage {config.name} has 2-D positions in the {file.track} track.", f"{OPEN_ONLY}: open."
            )
        if file.track == "sequence" and config.task != configs[-1].task:
            raise ConfigError(
                f"Stage {config.name} trains on another set of {config.task.name} than the last one in the sequence "
                "track.",
                f"{OPEN_ONLY} belong to the open track.",
            )
