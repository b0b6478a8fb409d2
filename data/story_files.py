"""Read stories from text, JSON, CSV and parquet files, compressed or not."""

import contextlib
import csv
import functools
import glob
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from tqdm import tqdm

from data.raw_stories import BATCH, Progress, slices
from model.errors import UserError, first_line, require
from model.files import shown
from model.tokenizer import END_OF_TEXT

FILE_TYPES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # allowed after the first four
BLOCK = 1 << 20  # bytes per read


def find_files(word: str, generated: Path) -> list[Path] | None:
    """The story files that a file, folder or glob refers to; None if the word is not a path.

    In a folder, hidden files, other file types and the scripts' own output under `generated` are skipped.
    Raises UserError if the word is a path but leads to no story file.
    """
    require(word.strip(), "a source name is empty: give a file, folder, glob or hub data set")
    path = Path(os.path.expanduser(word))
    ours = [(generated / name).resolve() for name in ("raw", "tokenizer", "processed")]
    if path.is_dir():
        files = [file for file in files_below(path.absolute()) if file_type(file) in FILE_TYPES]
        files = [file for file in files if not any(file.resolve().is_relative_to(folder) for folder in ours)]
    elif path.exists():
        files = [path.absolute()]
    elif any(mark in word for mark in "*?["):
        files = [Path(name).absolute() for name in sorted(glob.glob(str(path), recursive=True))]
    elif looks_like_path(word):
        raise UserError(f"there is no file or folder {word}")
    else:
        return None
    files = [file for file in files if not file.is_dir()]
    require(files, f"{word} contains no story files ({', '.join(FILE_TYPES)})")
    for file in files:
        known = file_type(file) in FILE_TYPES
        require(known, f"{shown(file)} is not a story file: use {', '.join(FILE_TYPES)}")
    return files


def files_below(folder: Path) -> list[Path]:
    """All files that are neither hidden nor in a hidden folder, sorted; links are followed, but no folder is read
    twice. Raises OSError for a folder that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    files, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def looks_like_path(word: str) -> bool:
    """Whether a word is more likely a mistyped path than a data set name, `owner/name`."""
    slashes = word.count("/")
    odd = "\\" in word or slashes > 1 or word.startswith((".", "~", "/")) or word.endswith("/")
    return odd or file_type(Path(word)) in FILE_TYPES


def file_type(path: Path) -> str:
    """The suffix that says how to read a file: .jsonl for stories.JSONL and stories.jsonl.gz."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in COMPRESSED else suffix


def read_file(path: Path, column: str, bar: Progress | None = None, story_per: str = "") -> Iterator[str]:
    """Yield the stories in a file. In a .txt file, they are separated by marks or blank lines, unless each line is one,
    or the whole file (`story_per` is "line" or "file"). Raises UserError naming the file and the place in it."""
    read = {
        ".txt": {"": text_rows, "line": text_lines, "file": whole_text}[story_per],
        ".jsonl": json_lines,
        ".json": json_rows,
        ".csv": csv_rows,
        ".parquet": parquet_rows,
    }
    for place, row in read[file_type(path)](path, column, bar):
        where = f"{shown(path)} {place}"
        if isinstance(row, dict):
            require_column(column, row, where)
            row = row[column]
        if row is None:
            row = ""
        require(isinstance(row, str), f"{where}: a story must be text, not {type(row).__name__}")
        try:
            row.encode()
        except UnicodeEncodeError:  # JSON can escape half a character, such as "\ud83d"
            raise UserError(
                f"{where}: the story contains half of a surrogate pair, which is not a character"
            ) from None
        yield row


def require_column(column: str, columns: object, where: str) -> None:
    names = ", ".join(map(str, columns)) or "no columns"
    require(
        column in columns, f"{where} has no column {column!r}: it has {names} (choose one with --text-column)"
    )


class WatchedFile(io.FileIO):
    """A file that reports its reads to a progress bar."""

    def __init__(self, path: Path, bar: Progress | None):
        super().__init__(path)
        self.bar = bar

    def readinto(self, buffer: object) -> int:
        count = super().readinto(buffer)
        if self.bar is not None:
            self.bar.update(count)
        return count


@contextlib.contextmanager
def open_text(path: Path, bar: Progress | None = None, newline: str | None = None) -> Iterator[TextIO]:
    """Open a UTF-8 file, decompressed, without its byte order mark. Raises UserError if it is damaged."""
    try:
        with open_unpacked(path, bar) as file, io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
            yield text
        return
    except UnicodeDecodeError:
        pass
    except OSError as error:
        if error.errno:
            raise
        raise UserError(f"{shown(path)} is cut short or damaged: {first_line(error)}") from None
    with open_unpacked(path) as file, io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape") as text:
        bad = next(number for number, line in enumerate(text, 1) if re.search("[\udc80-\udcff]", line))
    raise UserError(f"{shown(path)} line {bad} is not UTF-8 text: save the file as UTF-8")


def open_unpacked(path: Path, bar: Progress | None = None) -> BinaryIO:
    file = io.BufferedReader(WatchedFile(path, bar), BLOCK)
    if compression := COMPRESSED.get(path.suffix.lower()):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, compression), BLOCK)
    return file


def story_per(line: bool, file: bool) -> str:
    """What one story is in a .txt file, by --story-per-line and --story-per-file."""
    require(not (line and file), "--story-per-line and --story-per-file: choose one of the two")
    return "line" if line else "file" if file else ""


def tidy(story: str) -> str:
    """Normalise line ends to LF; strip the byte order mark and surrounding whitespace."""
    return story.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff").strip()


def text_rows(path: Path, column: str, bar: Progress | None) -> Iterator[tuple[str, str]]:
    """Stories separated by `<|endoftext|>`, wherever it stands; in a file without it, by blank lines."""
    with open_text(path) as file:
        marked = any(END_OF_TEXT in line for line in file)
    if not marked:
        note_blank_lines()
    with open_text(path, bar) as file:
        story = []
        for line in file:
            if marked:
                *ended, line = line.split(END_OF_TEXT)
                for text in ended:
                    yield "", "".join(story) + text
                    story = []
            elif story and not line.strip():
                yield "", "".join(story)
                story = []
            if line.strip() or story:
                story.append(line)
        if story:
            yield "", "".join(story)


def text_lines(path: Path, column: str, bar: Progress | None) -> Iterator[tuple[str, str]]:
    with open_text(path, bar) as file:
        yield from (("", line) for line in file)


def whole_text(path: Path, column: str, bar: Progress | None) -> Iterator[tuple[str, str]]:
    with open_text(path, bar) as file:
        yield "", file.read()


@functools.cache
def note_blank_lines() -> None:
    """Say it once, however many such files there are."""
    tqdm.write(
        f"note: .txt files without {END_OF_TEXT} are split at blank lines; with --story-per-line each line is a story, "
        "with --story-per-file each file"
    )


def not_json(where: str, error: ValueError | RecursionError) -> UserError:
    """What to raise for an error of the JSON reader, whose own words may end in "at" before its place."""
    return UserError(f"{where} is not JSON: {str(getattr(error, 'msg', error)).removesuffix(' at')}")


def json_lines(path: Path, column: str, bar: Progress | None) -> Iterator[tuple[str, object]]:
    with open_text(path, bar) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise not_json(f"{shown(path)} line {number}", error) from None
                yield f"line {number}", row


def json_rows(path: Path, column: str, bar: Progress | None) -> Iterator[tuple[str, object]]:
    """A list of objects or strings, {"data": [...]}, {column: [...]}, or JSON lines with the wrong suffix."""
    with open_text(path, bar) as file:
        line = 1
        while (start := file.read(1)).isspace():
            line += start == "\n"
        if start == "[":
            yield from json_array(path, file, line)
            return
    with open_text(path) as file:
        filled = (line for line in file if line.strip())
        first, second = next(filled, ""), next(filled, "")
    if second and first.rstrip().endswith("}"):
        yield from json_lines(path, column, bar)
        return
    with open_text(path, bar) as file:
        text = file.read()
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise not_json(f"{shown(path)}{line}", error) from None
    rows = [table]
    if isinstance(table, dict) and isinstance(table.get(column), dict):  # as pandas writes a column
        rows = list(table[column].values())
    elif isinstance(table, dict):
        rows = next((table[name] for name in (column, "data") if isinstance(table.get(name), list)), rows)
    for number, row in enumerate(rows, 1):
        yield f"item {number}", row


def json_array(path: Path, file: TextIO, line: int) -> Iterator[tuple[str, object]]:
    """Yield the elements of a JSON array without loading all of it; `file` is just past its "["."""
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
        except (ValueError, RecursionError) as error:  # the element may continue past what was read
            if not (block := file.read(max(BLOCK, len(text)))):
                line += text.count("\n", position, getattr(error, "pos", position))
                raise not_json(f"{shown(path)} line {line}", error) from None
            text, position = text[position:] + block, 0
            continue
        line += text.count("\n", position, start)
        yield f"line {line}", row
        line += text.count("\n", start, end)
        position, first = end, False
    rest = text[start + 1 :] + file.read(BLOCK)
    line += text.count("\n", position, start)
    require(
        not rest.strip(), f"{shown(path)} line {line} is not JSON: there is text after the end of the list"
    )


def csv_rows(path: Path, column: str, bar: Progress | None) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(2**31 - 1)  # a story may exceed the default limit of 131,072 characters
    with open_text(path, bar, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [column])
            require_column(column, names, f"{shown(path)} line 1")
            index = names.index(column)
            for row in reader:
                yield f"line {reader.line_num}", row[index] if index < len(row) else ""
        except csv.Error as error:
            raise UserError(f"{shown(path)} line {reader.line_num} is not CSV: {error}") from None


def parquet_rows(path: Path, column: str, bar: Progress | None) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=BLOCK) as file:
            require_column(column, file.schema_arrow.names, shown(path))
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            number = 0
            for table in file.iter_batches(BATCH, columns=[column]):
                for rows in slices(table):
                    if bar is not None:
                        bar.update(share * len(rows))
                    for row in rows:
                        number += 1
                        yield f"row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{shown(path)} is not a readable parquet file: {first_line(error)}") from None
