"""A run's state, which changes from step to step: how it begins, goes into a checkpoint, and comes back."""

import contextlib
import importlib
import itertools
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from model.bigrams import begin_as_bigrams
from model.checkpoint import (
    BEFORE_DECAY,
    list_checkpoints,
    load_checkpoint,
    peek,
    save_checkpoint,
    step_of,
)
from model.errors import UserError, first_line, ran_out_of_memory, require, warn
from model.files import atomic_write, shown
from model.gpt import GPT
from model.optimizer import make_optimizers
from model.packed_data import fingerprints
from model.run import STARTED_EARLIER, Run, recipe_of, remembered
from model.runtime import hardware


def ruined(run: Run, step: int, how: str) -> str:
    """An error's text."""
    return (
        f"after step {step} {how}: the model is ruined, and not saved. Try a lower --learning-rate than "
        f"{run.recipe.learning_rate:g}, with --fresh if its checkpoints are ruined, too"
    )


def diverged(run: Run, state: "TrainingState") -> str:
    """An error's text."""
    return (
        f"the loss or its gradient is not finite, {state.not_finite.item()} steps in a row up to step {state.step}; "
        f"none of them was applied. Try a lower --learning-rate than {run.recipe.learning_rate:g}, or --dtype float32. "
        "If that happens at once when resuming, the model was ruined before it was saved: delete the latest "
        "checkpoint, or start a new run with --fresh"
    )


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
    # how many steps in a row, up to now, had a loss or gradient that is not finite; on the model's device
    not_finite: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int))

    COUNTERS = ("step", "seconds", "best_loss", "last_evaluation")

    def snapshot(self, run: Run) -> dict:
        """This state as a checkpoint, enough to resume, generate, evaluate and export.

        Raises UserError if a weight is not finite, as after a step with a huge learning rate.
        """
        finite = torch.stack([parameter.isfinite().all() for parameter in self.model.parameters()]).all()
        require(finite, ruined(run, self.step, "some weights are not finite"))
        return {
            "config": asdict(self.model.config),
            "settings": remembered(run.settings),
            "defaults": run.settings.defaults,
            "device": hardware(run.runtime.device),
            "torch": str(torch.__version__),  # without its own type
            "depth": self.model.depth,
            "flex": self.model.flex if run.runtime.compile else None,
            "weights": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "tokenizer": run.data.tokenizer_json,
            "eot_id": run.data.eot_id,
            "data": fingerprints(run.data),
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


def initial_state(run: Run, checkpoint: dict | None) -> TrainingState:
    """The state of a new run, or of one that goes on from a checkpoint."""
    device, recipe = run.runtime.device, run.recipe
    torch.manual_seed(run.settings.seed)
    model = GPT(run.config).to(device)
    if run.pretrained:
        model.load_state_dict(run.pretrained.weights)
        run.pretrained.weights.clear()  # free their memory
    optimizers = make_optimizers(model, recipe, low_precision=run.runtime.dtype == torch.bfloat16)
    scaler = torch.amp.GradScaler(device.type, enabled=run.runtime.dtype == torch.float16)
    not_finite = torch.zeros((), dtype=torch.int, device=device)
    state = TrainingState(model, optimizers, scaler, not_finite=not_finite)
    if checkpoint:
        try:
            state.restore(checkpoint)
        except (KeyError, RuntimeError, ValueError) as error:
            if ran_out_of_memory(error):
                raise
            raise UserError(
                f"the parts of the checkpoint after step {checkpoint['step']} do not fit together "
                f"({first_line(error)}): move it away, and the run goes on from the one before"
            ) from error
        # measured anew, FlexAttention might be chosen otherwise, and it rounds otherwise; but it may be wrong elsewhere
        if (checkpoint.get("device"), checkpoint.get("torch")) == (hardware(device), torch.__version__):
            model.flex = checkpoint.get("flex")
        # best.pt may be later than the checkpoint; if it is lost, the next evaluation writes it
        best = peek(run.folder / "best.pt")
        state.best_loss = min(checkpoint["best_loss"], best["best_loss"]) if best else math.inf
        return state
    if recipe.bigram_start:
        with ThreadPoolExecutor(1) as background:
            counting = background.submit(timed, begin_as_bigrams, model, run.data.train.tokens)
            if run.runtime.compile:
                import_compiler()  # meanwhile, since this is Python, and counting is not
            state.seconds = counting.result()
    if recipe.grow_at:
        model.set_depth(recipe.depth(0.0, run.config.n_layer))
        model.silence(model.depth)
    return state


def timed(function: Callable, *arguments: object) -> float:
    """Call a function that uses one thread; return how many seconds it computed."""
    started = time.thread_time()
    function(*arguments)
    return time.thread_time() - started


def import_compiler() -> None:
    """Import what torch.compile takes seconds to import. If that fails, compilation will, and say why."""
    with contextlib.suppress(Exception):
        importlib.import_module("torch._inductor.compile_fx")


def rewind(run: Run, path: Path, checkpoint: dict) -> tuple[Path, dict]:
    """If an extended run had already started its final decay, return the checkpoint from before the decay;
    otherwise return the arguments unchanged.

    From there the run continues as if it had been started with the greater length. The files of the shorter run are
    kept under other names. A run that is made so short that its decay should have started keeps the checkpoint that it
    goes on from, since that is from before the decay.
    """
    saved, step, earlier = checkpoint["settings"], checkpoint["step"], run.folder / BEFORE_DECAY
    before = recipe_of(SimpleNamespace(**saved), len(run.data.train.tokens))
    then, now = (recipe.progress(step, checkpoint["seconds"]) for recipe in (before, run.recipe))
    decaying, extended = then > before.turning_point, now < min(then, 1)
    if not decaying and 0 < run.recipe.turning_point <= now and path != earlier and run.processes.first:
        save_checkpoint(earlier, checkpoint)  # the run is now so short that its decay should have started
    if not (decaying and extended):
        return path, checkpoint
    going_on = f"going on from step {step:,}, with the learning rate of the longer run"
    if before.turning_point == 0:  # there is no step before the decay
        run.processes.say(f"extended run: {going_on}")
        return path, checkpoint
    try:
        rewound = load_checkpoint(earlier, to_resume=True)
        require(rewound["step"] <= step, f"{shown(earlier)} is from a later step")
    except UserError as error:
        if run.processes.first:
            warn(f"{error}; {going_on}")
        return path, checkpoint
    if rewound["step"] == step:
        return path, checkpoint
    rewound["best_loss"] = min(rewound["best_loss"], checkpoint["best_loss"])
    rewound |= {"settings": remembered(run.settings), "defaults": run.settings.defaults}
    if run.processes.first:
        keep_shorter_run(run.folder, path, step, rewound)
    run.processes.say(
        f"extended run: going back to before the learning-rate decay; step {step:,} is kept as shorter_*"
    )
    return earlier, rewound


def keep_shorter_run(folder: Path, path: Path, step: int, rewound: dict) -> None:
    """Give the files of a run that ends with the checkpoint `path`, after `step`, other names, and save the checkpoint
    from which the extended run goes on."""
    numbered = (f"shorter_{step}-{number}_" for number in itertools.count(2))
    prefixes = itertools.chain([f"shorter_{step}_"], numbered)
    prefix = next(prefix for prefix in prefixes if not any(folder.glob(f"{prefix}*")))
    results = (folder / name for name in ("metrics.jsonl", "loss_curve.png", "samples.md"))
    for file in (path, *results):
        if file.exists():
            with atomic_write(file.with_name(prefix + file.name)) as temporary:
                shutil.copy2(file, temporary)
    # so that a run that is killed now still knows its new length, and what best.pt is
    save_checkpoint(folder / f"ckpt_{rewound['step']}.pt", rewound)
    for file in list_checkpoints(folder):
        if file == path:  # copied above
            file.unlink()
        elif step_of(file) > rewound["step"]:
            file.rename(file.with_name(prefix + file.name))
