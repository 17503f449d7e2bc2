"""What each command of the command line does: arguments in, files and text out."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lra.base.console import info
from lra.base.errors import ConfigError
from lra.config import RunConfig
from lra.preempt import raise_on_signals
from lra.recipes import CONFIGS, dump_config, load_config, make_config, nearest, parse_override, recipe_names
from tasks import registry
from tasks.registry import Task, TaskOptions


def prepare_command(args: argparse.Namespace) -> None:
    """Build (or verify) a task's cache, or print its card."""
    from tasks.cache import build_cache, find_cache, open_cache, verify
    from tasks.card import card

    task, options = task_and_options(args.task, args.overrides, {"count": args.count, "seed": args.seed})
    if args.card:
        print(card(task.name, args.out))
        return
    if args.verify:
        path = find_cache(task, options, args.out)
        if path is None:
            raise ConfigError(f"There is no cache of {task.name} in {args.out}.", "Run prepare without --verify.")
        verify(path)
        print(f"{path}: every byte is as written.")
        return
    with raise_on_signals("Give the same command again: what is finished is kept."):
        if args.release is not None:
            print(write_release(task, options, args.source, args.release))
            return
        path = build_cache(task, options, args.source, args.out)
    cache = open_cache(path)
    counts = ", ".join(f"{name} {stop - start:,}" for name, (start, stop) in cache.parts.items())
    print(f"{task.name}: {cache.num_examples:,} examples ({counts}) in {path}")


def write_release(task: Task, options: TaskOptions, source: Path | None, folder: Path) -> Path:
    """Write generated data as the official files; return their folder."""
    if task.write_release is None:
        raise ConfigError(f"{task.name} is not generated, so --release has nothing to write.", "Leave it out.")
    if source is not None:
        raise ConfigError("--release writes generated data and --source reads files.", "Give one of the two.")
    return task.write_release(options, folder)


def task_and_options(name: str, overrides: list[str], extra: dict[str, Any]) -> tuple[Task, TaskOptions]:
    """Return the task and its options from a task's name or a recipe's, overrides and command-line values."""
    extra = {key: value for key, value in extra.items() if value is not None}
    if "/" in name or name.endswith((".yaml", ".yml")):
        config = load_config(name, [f"task.{text}" for text in overrides])
        values = config.task.model_dump()
    else:
        registry.get(name)
        values = {"name": name}
        for text in overrides:
            path, value = parse_override(text)
            values[".".join(map(str, path))] = value
    task = registry.get(values["name"])
    known = [field for field in task.options.model_fields if field != "name"]
    for key in [*values, *extra]:
        if key != "name" and key not in known:
            near = nearest(key, known)
            raise ConfigError(f"{task.name} has no option {key!r}{near}.", f"It has: {', '.join(known) or 'none'}.")
    try:
        return task, task.options.model_validate(values | extra)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        # A union's branches follow the field's name in pydantic's path; the name is what the user wrote.
        where = str(error["loc"][0]) if error["loc"] else "options"
        raise ConfigError(f"{task.name}: {where}: {error['msg']}.", f"Options: {', '.join(known) or 'none'}.") from e


def list_command(args: argparse.Namespace) -> None:
    """Print tasks, recipes and backends."""
    from lra.attention import backend_names

    print("Tasks")
    for name in registry.names():
        task = registry.get(name)
        rules = ", ".join(task.split_rules)
        print(f"  {name:12} {task.title} ({task.num_classes} classes, {task.max_length:,} tokens; splits: {rules})")
    print("Recipes")
    for name in recipe_names():
        config = load_config(name)
        aim = f"aims at {100 * config.expected.accuracy:.1f}% ({config.expected.source})" if config.expected else ""
        print(f"  {name:22} {config.track:9} {config.train.steps:>7,} steps  {aim}".rstrip())
    print("Sweeps")
    for path in sorted((CONFIGS / "sweeps").glob("*.yaml")):
        print(f"  configs/sweeps/{path.name}")
    print("Attention backends")
    print("  " + ", ".join(backend_names()))


def train_command(args: argparse.Namespace) -> None:
    """Train a recipe or go on with a run."""
    overrides, recipe = args.overrides, args.recipe
    if args.resume is not None:
        # With --resume the recipe is the run's own, so a first key=value is an override.
        if recipe and "=" not in recipe:
            raise ConfigError("A resumed run has its recipe already.", f"Leave {recipe!r} out.")
        overrides = ([recipe] if recipe else []) + overrides
        config = run_config(args.resume, overrides)
    elif recipe is None:
        raise ConfigError("No recipe was given.", "`run_lra.py list` names them; try: train listops/smoke.")
    else:
        config = load_config(recipe, overrides)
    from lra import experiment

    if args.dry_run:
        print(dump_config(config))
        print(experiment.dry_run(config))
        return
    result = experiment.run_training(config, args.minutes, args.resume)
    if is_main_process():
        print_result(result, args.resume or Path(config.runs_folder) / config.run_name)


def run_config(run: Path, overrides: list[str]) -> RunConfig:
    """Return a run's own config with overrides."""
    from lra.run_dir import RunDir

    values = RunDir(run).config().model_dump(mode="json")
    return make_config(values, overrides, str(run / "config.yaml"))


def is_main_process() -> bool:
    """Whether this process speaks: under torchrun only the first does."""
    return os.environ.get("RANK", "0") == "0"


def print_result(result: dict[str, Any], folder: Path) -> None:
    """Print the tested accuracies in a line each."""
    sizes = f"{result['num_parameters']:,} parameters, {result['step']:,} steps"
    print(f"{result['name']}: {sizes}, split {result['split_rule']}")
    for name, test in result["test"].items():
        low, high = test["interval"]
        print(
            f"  test accuracy, {name} checkpoint (step {test['step']:,}): {100 * test['accuracy']:.2f}% "
            f"[{100 * low:.2f}, {100 * high:.2f}] ({test['correct']:,} of {test['total']:,})"
        )
    if result["expected"]:
        print(f"  published: {100 * result['expected']['accuracy']:.2f}% ({result['expected']['source']})")
    print(f"  {folder / 'result.json'}")


def eval_command(args: argparse.Namespace) -> None:
    """Test a run's checkpoint."""
    from lra.experiment import run_evaluation

    config = run_config(args.run, args.overrides)
    which = args.checkpoint or config.train.checkpoint_choice
    result = run_evaluation(args.run, config, args.minutes, which, args.predictions)
    if is_main_process():
        print(json.dumps(result, indent=2))


def sweep_command(args: argparse.Namespace) -> None:
    """Run a sweep's jobs, submit them, or print them."""
    from lra import sweep

    if args.slots is not None and args.slots < 1:
        raise ConfigError(f"--slots {args.slots} leaves no place for a job.", "Give 1 or more.")
    options = sweep.Options(args.overrides, args.out, args.minutes, args.job_minutes, args.slots, args.retry_failed)
    if args.dry_run:
        print(sweep.dry_run(args.sweep, options))
    elif args.slurm:
        sweep.submit_sweep(args.sweep, options)
    else:
        sweep.run_sweep(args.sweep, options)


def reproduce_command(args: argparse.Namespace) -> None:
    """Run a chain of stages, or print it."""
    from lra.chain import chain_path, load_chain

    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed} is no seed.", "Give 0 or more.")
    chain = load_chain(chain_path(args.task, args.track), args.overrides, args.seed, args.out, args.task)
    if args.dry_run:
        import torch

        from lra.chain_plan import plan

        print(plan(chain, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
        return
    from lra.reproduce import run_chain

    result = run_chain(chain, args.minutes)
    if is_main_process():
        print_chain(result, chain.folder)


def print_chain(result: dict[str, Any], folder: Path) -> None:
    """Print a finished chain's accuracies and cost."""
    for what, scores in [("test", result["test"]), *result["probes"].items()]:
        low, high = scores["interval"]
        print(
            f"  {what:22} {100 * scores['accuracy']:6.2f}% [{100 * low:.2f}, {100 * high:.2f}] of {scores['total']:,}"
        )
    spent = ", ".join(f"{kind} {value:.1f}" for kind, value in result["gpu_minutes"].items())
    print(f"  GPU minutes: {spent}; {result['restarts']} restarts")
    print(f"  {folder / 'chain.json'}")


def report_command(args: argparse.Namespace) -> None:
    """Write the report of runs."""
    from lra.report import build_report

    for path in build_report(args.runs, args.out):
        print(path)


def show_command(args: argparse.Namespace) -> None:
    """Draw a task's examples or a layout."""
    from lra import pictures

    out = args.out or Path(f"{args.what}.png")
    if args.what == "layout":
        pictures.save(layout_figure(args.overrides), out)
    else:
        task, options = task_and_options(args.what, args.overrides, {})
        if task.draw is not None:
            if out.suffix != ".png":
                raise ConfigError(f"{out} does not end in .png.", f"{task.name} is drawn as PNG.")
            task.draw(options, out)
        else:
            pictures.save(task_figure(task, options, args.data), out)
    print(out)


def layout_figure(overrides: list[str]) -> Any:
    """Return the picture of a block layout given as layout= block= length= window= num_global= stride= end_global=."""
    from lra.attention import make_layout
    from lra.config import AttentionConfig
    from lra.pictures import layout_picture

    values: dict[str, Any] = {"backend": "block_sparse", "layout": "butterfly", "length": 1024}
    for text in overrides:
        path, value = parse_override(text)
        values[".".join(map(str, path))] = value
    length = values.pop("length")
    known = [*(f for f in AttentionConfig.model_fields if f not in ("backend", "deterministic")), "length"]
    if not isinstance(length, int) or not 1 <= length <= 1 << 17:
        raise ConfigError(f"length={length} is no number of tokens.", "Give one from 1 to 131072.")
    try:
        config = AttentionConfig.model_validate(values)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        where = ".".join(map(str, error["loc"]))
        raise ConfigError(f"layout: {where}: {error['msg']}.", f"It takes {', '.join(known)}.") from e
    layout = make_layout(config, length)
    title = f"{config.layout}, blocks of {config.block or 64}, {length:,} tokens"
    return layout_picture(layout.to_mask().numpy(), title)


def task_figure(task: Task, options: TaskOptions, data: Path) -> Any:
    """Return a picture of a task's first training examples, from its cache."""
    from lra.board import decoder
    from lra.pictures import example_grid
    from tasks.cache import find_cache, open_cache

    path = find_cache(task, options, data)
    if path is None:
        raise ConfigError(f"There is no cache of {task.name} in {data}.", f"Run: run_lra.py prepare {task.name}")
    cache = open_cache(path)
    chosen = range(min(12, cache.num_examples))
    examples = [cache.example(i)[0] for i in chosen]
    labels = [int(cache.labels[i]) for i in chosen]
    return example_grid(examples, labels, None, grid=task.grid, decode=decoder(task), title=task.title)


def bench_command(args: argparse.Namespace) -> None:
    """Run a benchmark with its own options."""
    prog = f"run_lra.py bench {args.what}"
    if args.what == "io":
        from attention_kernels import bench_io

        bench_io.main(args.arguments, prog)
    elif args.what == "training":
        from lra import bench_training

        bench_training.main(args.arguments, prog)
    else:
        from attention_kernels import bench

        bench.main(args.arguments, prog)


def doctor_command(args: argparse.Namespace) -> None:
    """Print versions, GPUs and what would run."""
    import torch

    import attention_kernels

    print(f"python     {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    print(f"torch      {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    if not torch.cuda.is_available():
        print("GPU        none: everything runs on the CPU")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f"GPU {i}      {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = torch.zeros(1, 16, 1, 32, dtype=torch.bfloat16, device=device)
    reason = attention_kernels.why_not(q, q, q)
    print(f"attention  {'CUDA kernels' if reason is None else f'tiled PyTorch: {reason}'}")
    info(f"recipes    {len(recipe_names())}; tasks {len(registry.names())}")
