"""What train.py shows while it runs, and how it hears that it should stop."""

import math
import os
import re
import shlex
import signal
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from model.batches import Data
from model.config import Recipe
from model.files import command, shown
from model.resume import TrainingState
from model.runtime import Processes, Runtime, peak_flops

QUIET_SECONDS = 20  # between progress lines where there is no terminal


def print_plan(
    settings: SimpleNamespace,
    recipe: Recipe,
    data: Data,
    state: TrainingState,
    runtime: Runtime,
    processes: Processes,
) -> None:
    """What will be trained, on what, where and how long."""
    config, train = state.model.config, data.train
    tokens_per_step = max(1, recipe.batch_tokens // config.block_size) * config.block_size
    minutes = f" or {recipe.max_minutes:g} minutes" if recipe.max_minutes else ""
    epochs = recipe.max_steps * tokens_per_step / len(train.tokens)
    where = f" on {processes.count} processes" if processes.count > 1 else ""
    print(
        f"stories      {train.stories:,} ({len(train.tokens):,} tokens) to train on, "
        f"{data.validation.stories:,} ({len(data.validation.tokens):,} tokens) to validate\n"
        f"model        {settings.init_from or settings.preset}: "
        f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
        f"context {config.block_size}, vocabulary {config.vocab_size:,}, {config.blocks} blocks; "
        f"{state.model.count_parameters():,} parameters\n"
        f"device       {runtime.reasons}{where}\n"
        f"run          {recipe.max_steps:,} steps{minutes}, {tokens_per_step:,} tokens each (at most "
        f"{epochs:.1f} epochs); {recipe.optimizer}, learning rate {recipe.learning_rate:g}, {recipe.schedule} decay\n"
        f"results      in {shown(settings.checkpoint_dir)}"
    )


class ProgressBar:
    """A tqdm bar on a terminal; elsewhere a line now and then."""

    def __init__(
        self, state: TrainingState, recipe: Recipe, tokens_per_step: int, runtime: Runtime, shows: bool
    ):
        self.state, self.tokens_per_step, self.shows = state, tokens_per_step, shows
        self.max_steps = recipe.max_steps
        self.time_limit = 60 * recipe.max_minutes if recipe.max_minutes else math.inf
        peak = peak_flops(runtime.device)
        self.flops_share = state.model.flops_per_token() / peak if peak else None
        self.step, self.seconds, self.printed = state.step, state.seconds, time.monotonic()
        self.speed = 0.0  # tokens per second
        self.bar = tqdm(
            total=recipe.max_steps, initial=state.step, unit="step", dynamic_ncols=True, smoothing=0.05,
            disable=None if shows else True,
        )  # fmt: skip

    def update(self, loss: float) -> None:
        """Show the loss of the latest step, and the speed, smoothed over about ten calls."""
        steps, seconds = self.state.step - self.step, self.state.seconds - self.seconds
        self.step, self.seconds = self.state.step, self.state.seconds
        now = steps * self.tokens_per_step / max(seconds, 1e-9)
        self.speed = 0.9 * self.speed + 0.1 * now if self.speed else now
        per_second = self.speed / self.tokens_per_step
        left = max(0, min(self.max_steps - self.step, (self.time_limit - self.seconds) * per_second))
        self.bar.total = self.step + math.ceil(left)
        mfu = f", MFU {100 * self.flops_share * self.speed:.1f} %" if self.flops_share else ""
        text = f"loss {loss:.3f}, {self.speed:,.0f} tokens/s{mfu}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(steps)
        if self.shows and self.bar.disable and time.monotonic() - self.printed > QUIET_SECONDS:
            self.say(
                f"step {self.step:,} of {self.bar.total:,}: {text}, {left / per_second / 60:.1f} minutes to go"
            )

    def say(self, text: str) -> None:
        if self.shows:
            self.bar.write(text)
            sys.stdout.flush()
            self.printed = time.monotonic()

    def close(self) -> None:
        self.bar.update(self.state.step - self.bar.n)
        self.bar.close()


class StopRequest:
    """True once Ctrl-C or SIGTERM came; the step is finished and saved. A second Ctrl-C stops at once."""

    def __init__(self, processes: Processes):
        self.received, self.agreed, self.processes = 0, 0, processes
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def __bool__(self) -> bool:
        return self.agreed != 0

    def receive(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self.processes.count == 1:  # several stop together: see agree()
            self.agreed = number
        if self.processes.first:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)


def agree(state: TrainingState, stop: StopRequest, processes: Processes) -> None:
    """All processes take the same decisions: whether to stop, and how much time has passed."""
    if processes.count > 1:
        # a tensor on the CPU, so that no GPU is waited for
        facts = torch.tensor([stop.received, state.seconds], dtype=torch.float64)
        dist.all_reduce(facts, op=dist.ReduceOp.MAX)
        stop.agreed, state.seconds = int(facts[0]), float(facts[1])


def print_end(state: TrainingState, settings: SimpleNamespace, tokens_per_step: int, finished: bool) -> None:
    """The result in lines of `key: value`, or the command to go on."""
    folder = shown(settings.checkpoint_dir)
    if not finished:
        words = re.sub(r"--fresh(=\S+| (?!-)\S+)?( |$)", "", " ".join(map(shlex.quote, sys.argv[1:]))).strip()
        program = ["python"]
        if "RANK" in os.environ:
            program = ["torchrun", f"--nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 1)}"]
        again = f"{shlex.join([*program, shown(sys.argv[0])])} {words}".strip()
        print(f"saved step {state.step:,} in {folder}; go on with: {again}")
        return
    tokens = state.step * tokens_per_step
    places = f" --checkpoint-dir {shlex.quote(folder)}" if "checkpoint_dir" in settings.given else ""
    print(
        f"steps: {state.step}\ntokens: {tokens}\ntraining_seconds: {state.seconds:.1f}\n"
        f"tokens_per_second: {tokens / max(state.seconds, 1e-9):.0f}\n"
        f"best_validation_loss: {state.best_loss:.4f}\n"
        f"best_checkpoint: {folder}/best.pt\nloss_curve: {folder}/loss_curve.png\n"
        f"stories_on_the_way: {folder}/samples.md\n"
        f"next: {command('generate.py')}{places}"
    )
