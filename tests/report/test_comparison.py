"""Against standard attention on the same seeds; FlashAttention's table from two protocols; all tasks in one picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from lra import report
from lra.comparison import TABLE_3, TABLE_3_PROTOCOL, paired, step_speed_up, table_3, whole_rows
from lra.figures import pictures
from lra.report_tables import comparison, overview, section_title
from lra.runs import find_runs
from lra.summary import Section, sections
from tests.report.conftest import write_run

SOURCES = {"text": "official release", "image": "official release", "retrieval": "stand-in made from IMDB (not AAN)"}
CORRECT = {"standard": 1000, "flash": 1010, "block_sparse": 900}


def write_table(root: Path, seeds: tuple[int, ...] = (1, 2)) -> None:
    """Write the runs of FlashAttention's table: standard slower by 4, one accuracy step a seed."""
    for task, protocol in TABLE_3.items():
        for backend, correct in CORRECT.items():
            for seed in seeds:
                write_run(
                    root, f"{task}-{protocol}-{backend}-s{seed}", task=task, protocol=protocol, backend=backend,
                    seed=seed, correct=correct + 10 * seed + (seed if backend == "flash" else 0), total=2000,
                    source=SOURCES.get(task, "generated"), train_s=800.0 if backend == "standard" else 200.0,
                    steady_steps_per_s=5.0 if backend == "standard" else 25.0,
                    peak_memory_bytes=8_000_000_000 if backend == "standard" else 1_000_000_000,
                )  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Section]]:
    root = tmp_path_factory.mktemp("table")
    write_table(root)
    return root, sections(find_runs([root]))


def mixed(found: list[Section]) -> Section:
    section = table_3(found)
    assert section is not None
    return section


def test_the_mix_takes_each_task_from_its_protocol_and_no_stand_in(table: tuple[Path, list[Section]]) -> None:
    section = mixed(table[1])
    assert {g.setting.task: g.protocol for g in section.groups} == {
        "listops": "nystrom", "text": "nystrom", "image": "google", "pathfinder": "nystrom",
    }  # fmt: skip
    assert [s.task for s in section.mean_settings()] == ["listops", "text", "image", "pathfinder"]
    assert section_title(section) == "FlashAttention's Table 3" and section.protocol == TABLE_3_PROTOCOL


def test_without_both_protocols_there_is_no_mix(tmp_path: Path) -> None:
    write_run(tmp_path, "listops-nystrom-flash-s1")
    assert table_3(sections(find_runs([tmp_path]))) is None


def test_differences_are_paired_by_seed(table: tuple[Path, list[Section]]) -> None:
    section = mixed(table[1])
    flash = next(g for g in section.groups if g.method.backend == "flash" and g.setting.task == "image")
    difference = paired(section, flash)
    assert difference is not None and difference.count == 2
    # 11 and 12 of 2,000 more than standard with the same seed.
    assert difference.mean == pytest.approx(11.5 / 2000) and difference.std == pytest.approx(0.5 / 2000 * 2**0.5)
    base = next(g for g in section.groups if g.method.backend == "standard")
    assert paired(section, base) is None
    assert step_speed_up(section, flash) == pytest.approx(5.0) and section.speed_up(flash) == pytest.approx(4.0)


def test_seeds_that_one_side_lacks_are_left_out(tmp_path: Path) -> None:
    for backend, seeds in (("standard", (1, 2)), ("flash", (2, 3))):
        for seed in seeds:
            write_run(tmp_path, f"listops-{backend}-s{seed}", backend=backend, seed=seed, correct=700 + 10 * seed)
    (section,) = sections(find_runs([tmp_path]))
    flash = next(g for g in section.groups if g.method.backend == "flash")
    difference = paired(section, flash)
    assert difference is not None and (difference.count, difference.low) == (1, None)
    assert difference.mean == 0.0


def test_tables_show_speed_by_training_and_by_step_and_the_memory(table: tuple[Path, list[Section]]) -> None:
    section = mixed(table[1])
    text = str(overview(section).rows)
    assert "4.00x" in text and "5.00x" in text
    rows = comparison(section).rows
    assert len(rows) == 4 * 2 and all("8.0x" in str(row) for row in rows)


def test_all_tasks_stand_in_one_picture(table: tuple[Path, list[Section]]) -> None:
    section = mixed(table[1])
    assert [method.backend for method, _ in whole_rows(section)] == ["standard", "flash", "block_sparse"]
    (picture,) = pictures(section, set())
    assert picture.name == "paper-Table-3-all-speed" and picture.task.startswith("All 4 tasks")


def test_the_report_begins_with_the_mix(table: tuple[Path, list[Section]], tmp_path: Path) -> None:
    report.build_report([table[0]], tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.index("## FlashAttention's Table 3") < text.index("## Paper track, google protocol")
    assert "Against standard attention" in text and (tmp_path / "plots" / "paper-Table-3-all-speed.png").exists()
