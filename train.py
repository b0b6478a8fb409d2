"""Step 4: train a GPT on the packed stories. Run it again to resume from the latest checkpoint.

python train.py                              the default model
python train.py --preset quickstart          a small model: minutes on two CPU cores
python train.py --max-minutes 30             finish after 30 minutes, however many steps that takes
torchrun --standalone --nproc_per_node=2 train.py     two GPUs, or two CPU processes

Settings without a default take the preset's value (model/config.py), unless their line says otherwise.
"""

import contextlib
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from model.script import run_script  # before torch: see there

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

from model.batches import dropout_seed
from model.checkpoint import BEFORE_DECAY, load_latest, locked, prune, save_checkpoint, set_aside
from model.console import ProgressBar, print_end, print_finished, print_plan, print_stop
from model.errors import UserError, ran_out_of_memory, require
from model.files import count_text, shown
from model.forward import prepare_forward
from model.metrics import Metrics
from model.optimizer import learning_rate, set_rates
from model.processes import Processes, StopRequest, start_processes, stop_processes
from model.run import Run, changed_settings, check_settings, plan_run
from model.settings import read_settings
from model.train_flags import ALIASES, CHOICES, HINTS
from model.training_state import TrainingState, diverged, initial_state, rewind, ruined
from model.validation import validate, write_sample

# Edit these or pass them as flags: MAX_STEPS is --max-steps.
PRESET: str = "stories-9m"  # model shape and training recipe, by name from model/config.py
INIT_FROM: str | None = None  # initial weights: a checkpoint, or a Hugging Face folder or name (GPT-2, Qwen3)

BLOCKS: str | None = None  # transformer blocks: modern (Qwen3's) or gpt2 (GPT-2's)
BLOCK_SIZE: int | None = None  # context length, in tokens
N_LAYER: int | None = None  # number of transformer blocks
N_HEAD: int | None = None  # attention heads per block
N_EMBD: int | None = None  # model width
DROPOUT: float | None = None  # fraction of activations dropped; helps a little over many epochs
TIE_WEIGHTS: bool | None = None  # use the token embedding as the output head
VOCAB_SIZE: int | None = None  # None takes the tokenizer's; a larger one only adds padding
N_KV_HEAD: int | None = None  # key-value heads, each shared by a group of attention heads; None: N_HEAD
HEAD_SIZE: int | None = None  # width of a head; None: N_EMBD / N_HEAD
N_INNER: int | None = None  # width of the feed-forward layer; None: 4 N_EMBD, or 8/3 N_EMBD in modern blocks
ROPE_BASE: float | None = None  # base of the rotary frequencies; 10,000 in all presets

MAX_STEPS: int | None = None  # total optimizer steps; a limit that is set replaces all of the preset's
MAX_MINUTES: float | None = None  # total minutes of training steps (without compilation and evaluation)
MAX_EPOCHS: float | None = None  # total passes over the training stories
BATCH_TOKENS: int | None = None  # tokens per optimizer step, over all processes
MICRO_BATCH: int = 0  # windows per forward pass; lower it if memory runs out; 0 chooses automatically
OPTIMIZER: str | None = None  # muon (for the blocks' matrices, AdamW for the rest) or adamw
LEARNING_RATE: float | None = None  # peak learning rate
WEIGHT_DECAY: float | None = None  # on matrices and embeddings; more, by default, if the stories are few
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
EVAL_TOKENS: int = 65_536  # validation tokens per evaluation, evenly spread
SAVE_INTERVAL: int | None = None  # steps between checkpoints; None: same as EVAL_INTERVAL
KEEP: int = 3  # number of latest checkpoints to keep, in addition to best.pt
LOG_INTERVAL: int = 10  # steps between rows in metrics.jsonl
SAMPLE_PROMPT: str = "Once upon a time"  # prompt of the sample story at each evaluation
SAMPLE_TOKENS: int = 200  # maximum length of the sample, in tokens; 0: no sample

SEED: int = 1337  # for weights, data order and dropout
DEVICE: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
DTYPE: str = "auto"  # auto, bfloat16, float16 or float32
COMPILE: str = "auto"  # auto, on or off: torch.compile
DETERMINISTIC: bool = False  # on CUDA: use deterministic kernels only; slower
FRESH: bool = False  # start a new run; the old run's files are moved into a folder of their own, not deleted
VERIFY: bool = False  # check the SHA-256 of the .bin files before training
DATA_DIR: str = "data"  # folder with tokenizer/ and processed/
CHECKPOINT_DIR: str = "checkpoints"  # folder for checkpoints, metrics.jsonl, loss_curve.png and samples.md

# Stop after this many non-finite steps in a row; more in float16, whose gradient scale of 2**16 may need halvings.
GIVE_UP, GIVE_UP_SCALED = 5, 20


def main() -> None:
    settings = read_settings(__file__, choices=CHOICES, aliases=ALIASES, hints=HINTS)
    check_settings(settings)
    processes = start_processes(settings.device)
    try:
        start(settings, processes)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        half = settings.micro_batch // 2
        advice = f"run it again with --micro-batch {half} or less" if half else "use a smaller model"
        raise UserError(f"the GPU ran out of memory: {advice}") from None
    finally:
        stop_processes()


def start(settings: SimpleNamespace, processes: Processes) -> None:
    """Start a new run, or resume the one in the folder."""
    # After torchrun's restart, the run that it began is resumed
    folder, fresh = settings.checkpoint_dir, settings.fresh and not processes.begun
    with locked(folder) if processes.first else contextlib.nullcontext():
        processes.barrier()
        path, checkpoint = (None if fresh else load_latest(folder)) or (None, None)
        run = plan_run(settings, processes, checkpoint)
        steps = processes.extremes(checkpoint["step"] if checkpoint else 0)
        require(
            min(steps) == max(steps),
            "the processes found different checkpoints: all must see the same --checkpoint-dir",
        )
        # From here on, as all have read, the first may move files
        if checkpoint:
            changes = changed_settings(settings, checkpoint)
            if run.recipe.progress(checkpoint["step"], checkpoint["seconds"]) >= 1:
                if processes.first:
                    print_finished(run, checkpoint["step"], changes)
                return
            if changes:
                processes.say(f"changed      {'; '.join(changes.values())}")
            path, checkpoint = rewind(run, path, checkpoint)
        unsaved = bool(checkpoint and changed_settings(settings, checkpoint))
        state, resumed = prepare_state(run, path, checkpoint), checkpoint is not None
        del checkpoint  # frees its memory
        train(run, state, resumed, unsaved)


def prepare_state(run: Run, path: Path | None, checkpoint: dict | None) -> TrainingState:
    """The state that training starts from, the same in all processes: that of the checkpoint, if there is one, whose
    file is `path`. Moves an earlier run aside, and prints the plan."""
    processes, device = run.processes, run.runtime.device
    if device.type == "cuda":
        run.batches.move_to(device, budget=0.25 * torch.cuda.mem_get_info(device)[0])
    state = initial_state(run, checkpoint)
    processes.barrier()
    # Only now: a model that is too large moves no run
    if processes.first and not checkpoint and (moved := set_aside(run.folder)):
        print(f"moved the earlier run to {shown(moved)}")
    processes.mark_begun()
    processes.broadcast(state.model.parameters())
    if processes.first:
        print_plan(run, state, path)
    return state


def train(run: Run, state: TrainingState, resumed: bool, unsaved: bool) -> None:
    """Train until the run is finished or a signal stops it. `unsaved`: the checkpoint has other settings."""
    settings, recipe, processes, folder = run.settings, run.recipe, run.processes, run.folder
    device = run.runtime.device
    # This process's windows of each step, and the forward pass for them
    my_windows = np.array_split(np.arange(run.batches.windows_per_step), processes.world_size)[processes.rank]
    if run.runtime.compile:
        processes.say("compiling    a minute or so the first time, seconds once the code is kept")
    forward = prepare_forward(run, state.model, len(my_windows))
    micro_batches = -(-len(my_windows) // settings.micro_batch)
    each = " of each process" if processes.world_size > 1 else ""
    flex = "; FlexAttention within stories" if state.model.flex else ""
    processes.say(
        f"micro-batch  {count_text(settings.micro_batch, 'window', 'windows')}; "
        f"{count_text(micro_batches, 'micro-batch', 'micro-batches')} per step{each}{flex}"
    )
    metrics = Metrics(folder, state.step, state.last_evaluation) if processes.first else None
    stop = StopRequest(processes)
    progress_bar = ProgressBar(run, state, stop)
    eval_interval, save_interval = recipe.eval_interval, settings.save_interval or recipe.eval_interval
    saved_at = state.step if resumed else None
    # Or a run that is killed before its next checkpoint would go on without them
    if unsaved and processes.first:
        save_checkpoint(folder / f"ckpt_{state.step}.pt", state.snapshot(run))
    # A new run's is 0, so that it saves the state before the decay even if counting bigrams took until then
    progress = recipe.progress(state.step, state.seconds) if resumed else 0.0
    state.seconds = stop.share(state.seconds)  # counting bigrams took a different time in each process

    while True:
        # After state.step steps: evaluate, save, or stop
        progress_before, progress = progress, recipe.progress(state.step, state.seconds)
        finished = progress >= 1
        if processes.first and state.step != state.last_evaluation:
            trained = state.step or run.pretrained  # another model is not worth evaluating
            if finished or (trained and state.step % eval_interval == 0 and not stop):
                progress_bar.evaluating()
                progress_bar.say(evaluate_and_keep_best(run, state, metrics, progress_bar.mean_loss))
        stopping = bool(stop)  # a signal may come at any time
        if processes.first and state.step != saved_at:
            if progress_before < recipe.turning_point <= progress:  # from here on, a longer run would differ
                save_checkpoint(folder / BEFORE_DECAY, state.snapshot(run))
            if finished:
                metrics.draw(every=0)
            due = state.step and state.step % save_interval == 0
            if due or finished or stopping:
                save_checkpoint(folder / f"ckpt_{state.step}.pt", state.snapshot(run))
                prune(folder, settings.keep, state.step)
                saved_at = state.step
        if finished or stopping:
            break

        if recipe.depth(progress, run.config.n_layer) > state.model.depth:
            forward = grow(run, state, len(my_windows), progress_bar)

        started = time.perf_counter()
        rate = learning_rate(recipe, state.step, progress)
        loss, norm = take_step(run, state, forward, my_windows, rate)

        # Reading the loss waits for the GPU: do it only to log, and before evaluating or saving, to time all steps.
        logging = state.step % settings.log_interval == 0
        pausing = state.step % eval_interval == 0 or state.step % save_interval == 0
        reading = logging or pausing or state.step == recipe.max_steps or device.type == "cpu"
        if reading:
            loss = processes.total(loss)
            limit = GIVE_UP_SCALED if state.scaler.is_enabled() else GIVE_UP
            if state.not_finite >= limit:
                raise UserError(diverged(run, state))
        state.seconds += time.perf_counter() - started
        if reading:
            progress_bar.update(loss)
        state.seconds = stop.share(state.seconds)
        last = recipe.progress(state.step, state.seconds) >= 1  # by time, perhaps
        if last and not reading:
            loss = processes.total(loss)
        if (logging or last) and processes.first:
            metrics.add(training_row(run, state, loss, norm, rate, progress_bar.speed))

    progress_bar.close()
    processes.barrier()
    if processes.first:
        print_end(run, state) if finished else print_stop(run, state)
    if not finished:
        sys.exit(128 + stop.agreed)


def grow(run: Run, state: TrainingState, windows: int, progress_bar: ProgressBar) -> nn.Module:
    """Let the second half of the blocks join, which so far have added nothing; return the new forward pass."""
    layers, slow = run.config.n_layer, run.runtime.compile and run.runtime.device.type != "cpu"
    wait = " (compiling them takes a moment)" if slow else ""
    progress_bar.say(f"step {state.step:,}: from here on, all {layers} layers train{wait}")
    state.model.set_depth(layers)
    return prepare_forward(run, state.model, windows)


def evaluate_and_keep_best(
    run: Run, state: TrainingState, metrics: Metrics, training_loss: float | None
) -> str:
    """Evaluate the model, add the result to the metrics, and save a model that is the best so far as best.pt.

    Returns one line that says how good it is.
    """
    row = {"step": state.step, "tokens": state.step * run.tokens_per_step, **validate(run, state.model)}
    loss, mark = row["validation_loss"], f"; best.pt has {state.best_loss:.4f}"
    require(math.isfinite(loss), ruined(run, state.step, f"the validation loss is {loss}"))
    metrics.add({**row, "sample": write_sample(run, state.model)})
    metrics.draw()
    state.last_evaluation = state.step
    if loss < state.best_loss:
        state.best_loss, mark = loss, "; best so far"
        save_checkpoint(run.folder / "best.pt", state.snapshot(run))
    beside = "" if training_loss is None else f" (training loss {training_loss:.3f})"
    return (
        f"step {state.step:,}: validation loss {loss:.4f} nats per token{beside}, "
        f"{row['bits_per_byte']:.4f} bits per byte{mark}"
    )


def training_row(
    run: Run, state: TrainingState, loss: float, norm: Tensor, rate: float, tokens_per_second: float
) -> dict:
    """A step's row in metrics.jsonl."""
    row = {
        "step": state.step,
        "train_loss": loss if math.isfinite(loss) else None,
        "learning_rate": rate,
        "gradient_norm": norm.item() if norm.isfinite() else None,
        "tokens": state.step * run.tokens_per_step,
        "seconds": round(state.seconds, 6),
        "tokens_per_second": round(tokens_per_second),
    }
    if run.runtime.device.type == "cuda":
        row["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return row


def take_step(
    run: Run, state: TrainingState, forward: nn.Module, my_windows: np.ndarray, rate: float
) -> tuple[Tensor, Tensor]:
    """One step of batch_tokens tokens, of which this process takes `my_windows`, one micro-batch after another.

    Returns this process's share of the loss, and the gradient's norm, without waiting for a GPU.
    """
    settings, batches, device = run.settings, run.batches, run.runtime.device
    starts = batches.starts(state.step)[my_windows]
    shortlist = run.shortlist(state.step)
    loss = torch.zeros((), device=device)
    for first in range(0, len(starts), settings.micro_batch):
        chosen = starts[first : first + settings.micro_batch]
        inputs, targets, story_ids = run.inputs_and_targets(batches.tensor(chosen, device))
        if run.config.dropout:  # seeded per step and window, so that resumed runs drop the same activations
            torch.manual_seed(dropout_seed(settings.seed, state.step, int(my_windows[first])))
        share = len(chosen) / batches.windows_per_step
        with run.runtime.autocast():
            mean = forward(inputs, targets, story_ids, shortlist)
        state.scaler.scale(mean * share).backward()
        loss += mean.detach() * share
    run.processes.all_reduce([p.grad for p in state.model.parameters() if p.grad is not None])
    norm = apply_gradients(state, rate, run.recipe.grad_clip)
    state.step += 1
    return loss, norm


def apply_gradients(state: TrainingState, rate: float, grad_clip: float) -> Tensor:
    """Clip the gradients, update the weights with them, and clear them; returns their norm before that.

    If it is not finite, nothing changes. (GradScaler.step() would check each optimizer's gradients separately, and
    wait for the GPU.)
    """
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), grad_clip or math.inf)
    state.not_finite = (state.not_finite + 1) * ~norm.isfinite()
    set_rates(state.optimizers, rate, state.step)
    for optimizer in state.optimizers:
        optimizer.found_inf = (state.not_finite > 0).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.scaler.update()
    return norm


if __name__ == "__main__":
    run_script(main)
