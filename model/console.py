"""What train.py prints while it runs."""

import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from model.errors import note
from model.files import command, count_text, shown
from model.loss import bits_per_byte
from model.processes import StopRequest
from model.run import NOT_KEPT, Run
from model.runtime import peak_flops
from model.script import close_output
from model.settings import flag_name
from model.training_state import TrainingState

# Beyond, dropout helps a little, on top of the weight decay that few stories get (benchmarks/RESULTS.md)
MANY_EPOCHS = 12
QUIET_SECONDS = 20  # between progress lines when not on a terminal


def print_finished(run: Run, step: int, changes: dict[str, str]) -> None:
    """Say that the run had ended already, and what would extend it. `changes` are those of its settings."""
    if run.data.outdated:
        note(run.data.outdated)
    recipe, limit = run.recipe, "max_minutes"
    if recipe.max_steps and step >= recipe.max_steps:
        limit = "max_steps" if recipe.max_steps == run.settings.max_steps else "max_epochs"
    if limit in changes:
        beyond = f"step {step:,} is already beyond this {flag_name(limit)}"
        print(f"{beyond}: nothing is left to train, and the saved run keeps its own limit")
    else:
        print(f"already finished: a larger {flag_name(limit)} extends this run, --fresh starts a new one")


def print_plan(run: Run, state: TrainingState, resumed_from: Path | None) -> None:
    """Print what will be trained, on what data and device, for how long, and how it begins."""
    settings, config, recipe, data, train = run.settings, run.config, run.recipe, run.data, run.data.train
    if data.outdated:
        note(data.outdated)
    steps = f"{recipe.max_steps:,} steps" if recipe.max_steps else ""
    minutes = f"{recipe.max_minutes:g} minute{'s' * (recipe.max_minutes != 1)}" if recipe.max_minutes else ""
    limits = " or ".join(filter(None, (steps, minutes))) + ", whichever comes first" * bool(steps and minutes)
    epochs = (recipe.max_steps or 0) * run.tokens_per_step / len(train.tokens)
    epochs = min(epochs, recipe.max_epochs or epochs)  # the last step may begin another
    where = f" on {run.processes.world_size} processes" if run.processes.world_size > 1 else ""
    softmax = f"; softmax over {run.softmax_size:,} tokens" if run.shortlists else ""
    growth = ""
    if (depth := state.model.depth) < config.n_layer and recipe.grow_at:
        growth = f"; {count_text(depth, 'layer', 'layers')} until {100 * recipe.grow_at:g} % are done"
    print(
        f"stories      {train.stories:,} ({len(train.tokens):,} tokens) for training, "
        f"{data.validation.stories:,} ({len(data.validation.tokens):,} tokens) for validation\n"
        f"model        {settings.init_from or settings.preset}: "
        f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"context {config.block_size}, vocabulary {config.vocab_size:,}, {config.blocks} blocks; "
        f"{state.model.count_parameters():,} parameters\n"
        f"device       {run.runtime.description}{where}\n"
        f"run          {limits}, {run.tokens_per_step:,} tokens per step"
        f"{f' (at most {max(epochs, 0.1):.1f} epochs)' if steps else ''}{growth}\n"
        f"recipe       {recipe.optimizer}, learning rate {recipe.learning_rate:g}, {recipe.schedule} decay, "
        f"weight decay {recipe.weight_decay:g}{softmax}\n"
        f"results      in {shown(run.folder)}"
    )
    if epochs > MANY_EPOCHS and not (recipe.max_minutes or config.dropout or state.step):
        print(f"note         with stories read more than {MANY_EPOCHS} times, --dropout 0.1 may help")
    if recipe.batch_tokens < config.block_size:
        print(f"note         --batch-tokens {recipe.batch_tokens}: a step takes at least one window")
    if recipe.warmup_steps > (recipe.max_steps or math.inf):
        print(f"note         {recipe.warmup_steps} --warmup-steps: the learning rate will not reach its peak")
    if resumed_from:
        print(f"resuming     from {shown(resumed_from)}, after step {state.step:,}")
    elif recipe.bigram_start:
        print(f"initialised  as a bigram model of the stories, counted in {state.seconds:.1f} s")


def duration(minutes: float) -> str:
    """So many minutes, or hours or days."""
    for unit, size in (("days", 24 * 60), ("hours", 60)):
        if minutes >= 2 * size:
            return f"{minutes / size:.1f} {unit}"
    return f"{minutes:.1f} minutes"


class ProgressBar:
    """A tqdm bar on a terminal, otherwise an occasional line."""

    def __init__(self, run: Run, state: TrainingState, stop: StopRequest):
        self.run, self.state, self.stop, self.shows = run, state, stop, run.processes.first
        half = run.runtime.dtype != torch.float32
        peak = peak_flops(run.runtime.device) if half else None
        self.peak = peak * run.processes.world_size if peak else None  # FLOP/s
        self.step, self.seconds, self.printed = state.step, state.seconds, time.monotonic()
        self.speed = 0.0  # tokens per second
        self.loss, self.weight = 0.0, 0.0  # a moving average, and how much of it has been seen
        self.text = ""  # behind the bar
        self.bar = tqdm(
            total=run.recipe.max_steps, initial=state.step, unit="step", dynamic_ncols=True,
            disable=None if self.shows else True, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )  # fmt: skip

    def update(self, loss: float) -> None:
        """Show the loss, given the latest step's, and the speed, both smoothed over about ten calls."""
        steps, seconds = self.state.step - self.step, self.state.seconds - self.seconds
        self.step, self.seconds = self.state.step, self.state.seconds
        now = steps * self.run.tokens_per_step / max(seconds, 1e-9)
        self.speed = 0.9 * self.speed + 0.1 * now if self.speed else now
        mfu = ""
        if self.peak:
            mfu = f", MFU {100 * self.flops(self.state.model.depth) * self.speed / self.peak:.1f} %"
        steps_left, minutes_left = self.remaining()
        if math.isfinite(loss):
            self.loss, self.weight = 0.9 * self.loss + 0.1 * loss, 0.9 * self.weight + 0.1
            loss = self.mean_loss
        text = f"loss {loss:.3f}, {self.speed:,.0f} tokens/s{mfu}, {duration(minutes_left)} left"
        self.bar.total = self.step + steps_left
        self.text = text
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(steps)
        if self.shows and self.bar.disable and time.monotonic() - self.printed > QUIET_SECONDS:
            # a limit of time makes of it a guess that would change with each line
            total = "" if self.run.recipe.max_minutes else f" of {self.bar.total:,}"
            self.say(f"step {self.step:,}{total}: {text}")

    @property
    def mean_loss(self) -> float | None:
        """Of the latest steps; None if there were none."""
        return self.loss / self.weight if self.weight else None

    def flops(self, depth: int) -> float:
        return self.state.model.flops_per_token(depth, self.run.softmax_size)

    def remaining(self) -> tuple[int, float]:
        """Steps and minutes until the end. Once all blocks train, a step takes longer, in proportion to its
        operations."""
        recipe, model = self.run.recipe, self.state.model
        slower = self.flops(model.config.n_layer) / self.flops(model.depth)
        seconds_per_step = self.run.tokens_per_step / self.speed

        def left(total: float, done: float) -> tuple[float, float]:
            """What is left of a number of steps or seconds: before all blocks train, and after."""
            first = max(0, total * recipe.grow_at - done) if slower > 1 else 0
            return first, max(0, total - done) - first

        ends = []  # seconds and steps until each of the limits
        if recipe.max_steps:
            now, later = left(recipe.max_steps, self.step)
            ends.append(((now + later * slower) * seconds_per_step, round(now + later)))
        if recipe.max_minutes:
            now, later = left(60 * recipe.max_minutes, self.seconds)
            ends.append((now + later, math.ceil((now + later / slower) / seconds_per_step)))
        seconds, steps = min(ends)
        return steps, seconds / 60

    def evaluating(self) -> None:
        """Say why the bar stands still, until the next line."""
        self.bar.set_postfix_str("evaluating")

    def say(self, text: str) -> None:
        """Print a line. If what reads our output (such as `head`) is gone, let the run be saved and stop; without a
        terminal, or space on the disk for a log, it goes on."""
        if self.shows:
            self.bar.set_postfix_str(self.text, refresh=False)
            try:
                self.bar.write(text)
                sys.stdout.flush()
            except OSError as error:
                close_output()
                if isinstance(error, BrokenPipeError):
                    self.stop.receive(signal.SIGPIPE)
            self.printed = time.monotonic()

    def close(self) -> None:
        self.bar.update(self.state.step - self.bar.n)
        self.bar.close()


def print_end(run: Run, state: TrainingState) -> None:
    """Print the result of a finished run as `key: value` lines."""
    folder, tokens = shown(run.folder), state.step * run.tokens_per_step
    best_bits = bits_per_byte(state.best_loss, run.data.validation.bytes_per_token)
    print(
        f"steps: {state.step}\ntokens: {tokens}\ntraining_seconds: {state.seconds:.1f}\n"
        f"tokens_per_second: {tokens / max(state.seconds, 1e-9):.0f}\n"
        f"best_validation_loss: {state.best_loss:.4f}\n"
        f"best_bits_per_byte: {best_bits:.4f}\n"
        f"best_checkpoint: {folder}/best.pt\nloss_curve: {folder}/loss_curve.png\n"
        f"samples: {folder}/samples.md\n"
        f"next: {command('generate.py', checkpoint_dir=run.folder)}"
    )


def print_stop(run: Run, state: TrainingState) -> None:
    """Print the command that resumes a stopped run."""
    settings, program = run.settings, command("train.py")
    if workers := os.environ.get("LOCAL_WORLD_SIZE"):  # torchrun's
        program = program.replace("python", f"torchrun --standalone --nproc_per_node={workers}", 1)
    flags = []  # the checkpoint remembers the others
    forgotten = settings.given & (NOT_KEPT - {"fresh"})
    for name in settings.defaults:
        if name in forgotten:
            value = getattr(settings, name)
            flags += [flag_name(name), shown(value) if isinstance(value, Path) else str(value)]
    resume = " ".join([program, shlex.join(flags)]).strip()
    if workers and int(workers) < run.processes.world_size:
        resume = "the same torchrun commands, on all machines"
    print(f"saved step {state.step:,} in {shown(run.folder)}; resume with: {resume}")
