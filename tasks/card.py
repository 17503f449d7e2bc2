"""Data cards: what a task is, as Markdown, with the figures of a cache if one is at hand.

`run_lra.py prepare TASK --card` prints one; `python -m tasks.card` writes all of them, which is docs/tasks.md.
"""

from __future__ import annotations

from pathlib import Path

from lra.base.errors import DataError
from tasks.cache import MANIFEST, open_cache
from tasks.registry import Task, get

_OWN = ("listops", "text", "retrieval", "image", "pathfinder", "path64", "pathx", "path256")


def card(name: str, data_dir: Path | None = None) -> str:
    """Return the data card of a task as Markdown, with the figures of each of its caches in `data_dir`."""
    task = get(name)
    lines = [f"## {task.title} (`{task.name}`)", "", *_facts(task), "", task.card.rstrip()]
    folders = sorted((data_dir / name).glob(f"*/{MANIFEST}")) if data_dir is not None else []
    for file in folders:
        lines += ["", f"### The cache {file.parent}", "", *_figures(file.parent)]
    return "\n".join(lines) + "\n"


_TRACKS = """\
## Tracks
What a recipe may use, as `track:` in its file; results of different tracks are never averaged or set in one column.

| | paper | sequence | open |
|---|---|---|---|
| model and optimizer | the published protocol's | any Transformer | any Transformer |
| positions | the protocol's, 1-D | 1-D: learned, sinusoidal or rotary over token numbers | also rows and columns |
| training images | the task's own; Path-64 before Path-X and Path-256, as FlashAttention did | the task's own | \
also other sizes and difficulties, fresh images |
| changes to them | none | none; black pixels may be left out, hidden pixels guessed | also flips, turns, shifts |
| at test time | every token | every token | every token |

Outside the open track flips, turns, shifts and fresh images are refused, in chains also 2-D positions, and in the
sequence track another set than the task's own. Paper: what FlashAttention's table 6 reports (61.4 on Path-X, 63.1 on
Path-256).
Sequence: where self-pretrained Transformers and state-space models are compared. Open: the rest, and to be read so.
"""


def all_cards() -> str:
    """Return docs/tasks.md."""
    intro = (
        "# The tasks\n\n"
        "Written by `python -m tasks.card`; `run_lra.py prepare TASK --card` shows one card with the figures of your\n"
        "own cache. Published numbers are test accuracies in percent; `configs/` names the protocol of each.\n"
    )
    return "\n".join([intro, _TRACKS, *(card(name) for name in _OWN)])


def _facts(task: Task) -> list[str]:
    rules = [f"`{rule}`" + (" (default)" if i == 0 else "") for i, rule in enumerate(task.split_rules)]
    rows = [
        ("classes", f"{task.num_classes}"),
        ("sequences an example", f"{task.documents}"),
        ("longest sequence", f"{task.max_length:,} tokens" + (f" ({_grid(task)})" if task.grid else "")),
        ("ids", f"{task.vocab_size}" + (", id = byte + 1" if task.token_shift else "")),
        ("split rules", ", ".join(rules)),
        ("options", ", ".join(f"`{field}`" for field in task.options.model_fields if field != "name") or "none"),
        ("without --source", "generated" if task.generated else _downloads(task)),
    ]
    return ["| | |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)]


def _grid(task: Task) -> str:
    assert task.grid is not None
    return f"{task.grid[0]}x{task.grid[1]} pixels"


def _downloads(task: Task) -> str:
    names = [f"<{item.url}>" + (f", {item.num_bytes / 1e6:,.1f} MB" if item.num_bytes else "") for item in task.sources]
    return "downloaded: " + "; ".join(names) if names else "the files must be named"


def _figures(folder: Path) -> list[str]:
    try:
        manifest = open_cache(folder).manifest
    except DataError as e:
        return [f"{e.cause} {e.remedy}"]
    total = manifest.num_examples
    parts = ", ".join(f"{name} {stop - start:,}" for name, (start, stop) in manifest.parts.items())
    labels = ", ".join(f"{i}: {100 * count / total:.1f}%" for i, count in enumerate(manifest.label_histogram))
    lines = [
        f"- Source: {manifest.source}" + (f" ({manifest.source_path})" if manifest.source_path else ""),
        f"- Made: {manifest.created}, options {manifest.options}",
        f"- Examples: {total:,} ({parts})",
        f"- Labels: {labels}",
        f"- Tokens: {manifest.num_tokens:,}; sequences of {manifest.shortest:,} to {manifest.longest:,}, "
        f"mean {manifest.mean_length:,.1f}",
        f"- SHA-256 of tokens.npy: {manifest.files['tokens.npy'].sha256}",
    ]
    return lines + [f"- {key}: {value}" for key, value in manifest.notes.items()]


if __name__ == "__main__":
    print(all_cards(), end="")
