"""Reading stories: from files of several types, and from data/raw, which step 1 makes of them."""

import contextlib
import csv
import glob
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

from tqdm import tqdm

from model.files import read_json, shown
from model.settings import REPO, UserError, require

END_OF_TEXT = "<|endoftext|>"
FILE_TYPES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
SPLITS = ("train", "validation")
BATCH = 1_000  # stories read from a table at once
BLOCK = 1 << 20  # characters of a JSON file read at once


def progress(**options: object) -> tqdm:
    """A progress bar with an ETA: from the first second on, and only where someone can see it."""
    return tqdm(disable=None, delay=1, leave=False, unit_scale=True, dynamic_ncols=True, **options)


def next_step(script: str, settings: SimpleNamespace) -> str:
    """The command to run next, as it would be typed here."""
    command = f"next: python {shlex.quote(shown(REPO / script))}"
    if "data_dir" in settings.given:
        command += f" --data-dir {shlex.quote(shown(settings.data_dir))}"
    return command


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return textwrap.shorten(lines[0], 300, placeholder="...").rstrip(".")


def quiet_datasets(datasets: object) -> None:
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is raised too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


# Files


def find_files(word: str, generated: Path) -> list[Path] | None:
    """The story files that a file, folder or glob stands for; None where the word is no path at all.

    In a folder, hidden files, files of other types and what the scripts write below `generated` do
    not count. Raises UserError where the word is a path but leads to no story file.
    """
    require(bool(word.strip()), "an empty name is no source of stories")
    path = Path(word).expanduser()
    ours = [generated / name for name in ("raw", "tokenizer", "processed")]
    if path.is_dir():
        files = [file for file in sorted(path.absolute().rglob("*")) if file.suffix.lower() in FILE_TYPES]
        files = [file for file in files if not any(file.is_relative_to(folder) for folder in ours)]
        inner = len(path.absolute().parts)
        files = [file for file in files if not any(part.startswith(".") for part in file.parts[inner:])]
    elif path.exists():
        files = [path.absolute()]
    elif any(mark in word for mark in "*?["):
        files = [Path(name).absolute() for name in sorted(glob.glob(str(path), recursive=True))]
    elif looks_like_path(word):
        raise UserError(f"there is no file or folder {word}")
    else:
        return None
    files = [file for file in files if not file.is_dir()]
    require(bool(files), f"{word} holds no story files ({', '.join(FILE_TYPES)})")
    for file in files:
        known = file.suffix.lower() in FILE_TYPES
        require(known, f"{shown(file)} is not a known type of story file: {', '.join(FILE_TYPES)} are")
    return files


def looks_like_path(word: str) -> bool:
    """Whether a word is more likely a path with a slip in it than the name of a data set, `who/what`."""
    slashes = word.count("/")
    odd = "\\" in word or slashes > 1 or word.startswith((".", "~", "/")) or word.endswith("/")
    return odd or Path(word).suffix.lower() in FILE_TYPES


def read_file(path: Path, column: str) -> Iterator[str]:
    """The stories in a file, one at a time. Raises UserError naming the file and the place in it."""
    read = {
        ".txt": text_rows,
        ".jsonl": json_lines,
        ".json": json_rows,
        ".csv": csv_rows,
        ".parquet": parquet_rows,
    }
    with progress(total=path.stat().st_size, unit="B", desc=path.name) as bar:
        for place, row in read[path.suffix.lower()](path, column, bar):
            where = f"{shown(path)} {place}"
            if isinstance(row, dict):
                require_column(column, row, where)
                row = row[column]
            if row is None:
                row = ""
            require(isinstance(row, str), f"{where}: a story is text, not {type(row).__name__}")
            try:
                row.encode()
            except UnicodeEncodeError:  # JSON can spell half a character, such as "\ud83d"
                raise UserError(
                    f"{where}: the story holds half of a surrogate pair, which is no character"
                ) from None
            yield row


def require_column(column: str, columns: object, where: str) -> None:
    names = ", ".join(map(str, columns)) or "no columns"
    require(
        column in columns, f"{where} has no column {column!r}: it has {names} (--text-column chooses one)"
    )


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A UTF-8 file, without its byte order mark. Raises UserError naming the first line that is not UTF-8."""
    with path.open(encoding="utf-8-sig", newline=newline) as file:
        try:
            yield file
        except UnicodeDecodeError:
            pass
        else:
            return
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        bad = next(number for number, line in enumerate(file, 1) if re.search("[\udc80-\udcff]", line))
    raise UserError(f"{shown(path)} line {bad} is not UTF-8 text: save the file as UTF-8")


def text_rows(path: Path, column: str, bar: tqdm) -> Iterator[tuple[str, str]]:
    """Stories between lines `<|endoftext|>`, or between blank lines in a file that has no such line."""
    with open_text(path) as file:
        separator = END_OF_TEXT if any(line.strip() == END_OF_TEXT for line in file) else ""
    with open_text(path) as file:
        story = []
        for line in file:
            bar.update(len(line))
            if line.strip() != separator:
                story.append(line)
            elif story or separator:  # several blank lines are one boundary, not an empty story
                yield "", "".join(story)
                story = []
        if story:
            yield "", "".join(story)


def json_lines(path: Path, column: str, bar: tqdm) -> Iterator[tuple[str, object]]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            bar.update(len(line))
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    reason = getattr(error, "msg", error)
                    raise UserError(f"{shown(path)} line {number} is not JSON: {reason}") from None
                yield f"line {number}", row


def json_rows(path: Path, column: str, bar: tqdm) -> Iterator[tuple[str, object]]:
    """A list of objects or texts, {"data": [...]}, {column: [...]}, or JSON lines under the wrong name."""
    with open_text(path) as file:
        line = 1
        while (start := file.read(1)).isspace():
            line += start == "\n"
        if start == "[":
            yield from json_array(path, file, line, bar)
            return
    with open_text(path) as file:
        filled = (line for line in file if line.strip())
        first, second = next(filled, ""), next(filled, "")
    if second and first.rstrip().endswith("}"):
        yield from json_lines(path, column, bar)
        return
    with open_text(path) as file:
        try:
            table = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"{shown(path)} line {error.lineno} is not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{shown(path)} is not JSON: {error}") from None
    rows = [table]
    if isinstance(table, dict) and isinstance(table.get(column), dict):  # as pandas writes a column
        rows = list(table[column].values())
    elif isinstance(table, dict):
        rows = next((table[name] for name in (column, "data") if isinstance(table.get(name), list)), rows)
    for number, row in enumerate(rows, 1):
        yield f"item {number}", row


def json_array(path: Path, file: TextIO, line: int, bar: tqdm) -> Iterator[tuple[str, object]]:
    """The elements of a JSON array, without reading all of it into memory; `file` is just past its "["."""
    decoder, blank = json.JSONDecoder(), re.compile(r"\s*")
    text, position, first = "", 0, True
    while True:
        start = blank.match(text, position).end()
        try:
            if text[start : start + 1] == "]":
                break
            if not first:
                if text[start : start + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, start)
                start = blank.match(text, start + 1).end()
            row, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:  # the element may go on beyond what is read so far
            if not (block := file.read(max(BLOCK, len(text)))):
                line += text.count("\n", position, getattr(error, "pos", position))
                reason = getattr(error, "msg", error)
                raise UserError(f"{shown(path)} line {line} is not JSON: {reason}") from None
            bar.update(len(block))
            text, position = text[position:] + block, 0
            continue
        line += text.count("\n", position, start)
        yield f"line {line}", row
        line += text.count("\n", start, end)
        position, first = end, False
    rest = text[start + 1 :] + file.read(BLOCK)
    line += text.count("\n", position, start)
    require(not rest.strip(), f"{shown(path)} line {line} is not JSON: there is more after the list's end")


def csv_rows(path: Path, column: str, bar: tqdm) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(2**31 - 1)  # a story may be longer than the 131,072 characters of the default

    def counted(file: TextIO) -> Iterator[str]:
        for line in file:
            bar.update(len(line))
            yield line

    with open_text(path, newline="") as file:
        reader = csv.reader(counted(file), strict=True)
        try:
            names = next(reader, [column])
            require_column(column, names, f"{shown(path)} line 1")
            index = names.index(column)
            for row in reader:
                yield f"line {reader.line_num}", row[index] if index < len(row) else ""
        except csv.Error as error:
            raise UserError(f"{shown(path)} line {reader.line_num} is not CSV: {error}") from None


def parquet_rows(path: Path, column: str, bar: tqdm) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_column(column, file.schema_arrow.names, shown(path))
            share = bar.total / max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(BATCH, columns=[column]):
                bar.update(share * len(batch))
                for row in batch.column(0).to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown(path)} is not a readable parquet file: {first_line(error)}") from None


# data/raw


def read_manifest(data_dir: Path) -> dict:
    """What step 1 wrote about data/raw. Raises UserError where there is nothing, or not that."""
    path, command = data_dir / "raw" / "manifest.json", shown(REPO / "data" / "ingestion.py")
    manifest = read_json(path)
    require(bool(manifest), f"no raw data yet in {shown(path.parent)}: run: python {command}")
    try:
        whole = all({"stories", "bytes", "sha256"} <= set(manifest["splits"][split]) for split in SPLITS)
    except (KeyError, TypeError):
        whole = False
    require(whole, f"{shown(path)} is damaged: delete {shown(path.parent)} and run: python {command}")
    return manifest


def open_raw(data_dir: Path, split: str, manifest: dict) -> object:
    """A split of data/raw as a memory-mapped datasets.Dataset with the one column "text"."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets

    quiet_datasets(datasets)
    folder = data_dir / "raw" / split
    try:
        dataset = datasets.load_from_disk(str(folder))
        whole = len(dataset) == manifest["splits"][split]["stories"] and dataset.column_names == ["text"]
    except Exception:  # a missing or damaged file, each kind in its own exception
        whole = False
    require(
        whole, f"{shown(folder)} is damaged: delete {shown(folder.parent)} and run data/ingestion.py again"
    )
    return dataset


def raw_batches(dataset: object, size: int = BATCH) -> Iterator[list[str]]:
    """The stories of a split, in order, as lists."""
    for table in dataset.with_format("arrow").iter(size):
        yield table.column(0).to_pylist()
