"""Chains of stages in the report: found by themselves, tracks apart, nothing lost averaged away, pictures."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lra.base.errors import RunError
from lra.chain_figures import heat, read_view
from lra.chain_page import chain_parts
from lra.chain_records import VIEW_FILE, chain_groups, find_chains
from lra.chain_tables import cost_table, overview, probe_table, seeds_table
from lra.published import published
from lra.report import build_report
from lra.rivals import COSTS, marks, rivals
from lra.runs import find_runs
from lra.statistics import wilson_interval
from tests.report.conftest import MakeRun

NOW = datetime(2026, 11, 20, 9, 0, tzinfo=UTC)
TOTAL = 20_000


def summary(accuracy: float, total: int = TOTAL) -> dict[str, Any]:
    correct = round(accuracy * total)
    interval = list(wilson_interval(correct, total))
    return {"correct": correct, "total": total, "accuracy": correct / total, "interval": interval, "loss": 0.1}


def stage(name: str, task: str, goal: float, minutes: float, *, lost: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A finished stage whose validations rise to `goal`."""
    accuracies = [0.5 + (goal - 0.5) * min(1.0, 1.3 * i / 8) for i in range(1, 9)]
    curve = [{"step": 400 * i, "gpu_minutes": minutes * i / 8, "accuracy": a, "loss": 0.3, "total": 2000}
             for i, a in enumerate(accuracies, 1)]  # fmt: skip
    parts = {"training": minutes, "evaluation": 0.4, "compilation": 0.3, "given_up": lost}
    return {
        "name": name, "task": task, "status": "finished", "steps": 3200, "images": 819_200, "num_parameters": 810_000,
        "test": summary(goal, 2000 if name == "small" else TOTAL), "restarts": int(lost > 0), "attempts": [],
        "limit_eval": 2000 if name == "small" else None, "attention": "flash", "images_per_s": 11_000.0,
        "gpu_minutes": parts | {"total": sum(parts.values())}, "curve": curve,
    } | changes  # fmt: skip


def write_chain(
    root: Path, track: str, seed: int, goal: float, *, task: str = "pathx", minutes: float = 9.0, lost: float = 0.0,
    **changes: Any,
) -> Path:  # fmt: skip
    """Write a chain's folder; `changes` replace keys of chain.json."""
    folder = root / f"{task}-{track}-s{seed}"
    probes = {f"contour_length={n}": summary(0.6 if n < 12 else 0.97, 1000) for n in (9, 10, 11, 12, 13, 14)}
    probes |= {"num_distractors=8": summary(0.98, 1000)}
    value: dict[str, Any] = {
        "format": 1, "name": folder.name, "recipe": f"{task}-{track}", "task": task, "track": track, "seed": seed,
        "status": "finished", "reason": None, "test": summary(goal), "probes": probes if track == "open" else {},
        "epochs_share": 0.1 if track == "paper" else None, "restarts": int(lost > 0),
        "stages": [stage("small", "path64", goal - 0.05, minutes / 3, lost=lost), stage("long", task, goal, minutes)],
        "environment": {"gpu": "NVIDIA H200"}, "num_processes": 1, "commit": "0123abc", "date": "2026-11-20T09:00:00Z",
    }  # fmt: skip
    value |= changes
    folder.mkdir(parents=True)
    (folder / "chain.json").write_text(json.dumps(value), encoding="utf-8")
    for name in ("small", "long"):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text("task: pathx\n")
    return folder


def write_log(folder: Path, losses: list[float], accuracy: float = 0.5) -> None:
    """Write a stage's metrics.jsonl with a line a loss, 10 seconds each, and a validation at the end."""
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": 50 * i, "loss": loss, "train_gpu_s": 10.0 * i} for i, loss in enumerate(losses, 1)
    ]
    lines.append({"kind": "eval", "step": 50 * len(losses), "accuracy": accuracy, "loss": 0.7, "total": 100})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_view(folder: Path, depth: int = 6, heads: int = 2, side: int = 128) -> None:
    """Write a made-up view: attention a little ahead along a diagonal path."""
    t = np.linspace(0.15, 0.8, 16)
    points = np.stack([side * t, side * (0.2 + 0.5 * t)], 1).round().astype(np.int64)
    y, x = np.mgrid[:side, :side]
    image = np.zeros((side, side), np.uint8)
    for cy, cx in points:
        image[(abs(y - cy) < 2) & (abs(x - cx) < 2)] = 200
    maps = np.zeros((depth, heads, side, side))
    for layer in range(depth):
        for head in range(heads):
            cy, cx = points[min(15, 2 * layer + head)]
            maps[layer, head] = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 20.0)
    maps /= maps.sum((2, 3), keepdims=True)
    peaks = np.broadcast_to(np.roll(points, -1, 0), (depth, heads, 16, 2)).copy()
    shares = np.tile(np.array([0.6, 0.1, 0.1, 0.2], np.float32), (depth, heads, 1))
    save_file(
        {"image": image, "points": points, "from_marker": maps.astype(np.float16), "peaks": peaks, "shares": shares,
         "logits": np.array([-2.0, 2.0], np.float32)},
        folder / VIEW_FILE,
    )  # fmt: skip


@pytest.fixture(scope="session")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three open seeds and a stopped one, a failed paper chain beside a finished one, a stuck sequence chain."""
    root = tmp_path_factory.mktemp("chains")
    for seed, goal in ((1, 0.984), (2, 0.989), (3, 0.979)):
        write_chain(root, "open", seed, goal, lost=1.5 if seed == 2 else 0.0)
    write_view(root / "pathx-open-s2")
    waiting: dict[str, Any] = {"status": "waiting", "test": None, "curve": [], "gpu_minutes": {}}
    stages = [stage("small", "path64", 0.93, 3.0), stage("long", "pathx", 0.9, 9.0, **waiting)]
    folder = write_chain(root, "open", 4, 0.5, status="stopped", reason="Time is over.", test=None, stages=stages)
    write_log(folder / "long", [0.69, 0.6, 0.5], 0.8)
    write_chain(root, "paper", 1, 0.531, minutes=180.0)
    write_chain(root, "paper", 2, 0.5, status="failed", reason="The loss became NaN.", test=None, minutes=180.0)
    stuck = [stage("small", "path64", 0.5, 3.0, **waiting), stage("long", "pathx", 0.5, 9.0, **waiting)]
    folder = write_chain(root, "sequence", 1, 0.5, status="unfinished", test=None, stages=stuck)
    write_log(folder / "small", [0.6932] * 8)
    write_chain(root, "open", 1, 0.5, task="path256", lost=2.0)
    broken = root / "pathx-open-s9"
    broken.mkdir()
    (broken / "chain.json").write_text('{"status": "fini')
    return root


@pytest.fixture(scope="session")
def report(chains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the chains' report."""
    out = tmp_path_factory.mktemp("chain_report")
    build_report([chains], out, now=NOW)
    return out


def test_groups_keep_tracks_apart_and_count_what_is_lost(chains: Path) -> None:
    groups = {(g.task, g.track): g for g in chain_groups(find_chains([chains]))}
    assert list(groups) == [("pathx", "paper"), ("pathx", "sequence"), ("pathx", "open"), ("path256", "open")]
    opened = groups["pathx", "open"]
    assert [c.outcome for c in opened.chains] == ["finished"] * 3 + ["stopped"]
    assert opened.summary is not None and opened.summary.mean == pytest.approx((0.984 + 0.989 + 0.979) / 3)
    assert groups["path256", "open"].chains[0].outcome == "at chance"
    assert groups["pathx", "sequence"].chains[0].outcome == "stuck" and groups["pathx", "sequence"].summary is None
    row = [str(getattr(cell, "text", cell)) for cell in overview([opened]).rows[0]]
    assert "1 stopped" in row and "1 in 4 seeds" in row


def test_a_chain_on_its_way_is_read_from_its_logs(chains: Path) -> None:
    found = {c.name: c for c in find_chains([chains])}
    stopped = found["pathx-open-s4"]
    assert stopped.reason == "Stage long is at step 150 of 3,200. Time is over."
    assert stopped.curve[1][1] == [(pytest.approx(3.7 + 0.5), 0.8)]
    assert "at ln 2" in found["pathx-sequence-s1"].reason and "Stage small" in found["pathx-sequence-s1"].reason
    assert found["pathx-open-s9"].status == "corrupt"


def test_minutes_count_attempts_given_up(chains: Path) -> None:
    chain = next(c for c in find_chains([chains]) if c.name == "pathx-open-s2")
    assert chain.minutes("given_up") == 1.5 and chain.minutes("total") == pytest.approx(3 + 9 + 2 * 0.7 + 1.5)
    assert chain.curve[0][1][0][0] == pytest.approx(1.5 + 3 / 8)
    assert "Given up (GPU min)" in [c.title for c in seeds_table(chain_groups([chain])).columns]


def test_stages_are_no_runs_and_copies_count_once(chains: Path, tmp_path: Path, make_run: MakeRun) -> None:
    assert find_runs([chains], may_be_none=True) == []
    (tmp_path / "weights").mkdir()
    shutil.copyfile(chains / "pathx-open-s1/chain.json", tmp_path / "weights/chain.json")
    (tmp_path / "weights/config.yaml").write_text("task: pathx\n")
    shutil.copyfile(chains / "pathx-open-s2/chain.json", tmp_path / "pathx-open-s2.json")
    make_run(tmp_path, "a-run")
    assert len(find_chains([tmp_path])) == 2 and len(find_chains([chains, tmp_path])) == len(find_chains([chains]))
    assert [r.name for r in find_runs([tmp_path])] == ["a-run"]
    with pytest.raises(RunError):
        build_report([tmp_path / "nothing"], tmp_path / "out")


def test_report_holds_every_chain_and_every_picture(report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    text = (report / "report.md").read_text(encoding="utf-8")
    for name in ("pathx-open-s1", "pathx-open-s4", "pathx-paper-s2", "pathx-sequence-s1", "pathx-open-s9"):
        assert name in page and name.replace("_", r"\_") in text
    for words in ("The loss became NaN.", "at chance", "stuck", "not counted", "up to 480 a phase", "trace or count"):
        assert words in page and words in text
    assert {p.name for p in (report / "plots").iterdir()} == {
        *(f"chain-pathx-{name}.png" for name in ("minutes", "attention", "along-path")),
        "chain-path256-minutes.png",
    }
    assert page.count("data:image/png;base64,") == 2 * 6 * 2
    assert "61.4 FlashAttention" in page and "img-src data:" in page
    assert (report / "chains.csv").read_text().count("\n") == 9
    assert "pathx" in (report / "results.tex").read_text() and not (report / "results.csv").exists()


def test_probe_table_marks_what_is_at_chance(chains: Path) -> None:
    groups = [g for g in chain_groups(find_chains([chains])) if (g.task, g.track) == ("pathx", "open")]
    table = probe_table(groups)
    assert table is not None and len(table.columns) == 4
    assert [row[0] for row in table.rows][:2] == ["contour length 9", "contour length 10"]
    assert table.rows[-1][0] == "distractors 8"


def test_costs_are_of_published_results_and_ours_stand_beside(chains: Path) -> None:
    for task, method in COSTS:
        assert method in {row.method for row in published(task)}
    assert rivals("pathx")[0][0].percent == 98.63 and rivals("path256")[0][0].percent == 92.2
    assert [row.percent for row in marks("pathx", "paper")] == [61.4, 56.0]
    assert [row.percent for row in marks("pathx", "open")] == [98.63, 92.98]
    assert [row.percent for row in marks("path256", "open")] == [92.2, 63.1]
    groups = [g for g in chain_groups(find_chains([chains])) if g.task == "pathx"]
    table = cost_table("pathx", groups)
    ours = [row for row in table.rows if "This suite" in str(row[0])]
    assert len(ours) == 2  # the stuck sequence chain has no accuracy


def test_a_damaged_view_is_left_out(chains: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pathx-open-s2"
    shutil.copytree(chains / "pathx-open-s2", folder)
    assert read_view(folder / VIEW_FILE) is not None
    (folder / VIEW_FILE).write_bytes(b"no tensors")
    assert read_view(folder / VIEW_FILE) is None
    (part,) = chain_parts(find_chains([tmp_path]))
    assert [p.name for p in part.pictures] == ["chain-pathx-minutes"]


def test_heat_keeps_the_image_where_nobody_looks() -> None:
    image = np.zeros((4, 4))
    image[1, 1] = 255
    picture = heat(image, np.zeros((4, 4)))
    assert picture[0, 0].tolist() == [255, 255, 255] and picture[1, 1].tolist() == [115, 115, 115]
    looked = heat(image, np.eye(4))
    assert looked[2, 2].tolist() == [214, 94, 0] and looked[0, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "change",
    [
        {"stages": "x"},
        {"stages": []},
        {"test": {"correct": 5, "total": 4}},
        {"status": 3},
        {"probes": {"a": 1}},
        {"format": 2},
    ],
)
def test_hostile_chains_are_corrupt_and_nothing_more(change: dict[str, Any], tmp_path: Path) -> None:
    write_chain(tmp_path, "open", 1, 0.9, **change)
    (chain,) = find_chains([tmp_path])
    assert chain.status == "corrupt" and chain.reason
    build_report([tmp_path], tmp_path / "out", now=NOW)
    assert "corrupt" in (tmp_path / "out/index.html").read_text()


def test_a_chain_stopped_among_its_extra_sets_counts(tmp_path: Path) -> None:
    """Its last stage was tested on the whole test split, which is all that a mean is made of."""
    write_chain(tmp_path, "open", 1, 0.99)
    write_chain(tmp_path, "open", 2, 0.98, status="stopped", reason="Time is over.", probes={})
    write_chain(tmp_path, "open", 3, 0.5, status="stopped", reason="Time is over.", test=None)
    build_report([tmp_path], tmp_path / "out", now=NOW)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "2 chains counted, 1 not." in text and "98.50" in text
    assert "pathx-open-s3" in text.split("Chains that are not counted")[1].split("##")[0]
    assert "pathx-open-s2" not in text.split("Chains that are not counted")[1].split("##")[0]
