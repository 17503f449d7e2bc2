"""Values out of JSON that may be damaged or hostile: each of the kind that was expected, or nothing.

Called by the report's readers of runs and chains.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lra.records import Score
from lra.tables import clean

MAX_JSON_BYTES = 16 << 20


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; raises ValueError with a sentence for anything else."""
    try:
        with open(path, "rb") as f:
            data = f.read(MAX_JSON_BYTES + 1)
    except OSError as e:
        raise ValueError(f"It cannot be read ({e.strerror}).") from e
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"It is larger than {MAX_JSON_BYTES:,} bytes.")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ValueError("It is not whole JSON.") from e
    if not isinstance(value, dict):
        raise ValueError("It holds no JSON object.")
    return value


def score(name: str, value: object) -> Score:
    """Return a test score; raises ValueError unless its counts are possible and agree with its accuracy."""
    entry = mapping(value)
    correct, total, step = (count(entry.get(k)) for k in ("correct", "total", "step"))
    if correct is None or total is None or total == 0 or correct > total:
        raise ValueError(f"Its test counts of {clean(name)} are impossible.")
    said = number(entry.get("accuracy"))
    if said is not None and abs(said - correct / total) > 1e-6:
        raise ValueError(f"Its accuracy of {clean(name)} is not {correct:,} of {total:,}.")
    return Score(step or 0, correct, total, number(entry.get("loss")))


def mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping; {} for anything else."""
    return value if isinstance(value, dict) else {}


def text(value: object) -> str | None:
    """Return clean text of one line, or None."""
    return clean(value) or None if isinstance(value, str) else None


def count(value: object) -> int | None:
    """Return a non-negative integer that any format can print, or None."""
    return value if type(value) is int and 0 <= value < 1 << 62 else None


def number(value: object) -> float | None:
    """Return a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None
