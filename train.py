"""Step 4: train a GPT on the packed stories. Run it again, and it goes on from the latest checkpoint.

python train.py                              the default model
python train.py --preset quickstart          a small one: minutes on two CPU cores
python train.py --max-minutes 30             be done, learning rate at its end, after 30 minutes
torchrun --nproc_per_node=2 train.py         two GPUs, or two CPU processes
"""

import contextlib
import copy
import math
import os
import sys
import time
from types import SimpleNamespace

# OpenMP's threads, which wait for each other, shall soon let other programs compute; read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.batches import Batches, Data, load_data, to_device, validation_windows
from model.bigrams import begin_as_bigrams
from model.checkpoint import BEFORE_DECAY, load_latest, prune, save_checkpoint
from model.config import BLOCK_FAMILIES, OPTIMIZERS, PRESETS, SCHEDULES
from model.console import ProgressBar, StopRequest, agree, print_end, print_plan
from model.files import shown
from model.generation import continue_text, text_tokenizer
from model.gpt import GPT
from model.huggingface import load_pretrained
from model.metrics import Metrics
from model.optimizer import learning_rate, make_optimizers, set_rates
from model.resume import TrainingState, only_one, rewind, set_aside, settle
from model.runtime import (
    Processes,
    Runtime,
    choose_device,
    choose_runtime,
    prepare_forward,
    same_everywhere,
    start_processes,
    stop_processes,
    total_over,
    wait_for_all,
)
from model.settings import UserError, read_settings, require, run_script

# Edit these, or give them as flags: MAX_STEPS is --max-steps. None takes the preset's value.
PRESET = "stories-9m"  # shape and recipe, by a name in model/config.py
INIT_FROM: str | None = None  # begin with the weights of a Hugging Face folder or name (GPT-2 or Qwen3)

BLOCKS: str | None = None  # modern (Qwen3's) or gpt2 (GPT-2's)
BLOCK_SIZE: int | None = None  # context length, in tokens
N_LAYER: int | None = None  # transformer blocks
N_HEAD: int | None = None  # attention heads in each
N_EMBD: int | None = None  # width
DROPOUT: float | None = None  # share of activations dropped; helps where the epochs are many
TIE_WEIGHTS: bool | None = None  # use the token embedding as the output head
VOCAB_SIZE: int | None = None  # None takes the tokenizer's; a larger one only pads
N_KV_HEAD: int | None = None  # key-value heads, shared by groups of attention heads; None: one for each
HEAD_SIZE: int | None = None  # width of a head; None: N_EMBD / N_HEAD
N_INNER: int | None = None  # width of the feed-forward layer; None: 4 N_EMBD, or 8/3 of it in modern blocks
ROPE_BASE: float | None = None  # base of the rotary positions' wavelengths, 10,000 in all presets

MAX_STEPS: int | None = None  # optimizer steps in all
MAX_MINUTES: float | None = None  # minutes of training steps in all (compiling and evaluating come on top)
BATCH_TOKENS: int | None = None  # tokens per optimizer step, over all processes
MICRO_BATCH = 0  # windows in one forward pass; lower it when memory runs out; 0 finds it
OPTIMIZER: str | None = None  # muon (for the blocks' matrices; AdamW for the rest) or adamw
LEARNING_RATE: float | None = None  # peak
WEIGHT_DECAY: float | None = None  # on matrices and embeddings
WARMUP_STEPS: int | None = None  # over which the learning rate rises
SCHEDULE: str | None = None  # how it falls: linear or cosine
DECAY_FRACTION: float | None = None  # the last part of the run, over which it falls
FINAL_LEARNING_RATE: float | None = None  # where it ends, as a fraction of the peak
GRAD_CLIP: float | None = None  # longest gradient norm; 0 is off
MASK_STORIES: bool | None = None  # a token sees its own story only, not the one before it in the window
BIGRAM_START: bool | None = None  # begin as a bigram model of the stories, not with random weights

EVAL_INTERVAL: int | None = None  # steps between evaluations, each with a sample and a new loss curve
EVAL_TOKENS = 65_536  # validation tokens in each, evenly spread
SAVE_INTERVAL: int | None = None  # steps between checkpoints; None: as EVAL_INTERVAL
KEEP = 3  # latest checkpoints kept, beside best.pt
LOG_INTERVAL = 10  # steps between rows in metrics.jsonl
SAMPLE_PROMPT = "Once upon a time"  # beginning of the sample story at each evaluation
SAMPLE_TOKENS = 200  # longest sample; 0 for none

SEED = 1337  # of the weights, the data order and dropout
DEVICE = "auto"  # auto, cpu, cuda, cuda:1 or mps
DTYPE = "auto"  # auto, bfloat16, float16 or float32
COMPILE = "auto"  # auto, on or off: torch.compile
DETERMINISTIC = False  # on CUDA: only kernels that add in a fixed order; slower
FRESH = False  # begin a new run; the folder of the old one is moved aside, not deleted
VERIFY = False  # check the .bin files' SHA-256 before training
DATA_DIR = "data"  # holds tokenizer/ and processed/
CHECKPOINT_DIR = "checkpoints"  # where checkpoints, metrics.jsonl, loss_curve.png and samples.md go


# Steps in a row that are not finite, after which the run stops: more where the scale of float16's gradients, at first
# 2**16, may have to be halved
GIVE_UP, GIVE_UP_SCALED = 5, 20


def main() -> None:
    settings = read_settings(
        __file__,
        choices={
            "preset": tuple(PRESETS),
            "blocks": BLOCK_FAMILIES,
            "optimizer": OPTIMIZERS,
            "schedule": SCHEDULES,
            "dtype": ("auto", "bfloat16", "float16", "float32"),
            "compile": ("auto", "on", "off"),
        },
        aliases={"max-iters": "max-steps", "lr": "learning-rate", "out-dir": "checkpoint-dir"},
    )
    for name in ("keep", "log_interval", "eval_tokens"):
        require(getattr(settings, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
    require(
        settings.save_interval is None or settings.save_interval >= 1, "--save-interval must be at least 1"
    )
    require(settings.micro_batch >= 0, "--micro-batch must be 0 (found) or more")
    require(settings.sample_tokens >= 0, "--sample-tokens must be 0 (no sample) or more")
    processes = start_processes(settings.device)
    folder = settings.checkpoint_dir
    try:
        if settings.fresh:  # what cannot begin is refused before anything is moved
            pretrained = load_pretrained(settings.init_from) if settings.init_from else None
            settle(copy.copy(settings), None, load_data(settings.data_dir), True, pretrained)
        if settings.fresh and processes.first and (moved := set_aside(folder)):
            print(f"the earlier run is now in {shown(moved)}")
        with only_one(folder) if processes.first else contextlib.nullcontext():
            wait_for_all(processes)
            train(settings, processes)
    except torch.OutOfMemoryError:
        half = max(1, settings.micro_batch // 2)
        raise UserError(f"the GPU's memory ran out; go on with --micro-batch {half}, or fewer") from None
    finally:
        stop_processes()


def train(settings: SimpleNamespace, processes: Processes) -> None:
    # What: the stories, and the run to begin or to go on with
    data = load_data(settings.data_dir, settings.verify)
    device, folder = choose_device(settings.device), settings.checkpoint_dir
    path, checkpoint = load_latest(folder) or (None, None)
    wait_for_all(processes)  # all have read before the first may move files
    pretrained = load_pretrained(settings.init_from) if settings.init_from and not checkpoint else None
    config, recipe = settle(settings, checkpoint, data, device.type == "cpu", pretrained)
    if checkpoint:
        path, checkpoint = rewind(folder, path, checkpoint, recipe, processes.first)
    windows_per_step = max(1, recipe.batch_tokens // config.block_size)
    tokens_per_step = windows_per_step * config.block_size
    require(
        windows_per_step >= processes.count,
        f"a step has {windows_per_step} windows for {processes.count} processes: use fewer, or a larger --batch-tokens",
    )
    batches = Batches(data.train.tokens, config.block_size, windows_per_step, settings.seed)
    validation = validation_windows(
        data.validation.tokens, config.block_size, max(1, settings.eval_tokens // config.block_size)
    )

    # With what: the model and its optimizers, on which device
    runtime = choose_runtime(settings.device, settings.dtype, settings.compile, settings.deterministic)
    if runtime.device.type == "cuda":
        batches.move_to(runtime.device, budget=0.25 * torch.cuda.mem_get_info(runtime.device)[0])
    torch.manual_seed(settings.seed)
    model = GPT(config).to(runtime.device)
    if pretrained:
        model.load_state_dict(pretrained.with_context(config.block_size).weights)
    optimizers = make_optimizers(model, recipe, low_precision=runtime.dtype == torch.bfloat16)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    state = TrainingState(model, optimizers, scaler)
    if checkpoint:
        state.restore(checkpoint)
    require(
        same_everywhere(state.step, processes),
        "the processes found different checkpoints: all must see the same --checkpoint-dir",
    )
    if recipe.bigram_start and not checkpoint:
        started = time.perf_counter()
        begin_as_bigrams(model, data.train.tokens)
        state.seconds = time.perf_counter() - started
    if processes.first:
        print_plan(settings, recipe, data, state, runtime, processes)
        if checkpoint:
            print(f"going on     from {shown(path)}, after step {state.step:,}")
        elif recipe.bigram_start:
            print(f"beginning    as a bigram model of the stories, counted in {state.seconds:.1f} s")
    if checkpoint and recipe.progress(state.step, state.seconds) >= 1:
        if processes.first:
            limit = "--max-steps" if state.step >= recipe.max_steps else "--max-minutes"
            print(f"finished already: a larger {limit} extends this run, --fresh begins anew")
        return

    # How: compiled where that works, in micro-batches that fit into memory
    mine = np.array_split(np.arange(windows_per_step), processes.count)[processes.rank]
    loss_of, micro_batch = prepare_forward(
        model, runtime, settings.micro_batch, len(mine), recipe.mask_stories
    )
    settings.micro_batch = micro_batch
    if processes.first:
        print(f"micro-batch  {micro_batch} windows, {-(-len(mine) // micro_batch)} to a step", flush=True)
    if processes.count > 1:
        loss_of = DistributedDataParallel(loss_of, broadcast_buffers=False, gradient_as_bucket_view=True)
    metrics = Metrics(folder, state.step, state.last_evaluation) if processes.first else None
    progress_bar = ProgressBar(state, recipe, tokens_per_step, runtime, shows=processes.first)
    stop = StopRequest(processes)
    saved_at, progress = (state.step, 1.0) if checkpoint else (0, 0.0)
    not_finite = torch.zeros((), dtype=torch.int, device=runtime.device)  # steps in a row
    agree(state, stop, processes)  # counting bigrams took each of them another time

    while True:
        # The state is now that after state.step steps: evaluate, save, or be done.
        before, progress = progress, recipe.progress(state.step, state.seconds)
        finished = progress >= 1
        if processes.first and state.step != state.last_evaluation:
            begun = state.step or pretrained  # there is something to evaluate
            if finished or (begun and state.step % settings.eval_interval == 0 and not stop):
                row = evaluate(model, validation, data, runtime, recipe.mask_stories)
                row |= {"step": state.step, "tokens": state.step * tokens_per_step}
                metrics.add({**row, "sample": write_sample(model, data, settings)})
                metrics.draw()
                state.last_evaluation = state.step
                mark = ""
                if row["validation_loss"] < state.best_loss:
                    state.best_loss, mark = row["validation_loss"], "; best so far"
                    save_checkpoint(folder / "best.pt", state.snapshot(settings, data))
                progress_bar.say(
                    f"step {state.step:,}: validation loss {row['validation_loss']:.4f} nats per token, "
                    f"{row['bits_per_byte']:.4f} bits per byte{mark}"
                )
        if processes.first and state.step != saved_at:
            if before < 1 - recipe.decay_fraction <= progress:  # from here a longer run would differ
                save_checkpoint(folder / BEFORE_DECAY, state.snapshot(settings, data))
            if finished or stop or state.step % settings.save_interval == 0:
                save_checkpoint(folder / f"ckpt_{state.step}.pt", state.snapshot(settings, data))
                prune(folder, settings.keep, state.step)
                saved_at = state.step
        if finished or stop:
            break

        # One step: batch_tokens tokens in micro-batches, whose gradients add up
        started = time.perf_counter()
        rate = learning_rate(recipe, state.step, progress)
        starts = batches.starts(state.step)[mine]
        loss = torch.zeros((), device=runtime.device)
        for first in range(0, len(mine), micro_batch):
            chosen = starts[first : first + micro_batch]
            windows = batches.tensor(chosen, runtime.device)
            inputs, targets = windows[:, :-1], windows[:, 1:]
            stories = number_stories(inputs, data.eot_id) if recipe.mask_stories else None
            if config.dropout:  # which activations are dropped follows from the seed and the step alone
                torch.manual_seed(dropout_seed(settings.seed, state.step, int(mine[first])))
            share = len(chosen) / windows_per_step
            # Several processes exchange gradients once a step, and DDP averages where a sum is meant.
            alone = processes.count > 1 and first + micro_batch < len(mine)
            with loss_of.no_sync() if alone else contextlib.nullcontext():
                with runtime.autocast():
                    mean = loss_of(inputs, targets, stories)
                scaler.scale(mean * share * processes.count).backward()
            loss += mean.detach() * share
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip or math.inf)
        not_finite = (not_finite + 1) * ~norm.isfinite()
        set_rates(optimizers, rate, state.step)
        for optimizer in optimizers:
            # A step that is not finite changes nothing. (scaler.step would look at each optimizer's gradients alone.)
            optimizer.found_inf = (not_finite > 0).float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        state.step += 1

        # What to show of it. Reading the loss waits for the GPU, so there it is done only now and then.
        logging = state.step % settings.log_interval == 0 or state.step == recipe.max_steps
        if logging or runtime.device.type == "cpu":
            loss = total_over(loss, processes)
            if not_finite >= (GIVE_UP_SCALED if scaler.is_enabled() else GIVE_UP):
                raise UserError(
                    f"the loss or its gradient is not finite, {not_finite.item()} steps in a row up to step "
                    f"{state.step}; none of them was applied. Try a lower --learning-rate than "
                    f"{recipe.learning_rate:g}, or --dtype float32"
                )
        state.seconds += time.perf_counter() - started
        if isinstance(loss, float):
            progress_bar.update(loss)
        if logging and processes.first:
            row = {
                "step": state.step,
                "train_loss": loss if math.isfinite(loss) else None,
                "learning_rate": rate,
                "gradient_norm": norm.item() if norm.isfinite() else None,
            }
            row |= {"tokens": state.step * tokens_per_step, "seconds": round(state.seconds, 2)}
            metrics.add({**row, "tokens_per_second": round(progress_bar.speed)})
        agree(state, stop, processes)

    progress_bar.close()
    wait_for_all(processes)
    if processes.first:
        print_end(state, settings, tokens_per_step, finished)
    if not finished:
        sys.exit(128 + stop.agreed)


def dropout_seed(seed: int, step: int, window: int) -> int:
    return int(np.random.SeedSequence((seed, step, window)).generate_state(1, np.uint64)[0] >> 1)


def number_stories(idx: Tensor, eot_id: int) -> Tensor:
    """Which story of its window each token (B, T) is in, (B, T) int32: an end counts to the story after it, which is
    generated from there."""
    return (idx == eot_id).cumsum(1, dtype=torch.int32)


@torch.no_grad()
def evaluate(
    model: GPT, validation: np.ndarray, data: Data, runtime: Runtime, mask_stories: bool
) -> dict[str, float]:
    """Mean loss over the validation windows, in nats per token and in bits per byte of text."""
    model.eval()
    total = 0.0
    # on a CPU the logits should stay in its caches
    tokens = 2_048 if runtime.device.type == "cpu" else 65_536
    chunk = max(1, tokens // model.config.block_size)
    for first in range(0, len(validation), chunk):
        windows = to_device(validation[first : first + chunk], runtime.device)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        stories = number_stories(inputs, data.eot_id) if mask_stories else None
        with runtime.autocast():
            total += model(inputs, targets, stories).item() * len(windows)
    model.train()
    loss = total / len(validation)
    return {
        "validation_loss": loss,
        "bits_per_byte": loss / math.log(2) / data.validation.bytes_per_token,
    }


def write_sample(model: GPT, data: Data, settings: SimpleNamespace) -> str:
    """The same beginning, continued with the same seed at each evaluation."""
    if not settings.sample_tokens:
        return ""
    model.eval()
    tokenizer = text_tokenizer(data.tokenizer_json)
    words = (settings.sample_prompt, settings.sample_tokens, settings.seed)
    story = continue_text(model, tokenizer, data.eot_id, *words)
    model.train()
    return story


if __name__ == "__main__":
    run_script(main)
