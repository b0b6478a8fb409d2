"""Checkpoints: one file is enough to resume, generate, evaluate or export.

A checkpoint is a dictionary of plain values and tensors, loaded with weights_only=True, so that a file
from elsewhere cannot run code:

    format           version of this layout
    config           GPTConfig's fields
    settings         of the run, all filled in, except run.NOT_KEPT
    defaults         train.py's constants when the run was last started
    weights          the model's state_dict
    optimizers       their state_dicts
    scaler           the GradScaler's, {} unless in float16
    depth            blocks that train
    flex             whether FlexAttention masks the stories; None: not compiled, so not chosen
    step             optimizer steps done
    seconds          training time in them
    best_loss        lowest validation loss so far, nats per token
    last_evaluation  step of the latest evaluation, -1 before the first
    device           cpu, or the GPU's kind and name
    torch            PyTorch's version
    tokenizer        its JSON
    eot_id           the end-of-text token
    data             SHA-256 of both splits and of the tokenizer
"""

import contextlib
import errno
import fcntl
import os
import re
import zipfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.config import GPTConfig
from model.errors import UserError, first_line, require, warn
from model.files import (
    atomic_write,
    command,
    free_name,
    nearest_existing,
    remove_leftovers,
    require_writable,
    shown,
)
from model.gpt import GPT
from model.settings import REPO
from model.tokenizer import require_room, text_tokenizer

FORMAT = 1
BEFORE_DECAY = "before_decay.pt"
MARK = "quickstart.json"  # by which quickstart.sh knows the stories of its runs
# A run's files in its folder, and the folder in which they are gathered to be set aside
RUN_FILES = (
    "ckpt_*.pt",
    "best.pt",
    BEFORE_DECAY,
    "shorter_*",
    "metrics.jsonl",
    "loss_curve.png",
    "samples.md",
    MARK,
)
UNFINISHED = ".earlier"
NAME = re.compile(r"ckpt_(\d+)\.pt")
ENTRIES = ("config", "settings", "weights", "step", "tokenizer", "eot_id", "data")
# What it takes to resume, besides
TO_RESUME = ("defaults", "depth", "optimizers", "scaler", "seconds", "best_loss", "last_evaluation")


class BadCheckpoint(UserError):
    """A file that is not a valid checkpoint of this format."""


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write the file atomically: under a temporary name in the same folder, flushed to disk, then renamed."""
    with atomic_write(path) as temporary:
        try:
            torch.save({"format": FORMAT, **checkpoint}, temporary)
        except RuntimeError as error:  # how torch's zip writer reports a full disk
            if "inline_container" not in str(error):
                raise
            raise UserError(f"cannot write {shown(path)}: is the disk full?") from error


def load_checkpoint(path: Path, to_resume: bool = False) -> dict:
    """Read a checkpoint. Raises BadCheckpoint if the file is missing, damaged, of another format or lacks entries."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadCheckpoint(f"there is no checkpoint {shown(path)}") from None
    except (PermissionError, MemoryError):  # which is no damage
        raise
    except Exception as error:  # torch.load raises a dozen exception types for a damaged file
        reason = first_line(error)
        if isinstance(error, zipfile.BadZipFile):
            reason = "another kind of file, or cut short"
        raise BadCheckpoint(f"{shown(path)} does not load as a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise BadCheckpoint(f"{shown(path)} is not a checkpoint of this project")
    if checkpoint["format"] != FORMAT:
        raise BadCheckpoint(f"{shown(path)} has format {checkpoint['format']}; this version reads {FORMAT}")
    required = ENTRIES + TO_RESUME if to_resume else ENTRIES
    missing = [entry for entry in required if entry not in checkpoint]
    if missing:
        raise BadCheckpoint(f"{shown(path)} lacks {', '.join(missing)}")
    return checkpoint


def step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's ckpt_{step}.pt files, latest first."""
    return sorted((p for p in folder.glob("ckpt_*.pt") if step_of(p) >= 0), key=step_of, reverse=True)


def all_checkpoints(folder: Path) -> list[Path]:
    """All of the folder's checkpoints, in the order in which a run would resume from them."""
    others = [path for path in (folder / BEFORE_DECAY, folder / "best.pt") if path.exists()]
    others.sort(key=lambda path: peek(path).get("step", -1), reverse=True)
    return list_checkpoints(folder) + others


def run_files(folder: Path) -> list[Path]:
    """The files in the folder that belong to its run."""
    return [file for pattern in RUN_FILES for file in folder.glob(pattern)]


def load_latest(folder: Path) -> tuple[Path, dict] | None:
    """The latest checkpoint that loads, or None if the folder has none.

    A file that does not load is skipped with a warning. If there are files but none loads, raises
    BadCheckpoint, so that no new run overwrites them.
    """
    paths = all_checkpoints(folder)
    for path in paths:
        try:
            return path, load_checkpoint(path, to_resume=True)
        except BadCheckpoint as error:
            warn(f"{error}; trying the one before")
    if paths:
        raise BadCheckpoint(
            f"none of the {len(paths)} checkpoints in {shown(folder)} loads: move them away or use --fresh"
        )
    return None


def peek(path: Path) -> dict:
    """A checkpoint whose tensors are not read until they are used; {} if it does not load."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return checkpoint if set(ENTRIES + TO_RESUME) <= checkpoint.keys() else {}
    except Exception:  # a dozen types, as in load_checkpoint
        return {}


def find_checkpoint(folder: Path, name: str | None, prefer: str) -> Path:
    """The file named by `--checkpoint`: a path, "best", "latest", a step, or by default `prefer`."""
    require(name != "", "--checkpoint takes a name, not an empty one")
    latest = list_checkpoints(folder)
    known = {"best": [folder / "best.pt"], "latest": latest}
    if name is None:
        candidates = known[prefer] + [*latest, folder / "best.pt"]
    elif name in known:
        candidates = known[name]
    elif name.isdigit():
        candidates = [folder / f"ckpt_{name}.pt"]
    else:
        path = Path(os.path.expanduser(name))
        if path.is_dir() and not (path / "config.json").is_file():
            require(
                all_checkpoints(path),
                f"{name} holds neither checkpoints nor a Hugging Face model (config.json)",
            )
            return find_checkpoint(path, None, prefer)
        beside = [path.with_name(f"{path.name}.pt"), path.with_name(f"ckpt_{path.name}.pt")]
        candidates = [path, *beside, folder / name, folder / f"{name}.pt", REPO / name]
    for path in candidates:
        if path.is_file():
            return path
    if name == "best" and latest:
        raise UserError(
            f"no best.pt in {shown(folder)} yet, it comes with the first evaluation: use --checkpoint latest"
        )
    if name is None or name in known:
        raise UserError(
            f"no checkpoint in {shown(folder)} yet: run {command('train.py', checkpoint_dir=folder)}"
        )
    if (candidates[0] / "config.json").is_file():
        raise UserError(f"{name} is a Hugging Face model, not a checkpoint: see train.py --init-from")
    there = [str(step_of(path)) for path in latest] + (["best"] if (folder / "best.pt").is_file() else [])
    known_here = there and "/" not in name
    listed = f"{shown(folder)} has {', '.join(there)}" if known_here else f"looked for {shown(candidates[0])}"
    raise UserError(f"there is no checkpoint {name!r} ({listed})")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a checkpoint folder for this process; create it if missing, and then remove it if it stays empty.

    Raises UserError if another process holds the lock. The system releases it when a process ends, however it
    ends. Deletes partially written files left by a killed process.
    """
    existing = nearest_existing(folder)
    require(existing.is_dir(), f"--checkpoint-dir {shown(folder)}: {shown(existing)} is a file, not a folder")
    require_writable(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another train.py is running in {shown(folder)}: wait for it, stop it, or use another --checkpoint-dir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            warn(f"the disk of {shown(folder)} has no locks: do not start a second train.py there")
        try:
            for pattern in RUN_FILES:
                remove_leftovers(folder, pattern)
            if (folder / UNFINISHED).exists():
                move_run_files(folder)
            yield
        finally:  # by the holder alone: without its folder, the lock would be none
            with contextlib.suppress(OSError):
                if made:
                    folder.rmdir()
    finally:
        os.close(descriptor)


def set_aside(folder: Path) -> Path | None:
    """Move an earlier run's files into a new folder in theirs; return that, or None if there are none.

    To be called within locked(). Nothing else in the folder moves, and the folder itself may be a link, or a disk of
    its own.
    """
    if not any(file.stat().st_size for file in run_files(folder) if file.name != MARK):
        return None
    (folder / UNFINISHED).mkdir()
    return move_run_files(folder)


def move_run_files(folder: Path) -> Path:
    """Move a run's files, or the rest of them if a process was killed while it did so. The next one finishes it."""
    for file in run_files(folder):
        file.rename(folder / UNFINISHED / file.name)
    return (folder / UNFINISHED).rename(free_name(folder / f"earlier-{datetime.now():%Y%m%d-%H%M%S}"))


def prune(folder: Path, keep: int, step: int) -> None:
    """Delete all but the `keep` latest ckpt_{step}.pt up to this step. (Any later one did not load.)"""
    for path in [path for path in list_checkpoints(folder) if step_of(path) <= step][max(1, keep) :]:
        path.unlink(missing_ok=True)


def load_model(path: Path, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """A checkpoint's model (in evaluation mode, on the device), its tokenizer, and its other entries."""
    checkpoint = load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint.pop("weights"))
        tokenizer = text_tokenizer(checkpoint["tokenizer"])
        require_room(model.config.vocab_size, tokenizer, shown(path))
    except UserError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise BadCheckpoint(
            f"the parts of {shown(path)} do not fit together ({first_line(error)})"
        ) from error
    return model.to(device).eval(), tokenizer, checkpoint
