"""Files and folders are written whole or not at all, and nothing is lost where that fails."""

import errno
import hashlib
import os
import platform
import shutil
import signal
import time

import pytest
from conftest import REPO

from model import files
from model.checkpoint import locked
from model.errors import UserError
from model.files import (
    atomic_folder,
    atomic_write,
    command,
    file_to_write,
    naming,
    remove_leftovers,
    sha256_file,
)
from model.runtime import discard_unfinished, marking

DEAD = 2**22 + 1  # beyond the numbers that Linux gives to processes


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """A folder that holds one file."""
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "old").write_text("1")
    return folder


def test_a_folder_is_replaced_where_its_link_points(folder, tmp_path):
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(folder)
    with atomic_folder(link) as temporary:
        (temporary / "new").write_text("2")
    assert link.is_symlink() and content(folder) == {"new": "2"}
    assert [path.name for path in (*tmp_path.iterdir(), *link.parent.iterdir())].count("link") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "raw"]


def test_a_folders_files_and_its_new_name_are_flushed_to_disk(folder, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *words, name=name, original=original: (events.append(name), original(*words))[1]
        )
    with atomic_folder(folder) as temporary:
        (temporary / "new").write_text("2")
        (temporary / "inner").mkdir()
        (temporary / "inner" / "other").write_text("3")
    assert events == ["fsync", "fsync", "replace", "replace", "fsync"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_be_replaced_stays(folder, tmp_path, monkeypatch, failing):
    replace, calls = os.replace, []

    def fail_once(*names):
        calls.append(names)
        if len(calls) == failing:
            raise OSError("no")
        replace(*names)

    monkeypatch.setattr(files.os, "replace", fail_once)
    with pytest.raises(OSError, match="no"):
        with atomic_folder(folder) as temporary:
            (temporary / "new").write_text("2")
    assert content(folder) == {"old": "1"} and list(tmp_path.iterdir()) == [folder]


def test_what_was_killed_between_two_renames_comes_back(folder, tmp_path):
    folder.rename(tmp_path / f".raw.{DEAD}.old")
    (tmp_path / f".raw.{DEAD}.tmp").mkdir()
    remove_leftovers(tmp_path, "raw")
    assert content(folder) == {"old": "1"} and list(tmp_path.iterdir()) == [folder]


def test_a_run_tidies_up_what_is_dead_and_nothing_else(tmp_path):
    for name in ("best.pt", "ckpt_12.pt", "metrics.jsonl"):
        (tmp_path / f".{name}.{DEAD}.tmp").write_text("half")
    alive = {f".best.pt.{os.getppid()}.tmp", "best.pt", ".hidden", ".notes.old", f".draft.{DEAD}.tmp"}
    for name in alive:
        (tmp_path / name).write_text("whole")
    with locked(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == alive


def test_what_cannot_be_written_is_said_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("1")
    (tmp_path / "loop").symlink_to("loop")
    assert file_to_write(str(tmp_path / "new" / "one.json"), "--output") == tmp_path / "new" / "one.json"
    assert not (tmp_path / "new").exists()
    for name, reason in (("file/one.json", "file is not a folder"), ("loop", "a link that leads to itself")):
        with pytest.raises(UserError, match=f"--output .*{reason}"):
            file_to_write(str(tmp_path / name), "--output")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match="read-only"):
        file_to_write(str(tmp_path / "one.json"), "--output")


def test_a_full_disk_is_said_with_the_name_of_the_file(tmp_path):
    for block in (lambda: naming(tmp_path / "a"), lambda: atomic_write(tmp_path / "a")):
        with pytest.raises(OSError) as caught, block():
            raise OSError(errno.ENOSPC, "No space left on device")
        assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "a") as temporary:
        raise PermissionError(errno.EACCES, "Permission denied", str(temporary))
    assert caught.value.filename == str(tmp_path / "a")


def test_the_digest_is_of_the_whole_file(tmp_path):
    whole = bytes(range(256)) * 12_000  # more than is read at once
    (tmp_path / "a").write_bytes(whole)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(whole).hexdigest()


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOnce")
    assert files.read_text(str(tmp_path / "a.txt")) == "Once"


def test_a_command_has_the_folders_that_the_script_would_not_take_by_itself(monkeypatch):
    monkeypatch.chdir(REPO)
    folders = {"data_dir": REPO / "data", "checkpoint_dir": REPO / "my runs" / "a"}
    assert command("train.py", **folders) == "python train.py --checkpoint-dir 'my runs/a'"


def test_only_the_lock_is_taken_for_another_run(tmp_path):
    with pytest.raises(BlockingIOError):
        with locked(tmp_path):
            raise BlockingIOError("something else")
    with locked(tmp_path / "new"):
        with pytest.raises(UserError, match="another train.py"), locked(tmp_path / "new"):
            pass
        assert (tmp_path / "new").exists()  # with it, the lock of the first
    assert not (tmp_path / "new").exists()
    (tmp_path / "a user's").mkdir()
    with locked(tmp_path / "a user's"):
        pass
    assert (tmp_path / "a user's").exists()


def test_on_a_disk_without_locks_one_warning_is_all(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("model.checkpoint.fcntl.flock", flock)
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "a").touch()
    assert "has no locks" in capsys.readouterr().err
    assert (tmp_path / "run" / "a").exists()


def test_compiled_code_is_discarded_after_a_kill_only(tmp_path):
    folder = tmp_path / "inductor"
    discard_unfinished(folder)  # there is none yet
    with marking(folder):
        (folder / "code.so").touch()
        child = os.fork()
        if not child:  # another process that compiles meanwhile, and is killed
            with marking(folder):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        (folder / f"unfinished.{platform.node()}.{os.getppid()}").touch()
        discard_unfinished(folder)
        assert (folder / "code.so").exists()  # the parent process lives, and might be compiling
        (folder / f"unfinished.{platform.node()}.{os.getppid()}").unlink()
    with pytest.raises(ValueError), marking(folder):
        raise ValueError
    assert [mark.suffix for mark in folder.glob("unfinished.*")] == [f".{child}"]
    discard_unfinished(folder)
    assert not folder.exists()
    with pytest.raises(KeyboardInterrupt), marking(folder):
        raise KeyboardInterrupt
    discard_unfinished(folder)
    assert not folder.exists()
    for age, expected in (
        (60, True),
        (2 * 3600, False),
    ):  # seconds; on another machine that has the same folder
        folder.mkdir()
        mark = folder / "unfinished.elsewhere.example.org.17"
        mark.touch()
        os.utime(mark, (time.time() - age,) * 2)
        discard_unfinished(folder)
        assert folder.exists() == expected
        shutil.rmtree(folder, ignore_errors=True)
