"""From a recipe's name and `key=value` overrides to a RunConfig, and back to YAML. No code runs from a config."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from lra.base import strict_yaml
from lra.base.errors import ConfigError
from lra.base.strict_yaml import KeyPath
from lra.config import RunConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# `attention=flash` means attention.backend=flash; `task=pathx` means task.name=pathx. The other keys stay.
SHORTHANDS = {"attention": "backend", "task": "name"}
# What may differ between a checkpoint and the run that resumes it: it changes no update up to the common step.
RESUMABLE_CHANGES = (
    ("name",),
    ("runs_folder",),
    ("data", "folder"),
    ("train", "log_every"),
    ("train", "eval_every"),
    ("train", "checkpoint_every"),
    ("train", "eval_batch_size"),
    ("train", "test"),
    ("train", "start_from"),
    ("data", "limit_val"),
    ("expected",),
)


def recipe_names() -> list[str]:
    """Return every shipped recipe as `task/protocol`, sorted."""
    return sorted(
        str(path.relative_to(CONFIGS).with_suffix(""))
        for path in CONFIGS.glob("*/*.yaml")
        if path.parent.name not in ("sweeps", "reproduce")
    )


def recipe_path(recipe: str) -> Path:
    """Return the file of a recipe given as `listops/nystrom` or as a path; ConfigError names the nearest."""
    if recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f"There is no file {recipe}.", "`run_lra.py list` names the shipped recipes.")
        return path
    if recipe not in recipe_names():
        near = nearest(recipe, recipe_names())
        raise ConfigError(
            f"There is no recipe {recipe!r}{near}.", "`run_lra.py list` names them all; a path ends in .yaml."
        )
    return CONFIGS / f"{recipe}.yaml"


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply overrides, check everything. Raises ConfigError with file, line, path and remedy."""
    path = recipe_path(recipe)
    values, lines = strict_yaml.load(path)
    return make_config(values, overrides, str(path), lines)


def make_config(
    values: Any, overrides: Sequence[str] = (), source: str = "config", lines: dict[KeyPath, int] | None = None
) -> RunConfig:
    """Build a RunConfig from plain values and overrides; `source` and `lines` say where errors lie."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds no mapping.", "A recipe is a list of `key: value` lines.")
    lines = dict(lines or {})
    overridden: dict[KeyPath, str] = {}
    for text in overrides:
        key_path, value = parse_override(text)
        set_path(values, key_path, value, text)
        overridden[key_path] = text
    try:
        return RunConfig.model_validate(values)
    except ValidationError as e:
        raise explain(e, source, lines, overridden) from e


def parse_override(text: str) -> tuple[KeyPath, Any]:
    """Split `train.steps=100` into its path and its value, the value parsed like YAML."""
    key, equals, raw = text.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise ConfigError(f"{text!r} is not an override.", "Write key=value, for example train.steps=100.")
    value, _ = strict_yaml.loads(raw, f"override {text!r}")
    return parts, value


def set_path(values: dict[str, Any], path: KeyPath, value: Any, text: str) -> None:
    """Set a dotted path in nested mappings in place, honouring the two shorthands."""
    if len(path) == 1 and path[0] in SHORTHANDS and isinstance(value, str):
        path = (*path, SHORTHANDS[str(path[0])])
    inner = values
    for depth, key in enumerate(path[:-1]):
        below = inner.setdefault(str(key), {})
        if isinstance(below, str) and depth == 0 and key in SHORTHANDS:
            below = inner[str(key)] = {SHORTHANDS[str(key)]: below}
        if not isinstance(below, dict):
            where = ".".join(map(str, path[: depth + 1]))
            raise ConfigError(f"Override {text!r}: {where} is a single value.", f"Write {where}=value.")
        inner = below
    inner[str(path[-1])] = value


def dump_config(config: RunConfig) -> str:
    """Return the resolved config as YAML that `load_config` reads back to an equal one."""
    return strict_yaml.dumps(config.model_dump(mode="json"))


def fingerprint(config: RunConfig) -> str:
    """Return 16 hex digits over all that decides the updates: what must not change between start and resume."""
    values = config.model_dump(mode="json")
    for path in RESUMABLE_CHANGES:
        inner = values
        for key in path[:-1]:
            inner = inner[key]
        inner.pop(path[-1], None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Name the fields that differ and may not, as `path: old -> new`."""
    a, b = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return [
        f"{'.'.join(map(str, path))}: {a.get(path)!r} -> {b.get(path)!r}"
        for path in sorted(a.keys() | b.keys(), key=str)
        if a.get(path) != b.get(path) and not any(path[: len(allowed)] == allowed for allowed in RESUMABLE_CHANGES)
    ]


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `; the nearest is 'x'` for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; the nearest is {close[0]!r}" if close else ""


def _flat(value: Any, path: KeyPath = ()) -> dict[KeyPath, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {p: v for key, inner in value.items() for p, v in _flat(inner, (*path, key)).items()}


def explain(
    e: ValidationError,
    source: str,
    lines: dict[KeyPath, int],
    overridden: dict[KeyPath, str],
    model: type[BaseModel] = RunConfig,
) -> ConfigError:
    """Return what pydantic found wrong in a file as one ConfigError with lines and the nearest keys of `model`."""
    messages = []
    for error in e.errors(include_url=False):
        path: KeyPath = error["loc"]
        where = _where(path, source, lines, overridden)
        messages.append(f"{where}: {_message(error, path, model)}")
    cause = "; ".join(messages)
    return ConfigError(f"{cause}.", "Correct it, or see `run_lra.py list` and docs/usage.md.")


def _where(path: KeyPath, source: str, lines: dict[KeyPath, int], overridden: dict[KeyPath, str]) -> str:
    for override, text in overridden.items():
        full = (*override, SHORTHANDS.get(str(override[0]), "")) if len(override) == 1 else override
        if path[: len(override)] == override or full[: len(path)] == path != ():
            return f"override {text!r}"
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return f"{source}, line {lines[path[:length]]}"
    return source


def _message(error: Any, path: KeyPath, model: type[BaseModel]) -> str:
    dotted = ".".join(map(str, path)) or "config"
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"there is no key {dotted}{_nearest_key(path, model)}"
    if kind == "missing":
        return f"the key {dotted} is missing"
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        if not path:
            return text
        return f"{dotted} {text}" if text.startswith("must ") else f"{dotted}: {text}"
    got = error.get("input")
    shown = f", it is {got!r}" if isinstance(got, (str, int, float, bool, type(None))) else ""
    return f"{dotted}: {error['msg'].lower()}{shown}"


def _nearest_key(path: KeyPath, model: type[BaseModel]) -> str:
    """Suggest a key: first among the same section's fields, then a field of that name in another section."""
    known = _all_keys(model)
    names = tuple(key for key in path if isinstance(key, str))
    section = [".".join(p) for p in known if p[:-1] == names[:-1]]
    dotted = ".".join(names)
    elsewhere = [".".join(p) for p in known if p[-1] == str(path[-1])]
    if elsewhere:
        return f"; the nearest is {elsewhere[0]!r}"
    return nearest(dotted, section) or nearest(dotted, [".".join(p) for p in known])


def _all_keys(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append((*prefix, name))
        inner: Any = field.annotation
        if get_origin(inner) is list:
            inner = get_args(inner)[0]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += _all_keys(inner, (*prefix, name))
    return keys
