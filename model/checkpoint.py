"""Checkpoints: one file that suffices to go on, generate, evaluate or export.

A checkpoint is a dictionary of plain values and tensors, read with weights_only=True, so that a file
from elsewhere cannot run code:

    format    of this dictionary      config    GPTConfig's fields
    weights   under the model's names settings  of the run, all settled
    optimizers, scaler  their states  defaults  of the script when the run was last started
    step, seconds, best_loss, last_evaluation
    tokenizer its JSON, eot_id        data      SHA-256 of the stories and the tokenizer
"""

import re
import sys
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.config import GPTConfig
from model.files import atomic_write, command, shown
from model.generation import text_tokenizer
from model.gpt import GPT
from model.settings import UserError, first_line

FORMAT = 1
BEFORE_DECAY = "before_decay.pt"
NAME = re.compile(r"ckpt_(\d+)\.pt")
ENTRIES = ("config", "settings", "weights", "step", "tokenizer", "eot_id", "data")


class BadCheckpoint(UserError):
    """A file that is no checkpoint of this format."""


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write the whole file or nothing: a temporary name in the same folder, flushed to disk, renamed."""
    with atomic_write(path) as temporary:
        try:
            torch.save({"format": FORMAT, **checkpoint}, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk so
            raise UserError(f"cannot write {shown(path)}: is the disk full? ({error})") from error


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> dict:
    """Read a checkpoint. Raises BadCheckpoint where the file is cut short or of another format."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself does not look at the check sums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise BadCheckpoint(f"there is no checkpoint {shown(path)}") from None
    except Exception as error:  # torch.load raises a dozen kinds for a damaged file
        raise BadCheckpoint(f"{shown(path)} does not load as a checkpoint ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise BadCheckpoint(f"{shown(path)} is not a checkpoint of this project")
    if checkpoint["format"] != FORMAT:
        raise BadCheckpoint(f"{shown(path)} has format {checkpoint['format']}, this version reads {FORMAT}")
    missing = [entry for entry in ENTRIES if entry not in checkpoint]
    if missing:
        raise BadCheckpoint(f"{shown(path)} lacks {', '.join(missing)}")
    return checkpoint


def step_of(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The folder's ckpt_{step}.pt, latest first."""
    return sorted((p for p in folder.glob("ckpt_*.pt") if step_of(p) >= 0), key=step_of, reverse=True)


def load_latest(folder: Path, device: str | torch.device = "cpu") -> tuple[Path, dict] | None:
    """The latest checkpoint that loads, or None where the folder has none.

    A file that does not load is named on stderr and passed over for the one before. Where there are
    files and none loads, raises BadCheckpoint: nothing should start afresh over them.
    """
    paths = list_checkpoints(folder)
    paths += [path for path in (folder / BEFORE_DECAY, folder / "best.pt") if path.exists()]
    for path in paths:
        try:
            return path, load_checkpoint(path, device)
        except BadCheckpoint as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    if paths:
        raise BadCheckpoint(
            f"none of the {len(paths)} checkpoints in {shown(folder)} loads: move them or --fresh"
        )
    return None


def find_checkpoint(folder: Path, name: str | None, prefer: str) -> Path:
    """The file that `--checkpoint` means: a path, "best", "latest", a step, or by default `prefer`."""
    latest = list_checkpoints(folder)
    known = {"best": [folder / "best.pt"], "latest": latest}
    if name is None:
        candidates = known[prefer] + [*latest, folder / "best.pt"]
    elif name in known:
        candidates = known[name]
    elif name.isdigit():
        candidates = [folder / f"ckpt_{name}.pt"]
    else:
        path = Path(name)
        if path.is_dir():
            return find_checkpoint(path, None, prefer)
        candidates = [path, folder / name]
    for path in candidates:
        if path.is_file():
            return path
    if name is None or name in known:
        raise UserError(f"no checkpoint in {shown(folder)} yet: run {command('train.py')}")
    raise UserError(f"there is no checkpoint {name!r} (looked for {shown(candidates[0])})")


def prune(folder: Path, keep: int, step: int) -> None:
    """Delete all but the `keep` latest ckpt_{step}.pt of this step and before. (A later one did not load.)"""
    for path in [path for path in list_checkpoints(folder) if step_of(path) <= step][max(1, keep) :]:
        path.unlink(missing_ok=True)


def load_model(path: Path, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """The model of a checkpoint (in evaluation mode, on the device), its tokenizer, and all the rest."""
    checkpoint = load_checkpoint(path)
    try:
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint.pop("weights"))
        tokenizer = text_tokenizer(checkpoint["tokenizer"])
    except UserError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        raise BadCheckpoint(
            f"the parts of {shown(path)} do not fit together ({first_line(error)})"
        ) from error
    return model.to(device).eval(), tokenizer, checkpoint
