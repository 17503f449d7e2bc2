"""Published Long-Range Arena accuracies with their sources, as data; the report prints them beside ours.

Called by the report. Knows no run. Accuracies are percentages here, exactly as printed in the papers; None is a
cell that the paper gives as chance level or out of memory ("fail").
"""

from __future__ import annotations

from dataclasses import dataclass

LRA_TASKS = ("listops", "text", "retrieval", "image", "pathfinder")
LONG_TASKS = ("pathx", "path256")

PAPER_PROTOCOLS = ("google", "nystrom", "fly")

FLASH_TABLE_3 = "FlashAttention (Dao et al. 2022, arXiv:2205.14135), Table 3"
FLASH_TABLE_6 = "FlashAttention (Dao et al. 2022, arXiv:2205.14135), Table 6"
LRA_PAPER = "Long Range Arena (Tay et al. 2021, arXiv:2011.04006), Table 1"
NYSTROM_PAPER = "Nystromformer (Xiong et al. 2021, arXiv:2102.03902), LRA table"
SPT_PAPER = "Never Train from Scratch (Amos et al. 2023, arXiv:2310.02980)"
SPT_LOCAL = SPT_PAPER + "; Path-X with attention inside blocks of 4,096 and their neighbours"
S4_PAPER = "S4 (LegS, v2), as reprinted in MEGA, Table 2"
S5_PAPER = "S5 (Smith et al. 2023, arXiv:2208.04933)"
MEGA_PAPER = "MEGA (Ma et al. 2023, arXiv:2209.10655), Table 2"
CHORD_PAPER = "ChordMixer (Khalitov et al. 2023), README of its code"
DFOUT_PAPER = "S4D-DFouT (NeurIPS 2025)"
LONG_CONV_PAPER = "Long convolutions (Fu et al. 2023, arXiv:2302.06646): 63.1 + 29.1 points"


@dataclass(frozen=True)
class Published:
    """One printed number: percent, or None where the paper prints chance level or out of memory."""

    task: str
    method: str
    percent: float | None
    protocol: str
    source: str

    @property
    def text(self) -> str:
        """The number as the paper prints it, with one decimal or two."""
        if self.percent is None:
            return "fail"
        one = f"{self.percent:.1f}"
        return one if float(one) == self.percent and self.source.startswith("FlashAttention") else f"{self.percent:.2f}"


# method -> (ListOps, Text, Retrieval, Image, Pathfinder), percent
_FLASH_TABLE_3 = {
    "Transformer": (36.0, 63.6, 81.6, 42.3, 72.7),
    "FlashAttention": (37.6, 63.9, 81.4, 43.5, 72.7),
    "Block-sparse FlashAttention": (37.0, 63.0, 81.3, 43.6, 73.3),
    "Linformer": (35.6, 55.9, 77.7, 37.8, 67.6),
    "Linear Attention": (38.8, 63.2, 80.7, 42.6, 72.5),
    "Performer": (36.8, 63.6, 82.2, 42.1, 69.9),
    "Local Attention": (36.1, 60.2, 76.7, 40.6, 66.6),
    "Reformer": (36.5, 63.8, 78.5, 39.6, 69.4),
    "SMYRF": (36.1, 64.1, 79.0, 39.6, 70.5),
}
FLASH_SPEED_UPS = {
    "Transformer": 1.0,
    "FlashAttention": 2.4,
    "Block-sparse FlashAttention": 2.8,
    "Linformer": 2.5,
    "Linear Attention": 2.3,
    "Performer": 1.8,
    "Local Attention": 1.7,
    "Reformer": 1.3,
    "SMYRF": 1.7,
}
# (method, protocol, source, the seven tasks); a missing number is left out, "fail" is None.
_OTHER_ROWS: tuple[tuple[str, str, str, dict[str, float | None]], ...] = (
    (
        "Transformer",
        "google",
        LRA_PAPER,
        {"listops": 36.37, "text": 64.27, "retrieval": 57.46, "image": 42.44, "pathfinder": 71.40, "pathx": None},
    ),
    (
        "Transformer",
        "nystrom",
        NYSTROM_PAPER,
        {"listops": 37.10, "text": 65.02, "retrieval": 79.35, "image": 38.20, "pathfinder": 74.16},
    ),
    ("Transformer", "flash", FLASH_TABLE_6, {"pathx": None, "path256": None}),
    ("FlashAttention", "flash", FLASH_TABLE_6, {"pathx": 61.4, "path256": None}),
    ("Block-sparse FlashAttention", "flash", FLASH_TABLE_6, {"pathx": 56.0, "path256": 63.1}),
    (
        "Transformer + rotary, from scratch",
        "spt",
        SPT_LOCAL,
        {"listops": 47.90, "text": 79.08, "retrieval": 82.31, "image": 75.04, "pathfinder": 76.64, "pathx": 84.72},
    ),
    (
        "Transformer + rotary + self-pretraining",
        "spt",
        SPT_LOCAL,
        {"listops": 61.49, "text": 91.02, "retrieval": 91.57, "image": 86.04, "pathfinder": 94.16, "pathx": 92.98},
    ),
    (
        "S4",
        "later",
        S4_PAPER,
        {"listops": 59.60, "text": 86.82, "retrieval": 90.90, "image": 88.65, "pathfinder": 94.20, "pathx": 96.35},
    ),
    (
        "S5",
        "later",
        S5_PAPER,
        {"listops": 62.15, "text": 89.31, "retrieval": 91.40, "image": 88.00, "pathfinder": 95.33, "pathx": 98.58},
    ),
    (
        "MEGA",
        "later",
        MEGA_PAPER,
        {"listops": 63.14, "text": 90.43, "retrieval": 91.25, "image": 90.44, "pathfinder": 96.01, "pathx": 97.98},
    ),
    (
        "ChordMixer",
        "later",
        CHORD_PAPER,
        {"listops": 59.89, "text": 88.87, "retrieval": 90.38, "image": 89.95, "pathfinder": 96.67, "pathx": 98.63},
    ),
    (
        "S4D-DFouT",
        "later",
        DFOUT_PAPER,
        {
            **{"listops": 61.89, "text": 87.41, "retrieval": 90.95, "image": 88.48, "pathfinder": 94.30},
            **{"pathx": 94.17, "path256": 87.89},
        },
    ),
    ("S4 + self-pretraining", "later", DFOUT_PAPER + ", Table 4", {"pathx": 96.94, "path256": 87.11}),
    ("Long convolutions (FlashButterfly)", "later", LONG_CONV_PAPER, {"path256": 92.2}),
)

# Which published method a backend of ours is compared with. sdpa computes what standard computes.
METHOD_OF_BACKEND = {
    "standard": "Transformer",
    "sdpa": "Transformer",
    "flash": "FlashAttention",
    "block_sparse": "Block-sparse FlashAttention",
    "linformer": "Linformer",
    "linear": "Linear Attention",
    "linear_attention": "Linear Attention",
    "performer": "Performer",
    "local": "Local Attention",
    "local_attention": "Local Attention",
    "reformer": "Reformer",
    "smyrf": "SMYRF",
}


def _all_rows() -> tuple[Published, ...]:
    rows = [
        Published(task, method, percent, "flash", FLASH_TABLE_3)
        for method, percents in _FLASH_TABLE_3.items()
        for task, percent in zip(LRA_TASKS, percents, strict=True)
    ]
    rows += [
        Published(task, method, percent, protocol, source)
        for method, protocol, source, cells in _OTHER_ROWS
        for task, percent in cells.items()
    ]
    return tuple(rows)


PUBLISHED = _all_rows()


def published(task: str) -> tuple[Published, ...]:
    """Return every published number of `task`, FlashAttention's first; empty for a task of one's own."""
    return tuple(row for row in PUBLISHED if row.task == task)


def beside(task: str, *, track: str, protocol: str, backend: str) -> Published | None:
    """Return the published number that stands beside a result of ours, or None where none is comparable.

    In the paper track it is FlashAttention's number for the same method (its Table 3, and Table 6 for Path-X and
    Path-256). In the tracks sequence and open it is the best Transformer: rotary positions with
    self-pretraining, and for Path-256, where that paper has none, block-sparse FlashAttention. A smoke recipe
    is a test of the machinery and has no published counterpart.
    """
    if track == "paper" and protocol in PAPER_PROTOCOLS:
        return _find(task, "flash", METHOD_OF_BACKEND.get(backend))
    if track in ("sequence", "open") and protocol != "smoke":
        spt = _find(task, "spt", "Transformer + rotary + self-pretraining")
        return spt or (_find(task, "flash", "Block-sparse FlashAttention") if task == "path256" else None)
    return None


def best_published(task: str) -> Published | None:
    """Return the best published number of any method (other models included), or None."""
    known = [row for row in published(task) if row.percent is not None]
    return max(known, key=lambda row: row.percent or 0.0, default=None)


def _find(task: str, protocol: str, method: str | None) -> Published | None:
    for row in PUBLISHED:
        if (row.task, row.protocol, row.method) == (task, protocol, method):
            return row
    return None
