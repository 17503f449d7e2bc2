"""The floors of the house: an import goes down or stays, never up; few modules write files; --help needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Lowest floor first. A module may import its own floor and those below.
FLOORS = [
    ["lra.base"],
    ["tasks", "attention_kernels"],
    ["lra.attention", "lra.config", "lra.recipes", "lra.weighing", "lra.packing", "lra.statistics"],
    ["lra.model", "lra.positions", "lra.pooling", "lra.optim", "lra.muon", "lra.ema", "lra.checkpoint", "lra.run_dir",
     "lra.preempt", "lra.distributed", "lra.memory", "lra.graphs", "lra.objective", "lra.learner", "lra.transfer",
     "lra.compiling", "lra.restarts", "lra.feed", "lra.mixers"],
    ["lra.train", "lra.step", "lra.train_log", "lra.evaluate"],
    ["lra.experiment", "lra.board", "lra.report", "lra.plots", "lra.figures", "lra.pictures", "lra.tables",
     "lra.published", "lra.runs", "lra.records", "lra.report_tables", "lra.run_tables", "lra.summary", "lra.page",
     "lra.sweep_jobs", "lra.sweep_marks", "lra.sweep_pool", "lra.sweep_slurm", "lra.sweep_view", "lra.sweep",
     "lra.chain", "lra.chain_plan", "lra.export", "lra.robustness", "lra.reproduce", "lra.attention_view",
     "lra.chain_records", "lra.chain_tables", "lra.chain_figures", "lra.chain_page", "lra.rivals", "lra.json_values",
     "lra.bench_cases", "lra.bench_padded", "lra.bench_worker", "lra.bench_report", "lra.bench_training",
     "lra.comparison"],
    ["lra.commands"],
    ["lra.cli"],
]  # fmt: skip
# attention.py finds the mixers, which are built on it; nothing else looks up.
EXCEPTIONS = {("lra.attention", "lra.mixers")}


def sources() -> list[Path]:
    return sorted(p for room in ("lra", "tasks", "attention_kernels") for p in (ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(module: str) -> int | None:
    if module == "lra":
        return 0
    found = [i for i, rooms in enumerate(FLOORS) for r in rooms if module == r or module.startswith(r + ".")]
    return found[0] if found else None


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            # `from lra import checkpoint` imports lra.checkpoint.
            names |= {node.module} if node.module != "lra" else {f"lra.{alias.name}" for alias in node.names}
    return {n for n in names if n.split(".")[0] in ("lra", "tasks", "attention_kernels")}


def test_every_module_stands_on_a_floor_and_imports_none_above() -> None:
    wrong = []
    for path in sources():
        name = module_name(path)
        here = floor(name)
        assert here is not None, f"{name} stands on no floor: add it to FLOORS"
        for imported in imports(path):
            there = floor(imported)
            if there is not None and there > here and (name, imported) not in EXCEPTIONS:
                wrong.append(f"{name} imports {imported}")
    assert wrong == []


def test_attention_kernels_stand_alone_and_tasks_know_no_experiment() -> None:
    for path in sources():
        for imported in imports(path):
            if path.is_relative_to(ROOT / "attention_kernels"):
                assert imported.startswith("attention_kernels"), f"{path} imports {imported}"
            if path.is_relative_to(ROOT / "tasks"):
                assert imported.startswith(("tasks", "lra.base")), f"{path} imports {imported}"


def test_train_names_no_task_and_no_backend_and_report_needs_no_torch() -> None:
    text = (ROOT / "lra/train.py").read_text()
    for word in ("listops", "retrieval", "pathfinder", "flash", "sdpa", "block_sparse"):
        assert word not in text.lower()
    code = "import sys, lra.report, lra.summary; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_nobody_unpickles_executes_or_shells_out() -> None:
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "torch.load"), path
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert keywords.get("shell") != "True" and keywords.get("allow_pickle") != "True", path


def test_files_and_functions_stay_short() -> None:
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.body[0].lineno + 1
                assert lines <= 60, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["nonsense"]])
def test_help_and_misspellings_answer_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom lra.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'rich', 'pydantic'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
