"""Find and read run folders, whatever state they are in.

Called by the report. Reads files only, never a checkpoint; knows nothing of models. A run that is missing, failed,
stopped, half-finished or damaged becomes a RunRecord that says so, so that no reader can drop it by accident.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lra.base import strict_yaml
from lra.base.errors import EXIT_OUT_OF_MEMORY, LraError, RunError
from lra.json_values import count as _count
from lra.json_values import mapping as _mapping
from lra.json_values import number as _number
from lra.json_values import read_object as _read_json
from lra.json_values import score as _score
from lra.json_values import text as _text
from lra.records import Curve, Curves, Evaluation, RunRecord, Status
from lra.tables import clean

CHAIN_FILE = "chain.json"
RUN_FILES = ("result.json", "config.yaml", "metrics.jsonl", "environment.json")
MAX_LINE_BYTES = 1 << 16
MAX_DEPTH = 6
MAX_CLASSES = 1000
MAX_EVALUATIONS = 50

# Keys of config.yaml in which runs of one cell may differ: they change no update, or stand in the table themselves.
_FREE_KEYS = (
    ("name",),
    ("runs_folder",),
    ("seed",),
    ("expected",),
    ("attention", "backend"),
    ("data", "folder"),
    ("train", "log_every"),
    ("train", "eval_every"),
    ("train", "checkpoint_every"),
    ("train", "eval_batch_size"),
    ("train", "accumulate"),
    ("train", "compile"),
    ("train", "deterministic"),
)


def find_runs(roots: Iterable[Path], *, may_be_none: bool = False) -> list[RunRecord]:
    """Read every run beneath `roots`, sorted by path, each folder once.

    A root is a run's folder, a folder of such folders (MAX_DEPTH levels deep), or a result.json kept alone under
    another name, as in `results/`. A root that does not exist becomes a record with status "missing".
    The stages of a chain are no runs of their own (lra/chain_records.py). Raises RunError when there is nothing at all
    to report, unless `may_be_none`.
    """
    roots = [Path(r) for r in roots]
    places: dict[Path, RunRecord] = {}
    for root in roots:
        for place in _places(root):
            resolved = place.resolve()
            if resolved not in places:
                places[resolved] = _read_place(place)
    records = [places[p] for p in sorted(places)]
    if not may_be_none and not any(r.status != "missing" for r in records):
        named = ", ".join(clean(r) for r in roots) or "nothing"
        raise RunError(
            f"There is no run in {named}.",
            "Name a run's folder or a folder of runs; `run_lra.py train listops/smoke` makes one.",
        )
    return records


def _places(root: Path) -> list[Path]:
    """Run folders and bare result files beneath `root`; `root` itself where there is nothing to look into."""
    if not root.is_dir():
        return [] if root.is_file() and is_bare_chain(root) else [root]
    found: list[Path] = []
    for folder, subfolders, files in os.walk(root):
        here = Path(folder)
        if CHAIN_FILE in files:
            subfolders.clear()
            continue
        if any(name in files for name in RUN_FILES):
            found.append(here)
            subfolders.clear()
            continue
        depth = len(here.relative_to(root).parts)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".")) if depth < MAX_DEPTH else []
        found += [here / f for f in sorted(files) if f.endswith(".json") and _is_bare_result(here / f)]
    return found


def is_bare_chain(path: Path) -> bool:
    """Whether a file is a chain.json, under whatever name."""
    try:
        value = _read_json(path)
    except ValueError:
        return False
    return all(key in value for key in ("stages", "track", "task"))


def _is_bare_result(path: Path) -> bool:
    """Other JSON may lie beside results; a result names its status, task and backend."""
    try:
        value = _read_json(path)
    except ValueError:
        return False
    return all(key in value for key in ("status", "task", "backend"))


def _read_place(place: Path) -> RunRecord:
    if place.is_dir():
        return read_run(place)
    if not place.is_file():
        return RunRecord(place, clean(place.name), "missing", "There is no such folder.")
    try:
        return _from_result(place, place.stem, _read_json(place), {}, Curves(), "")
    except ValueError as e:
        return RunRecord(place, clean(place.stem), "corrupt", f"{clean(place.name)}: {e}")


def read_run(folder: Path) -> RunRecord:
    """Read one run's folder; never raises for what it holds: the record's status and reason tell."""
    problems: list[str] = []
    config = _read_config(folder / "config.yaml", problems)
    environment = _read_optional_json(folder / "environment.json", problems)
    curves = read_curves(folder / "metrics.jsonl")
    fingerprint = _fingerprint(config)
    if (folder / "result.json").exists():
        try:
            result = _read_json(folder / "result.json")
            record = _from_result(folder, folder.name, result, environment, curves, fingerprint)
            return replace(record, evaluations=_evaluations(folder))
        except ValueError as e:
            problems.insert(0, f"result.json: {e}")
    known = _from_config(config)
    last = curves.last_step
    if problems:
        status: Status = "corrupt"
        reason = " ".join(problems)
    else:
        status = "unfinished"
        reason = (
            f"No result.json; the last logged step is {last:,} of {known['steps'] or 0:,}."
            if last
            else "No result.json and no logged step."
        ) + " It is still running, or it was killed and can be resumed."
    return RunRecord(
        path=folder,
        name=clean(folder.name),
        status=status,
        reason=clean(reason),
        step=last or None,
        curves=curves,
        fingerprint=fingerprint,
        **known,
        **_from_environment(environment),
    )


def _evaluations(folder: Path) -> tuple[Evaluation, ...]:
    """Later tests of the run; a file that cannot be read is left out, the run's own result does not rest on it."""
    found = []
    for path in sorted(folder.glob("eval-*.json"))[:MAX_EVALUATIONS]:
        try:
            value = _read_json(path)
            backend, checkpoint = _text(value.get("backend")) or "unknown", _text(value.get("checkpoint")) or "unknown"
            found.append(Evaluation(backend, checkpoint, _score(path.name, value)))
        except ValueError:
            continue
    return tuple(found)


def read_curves(path: Path) -> Curves:
    """Read metrics.jsonl; a step logged twice (a resumed run) keeps its last value, unreadable lines are counted."""
    train: dict[int, float] = {}
    val_loss: dict[int, float] = {}
    val_accuracy: dict[int, float] = {}
    bad = 0
    try:
        with open(path, "rb") as lines:
            while line := lines.readline(MAX_LINE_BYTES):
                try:
                    point = json.loads(line)
                    step, kind = point["step"], point["kind"]
                    if type(step) is not int or step < 0:
                        raise ValueError(step)
                    if kind == "train":
                        _put(train, step, point["loss"])
                    elif kind == "eval" and point["split"] == "val":
                        _put(val_loss, step, point.get("loss"))
                        _put(val_accuracy, step, point["correct"] / point["total"])
                except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
                    bad += 1
    except OSError:
        return Curves()
    return Curves(Curve.of(train), Curve.of(val_loss), Curve.of(val_accuracy), bad)


def _put(points: dict[int, float], step: int, value: object) -> None:
    number = _number(value)
    if number is not None:
        points[step] = number


def _read_optional_json(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return _read_json(path)
    except ValueError as e:
        problems.append(f"{path.name}: {e}")
        return {}


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = strict_yaml.load(path)[0]
    except (LraError, OSError, ValueError, RecursionError) as e:
        problems.append(f"config.yaml: {e.cause if isinstance(e, LraError) else 'It cannot be read.'}")
        return {}
    if not isinstance(value, dict):
        problems.append("config.yaml: It holds no mapping.")
        return {}
    return value


def _fingerprint(config: Mapping[str, Any]) -> str:
    """Six hex digits over all of a config that decides a result, save seed and backend; "" without a config."""
    if not config:
        return ""
    kept = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    for *parents, last in _FREE_KEYS:
        place: Any = kept
        for parent in parents:
            place = place.get(parent) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(last, None)
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()[:6]


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a resolved config tells, for runs without a usable result."""
    attention, train, data = (_mapping(config.get(k)) for k in ("attention", "train", "data"))
    backend = _text(attention.get("backend")) or _text(config.get("attention")) or "unknown"
    # As training writes it into result.json: a null layout of block_sparse is butterfly with blocks of 64.
    sparse = f"{_text(attention.get('layout')) or 'butterfly'}-{_count(attention.get('block')) or 64}"
    task = _text(_mapping(config.get("task")).get("name")) or _text(config.get("task")) or "unknown"
    protocol = _text(config.get("protocol")) or "unknown"
    return {
        "task": task,
        "protocol": protocol,
        "recipe": f"{task}/{protocol}" if task != "unknown" else None,
        "track": _text(config.get("track")) or "unknown",
        "backend": backend,
        "layout": sparse if backend == "block_sparse" else None,
        "seed": _count(config.get("seed")),
        "steps": _count(train.get("steps")),
        "batch_size": _count(train.get("batch_size")),
        "precision": _text(train.get("precision")),
        "checkpoint_choice": _text(train.get("checkpoint_choice")),
        "split_rule": _text(data.get("split_rule")),
    }


def _from_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, software and command; every field may be absent."""
    versions = [f"{k} {_text(environment.get(k))}" for k in ("python", "torch", "cuda") if environment.get(k)]
    command = environment.get("command")
    device = _text(environment.get("gpu"))
    cpus = _count(environment.get("host_cpus"))
    return {
        "device": device or (f"CPU ({cpus} cores)" if cpus else None),
        "num_gpus": _count(environment.get("gpu_count")) if device else None,
        "software": ", ".join(versions) or None,
        "command": clean(" ".join(map(str, command))) if isinstance(command, list) else _text(command),
        "dirty": environment.get("dirty") is True,
    }


def _from_result(
    path: Path,
    name: str,
    result: Mapping[str, Any],
    environment: Mapping[str, Any],
    curves: Curves,
    fingerprint: str,
) -> RunRecord:
    """Build a record from result.json; raises ValueError where it contradicts itself."""
    if result.get("format") != 1:
        raise ValueError(f"Its format is {clean(result.get('format'))}, this report reads format 1.")
    if result.get("status") not in ("finished", "stopped", "failed"):
        raise ValueError(f"Its status is {clean(result.get('status'))!r}.")
    status: Status = result["status"]
    known: dict[str, Any] = {k: _text(result.get(k)) or "unknown" for k in ("task", "protocol", "track", "backend")}
    for key in ("recipe", "layout", "precision", "split_rule", "checkpoint_choice", "source", "date"):
        known[key] = _text(result.get(key))
    for key in ("seed", "num_parameters", "steps", "step", "batch_size", "peak_memory_bytes"):
        known[key] = _count(result.get(key))
    for key in ("train_s", "eval_s", "wall_s", "steps_per_s", "steady_steps_per_s", "tokens_per_s"):
        known[key] = _number(result.get(key))
    tests = {clean(k): _score(k, v) for k, v in _mapping(result.get("test")).items() if v is not None}
    reason = _text(result.get("reason")) or ""
    step, steps = known["step"], known["steps"]
    if status == "finished" and steps and step is not None and step < steps:
        status, reason = "unfinished", f"It says finished at step {step:,} of {steps:,}."
    elif status == "finished" and (known["checkpoint_choice"] or "best_val") not in tests and "last" not in tests:
        status, reason = "unfinished", "Training ended but no checkpoint was tested."
    elif status == "stopped" and not reason:
        reason = f"Stopped at step {step or 0:,} of {steps or 0:,}; it can be resumed."
    expected, best = _mapping(result.get("expected")), _mapping(_mapping(result.get("val")).get("best"))
    known |= _from_environment(environment or _mapping(result.get("environment")))
    known["dirty"] = known["dirty"] or result.get("dirty") is True
    return RunRecord(
        path=path,
        name=clean(name),
        status=status,
        reason=reason or ("No reason is recorded." if status == "failed" else ""),
        tests=tests,
        val_accuracy=_number(best.get("accuracy")),
        expected=_number(expected.get("accuracy")),
        expected_source=_text(expected.get("source")) or "",
        confusion=_confusion(result.get("confusion")),
        what_ran={clean(k): clean(v) for k, v in _mapping(result.get("what_ran")).items()},
        commit=_text(result.get("commit")) or _text(environment.get("commit")),
        resumed=_count(result.get("resumed")) or 0,
        restarts=_count(result.get("restarts")) or 0,
        short_of_memory=result.get("exit_code") == EXIT_OUT_OF_MEMORY,
        fingerprint=fingerprint,
        curves=curves,
        **known,
    )


def _confusion(value: object) -> tuple[tuple[int, ...], ...]:
    """A square matrix of counts, or () for anything else: it is shown, nothing is computed from it but scores."""
    if not isinstance(value, list) or len(value) > MAX_CLASSES:
        return ()
    rows = [tuple(_count(v) for v in row) for row in value if isinstance(row, list) and len(row) == len(value)]
    if len(rows) != len(value):
        return ()
    checked = tuple(tuple(v for v in row if v is not None) for row in rows)
    return checked if all(len(row) == len(value) for row in checked) else ()
