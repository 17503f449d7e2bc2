"""The command line. Heavy imports stand inside the commands, so that `--help` answers at once.

Exit codes: 0 done; 1 our bug; 2 the user's input or environment; 3 non-finite loss; 4 disk full; 5 out of memory;
75 stopped by a signal or --minutes, resumable.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lra.base.errors import EXIT_BUG, EXIT_DONE, EXIT_USER, LraError


class Parser(argparse.ArgumentParser):
    """Says in one sentence what is wrong and in one what to do, and leaves with 2."""

    def error(self, message: str) -> NoReturn:
        """Print cause and remedy, exit with 2."""
        if message.startswith("argument COMMAND: invalid choice: "):
            wrong = message.split("invalid choice: ")[1].split("'")[1]
            close = difflib.get_close_matches(wrong, COMMANDS, n=1)
            message = f"There is no command {wrong!r}{f'; the nearest is {close[0]!r}' if close else ''}."
        message = message.replace("the following arguments are required", "Missing").replace(", key=value", "")
        print(f"error: {message.rstrip(chr(46))}.\n  Try: {self.prog} --help", file=sys.stderr)
        raise SystemExit(EXIT_USER)


def minutes(text: str) -> float:
    """Read the value of --minutes."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time to work")
    return value


def make_parser() -> Parser:
    """Return the parser of all commands."""
    parser = Parser(prog="run_lra.py", description="Long-Range Arena with exact attention.")
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks of the user's errors too")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    p = command("prepare", "Generate, convert or download a task's data into the cache, and verify it.")
    p.add_argument("task", help="a task (listops), or a recipe (listops/smoke) whose task options are used")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="options of the task's generator")
    p.add_argument("--source", type=Path, help="folder or archive with the task's official files")
    p.add_argument("--out", type=Path, default=Path("data"), help="folder of the caches (default: data)")
    p.add_argument("--release", type=Path, help="write generated data there as the official files, and no cache")
    p.add_argument("--count", type=int, help="number of examples to generate in all")
    p.add_argument("--seed", type=int, help="seed of the generator")
    p.add_argument("--card", action="store_true", help="print the data card and do nothing else")
    p.add_argument("--verify", action="store_true", help="check every byte of an existing cache against its hashes")

    command("list", "Name the tasks, recipes and attention backends.")

    p = command("train", "Train a recipe, test it, write runs/<name>/.")
    p.add_argument("recipe", nargs="?", help="task/protocol, or a path to a YAML file")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="for example attention=flash train.steps=100")
    p.add_argument("--minutes", type=minutes, help="stop cleanly at a checkpoint after so many minutes (exit code 75)")
    p.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    p.add_argument("--dry-run", action="store_true", help="print config, parameters, memory estimate; train nothing")

    p = command("eval", "Test a run's checkpoint, also under another attention backend.")
    p.add_argument("run", type=Path, help="folder of the run")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="for example attention=standard")
    p.add_argument("--minutes", type=minutes, help="stop cleanly after so many minutes; the next call goes on")
    p.add_argument("--checkpoint", choices=["best_val", "last"], help="default: the recipe's choice")
    p.add_argument("--predictions", action="store_true", help="write one line an example")

    p = command("sweep", "Train every job of a sweep's file on all GPUs, or on Slurm; the next call goes on.")
    add_sweep_arguments(p)

    p = command("reproduce", "Train a chain of stages to Path-X or Path-256, test it; the next call goes on.")
    add_reproduce_arguments(p)

    p = command("report", "Turn run folders into Markdown, CSV, LaTeX and one HTML page.")
    p.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of runs")
    p.add_argument("--out", type=Path, required=True, help="folder of the report")

    p = command("show", "Draw examples of a task, or a recipe's block layout.")
    p.add_argument("what", help="a task, or `layout`")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="task options; layout: layout= block= length=")
    p.add_argument("--out", type=Path, help="picture file (default: <what>.png)")
    p.add_argument("--data", type=Path, default=Path("data"), help="folder of the caches (default: data)")

    p = command("bench", "Time attention or training steps against every peer, or count bytes through GPU memory.")
    p.add_argument("what", choices=["attention", "training", "io"], help="io: bytes, by Nsight Compute")
    p.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the benchmark (bench attention --help)")

    command("doctor", "Say what this machine has and what will run on it.")
    return parser


def add_sweep_arguments(p: argparse.ArgumentParser) -> None:
    """Give `sweep` its arguments."""
    p.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="for example configs/sweeps/table3.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="for every job")
    p.add_argument("--minutes", type=minutes, help="stop all jobs cleanly in time; with --slurm a job's time limit")
    p.add_argument("--job-minutes", type=minutes, help="stop a job that takes longer in one call")
    p.add_argument("--slots", type=int, metavar="N", help="jobs at once (default: one a GPU; without a GPU one)")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the runs (default: runs/<name>)")
    p.add_argument("--retry-failed", action="store_true", help="try jobs again that failed")
    p.add_argument("--slurm", action="store_true", help="submit the jobs as a Slurm array through submitit")
    p.add_argument("--dry-run", action="store_true", help="print jobs, states and memory estimates; run nothing")


def add_reproduce_arguments(p: argparse.ArgumentParser) -> None:
    """Give `reproduce` its arguments."""
    p.add_argument("task", choices=["pathx", "path256"])
    p.add_argument("overrides", nargs="*", metavar="key=value", help="for every stage, or STAGE.key=value for one")
    p.add_argument("--track", choices=["paper", "sequence", "open"], default="open", help="what is allowed (docs)")
    p.add_argument("--seed", type=int, default=1, help="seed of every stage (default: 1)")
    p.add_argument("--minutes", type=minutes, help="stop cleanly at a checkpoint after so many minutes (exit code 75)")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the chain (default: runs/<name>-s<seed>)")
    p.add_argument("--dry-run", action="store_true", help="print the stages, parameters and memory; train nothing")


COMMANDS = ("prepare", "list", "train", "eval", "sweep", "reproduce", "report", "show", "bench", "doctor")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and leave with its exit code."""
    # Must be set before CUDA starts; only deterministic runs depend on it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parser = make_parser()
    args, left = parser.parse_known_args(arguments)
    if args.command is None:
        parser.error("No command was given.")
    # argparse takes no positional behind an option: `train X --dry-run a=b` leaves a=b over.
    overrides = [text for text in left if "=" in text and not text.startswith("-")]
    if len(overrides) < len(left) or (left and not hasattr(args, "overrides")):
        parser.error(f"Not understood: {' '.join(text for text in left if text not in overrides) or left[0]}.")
    if overrides:
        args.overrides = args.overrides + overrides
    from lra import commands

    try:
        getattr(commands, f"{args.command}_command")(args)
    except LraError as e:
        if args.debug:
            raise
        print(f"{'' if e.exit_code == 75 else 'error: '}{e.cause}", file=sys.stderr)
        if e.remedy:
            print(f"  {e.remedy}", file=sys.stderr)
        raise SystemExit(e.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output left (`| head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_DONE) from None
    except Exception:
        print(f"This is a bug of the suite (exit code {EXIT_BUG}); please report the traceback.", file=sys.stderr)
        raise
    raise SystemExit(EXIT_DONE)
