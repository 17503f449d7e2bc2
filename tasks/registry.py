"""The table of tasks: what each one is, how it is built, how it is split.

Everything else asks `get(name)` and treats all tasks alike. A task of one's own is one module that calls
`register(Task(...))` when it is imported (docs/extend.md).
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from lra.base.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tasks.cache import CacheWriter

    FreshDrawer = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    """(start, count) -> images (count, pixels) uint8 and labels (count,) int64 on the device."""

# Imported one by one until the asked name is found, so that `--help` and `list` stay quick.
_MODULES = {
    "tasks.listops": ("listops",),
    "tasks.text": ("text",),
    "tasks.retrieval": ("retrieval",),
    "tasks.image": ("image",),
    "tasks.pathfinder": ("pathfinder", "path64", "pathx", "path256"),
}


class TaskOptions(BaseModel):
    """Everything that changes the bytes of a task's cache; subclasses add their own fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    # Fields that act only when the data are generated. Files on disk stand for their default values.
    generator_fields: ClassVar[frozenset[str]] = frozenset()

    def only_generated(self) -> list[str]:
        """Return the generator fields whose value is not the default: files cannot stand for these."""
        fields = type(self).model_fields
        return sorted(f for f in self.generator_fields if getattr(self, f) != fields[f].default)


@dataclass(frozen=True)
class Download:
    """One file that `prepare` may fetch. `num_bytes` and `sha256` are None where none is published."""

    url: str
    file_name: str
    num_bytes: int | None = None
    sha256: str | None = None
    mirrors: tuple[str, ...] = ()


@dataclass(frozen=True)
class CacheInfo:
    """What a split rule may look at: the parts as [start, stop) example ranges in file order."""

    parts: Mapping[str, tuple[int, int]]
    num_examples: int


SplitRule = Callable[[CacheInfo], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Task:
    """One task of the suite.

    `vocab_size` counts the ids that the model sees (with the pad id 0 where the task has one) and an id is
    byte + `token_shift`. `documents` is the number of sequences an example has. `grid` is (rows, columns) of
    image tasks. The first entry of `split_rules` is the default; a rule returns example indices (int64) for
    train, val and test. `find_files(source, options)` names the files or folders to be read, or raises
    DataError; it is None for tasks that are only generated. `build(options, source, writer)` fills the cache; a
    `resumable` one fills a reserved block in order and goes on where a killed build stopped.
    `draw(options, file)` saves a picture that shows more than the tokens do.
    `fresh(laws, seed, device)` returns a drawer of new examples, of one law after the other in turn; the same for the
    same seed and numbers.
    `shuffle(tokens, bounds, seed)` changes packed sequences in place, row s from bounds[s, 0] to bounds[s, 1], in a way
    that keeps their labels: a pure function of its arguments.
    `write_release(options, folder)` writes generated data as the official files instead and returns their folder.
    """

    name: str
    title: str
    num_classes: int
    vocab_size: int
    token_shift: int
    max_length: int
    options: type[TaskOptions]
    split_rules: Mapping[str, SplitRule]
    build: Callable[[TaskOptions, Path | None, CacheWriter], None]
    card: str
    documents: int = 1
    grid: tuple[int, int] | None = None
    sources: tuple[Download, ...] = ()
    find_files: Callable[[Path, TaskOptions], Mapping[str, Path]] | None = None
    generated: bool = False
    resumable: bool = False
    write_release: Callable[[TaskOptions, Path], Path] | None = None
    draw: Callable[[TaskOptions, Path], None] | None = None
    fresh: Callable[[Sequence[TaskOptions], int, torch.device], FreshDrawer] | None = None
    shuffle: Callable[[np.ndarray, np.ndarray, int], None] | None = None
    class_names: tuple[str, ...] = ()
    token_names: tuple[str, ...] = ()
    version: int = 1


_tasks: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Add a task to the table and return it. Raises ConfigError if another task has the name."""
    if task.name in _tasks and _tasks[task.name] is not task:
        raise ConfigError(f"Two tasks are named {task.name!r}.", "Rename one of them.")
    if not task.split_rules:
        raise ConfigError(f"The task {task.name!r} has no split rule.", "Give it at least one.")
    _tasks[task.name] = task
    return task


def names() -> list[str]:
    """Return the names of all tasks, the suite's own first."""
    _import_own()
    own = [name for group in _MODULES.values() for name in group]
    return own + sorted(set(_tasks) - set(own))


def get(name: str) -> Task:
    """Return the task `name`. Raises ConfigError with the nearest name if there is none."""
    for module, group in _MODULES.items():
        if name in group:
            importlib.import_module(module)
    if name not in _tasks:
        _import_own()
    if name in _tasks:
        return _tasks[name]
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"The tasks are {', '.join(names())}."
    raise ConfigError(f"There is no task {name!r}.", hint)


def _import_own() -> None:
    """Import every module of tasks/own, so that it registers its task."""
    import tasks.own

    for module in pkgutil.iter_modules(tasks.own.__path__):
        importlib.import_module(f"tasks.own.{module.name}")
