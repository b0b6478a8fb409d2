"""A run's settings and state: a new run takes them from its preset, a resumed one from its checkpoint."""

import contextlib
import dataclasses
import fcntl
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import torch

from model.batches import Data, fingerprints
from model.checkpoint import BEFORE_DECAY, list_checkpoints, load_checkpoint, step_of
from model.config import CONFIG_FIELDS, LEARNING_RATES, PRESETS, RECIPE_FIELDS, GPTConfig, Recipe
from model.files import command, remove_leftovers, shown
from model.gpt import GPT
from model.huggingface import Pretrained, token_table
from model.settings import UserError, require

# Settings that identify a run; the others may change when it resumes.
FIXED = ("preset", "init_from", *CONFIG_FIELDS, "seed", "batch_tokens", "optimizer")
KEPT = (
    *dict.fromkeys((*FIXED, *RECIPE_FIELDS)),
    "dtype",
    "compile",
    "deterministic",
    "micro_batch",
    "save_interval",
    "eval_tokens",
    "log_interval",
    "sample_prompt",
    "sample_tokens",
)

STARTED_EARLIER = (
    "this run was started by an earlier version of this repository: resume it with that version, or start a new "
    "run with --fresh (it moves the old one aside)"
)

# A pretrained model's context, which may be very long, is cut to this unless BLOCK_SIZE is set.
CONTEXT_LIMIT = 1_024
# Fraction of the preset's learning rate used for a pretrained model, which should change gently
PRETRAINED_SHARE = 0.1


@dataclass
class TrainingState:
    """Everything that changes during training. There is no RNG state: data order and dropout are derived from
    the seed and the step."""

    model: GPT
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # training time in them
    best_loss: float = math.inf  # lowest validation loss so far
    last_evaluation: int = -1  # step of the latest evaluation

    COUNTERS = ("step", "seconds", "best_loss", "last_evaluation")

    def snapshot(self, settings: SimpleNamespace, data: Data) -> dict:
        """This state as a checkpoint, enough to resume, generate, evaluate and export."""
        return {
            "config": dataclasses.asdict(self.model.config),
            "settings": {name: getattr(settings, name) for name in KEPT},
            "defaults": settings.defaults,
            "depth": self.model.depth,
            "weights": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "tokenizer": data.tokenizer_json,
            "eot_id": data.eot_id,
            "data": fingerprints(data),
            **{name: getattr(self, name) for name in self.COUNTERS},
        }

    def restore(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["weights"])
        self.model.set_depth(checkpoint["depth"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]
            require(arrangement(groups) == arrangement(state["param_groups"]), STARTED_EARLIER)
            # the groups' options, such as weight decay, come from the settings, which may have changed
            optimizer.load_state_dict({**state, "param_groups": groups})
        if checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        for name in self.COUNTERS:
            setattr(self, name, checkpoint[name])


def arrangement(groups: list[dict]) -> list[tuple]:
    """What an optimizer's state depends on: the parameters in each group, and how Muon cuts them."""
    return [(group["params"], group.get("pieces")) for group in groups]


def settle(
    settings: SimpleNamespace,
    checkpoint: dict | None,
    data: Data,
    on_cpu: bool,
    pretrained: Pretrained | None = None,
) -> tuple[GPTConfig, Recipe]:
    """Fill in every setting that was left open; return the model's shape and the recipe.

    A new run takes them from its preset, and its shape from the pretrained model, if any. A resumed run keeps its
    own, except those set by a flag or edited in the script since it started. Raises UserError, listing the
    settings that may not change, if any did.
    """
    bigrams, growing = settings.bigram_start, settings.grow_at
    if checkpoint is None:
        fill_from_preset(settings, data, on_cpu, pretrained)
    else:
        keep_from_checkpoint(settings, checkpoint, data)
    if settings.vocab_size < data.vocab_size:
        raise UserError(f"vocab_size {settings.vocab_size} is below the tokenizer's {data.vocab_size}")
    config = GPTConfig(**{name: getattr(settings, name) for name in CONFIG_FIELDS})
    if checkpoint is None and settings.bigram_start and (pretrained or not config.can_hold_bigrams):
        require(
            not bigrams,
            "--bigram-start needs modern blocks with an untied output head (--no-tie-weights), and no --init-from",
        )
        settings.bigram_start = False
    if checkpoint is None and pretrained:
        require(not growing, "--grow-at is for new models: those of --init-from train whole")
        settings.grow_at = 0.0
    return config, Recipe(**{name: getattr(settings, name) for name in RECIPE_FIELDS})


def left_open(settings: SimpleNamespace, name: str) -> bool:
    """Whether a setting is to be filled in; `--max-minutes none`, though, means no limit."""
    return getattr(settings, name) is None and not (name == "max_minutes" and name in settings.given)


def fill_from_preset(
    settings: SimpleNamespace, data: Data, on_cpu: bool, pretrained: Pretrained | None
) -> None:
    preset = PRESETS[settings.preset]
    recipe = preset.recipe
    if on_cpu:
        recipe = recipe.on_cpu(
            recipe.max_minutes if left_open(settings, "max_minutes") else settings.max_minutes
        )
    values = {**vars(recipe), **vars(preset.config), "vocab_size": data.vocab_size}
    if settings.optimizer not in (None, recipe.optimizer):
        values["learning_rate"] = LEARNING_RATES[settings.optimizer]
    if pretrained:
        values |= shape_of(pretrained, settings, data)
        values["learning_rate"] *= PRETRAINED_SHARE
    for name in (*CONFIG_FIELDS, *RECIPE_FIELDS):
        if left_open(settings, name):
            setattr(settings, name, values[name])
    if settings.save_interval is None:
        settings.save_interval = settings.eval_interval


def shape_of(pretrained: Pretrained, settings: SimpleNamespace, data: Data) -> dict[str, object]:
    """A pretrained model's shape, whatever the preset; only context length and dropout may be chosen.

    Raises UserError if the settings ask for another shape, or the stories were packed with another tokenizer.
    """
    shape = {name: value for name, value in vars(pretrained.config).items() if name != "dropout"}
    shape["block_size"] = min(shape["block_size"], CONTEXT_LIMIT)
    for name, value in shape.items():
        asked = getattr(settings, name)
        fits = asked in (None, value) or name == "block_size"
        require(fits, f"{settings.init_from} has {name} {value}, which --init-from cannot change to {asked}")
    require(
        token_table(pretrained.tokenizer_json) == token_table(data.tokenizer_json),
        f"the stories were packed with another tokenizer than that of {settings.init_from}: run "
        f"{command('data/train_tokenizer.py')} --kind {settings.init_from}, then {command('data/prepare_data.py')}",
    )
    return shape


def keep_from_checkpoint(settings: SimpleNamespace, checkpoint: dict, data: Data) -> None:
    saved, then = checkpoint["settings"], checkpoint["defaults"]
    edited = {name for name, value in settings.defaults.items() if name in then and value != then[name]}
    require(set(KEPT) <= saved.keys(), STARTED_EARLIER)
    differences = []
    for name in KEPT:
        value = getattr(settings, name)
        if name not in settings.given | edited or left_open(settings, name):
            setattr(settings, name, saved[name])
        elif name in FIXED and value != saved[name]:
            differences.append(f"{name} {saved[name]} is now {value}")
    current = fingerprints(data)
    differences += [f"changed {name}" for name, value in checkpoint["data"].items() if value != current[name]]
    if differences:
        raise UserError(
            f"the run in {shown(settings.checkpoint_dir)} cannot be resumed with: {'; '.join(differences)}. "
            "Change that back, or start a new run with --fresh (it moves the old one aside) "
            "or another --checkpoint-dir"
        )


def rewind(folder: Path, path: Path, checkpoint: dict, recipe: Recipe, first: bool) -> tuple[Path, dict]:
    """If an extended run had already started its final decay, return the checkpoint from before the decay;
    otherwise return the arguments unchanged.

    From there the run continues as if it had been started with the greater length. The files of the shorter run are
    kept under other names.
    """
    saved, earlier = checkpoint["settings"], folder / BEFORE_DECAY
    shorter = Recipe(**{name: saved[name] for name in RECIPE_FIELDS})
    then, now = (r.progress(checkpoint["step"], checkpoint["seconds"]) for r in (shorter, recipe))
    longer, turned = now < min(then, 1), then > shorter.turning_point
    if not longer or not turned or not earlier.exists():
        return path, checkpoint
    rewound = load_checkpoint(earlier)
    if rewound["step"] >= checkpoint["step"]:
        return path, checkpoint
    step = checkpoint["step"]
    if first:
        print(
            f"extended run: going back to before the learning-rate decay; step {step:,} is kept as shorter_*"
        )
        for file in [path, folder / "metrics.jsonl", folder / "loss_curve.png", folder / "samples.md"]:
            if file.exists():
                shutil.copy2(file, folder / f"shorter_{step}_{file.name}")
        for file in list_checkpoints(folder):
            if step_of(file) > rewound["step"]:
                file.unlink()
    return earlier, {**rewound, "best_loss": min(rewound["best_loss"], checkpoint["best_loss"])}


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Lock a checkpoint folder for this process; create it if missing, remove it if it stays empty.

    Raises UserError if another process holds the lock. The system releases it when a process ends, however it
    ends. Deletes partially written files left by a killed process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another train.py is running in {shown(folder)}: wait for it, stop it, or use another --checkpoint-dir"
            ) from None
        remove_leftovers(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(descriptor)


def set_aside(folder: Path) -> Path | None:
    """Move an earlier run's folder out of the way; return its new path, or None if there was none."""
    if not list_checkpoints(folder) and not (folder / "best.pt").exists():
        return None
    with only_one(folder):
        moved = folder.with_name(f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(moved)
    return moved
