"""ListOps: nested lists of digits under MIN, MAX, MED and SM; the answer is a digit.

Reads the official TSV files, checking every line by evaluating it again, or has `tasks.generate_listops` draw new
ones. Facts: lra_spec.md sections 1.1 and 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from lra.base import console
from lra.base.errors import DataError
from tasks import splits
from tasks.cache_writer import CacheWriter
from tasks.registry import Task, TaskOptions, register

# The order is fixed here; Google's is that of a Python set and differs from run to run.
TOKEN_NAMES = ("<pad>", "[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789", "<oov>")
PARTS = ("train", "val", "test")
OFFICIAL_COUNTS = {"train": 96_000, "val": 2_000, "test": 2_000}
HEADER = b"Source\tTarget"
MADE_BY = "made_by_lra_suite.json"
_CHUNK_BYTES = 1 << 22
_MAX_LINE_BYTES = 1 << 20
_PROBLEMS = (
    "",
    "the expression does not parse",
    "the expression ends too early",
    "the expression is nested more than 64 deep",
    "something follows the end of the expression",
    "there is no tab between expression and target",
    "the target is not one digit",
    "the target is not the value of the expression",
)


class ListOpsOptions(TaskOptions):
    """Knobs of the generator; the defaults are those of the official data."""

    generator_fields: ClassVar[frozenset[str]] = frozenset(
        {"count", "max_depth", "max_args", "min_length", "max_length", "seed"}
    )

    name: Literal["listops"] = "listops"
    count: int = Field(100_000, ge=3, le=100_000_000)
    max_depth: int = Field(10, ge=1, le=60)
    max_args: int = Field(10, ge=2, le=1_000)
    min_length: int = Field(500, ge=0)
    max_length: int = Field(2_000, ge=2, le=100_000)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> ListOpsOptions:
        if self.min_length + 1 >= self.max_length:
            raise ValueError("min_length < length < max_length leaves no length")
        return self


def part_counts(count: int) -> dict[str, int]:
    """Return how many of `count` examples are train, val and test: 96, 2 and 2 of a hundred."""
    small = max(1, count // 50)
    return {"train": count - 2 * small, "val": small, "test": small}


def evaluate(text: str) -> tuple[np.ndarray, int]:
    """Parse one expression in the official form; return its token bytes (uint8) and its value.

    Raises DataError if it does not parse.
    """
    from tasks import listops_kernels as kernels

    data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    tokens = np.empty(len(data) + 1, np.uint8)
    status, count, value, at = kernels.parse(data, 0, len(data), tokens, 0, np.empty(len(data) + 1, np.int64))
    if status != kernels.OK:
        raise DataError(f"{_PROBLEMS[status]} (byte {at}): {text[:60]!r}.", "See lra_spec: `( ( ( [MAX 1 ) 2 ) ] )`.")
    return tokens[:count].copy(), int(value)


def shuffle_operands(tokens: np.ndarray, bounds: np.ndarray, seed: int) -> None:
    """Put the operands of every operator in random order, in place; MIN, MAX, MED and SM do not mind.

    tokens uint8 holds expressions, number s from bounds[s, 0] to bounds[s, 1]; one that was cut off stays as it is.
    """
    from tasks import listops_kernels as kernels

    longest = int((bounds[:, 1] - bounds[:, 0]).max(initial=0))
    kernels.shuffle_many(tokens, bounds, seed, np.empty(longest, np.uint8), np.empty((3, longest), np.int64))


def write_expression(tokens: np.ndarray) -> bytes:
    """Return the official text of token bytes that `evaluate` or the generator made."""
    from tasks import listops_kernels as kernels

    out = np.empty(10 * len(tokens) + 16, np.uint8)
    return out[: kernels.write_out(tokens, out)].tobytes()


def find_files(source: Path, options: TaskOptions) -> Mapping[str, Path]:
    """Return the three TSV files beneath `source`: the folder itself, a release in either layout, or an archive."""
    if source.is_file():
        return {"archive": source}
    # The release unpacks to a stray outer copy as well; the inner one is meant and looked for first.
    folders = ("lra_release/lra_release/listops-1000", "lra_release/listops-1000", "listops-1000", "listops", "")
    for folder in folders:
        files = {part: source / folder / f"basic_{part}.tsv" for part in PARTS}
        if all(file.is_file() for file in files.values()):
            return files
    raise DataError(
        f"{source} holds no ListOps files (basic_train.tsv, basic_val.tsv, basic_test.tsv).",
        "Name the folder with the three files or the root of the LRA release; without --source they are generated.",
    )


def read_rows(stream: BinaryIO, name: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (tokens uint8 flat, lengths int64, labels uint8) of some rows at a time, every target checked.

    Raises DataError with `name` and the line number at the first row that is not as it should be.
    """
    header = stream.readline(_MAX_LINE_BYTES)
    if header.rstrip(b"\r\n") != HEADER:
        raise DataError(
            f"{name}, line 1: the header is not Source<tab>Target.", "Use the official file, or generate the data."
        )
    line, rest = 2, b""
    while True:
        block = stream.read(_CHUNK_BYTES)
        data = rest + block
        cut = data.rfind(b"\n") + 1 if block else len(data)
        data, rest = data[:cut], data[cut:]
        if len(rest) > _MAX_LINE_BYTES:
            raise DataError(f"{name}, line {line + data.count(10)}: longer than 1 MB.", "Get the file again.")
        if data:
            rows = _parse_block(data if data.endswith(b"\n") else data + b"\n", name, line)
            line += len(rows[1])
            yield rows
        if not block:
            return


def _parse_block(data: bytes, name: str, line: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from tasks import listops_kernels as kernels

    num_lines = data.count(b"\n")
    tokens = np.empty(len(data), np.uint8)
    lengths = np.empty(num_lines, np.int64)
    labels = np.empty(num_lines, np.uint8)
    status, rows, written = kernels.parse_rows(np.frombuffer(data, np.uint8), tokens, lengths, labels)
    if status != kernels.OK:
        raise DataError(
            f"{name}, line {line + rows}: {_PROBLEMS[status]}.", "Get the file again, or generate the data."
        )
    return tokens[:written], lengths, labels


def build(options: TaskOptions, source: Path | None, writer: CacheWriter) -> None:
    """Fill the cache from the official files, or with drawn examples if `source` is None."""
    assert isinstance(options, ListOpsOptions)
    if source is None:
        from tasks import generate_listops

        generate_listops.fill(writer, options)
    else:
        _read(find_files(source, options), writer)


def _read(files: Mapping[str, Path], writer: CacheWriter) -> None:
    if "archive" in files:
        from tasks.unpack import extract

        wanted = {f"basic_{part}.tsv": part for part in PARTS}
        files = extract(files["archive"], wanted, writer.scratch(), under="listops")
    total = sum(file.stat().st_size for file in files.values())
    writer.need_bytes(total // 4)
    with console.progress(total, "ListOps: reading and evaluating", "bytes") as bar:
        for part, file in files.items():
            writer.start_part(part)
            with open(file, "rb") as stream:
                before = 0
                for tokens, lengths, labels in read_rows(stream, str(file)):
                    writer.append_packed(tokens, lengths, labels)
                    bar.advance(stream.tell() - before)
                    before = stream.tell()
    if (next(iter(files.values())).parent / MADE_BY).is_file():
        writer.source = "generated"
    counts = {part: stop - start for part, (start, stop) in writer.parts.items()}
    writer.note("official_counts", counts == OFFICIAL_COUNTS)


def write_release(options: TaskOptions, folder: Path) -> Path:
    """Generate the examples as the official basic_{train,val,test}.tsv; return their folder."""
    from tasks.generate_listops import write_tsv

    assert isinstance(options, ListOpsOptions)
    counts = part_counts(options.count)
    place = folder / "listops-1000"
    write_tsv(
        place,
        num_train=counts["train"],
        num_val=counts["val"],
        num_test=counts["test"],
        **options.model_dump(exclude={"name", "count"}),
    )
    return place


_CARD = """\
- **What.** A nested list of digits under MIN, MAX, MED (median, cut off to a whole number) and SM (sum modulo 10);
  the answer is its value, a digit. 4 operators, the closing bracket and 10 digits are the 15 token types; id 0 is
  padding and 16 stands for unknown tokens (Google's vocabulary order is that of a Python set and changes from run
  to run; ours is fixed).
- **Source.** `listops-1000/basic_{train,val,test}.tsv` of the LRA release, or our generator, which has the law of
  the official one (it has no seed, so its very examples cannot be drawn again). Every target is checked by
  evaluation.
- **Licence.** The official generator's code is Apache-2.0; the release names no licence for the data. Ours:
  Apache-2.0.
- **Counts.** 96,000 / 2,000 / 2,000.
- **Lengths.** 501 to 1,999 tokens without the structural parentheses, mean about 1,040; nothing is truncated at
  2,000.
- **Chance.** About 17% (the commonest digit). Reading the root operator alone gives about 37%.
- **Quirks.** Results from before March 2021 dropped all brackets and are invalid.
- **Published.** Transformer: 36.37 (LRA), 37.10 (Nystromformer), 36.0 and with FlashAttention 37.6
  (FlashAttention).
- **Citation.** Nangia and Bowman, ListOps, NAACL SRW 2018; Tay et al., Long Range Arena, ICLR 2021.
"""

register(
    Task(
        name="listops",
        title="ListOps",
        num_classes=10,
        vocab_size=17,
        token_shift=0,
        max_length=2000,
        options=ListOpsOptions,
        split_rules={"official": splits.official},
        build=build,
        find_files=find_files,
        write_release=write_release,
        generated=True,
        shuffle=shuffle_operands,
        class_names=tuple("0123456789"),
        token_names=TOKEN_NAMES,
        card=_CARD,
    )
)
