"""Settling what a run is: from the preset where it begins, from the checkpoint where it goes on."""

import contextlib
import dataclasses
import fcntl
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import torch

from model.batches import Data
from model.checkpoint import BEFORE_DECAY, list_checkpoints, load_checkpoint, step_of
from model.config import CONFIG_FIELDS, LEARNING_RATES, RECIPE_FIELDS, GPTConfig, Recipe, find_preset
from model.files import remove_leftovers, shown
from model.gpt import GPT
from model.huggingface import Pretrained, token_table
from model.settings import UserError, require

# What makes a run this run and not another; the rest may change when it goes on.
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

# A pretrained model's context, which may be very long, is cut to this unless BLOCK_SIZE says otherwise.
CONTEXT_LIMIT = 1_024
# Of the preset's learning rate: a pretrained model is to be changed, not shaken.
PRETRAINED_SHARE = 0.1


@dataclass
class TrainingState:
    """All that changes during training. There is no random state: data order and dropout follow from
    the seed and the step."""

    model: GPT
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done
    seconds: float = 0.0  # spent in them
    best_loss: float = math.inf  # lowest validation loss so far
    last_evaluation: int = -1  # the step of the latest evaluation

    COUNTERS = ("step", "seconds", "best_loss", "last_evaluation")

    def snapshot(self, settings: SimpleNamespace, data: Data) -> dict:
        """The checkpoint of this state: it suffices to go on, generate, evaluate and export."""
        return {
            "config": dataclasses.asdict(self.model.config),
            "settings": {name: getattr(settings, name) for name in KEPT},
            "defaults": settings.defaults,
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
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            # the groups' options, such as weight decay, follow from the settings, which may have changed
            optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
        if checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        for name in self.COUNTERS:
            setattr(self, name, checkpoint[name])


def fingerprints(data: Data) -> dict[str, str]:
    """What must be the same when a run goes on: the SHA-256 of both splits and of the tokenizer."""
    return {
        "training stories": data.train.sha256,
        "validation stories": data.validation.sha256,
        "tokenizer": hashlib.sha256(data.tokenizer_json.encode()).hexdigest(),
    }


def settle(
    settings: SimpleNamespace,
    checkpoint: dict | None,
    data: Data,
    on_cpu: bool,
    pretrained: Pretrained | None = None,
) -> tuple[GPTConfig, Recipe]:
    """Fill in every setting that was left open; return the model's shape and the recipe.

    A new run takes them from its preset, and its shape from a pretrained model where it begins with one.
    A run that goes on keeps its own, but for what the user set by a flag, or edited in the script since it
    began. Raises UserError with the list of what may not differ.
    """
    asked = settings.bigram_start
    if checkpoint is None:
        fill_from_preset(settings, data, on_cpu, pretrained)
    else:
        keep_from_checkpoint(settings, checkpoint, data)
    if settings.vocab_size < data.vocab_size:
        raise UserError(f"vocab_size {settings.vocab_size} is below the tokenizer's {data.vocab_size}")
    config = GPTConfig(**{name: getattr(settings, name) for name in CONFIG_FIELDS})
    if checkpoint is None and settings.bigram_start and (pretrained or not config.can_hold_bigrams):
        require(
            not asked,
            "--bigram-start is for modern blocks, with an output head of their own (--no-tie-weights), "
            "that do not begin with the weights of another model",
        )
        settings.bigram_start = False
    return config, Recipe(**{name: getattr(settings, name) for name in RECIPE_FIELDS})


def left_open(settings: SimpleNamespace, name: str) -> bool:
    """Whether a setting takes another's value; `--max-minutes none`, though, means no limit."""
    return getattr(settings, name) is None and not (name == "max_minutes" and name in settings.given)


def fill_from_preset(
    settings: SimpleNamespace, data: Data, on_cpu: bool, pretrained: Pretrained | None
) -> None:
    preset = find_preset(settings.preset)
    recipe = preset.recipe
    if on_cpu:  # a CPU learns more from many small steps than from few large ones
        recipe = dataclasses.replace(
            recipe,
            batch_tokens=recipe.cpu_batch_tokens or recipe.batch_tokens,
            eval_interval=recipe.cpu_eval_interval or recipe.eval_interval,
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
    """The shape that a pretrained model has, whatever the preset; only its context may be chosen, and dropout.

    Raises UserError where a flag asks for another shape, or the stories were packed with another tokenizer.
    """
    shape = {name: value for name, value in vars(pretrained.config).items() if name != "dropout"}
    shape["block_size"] = min(shape["block_size"], CONTEXT_LIMIT)
    for name, value in shape.items():
        asked = getattr(settings, name)
        fits = asked in (None, value) or name == "block_size"
        require(fits, f"{settings.init_from} has {name} {value}, which --init-from cannot change to {asked}")
    require(
        token_table(pretrained.tokenizer_json) == token_table(data.tokenizer_json),
        f"the stories are packed with another tokenizer than that of {settings.init_from}: run "
        f"python data/train_tokenizer.py --kind {settings.init_from}, then python data/prepare_data.py",
    )
    return shape


def keep_from_checkpoint(settings: SimpleNamespace, checkpoint: dict, data: Data) -> None:
    saved, then = checkpoint["settings"], checkpoint["defaults"]
    edited = {name for name, value in settings.defaults.items() if name in then and value != then[name]}
    saved = {
        "init_from": None,
        "mask_stories": False,
        "bigram_start": False,
        "dtype": "auto",
        "compile": "auto",
        "deterministic": False,
        "micro_batch": 0,
        **vars(GPTConfig()),
        **saved,
    }  # as before there were these settings
    differences = []
    for name in KEPT:
        value = getattr(settings, name)
        if name not in settings.given | edited or left_open(settings, name):
            setattr(settings, name, saved[name])
        elif name in FIXED and value != saved[name]:
            differences.append(f"{name} {saved[name]} is now {value}")
    current = fingerprints(data)
    differences += [f"other {name}" for name, value in checkpoint["data"].items() if value != current[name]]
    if differences:
        raise UserError(
            f"the run in {shown(settings.checkpoint_dir)} cannot go on with: {'; '.join(differences)}. "
            "Change that back, or begin a new run with --fresh (it moves the old one aside) "
            "or another --checkpoint-dir"
        )


def rewind(folder: Path, path: Path, checkpoint: dict, recipe: Recipe, first: bool) -> tuple[Path, dict]:
    """Where a run that has begun its final decay is made longer: the state from before the decay.

    From there it is the run that it would have been, had it been begun with the greater length. What came
    after is kept in the folder under other names. Otherwise returns what it was given.
    """
    saved, earlier = checkpoint["settings"], folder / BEFORE_DECAY
    shorter = Recipe(**{name: saved[name] for name in RECIPE_FIELDS if name in saved})
    then, now = (r.progress(checkpoint["step"], checkpoint["seconds"]) for r in (shorter, recipe))
    longer, decaying = now < min(then, 1), then > 1 - shorter.decay_fraction
    if not longer or not decaying or not earlier.exists():
        return path, checkpoint
    rewound = load_checkpoint(earlier)
    if rewound["step"] >= checkpoint["step"]:
        return path, checkpoint
    step = checkpoint["step"]
    if first:
        print(
            f"longer now: going back to before the learning rate's decay; step {step:,} is kept as shorter_*"
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
    """Hold a checkpoint folder for this process; make it where there is none, remove it if it stays empty.

    Raises UserError while another process holds it. The system lets go of it when a process ends,
    however it ends. What a killed process left half-written is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another train.py is at work in {shown(folder)}: wait for it, stop it, or use another --checkpoint-dir"
            ) from None
        remove_leftovers(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(descriptor)


def set_aside(folder: Path) -> Path | None:
    """Move an earlier run's folder out of the way; return where it went, None where there was none."""
    if not list_checkpoints(folder) and not (folder / "best.pt").exists():
        return None
    with only_one(folder):
        moved = folder.with_name(f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S}")
        folder.rename(moved)
    return moved
