"""Figures about chains of stages: accuracy over GPU minutes, and where a finished model looks.

Called by the report. Records and arrays in, matplotlib figures out; lra/plots.py has the style and writes SVG and PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lra.chain_records import CHANCE, TRACKS, ChainGroup, ChainRecord
from lra.plots import COLOURS, FAINT, INK, MARKERS, style
from lra.published import Published
from lra.rivals import marks
from lra.tables import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 8.4
HEAT = np.array((0.84, 0.37, 0.0))
OWNERS = ("its own path", "the other path", "distractors", "background")


@dataclass(frozen=True)
class View:
    """What lra/attention_view.py kept; D layers, H heads, P points (y, x) on the path, S x S pixels."""

    image: np.ndarray
    points: np.ndarray
    from_marker: np.ndarray
    peaks: np.ndarray
    shares: np.ndarray
    logits: np.ndarray

    @property
    def answer(self) -> str:
        """The model's answer in words."""
        odds = np.exp(self.logits - self.logits.max())
        connected = float(odds[1] / odds.sum())
        return f"the model says connected with probability {connected:.3f}"


def read_view(path: Path) -> View | None:
    """Read an attention view; None for a file that is damaged or of other shapes."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        a = load_file(path)
        view = View(**{name: a[name].astype(np.float64) for name in View.__dataclass_fields__})
    except (OSError, KeyError, ValueError, SafetensorError):
        return None
    side, (depth, heads, num) = view.image.shape[0], view.peaks.shape[:3]
    shapes = {
        "image": (side, side),
        "points": (num, 2),
        "from_marker": (depth, heads, side, side),
        "peaks": (depth, heads, num, 2),
        "shares": (depth, heads, 4),
        "logits": (2,),
    }
    return view if all(getattr(view, name).shape == shape for name, shape in shapes.items()) else None


def accuracy_over_minutes(task: str, groups: Sequence[ChainGroup]) -> Figure | None:
    """Draw validation accuracy over GPU minutes, a row a track with an axis of its own, a line a seed."""
    from matplotlib.figure import Figure

    with_points = [g for g in groups if any(points for c in g.chains for _, points in c.curve)]
    tracks = sorted({g.track for g in with_points}, key=lambda t: TRACKS.index(t) if t in TRACKS else len(TRACKS))
    if not tracks:
        return None
    with style():
        figure = Figure(figsize=(WIDTH_IN, 0.5 + 2.5 * len(tracks)), layout="constrained")
        for axes, track in zip(figure.subplots(len(tracks), 1, squeeze=False)[:, 0], tracks, strict=True):
            chains = [c for g in with_points if g.track == track for c in g.chains]
            for index, chain in enumerate(chains):
                _chain_line(axes, chain, index, task)
            _marks(axes, marks(task, track))
            axes.axhline(100 * CHANCE, color=FAINT, linestyle=":", linewidth=1.2)
            axes.set_ylim(44, 101)
            axes.set_xlim(left=0)
            axes.set_title(f"{clean(track)} track")
            axes.set_ylabel("accuracy (%)")
            if len(chains) <= 8:
                axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.set_xlabel("GPU minutes of the whole chain")
    return figure


def _chain_line(axes: Axes, chain: ChainRecord, index: int, task: str) -> None:
    """A solid line at the task's own resolution, a dotted one before; a star is the final test."""
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    for stage, points in chain.curve:
        own = stage.task == task
        fill = colour if own else "white"
        axes.plot(
            [minute for minute, _ in points],
            [100 * accuracy for _, accuracy in points],
            color=colour,
            linestyle="-" if own else ":",
            marker=marker,
            markersize=4,
            markerfacecolor=fill,
            markeredgecolor=colour,
        )
    outcome = "" if chain.outcome == "finished" else f", {chain.outcome}"
    axes.plot([], [], color=colour, marker=marker, markersize=4, label=f"{clean(chain.name, 28)}{outcome}")
    if chain.test is not None:
        axes.plot(chain.minutes("total"), 100 * chain.test.accuracy, "*", color=colour, markersize=11, zorder=3)


def _marks(axes: Axes, published: Sequence[Published]) -> None:
    for row in published:
        if row.percent is None:
            continue
        axes.axhline(row.percent, color=INK, linestyle=(0, (5, 3)), linewidth=0.8)
        below = row.percent > 90
        axes.annotate(
            f"{row.text} {row.method}",
            (0.0, row.percent),
            xycoords=("axes fraction", "data"),
            xytext=(3, -3 if below else 3),
            textcoords="offset points",
            ha="left",
            va="top" if below else "bottom",
            fontsize=7.5,
            # Under the curves, which may run through it.
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
            zorder=1.5,
        )


def attention_grid(view: View) -> Figure:
    """Draw the attention of the marker, a column a layer and a row a head, over the image; endpoints are marked."""
    depth, heads = view.from_marker.shape[:2]
    with style():
        figure, cells = _panels(heads, depth)
        for layer in range(depth):
            for head in range(heads):
                axes = cells[head, layer]
                axes.imshow(heat(view.image, view.from_marker[layer, head]), interpolation="none")
                _endpoints(axes, view)
                share = 100 * view.shares[layer, head, 0]
                axes.set_title(f"layer {layer + 1}, head {head + 1}: {share:.0f} %", fontsize=8, fontweight="normal")
    return figure


def looks_along_path(view: View) -> Figure:
    """Draw, a column a layer and a row a head, an arrow from each point of the path to where it looks most."""
    depth, heads = view.peaks.shape[:2]
    base = heat(view.image, np.zeros_like(view.image))
    with style():
        figure, cells = _panels(heads, depth)
        for layer in range(depth):
            for head in range(heads):
                axes = cells[head, layer]
                axes.imshow(base, interpolation="none")
                step = view.peaks[layer, head] - view.points
                axes.quiver(
                    *(view.points[:, 1], view.points[:, 0], step[:, 1], step[:, 0]),
                    angles="xy",
                    scale_units="xy",
                    scale=1,
                    color=HEAT,
                    width=0.012,
                    headwidth=4,
                )
                _endpoints(axes, view)
                axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8, fontweight="normal")
    return figure


def heat(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return an (S, S, 3) uint8 picture: the image grey on white, attention in orange by the root of its share."""
    grey = 1.0 - 0.55 * (image[:, :, None] / 255.0)
    top = weights.max()
    strength = np.sqrt(weights / top)[:, :, None] if top > 0 else np.zeros((*weights.shape, 1))
    blend = (1 - strength) * grey + strength * HEAT
    return (255 * blend.clip(0, 1)).round().astype(np.uint8)


def _panels(rows: int, columns: int) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    size = WIDTH_IN / max(columns, 2)
    figure = Figure(figsize=(WIDTH_IN, rows * (size + 0.2)), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False)
    for axes in cells.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(visible=False)
    return figure, cells


def _endpoints(axes: Axes, view: View) -> None:
    side = view.image.shape[0]
    for point, marker in ((view.points[0], "o"), (view.points[-1], "s")):
        axes.plot(point[1], point[0], marker, markersize=7, markerfacecolor="none", markeredgecolor=COLOURS[0])
    axes.set_xlim(-0.5, side - 0.5)
    axes.set_ylim(side - 0.5, -0.5)


def view_caption(chain: ChainRecord, view: View) -> str:
    """Return what a picture of attention shows, for its caption."""
    return f"{clean(chain.name)}, a connected test image; {view.answer}"
