"""Which family of CUDA kernels a call may take: "generic" (8.0 and up), "hopper" (9.0), or "auto", the best there is.

Read where a plan is chosen. Normally nobody asks; tests and timings do, with `cuda_family`, and
ATTENTION_KERNELS_FAMILY in the environment names one for a whole process. Standard library only.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Family = Literal["auto", "generic", "hopper"]

VARIABLE = "ATTENTION_KERNELS_FAMILY"
# The families that this version has kernels of.
BUILT: tuple[Family, ...] = ("generic", "hopper")

_asked: Family | None = None


def asked() -> Family:
    """Return the family asked for: by `cuda_family`, else by the environment, else "auto".

    Raises ValueError where the environment names none.
    """
    global _asked
    if _asked is None:
        _asked = _checked(VARIABLE, os.environ.get(VARIABLE, "auto"))
    return _asked


@contextmanager
def cuda_family(name: Family) -> Iterator[None]:
    """Let calls inside the block, in the whole process, run on one family's kernels; "auto" is the default.

    Raises ValueError for a family that is unknown or that this version has no kernels of.
    """
    global _asked
    before, _asked = asked(), _checked("name", name)
    try:
        yield
    finally:
        _asked = before


def _checked(what: str, name: str) -> Family:
    for family in get_args(Family):
        if name == family and (name == "auto" or name in BUILT):
            return name  # type: ignore[return-value]
    known = ", ".join(f'"{family}"' for family in ("auto", *BUILT))
    raise ValueError(f"{what} must be {known}, got {name!r}.")
