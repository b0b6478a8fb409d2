"""Step 4: train a GPT on the packed stories. Run it again to resume from the latest checkpoint.

python train.py                              the default model
python train.py --preset quickstart          a small model: minutes on two CPU cores
python train.py --max-minutes 30             finish after 30 minutes, learning rate fully decayed
torchrun --nproc_per_node=2 train.py         two GPUs, or two CPU processes

Settings without a default take the preset's value.
"""

import contextlib
import copy
import functools
import math
import os
import sys
import time
from types import SimpleNamespace

# Keep idle OpenMP threads from spinning for long, so that a shared CPU stays usable; set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from torch import nn

from model.batches import (
    Batches,
    dropout_seed,
    load_data,
    number_stories,
    validation_windows,
)
from model.bigrams import begin_as_bigrams
from model.checkpoint import BEFORE_DECAY, load_latest, prune, save_checkpoint
from model.config import BLOCK_FAMILIES, OPTIMIZERS, PRESETS, SCHEDULES
from model.console import ProgressBar, StopRequest, agree, print_end, print_plan
from model.files import shown
from model.gpt import GPT
from model.huggingface import Pretrained, load_pretrained
from model.metrics import Metrics
from model.optimizer import learning_rate, make_optimizers, set_rates
from model.resume import TrainingState, only_one, rewind, set_aside, settle
from model.runtime import (
    Processes,
    choose_device,
    choose_runtime,
    prepare_forward,
    ran_out_of_memory,
    same_everywhere,
    start_processes,
    stop_processes,
    total_over,
    wait_for_all,
)
from model.sampled_softmax import make_shortlists
from model.settings import UserError, read_settings, require, require_at_least, run_script
from model.validation import validate, write_sample

# Edit these or pass them as flags: MAX_STEPS is --max-steps. None takes the preset's value.
PRESET = "stories-9m"  # model shape and training recipe, by name from model/config.py
INIT_FROM: str | None = None  # initial weights: a checkpoint, or a Hugging Face folder or name (GPT-2, Qwen3)

BLOCKS: str | None = None  # transformer blocks: modern (Qwen3's) or gpt2 (GPT-2's)
BLOCK_SIZE: int | None = None  # context length, in tokens
N_LAYER: int | None = None  # number of transformer blocks
N_HEAD: int | None = None  # attention heads per block
N_EMBD: int | None = None  # model width
DROPOUT: float | None = None  # fraction of activations dropped; helps over many epochs
TIE_WEIGHTS: bool | None = None  # use the token embedding as the output head
VOCAB_SIZE: int | None = None  # None takes the tokenizer's; a larger one only adds padding
N_KV_HEAD: int | None = None  # key-value heads, each shared by a group of attention heads; None: N_HEAD
HEAD_SIZE: int | None = None  # width of a head; None: N_EMBD / N_HEAD
N_INNER: int | None = None  # width of the feed-forward layer; None: 4 N_EMBD, or 8/3 N_EMBD in modern blocks
ROPE_BASE: float | None = None  # base of the rotary frequencies; 10,000 in all presets

MAX_STEPS: int | None = None  # total optimizer steps
MAX_MINUTES: float | None = None  # total minutes of training steps (without compilation and evaluation)
BATCH_TOKENS: int | None = None  # tokens per optimizer step, over all processes
MICRO_BATCH = 0  # windows per forward pass; lower it if memory runs out; 0 chooses automatically
OPTIMIZER: str | None = None  # muon (for the blocks' matrices, AdamW for the rest) or adamw
LEARNING_RATE: float | None = None  # peak learning rate
WEIGHT_DECAY: float | None = None  # on matrices and embeddings
WARMUP_STEPS: int | None = None  # steps of linear learning-rate warm-up
SCHEDULE: str | None = None  # learning-rate decay: linear or cosine
DECAY_FRACTION: float | None = None  # final fraction of the run, over which the learning rate decays
FINAL_LEARNING_RATE: float | None = None  # learning rate at the end, as a fraction of the peak
GRAD_CLIP: float | None = None  # maximum gradient norm; 0: no clipping
MASK_STORIES: bool | None = None  # attend within a story only, not to earlier stories in the window
BIGRAM_START: bool | None = None  # initialise as a bigram model of the stories, not with random weights
GROW_AT: float | None = None  # when the second half of the blocks joins, as a fraction of the run; 0: at once
SAMPLED_SOFTMAX: bool | None = None  # compute the training loss from part of the vocabulary

EVAL_INTERVAL: int | None = None  # steps between evaluations, each with a sample and a new loss curve
EVAL_TOKENS = 65_536  # validation tokens per evaluation, evenly spread
SAVE_INTERVAL: int | None = None  # steps between checkpoints; None: same as EVAL_INTERVAL
KEEP = 3  # number of latest checkpoints to keep, in addition to best.pt
LOG_INTERVAL = 10  # steps between rows in metrics.jsonl
SAMPLE_PROMPT = "Once upon a time"  # prompt of the sample story at each evaluation
SAMPLE_TOKENS = 200  # maximum length of the sample, in tokens; 0: no sample

SEED = 1337  # for weights, data order and dropout
DEVICE = "auto"  # auto, cpu, cuda, cuda:1 or mps
DTYPE = "auto"  # auto, bfloat16, float16 or float32
COMPILE = "auto"  # auto, on or off: torch.compile
DETERMINISTIC = False  # on CUDA: use deterministic kernels only; slower
FRESH = False  # start a new run; the old run's folder is moved aside, not deleted
VERIFY = False  # check the SHA-256 of the .bin files before training
DATA_DIR = "data"  # folder with tokenizer/ and processed/
CHECKPOINT_DIR = "checkpoints"  # folder for checkpoints, metrics.jsonl, loss_curve.png and samples.md

# Stop after this many non-finite steps in a row; more in float16, whose gradient scale of 2**16 may need halvings.
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
    require_at_least(1, settings, "keep", "log_interval", "eval_tokens", "save_interval")
    require_at_least(0, settings, "micro_batch", "sample_tokens")
    processes = start_processes(settings.device)
    folder = settings.checkpoint_dir
    try:
        pretrained = None
        if settings.fresh:  # fail on bad settings before anything is moved
            pretrained = load_pretrained(settings.init_from) if settings.init_from else None
            settle(copy.copy(settings), None, load_data(settings.data_dir), True, pretrained)
            wait_for_all(processes)  # all have read the weights, which may be in the folder
            if processes.first and (moved := set_aside(folder)):
                print(f"moved the earlier run to {shown(moved)}")
        with only_one(folder) if processes.first else contextlib.nullcontext():
            wait_for_all(processes)
            train(settings, processes, pretrained)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        half = max(1, settings.micro_batch // 2)
        raise UserError(f"the GPU ran out of memory: resume with --micro-batch {half} or less") from None
    finally:
        stop_processes()


def train(settings: SimpleNamespace, processes: Processes, pretrained: Pretrained | None) -> None:
    # Data, and the configuration of a new or resumed run
    data = load_data(settings.data_dir, settings.verify)
    device, folder = choose_device(settings.device), settings.checkpoint_dir
    path, checkpoint = load_latest(folder) or (None, None)
    wait_for_all(processes)  # until all have read, the first must not move files
    if settings.init_from and not (checkpoint or pretrained):
        pretrained = load_pretrained(settings.init_from)
    config, recipe = settle(settings, checkpoint, data, device.type == "cpu", pretrained)
    if checkpoint:
        path, checkpoint = rewind(folder, path, checkpoint, recipe, processes.first)
    windows_per_step = recipe.windows_per_step(config.block_size)
    tokens_per_step = windows_per_step * config.block_size
    require(
        windows_per_step >= processes.count,
        f"a step has {windows_per_step} windows for {processes.count} processes: use fewer, or a larger --batch-tokens",
    )
    batches = Batches(data.train.tokens, config.block_size, windows_per_step, settings.seed)
    validation = validation_windows(
        data.validation.tokens, config.block_size, max(1, settings.eval_tokens // config.block_size)
    )

    # Device, model and optimizers
    runtime = choose_runtime(device, settings.dtype, settings.compile, settings.deterministic)
    if device.type == "cuda":
        batches.move_to(device, budget=0.25 * torch.cuda.mem_get_info(device)[0])
    torch.manual_seed(settings.seed)
    model = GPT(config).to(device)
    if pretrained:
        model.load_state_dict(pretrained.with_context(config.block_size).weights)
    optimizers = make_optimizers(model, recipe, low_precision=runtime.dtype == torch.bfloat16)
    scaler = torch.amp.GradScaler(device.type, enabled=runtime.dtype == torch.float16)
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
    if recipe.grow_at and not checkpoint:
        model.set_depth(recipe.depth(0.0, config.n_layer))
        model.silence(model.depth)
    shortlists = make_shortlists(batches, config.vocab_size) if recipe.sampled_softmax else None
    shortlist_size = shortlists.size if shortlists else 0
    if processes.first:
        print_plan(settings, recipe, data, state, runtime, processes, shortlist_size)
        if checkpoint:
            print(f"resuming     from {shown(path)}, after step {state.step:,}")
        elif recipe.bigram_start:
            print(f"initialised  as a bigram model of the stories, counted in {state.seconds:.1f} s")
    if checkpoint and recipe.progress(state.step, state.seconds) >= 1:
        if processes.first:
            limit = "--max-steps" if state.step >= recipe.max_steps else "--max-minutes"
            print(f"already finished: a larger {limit} extends this run, --fresh starts a new one")
        return

    # Forward pass, compiled if possible, with a micro-batch that fits in memory
    mine = np.array_split(np.arange(windows_per_step), processes.count)[processes.rank]
    shortlist = shortlists and shortlists.shortlist(0, device)
    prepare = functools.partial(
        prepare_forward, model, runtime, len(mine), processes, recipe.mask_stories, shortlist
    )
    loss_of, settings.micro_batch = prepare(settings.micro_batch)
    if processes.first:
        micro_batches = -(-len(mine) // settings.micro_batch)
        print(f"micro-batch  {settings.micro_batch} windows, {micro_batches} per step", flush=True)
    metrics = Metrics(folder, state.step, state.last_evaluation) if processes.first else None
    progress_bar = ProgressBar(state, recipe, tokens_per_step, runtime, processes, shortlist_size)
    stop = StopRequest(processes)
    saved_at, progress = state.step, 0.0
    not_finite = torch.zeros((), dtype=torch.int, device=device)  # steps in a row so far
    agree(state, stop, processes)  # counting bigrams took a different time in each process

    while True:
        # After state.step steps: evaluate, save, or stop
        before, progress = progress, recipe.progress(state.step, state.seconds)
        finished = progress >= 1
        if processes.first and state.step != state.last_evaluation:
            begun = state.step or pretrained  # an untrained model is not worth evaluating
            if finished or (begun and state.step % settings.eval_interval == 0 and not stop):
                row = {
                    "step": state.step,
                    "tokens": state.step * tokens_per_step,
                    **validate(model, validation, data, runtime, recipe.mask_stories),
                    "sample": write_sample(model, data, settings),
                }
                metrics.add(row)
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
            if before < recipe.turning_point <= progress:  # from here on, a longer run would differ
                save_checkpoint(folder / BEFORE_DECAY, state.snapshot(settings, data))
            if finished or stop or state.step % settings.save_interval == 0:
                save_checkpoint(folder / f"ckpt_{state.step}.pt", state.snapshot(settings, data))
                prune(folder, settings.keep, state.step)
                saved_at = state.step
        if finished or stop:
            break

        # The second half of the blocks joins; so far, they have added nothing
        if recipe.depth(progress, config.n_layer) > model.depth:
            anew = " (compiling them takes a moment)" if runtime.compile else ""
            progress_bar.say(f"step {state.step:,}: from here on, all {config.n_layer} layers train{anew}")
            model.set_depth(config.n_layer)
            loss_of, settings.micro_batch = prepare(settings.micro_batch)
            progress_bar.bar.unpause()

        # One step of batch_tokens tokens, accumulating gradients over micro-batches
        started = time.perf_counter()
        rate = learning_rate(recipe, state.step, progress)
        starts = batches.starts(state.step)[mine]
        shortlist = shortlists and shortlists.shortlist(state.step, device)
        loss = torch.zeros((), device=device)
        for first in range(0, len(mine), settings.micro_batch):
            chosen = starts[first : first + settings.micro_batch]
            windows = batches.tensor(chosen, device)
            inputs, targets = windows[:, :-1], windows[:, 1:]
            story_ids = number_stories(inputs, data.eot_id) if recipe.mask_stories else None
            if config.dropout:  # seeded per step and window, so that resumed runs drop the same activations
                torch.manual_seed(dropout_seed(settings.seed, state.step, int(mine[first])))
            share = len(chosen) / windows_per_step
            # All-reduce after the last micro-batch only; the factor processes.count turns DDP's average into a sum.
            last = first + settings.micro_batch >= len(mine)
            with contextlib.nullcontext() if last or processes.count == 1 else loss_of.no_sync():
                with runtime.autocast():
                    mean = loss_of(inputs, targets, story_ids, shortlist)
                scaler.scale(mean * share * processes.count).backward()
            loss += mean.detach() * share
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip or math.inf)
        not_finite = (not_finite + 1) * ~norm.isfinite()
        set_rates(optimizers, rate, state.step)
        for optimizer in optimizers:
            # A non-finite step changes nothing. (scaler.step would check each optimizer's gradients separately.)
            optimizer.found_inf = (not_finite > 0).float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        state.step += 1

        # Reading the loss waits for the GPU: do it only to log, and before evaluating or saving, to time all steps.
        logging = state.step % settings.log_interval == 0 or state.step == recipe.max_steps
        pausing = state.step % settings.eval_interval == 0 or state.step % settings.save_interval == 0
        reading = logging or pausing or device.type == "cpu"
        if reading:
            loss = total_over(loss, processes)
            if not_finite >= (GIVE_UP_SCALED if scaler.is_enabled() else GIVE_UP):
                raise UserError(
                    f"the loss or its gradient is not finite, {not_finite.item()} steps in a row up to step "
                    f"{state.step}; none of them was applied. Try a lower --learning-rate than "
                    f"{recipe.learning_rate:g}, or --dtype float32"
                )
        state.seconds += time.perf_counter() - started
        if reading:
            progress_bar.update(loss)
        if logging and processes.first:
            row = {
                "step": state.step,
                "train_loss": loss if math.isfinite(loss) else None,
                "learning_rate": rate,
                "gradient_norm": norm.item() if norm.isfinite() else None,
                "tokens": state.step * tokens_per_step,
                "seconds": round(state.seconds, 3),
                "tokens_per_second": round(progress_bar.speed),
            }
            if device.type == "cuda":
                row["gpu_bytes"] = torch.cuda.max_memory_allocated()
            metrics.add(row)
        agree(state, stop, processes)

    progress_bar.close()
    wait_for_all(processes)
    if processes.first:
        print_end(state, settings, tokens_per_step, finished)
    if not finished:
        sys.exit(128 + stop.agreed)


if __name__ == "__main__":
    run_script(main)
