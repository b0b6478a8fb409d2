"""Atomic writes, checks before writing, checksums, and paths, commands and sizes as text."""

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from model.errors import UserError, require
from model.settings import REPO, flag_name, read_constants


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """If an OSError names no file (a full disk), or only the temporary one, let it name `path`."""
    try:
        yield
    except OSError as error:
        if not error.filename or error.filename == str(temporary):
            error.filename = shown(path)
        raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary name next to `path`; on success flush it to disk and rename it to `path`.

    On any exception the temporary file is removed and `path` is unchanged.
    """
    path = path.resolve()  # replace a link's target, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, temporary):
            yield temporary
            flush(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; on success flush its files to disk, and it replaces `path`."""
    path = path.resolve()
    require_writable(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            flush(file)
        if path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        remove_leftovers(path.parent, glob.escape(path.name))


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove temporary files left by killed processes, for files whose names match the pattern.

    A folder moved aside by an unfinished replacement is restored.
    """
    for leftover in folder.glob(f".{pattern}.*"):
        *words, process, suffix = leftover.name[1:].split(".")
        if process.isdigit() and suffix in ("tmp", "old") and not lives(int(process)):
            if suffix == "old" and not (whole := folder / ".".join(words)).exists():
                os.replace(leftover, whole)
            elif leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def lives(process: int) -> bool:
    """Whether another process has this id."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return process != os.getpid()


def file_to_write(name: str | None, flag: str, read: Iterable[str | Path] = ()) -> Path | None:
    """The value of a flag as a path (None: not given). Raises UserError if it cannot be written as a file, or is one of
    the files that are read."""
    if name is None:
        return None
    path = Path(os.path.expanduser(name))
    require(not path.is_dir(), f"{flag} {name or repr(name)} is a folder: name a file in it")
    require(not path.exists() or path.is_file(), f"{flag} {name} is not a regular file")
    overwritten = path.exists() and any(os.path.exists(other) and path.samefile(other) for other in read)
    require(
        not overwritten,
        f"{flag} {name} would replace a file that is in use: choose another name",
    )
    target = Path(os.path.realpath(path))
    require(not target.is_symlink(), f"{flag} {name} cannot be written: it is a link that leads to itself")
    folder = nearest_existing(target.parent)
    require(folder.is_dir(), f"{flag} {name} cannot be written: {shown(folder)} is not a folder")
    require(os.access(folder, os.W_OK), f"{flag} {name} cannot be written: {shown(folder)} is read-only")
    return path


def free_name(path: Path) -> Path:
    """The path, or if it exists, the first of path-2, path-3 and so on that does not."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], others) if not name.exists())


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest of its parents that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def require_writable(folder: Path) -> None:
    """Raise UserError if no file can be written into the folder, or the folder cannot be made."""
    existing = nearest_existing(folder)
    require(
        os.access(existing, os.W_OK), f"{shown(existing)} is read-only: choose another folder to write into"
    )


def require_space(folder: Path, needed: float) -> None:
    """Raise UserError if the disk of `folder` has fewer than `needed` bytes free."""
    folder = nearest_existing(folder)
    free = shutil.disk_usage(folder).free
    require(
        needed <= free,
        f"not enough disk space in {shown(folder)}: about {size_text(needed)} needed, {size_text(free)} free",
    )


def flush(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, if the system can."""
    with contextlib.suppress(OSError):
        flush(folder)


def write_text(path: Path, text: str) -> None:
    """As UTF-8, with a ? for what is not Unicode, such as parts of a file name."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """The JSON object in a file, {} if there is no file. Raises UserError if it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{shown(path)} is not a JSON object: delete it and rerun the step that writes it")
    return value


def read_text(path: str) -> str:
    """The content of a user's text file. Raises UserError if it is missing or not UTF-8."""
    try:
        return Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def shown(path: str | Path) -> str:
    """A path as the user would type it: relative if it is below the current directory."""
    path = Path(path)
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)


def command(script: str, **folders: Path) -> str:
    """The command to run a script, given by its path in the repository, from the current directory. For its settings
    `folders` (data_dir, checkpoint_dir), it has the flags that are needed: none if these are its defaults."""
    words = ["python", shown(REPO / script)]
    for name, folder in folders.items():
        if folder != default_folders(script)[name]:
            words += [flag_name(name), shown(folder)]
    return shlex.join(words)


@functools.cache
def default_folders(script: str) -> dict[str, Path]:
    """The folders that a script takes without flags, by the names of its settings."""
    constants = [one for one in read_constants(REPO / script) if one.name.endswith("_dir")]
    return {constant.name: REPO / os.path.expanduser(constant.value) for constant in constants}


def count_text(count: int, one: str, several: str) -> str:
    """A number of things, in words: 1 story, 2,000 stories."""
    return f"{count:,} {one if count == 1 else several}"


def size_text(count: float) -> str:
    """A human-readable number of bytes: 20.2 MB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
