"""What stays the same from a run's first step to its last: a new run takes its settings from its preset, a resumed one
from its checkpoint."""

import functools
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from model.batches import Batches, number_stories, validation_windows
from model.config import (
    CONFIG_FIELDS,
    LEARNING_RATES,
    PRESETS,
    RECIPE_FIELDS,
    GPTConfig,
    Recipe,
    weight_decay_for,
)
from model.errors import UserError, require
from model.files import command, shown
from model.huggingface import Pretrained, load_pretrained
from model.loss import MPS_TERMS, Shortlist
from model.packed_data import Data, fingerprints, load_data
from model.processes import Processes
from model.runtime import Runtime, choose_device, choose_runtime, hardware
from model.sampled_softmax import Shortlists, make_shortlists
from model.settings import require_within
from model.tokenizer import token_table

# Settings that identify a run; the others may change when it resumes.
FIXED = {
    "preset",
    "init_from",
    *CONFIG_FIELDS,
    "bigram_start",
    "mask_stories",
    "seed",
    "batch_tokens",
    "optimizer",
    "eval_tokens",  # on others, another step might be the best
}
# The run's length: the limit that is reached first ends it
LIMITS = {"max_steps", "max_minutes", "max_epochs"}
# Settings that a checkpoint does not remember: where and how a run is resumed
NOT_KEPT = {"device", "data_dir", "checkpoint_dir", "keep", "verify", "fresh"}

# A pretrained model's context, which may be very long, is cut to this unless BLOCK_SIZE is set.
CONTEXT_LIMIT = 1_024
# Fraction of the preset's learning rate used for a pretrained model, which should change gently
PRETRAINED_SHARE = 0.1
# Its default length: it learns new stories by heart before long
FINE_TUNING_EPOCHS = 3.0
# Few stories make few steps: at least so many evaluations in them, and at most so much of them as warm-up
EVALUATIONS, WARMUP = 5, 0.1
STARTED_EARLIER = (
    "this run was started by an earlier version of this repository: resume it with that version, or start a new "
    "run with --fresh (it moves the old one aside)"
)


@dataclass(frozen=True)
class Run:
    """A run's settings, shape, data and device. Fixed, except settings.micro_batch and runtime.compile, which
    prepare_forward() sets to what works here: at the start, and when the other blocks join."""

    settings: SimpleNamespace  # all filled in
    config: GPTConfig
    recipe: Recipe
    data: Data
    batches: Batches
    validation_windows: np.ndarray  # of tokens, (N, block_size + 1)
    runtime: Runtime
    processes: Processes
    pretrained: Pretrained | None = None  # a new model's initial weights

    @property
    def folder(self) -> Path:
        return self.settings.checkpoint_dir

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.tokens_per_step(self.config.block_size)

    @functools.cached_property
    def shortlists(self) -> Shortlists | None:
        """Of a sampled softmax; None if the softmax is over the whole vocabulary."""
        return make_shortlists(self.batches, self.config.vocab_size) if self.recipe.sampled_softmax else None

    def inputs_and_targets(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Windows (B, block_size + 1) as inputs, targets and, if attention is within stories, story ids, all
        (B, block_size)."""
        inputs, targets = windows[:, :-1], windows[:, 1:]
        return inputs, targets, number_stories(inputs, self.data.eot_id) if self.recipe.mask_stories else None

    def shortlist(self, step: int) -> Shortlist | None:
        """The tokens in the softmax of a step; None: all."""
        return self.shortlists and self.shortlists.shortlist(step, self.runtime.device)

    @property
    def softmax_size(self) -> int:
        return self.shortlists.size if self.shortlists else self.config.vocab_size


def check_settings(settings: SimpleNamespace) -> None:
    """Raise UserError if a setting that belongs neither to the shape nor to the recipe makes no sense."""
    require_within(settings, keep="[1, inf)", log_interval="[1, inf)", eval_tokens="[1, inf)")
    require_within(settings, save_interval="[1, inf)", micro_batch="[0, inf)", sample_tokens="[0, 100000]")
    require(
        settings.init_from not in ("scratch", "resume") or Path(settings.init_from).exists(),
        "--init-from names a model to fine-tune: without it, a run resumes, or starts from scratch, by itself",
    )


def plan_run(settings: SimpleNamespace, processes: Processes, checkpoint: dict | None) -> Run:
    """Fill in and check the settings of a new run, or of one that goes on from a checkpoint, and read its data.

    Raises UserError, before anything is written, if something does not fit.
    """
    data = load_data(settings.data_dir, settings.verify, settings.init_from)
    device = choose_device(settings.device)
    pretrained = None
    if settings.init_from and not checkpoint:
        pretrained = load_pretrained(settings.init_from)
    config, recipe = complete_settings(settings, checkpoint, data, device, pretrained)
    if pretrained:
        pretrained = pretrained.with_context(config.block_size)
    windows = recipe.windows_per_step(config.block_size)
    require(
        windows >= processes.world_size,
        f"a step has {windows} windows for {processes.world_size} processes: use fewer, or a larger --batch-tokens",
    )
    most = max(1, MPS_TERMS // config.block_size)
    require(
        device.type != "mps" or min(settings.micro_batch, windows) <= most,
        f"--micro-batch {settings.micro_batch}: on this GPU, {most} is the most",
    )
    count = max(1, settings.eval_tokens // config.block_size)
    return Run(
        settings=settings,
        config=config,
        recipe=recipe,
        data=data,
        batches=Batches(data.train.tokens, config.block_size, windows, settings.seed),
        validation_windows=validation_windows(data.validation.tokens, config.block_size, count),
        runtime=choose_runtime(device, settings.dtype, settings.compile, settings.deterministic),
        processes=processes,
        pretrained=pretrained,
    )


def complete_settings(
    settings: SimpleNamespace,
    checkpoint: dict | None,
    data: Data,
    device: torch.device,
    pretrained: Pretrained | None = None,
) -> tuple[GPTConfig, Recipe]:
    """Fill in every setting that was left open; return the model's shape and the recipe.

    A new run takes them from its preset, and its shape from the pretrained model, if any. A resumed run keeps its
    own, except those set by a flag or edited in the script since it started. Raises UserError, listing the
    settings that may not change, if any did.
    """
    if checkpoint is None:
        fill_from_preset(settings, data, device, pretrained)
    else:
        keep_from_checkpoint(settings, checkpoint, data, device)
    return config_of(settings), recipe_of(settings, len(data.train.tokens))


def config_of(settings: SimpleNamespace) -> GPTConfig:
    return GPTConfig(**{name: getattr(settings, name) for name in CONFIG_FIELDS})


def recipe_of(settings: SimpleNamespace, tokens: int) -> Recipe:
    """The recipe of complete settings; a limit in epochs, of so many tokens, is one in steps there, too."""
    recipe = Recipe(**{name: getattr(settings, name) for name in RECIPE_FIELDS})
    if not recipe.max_epochs:
        return recipe
    tokens_per_step = recipe.tokens_per_step(config_of(settings).block_size)
    steps = math.ceil(recipe.max_epochs * tokens / tokens_per_step)
    return replace(recipe, max_steps=min(recipe.max_steps or steps, steps))


def chosen_settings(settings: SimpleNamespace, names: Iterable[str]) -> set[str]:
    """The names among these that were set. `none` sets nothing, except for a limit, which it lifts. A limit that is set
    replaces all of the preset's, so that `--max-minutes 30` is half an hour, however many steps that takes."""
    chosen = {name for name in names if getattr(settings, name) is not None}
    return chosen | (LIMITS if chosen & LIMITS else settings.given & LIMITS)


def fill_from_preset(
    settings: SimpleNamespace, data: Data, device: torch.device, pretrained: Pretrained | None
) -> None:
    preset, chosen = PRESETS[settings.preset], chosen_settings(settings, kept_settings(settings))
    tokens, limits = len(data.train.tokens), {name: getattr(settings, name) for name in chosen & LIMITS}
    if pretrained and not limits:
        limits = {**dict.fromkeys(LIMITS), "max_epochs": FINE_TUNING_EPOCHS}
    recipe = preset.recipe_on(device.type, tokens, **limits)
    values = {**vars(recipe), **vars(preset.config), "vocab_size": data.vocab_size}
    if settings.optimizer not in (None, recipe.optimizer):
        values["learning_rate"] = LEARNING_RATES[settings.optimizer]
    if pretrained:
        values |= shape_of(pretrained, settings, data)
        values["learning_rate"] *= PRETRAINED_SHARE
    for name in (*CONFIG_FIELDS, *RECIPE_FIELDS):
        if name not in chosen:
            setattr(settings, name, values[name])
    if settings.vocab_size < data.vocab_size:
        raise UserError(f"vocab_size {settings.vocab_size} is below the tokenizer's {data.vocab_size}")
    if settings.bigram_start and (pretrained or not config_of(settings).can_hold_bigrams):
        require(
            "bigram_start" not in chosen,
            "--bigram-start needs modern blocks with an untied output head (--no-tie-weights), and no --init-from",
        )
        settings.bigram_start = False
    if settings.grow_at and pretrained:
        require("grow_at" not in chosen, "--grow-at is for new models: those of --init-from train whole")
        settings.grow_at = 0.0
    if settings.optimizer == "muon" and not pretrained and "weight_decay" not in chosen:
        settings.weight_decay = float(f"{weight_decay_for(tokens):.2g}")
    if settings.max_epochs:
        steps = recipe_of(settings, tokens).max_steps
        if "eval_interval" not in chosen:
            settings.eval_interval = min(settings.eval_interval, -(-steps // EVALUATIONS))
        if "warmup_steps" not in chosen:
            settings.warmup_steps = min(settings.warmup_steps, int(WARMUP * steps))


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
        f"{command('data/train_tokenizer.py', data_dir=settings.data_dir)} "
        f"--kind {shlex.quote(settings.init_from)}, then "
        f"{command('data/prepare_data.py', data_dir=settings.data_dir)}",
    )
    return shape


def kept_settings(settings: SimpleNamespace) -> list[str]:
    return [name for name in settings.defaults if name not in NOT_KEPT]


def remembered(settings: SimpleNamespace) -> dict[str, object]:
    """The settings that a checkpoint keeps, by name."""
    return {name: getattr(settings, name) for name in kept_settings(settings)}


def changed_settings(settings: SimpleNamespace, checkpoint: dict) -> dict[str, str]:
    """What a resumed run changes, by name, each as "learning_rate 0.006 is now 0.001"."""
    saved = checkpoint["settings"]
    return {
        name: f"{name} {saved[name]} is now {now if name != 'micro_batch' or now else 'chosen anew'}"
        for name, now in remembered(settings).items()
        if now != saved[name]
    }


def keep_from_checkpoint(
    settings: SimpleNamespace, checkpoint: dict, data: Data, device: torch.device
) -> None:
    saved, then, kept = checkpoint["settings"], checkpoint["defaults"], kept_settings(settings)
    edited = {name for name, value in settings.defaults.items() if name in then and value != then[name]}
    require(set(kept) <= saved.keys(), STARTED_EARLIER)
    chosen = chosen_settings(settings, (settings.given | edited) & set(kept))
    for name in set(kept) - chosen:
        setattr(settings, name, saved[name])
    refuse_differences(settings, checkpoint, data)
    if checkpoint.get("device", hardware(device)) != hardware(device) and "micro_batch" not in chosen:
        settings.micro_batch = 0  # what suits a GPU may not fit another one's memory


def refuse_differences(settings: SimpleNamespace, checkpoint: dict, data: Data) -> None:
    """Raise UserError, with a list, if something that identifies a run is not as in its checkpoint."""
    differences = [change for name, change in changed_settings(settings, checkpoint).items() if name in FIXED]
    current = fingerprints(data)
    changed = [name for name, value in checkpoint["data"].items() if value != current[name]]
    if "tokenizer" in changed:
        changed = ["tokenizer"]  # with which the packed stories change in any case
    differences += [f"changed {name}" for name in changed]
    if not differences:
        return
    folder = shown(settings.checkpoint_dir)
    where = f" (in {shown(settings.data_dir)}; --data-dir takes another folder)" if changed else ""
    other_stories = changed and "tokenizer" not in changed
    weights = (
        f" (there with --init-from {shlex.quote(folder)}, to begin with its weights)" if other_stories else ""
    )
    raise UserError(
        f"the run in {folder} cannot be resumed with: {'; '.join(differences)}{where}. Change that back, or start a "
        f"new run with --fresh (it moves the old one aside) or another --checkpoint-dir{weights}"
    )
