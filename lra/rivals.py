"""What published Path-X and Path-256 results cost, as data, as far as their authors say.

Called by the report of chains. Knows no chain of ours. Hours are of the machine named, which is not ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from lra.published import Published, published

NOT_STATED = "not stated"


@dataclass(frozen=True)
class Cost:
    """GPU hours of a published result: a number where one is stated or follows, and what it rests on."""

    gpu_hours: float | None
    text: str
    machine: str
    basis: str


# (task, method) as in lra/published.py
COSTS: dict[tuple[str, str], Cost] = {
    ("pathx", "FlashAttention"): Cost(
        130.0,
        "about 130",
        "A100",
        "derived: attention of 400 epochs at the 65 TFLOP/s of its runtime table; Path-64 not counted",
    ),
    ("pathx", "Transformer + rotary + self-pretraining"): Cost(
        480.0,
        "up to 480 a phase, two phases",
        "V100 or RTX 3090",
        "its appendix C: at most 5 days on 4 GPUs a phase",
    ),
    ("pathx", "S4"): Cost(47.0, "47", "A100", "its notes on experiments: 50 epochs of 56 minutes, 92 % after 10"),
    ("pathx", "MEGA"): Cost(None, NOT_STATED, "8 x A100", "its README: 125,000 updates of 128 images"),
    ("pathx", "S5"): Cost(None, NOT_STATED, NOT_STATED, "75 epochs, batches of 32"),
    ("pathx", "S4D-DFouT"): Cost(None, NOT_STATED, NOT_STATED, "50 epochs, batches of 32"),
    ("path256", "S4D-DFouT"): Cost(None, NOT_STATED, NOT_STATED, "20 epochs, batches of 16"),
}


def rivals(task: str) -> list[tuple[Published, Cost]]:
    """Return every published result of a task above chance with its cost, the best first."""
    unknown = Cost(None, NOT_STATED, NOT_STATED, "")
    rows = [(row, COSTS.get((task, row.method), unknown)) for row in published(task) if row.percent is not None]
    return sorted(rows, key=lambda pair: -(pair[0].percent or 0.0))


def marks(task: str, track: str) -> list[Published]:
    """Return the published accuracies that a track is measured by: FlashAttention's, or the best Transformer and all.

    Paper track: the dense and the block-sparse row of FlashAttention's Table 6. Others: the best published Transformer
    and the best published model.
    """
    rows = [row for row, _ in rivals(task)]
    ours = [row for row in rows if "FlashAttention" in row.method]
    if track == "paper" or not rows:
        return ours
    best_transformer = next((r for r in rows if "Transformer" in r.method), ours[0] if ours else rows[0])
    return list(dict.fromkeys([rows[0], best_transformer]))
