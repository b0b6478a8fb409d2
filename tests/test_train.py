"""train.py as its users run it: a tiny model, some steps, on the built-in stories."""

import errno
import importlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PATIENCE, REPO, assert_one_line_error

import train as train_script
from model.attention import story_mask
from model.batches import Batches, validation_windows
from model.bigrams import begin_as_bigrams
from model.checkpoint import list_checkpoints, load_checkpoint, load_latest, save_checkpoint
from model.config import GPTConfig, Recipe
from model.console import ProgressBar, print_plan, print_stop
from model.errors import UserError, first_line, ran_out_of_memory
from model.forward import choose_flex, flex_may_pay, prepare_forward
from model.gpt import GPT
from model.metrics import Metrics, read_history, smooth, write_samples
from model.packed_data import Data, Split, fingerprints, load_data
from model.processes import Processes, StopRequest, start_processes
from model.run import Run, complete_settings, plan_run
from model.runtime import (
    COMPILED,
    Runtime,
    choose_compile,
    choose_device,
    choose_dtype,
    choose_runtime,
    keep_headers,
    peak_flops,
)
from model.sampled_softmax import Shortlists
from model.settings import read_settings
from model.training_state import TrainingState, rewind
from model.validation import validate
from train import main

TINY = (
    "--preset quickstart --n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --batch-tokens 512 --max-steps 12 "
    "--warmup-steps 2 --eval-interval 4 --eval-tokens 1024 --log-interval 1 --sample-tokens 8 --compile off"
).split()
CPU = torch.device("cpu")
LARGE_VOCABULARY = ["--vocab-size", "2000"]  # of which a softmax may be sampled


@pytest.fixture
def train(packed, tmp_path, monkeypatch, capsys):
    """train("name", flags...) trains in tmp_path/name, inside this process, which saves torch's start.

    Returns the folder and what was printed on stdout and stderr.
    """

    def train(name, *flags, tiny=TINY):
        folder = tmp_path / name
        words = [*tiny, "--data-dir", packed, "--checkpoint-dir", folder, *flags]
        monkeypatch.setattr(sys, "argv", [str(REPO / "train.py"), *map(str, words)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return folder, capsys.readouterr()

    return train


def make_run(**parts):
    """A run that has only these parts."""
    empty = dict.fromkeys("settings config recipe data batches validation runtime".split())
    return Run(**{**empty, "processes": Processes(), **parts})


def settings_of(checkpoint, folder, **changes):
    """Of a run that goes on from a checkpoint."""
    values = {**checkpoint["settings"], **changes}
    return SimpleNamespace(**values, defaults=checkpoint["defaults"], checkpoint_dir=folder)


def metrics(folder, prefix=""):
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / f"{prefix}metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def losses(folder):
    return np.array([row["train_loss"] for row in metrics(folder) if "train_loss" in row])


def assert_same_run(one, other, *names):
    assert metrics(one) == metrics(other)
    for name in names or ("ckpt_12.pt", "best.pt"):
        weights, others = (load_checkpoint(folder / name)["weights"] for folder in (one, other))
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights)


def wait_for_checkpoint(folder, process):
    deadline = time.monotonic() + PATIENCE
    while not list_checkpoints(folder):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_a_run_leaves_what_it_promises(train):
    folder, result = train("run")
    assert [path.name for path in list_checkpoints(folder)] == ["ckpt_12.pt", "ckpt_8.pt", "ckpt_4.pt"]
    rows = metrics(folder)
    assert [row["step"] for row in rows if "train_loss" in row] == list(range(1, 13))
    evaluations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in evaluations] == [4, 8, 12]
    assert evaluations[-1]["validation_loss"] < evaluations[0]["validation_loss"] < 6.1
    for row in evaluations:
        figures = f"validation loss {row['validation_loss']:.4f} nats per token (training loss "
        figures += (
            f"{smooth(losses(folder)[: row['step']])[-1]:.3f}), {row['bits_per_byte']:.4f} bits per byte"
        )
        assert f"step {row['step']}: {figures}" in result.out
    best = load_checkpoint(folder / "best.pt")
    assert best["best_loss"] == min(row["validation_loss"] for row in evaluations)
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples.md").read_text().count("Once upon a time") == 3
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    assert f"best_validation_loss: {best['best_loss']:.4f}\n" in result.out
    assert f"best_bits_per_byte: {min(row['bits_per_byte'] for row in evaluations):.4f}\n" in result.out
    assert "best_checkpoint" in result.out and result.err == ""


def test_keep_limits_the_checkpoints(train):
    folder, _ = train("run", "--keep", 1)
    assert [path.name for path in list_checkpoints(folder)] == ["ckpt_12.pt"]


def test_what_changes_is_kept_from_before_the_first_step(train, monkeypatch):
    flags = ["--decay-fraction", "0.01", "--grow-at", 0, "--max-steps", 6]
    folder, _ = train("run", *flags)
    monkeypatch.setattr(train_script, "take_step", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        train("run", "--max-steps", 12, "--learning-rate", "1e-3", tiny=[])
    saved = load_checkpoint(folder / "ckpt_6.pt")["settings"]
    assert (saved["max_steps"], saved["learning_rate"]) == (12, 1e-3)


def test_what_is_printed_of_layers_is_what_trains(train):
    """Those that have joined stay, whatever --grow-at says on resume."""
    train("run", "--decay-fraction", "0.01", "--max-steps", 4, "--grow-at", 0)
    _, result = train("run", "--max-steps", 8, "--grow-at", 0.9, tiny=[])
    assert "changed      max_steps 4 is now 8; grow_at 0.0 is now 0.9\n" in result.out
    assert "layer until" not in result.out


def test_losses_on_other_validation_tokens_do_not_count_as_the_best(train):
    folder, _ = train("run", "--decay-fraction", "0.01", "--grow-at", 0, "--max-steps", 4)
    path = folder / "ckpt_4.pt"
    save_checkpoint(path, {**load_checkpoint(path), "best_loss": 0.5})
    train("run", "--max-steps", 8, tiny=[])
    assert load_checkpoint(folder / "ckpt_8.pt")["best_loss"] == 0.5
    train("run", "--max-steps", 12, "--eval-tokens", 512, tiny=[])
    assert load_checkpoint(folder / "best.pt")["step"] == 12
    assert load_checkpoint(folder / "best_4.pt")["step"] == 4  # which is not lost


def test_without_other_checkpoints_a_run_goes_on_from_the_later_one(train):
    folder, _ = train("run")
    for path in list_checkpoints(folder):
        path.unlink()
    steps = {name: load_checkpoint(folder / name)["step"] for name in ("before_decay.pt", "best.pt")}
    assert steps["before_decay.pt"] < steps["best.pt"] and load_latest(folder)[0].name == "best.pt"
    (folder / "best.pt").write_bytes(b"damaged")
    assert load_latest(folder)[0].name == "before_decay.pt"


def test_a_best_model_that_is_later_than_the_checkpoint_is_kept(train):
    """As after a kill between two checkpoints, when the run goes on with other settings."""
    folder, _ = train("run", "--decay-fraction", "0.01", "--grow-at", 0, "--max-steps", 4)
    path = folder / "best.pt"
    save_checkpoint(path, {**load_checkpoint(path), "best_loss": 0.5, "step": 6})
    _, result = train("run", "--max-steps", 8, tiny=[])
    assert "best so far" not in result.out and load_checkpoint(path)["step"] == 6
    path.write_bytes(b"damaged")  # then the next evaluation replaces it
    train("run", "--max-steps", 12, tiny=[])
    assert load_checkpoint(path)["step"] == 12


def test_a_checkpoint_that_lacks_a_weight_is_a_user_error(train):
    folder, _ = train("run", "--max-steps", 4)
    checkpoint = load_checkpoint(folder / "ckpt_4.pt")
    del checkpoint["weights"]["norm.weight"]
    save_checkpoint(folder / "ckpt_4.pt", checkpoint)
    with pytest.raises(UserError, match="after step 4 do not fit together .*norm.weight"):
        train("run", tiny=[])


@pytest.mark.parametrize(
    "line",
    [
        '{"step": null, "note": "mine"}',
        '{"step": "7"}',
        '{"step": 3, "validation_loss": null}',
        '{"step": 3, "train_loss": "abc"}',
        "[1]",
        '{"note": "mine"}',
        '{"step": 3, "train_l',
    ],
)
def test_lines_of_others_in_the_metrics_do_no_harm(tmp_path, line):
    ours = ['{"step": 1, "train_loss": null}', '{"step": 2, "validation_loss": 3.5, "tokens": 9}']
    (tmp_path / "metrics.jsonl").write_text("\ufeff" + "\n".join([ours[0], line, ours[1], line]), "utf-8")
    Metrics(tmp_path, 5, 5).draw()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == ours


@pytest.mark.parametrize(
    ("mask", "grow_at", "vocab_size"),
    [("--mask-stories", 0.5, 400), ("--no-mask-stories", 0, 400), ("--mask-stories", 0.5, 2_000)],
)
def test_losses_are_those_of_a_plain_loop(train, packed, mask, grow_at, vocab_size):
    """GPT-2's blocks under AdamW in float32, against the textbook loop: no micro-batches, nothing fused.

    Until it joins, the second block is there, but adds nothing and gets no gradients; and of a large vocabulary, the
    tokens that are not in a step's shortlist are left out.
    """
    flags = "--blocks gpt2 --optimizer adamw --dtype float32 --micro-batch 3 --learning-rate 1e-3 --weight-decay 0.1"
    cosine = "--schedule cosine --decay-fraction 1".split()
    shape = ["--vocab-size", vocab_size, mask, "--grow-at", grow_at]
    folder, result = train("run", *flags.split(), *cosine, *shape)
    sampled = vocab_size == 2_000
    assert sampled == ("; softmax over 500 tokens; 1 layer until 50 % are done" in result.out)
    data = load_data(packed)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(vocab_size, 32, 2, 2, 32, blocks="gpt2", tie_weights=False)).double()
    second = model.blocks[1]
    if grow_at:
        torch.nn.init.zeros_(second.attention.proj.weight)
        torch.nn.init.zeros_(second.mlp.down.weight)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    batches = Batches(data.train.tokens, 32, 16, seed=1337)
    expected, norms, ends = [], [], 0
    for step in range(12):
        windows = torch.from_numpy(batches.windows(batches.starts(step)))
        inputs, stories = windows[:, :-1], None
        if mask == "--mask-stories":
            stories = torch.tensor(
                [[row[: k + 1].count(data.eot_id) for k in range(32)] for row in inputs.tolist()]
            )
        logits = model(inputs, story_ids=stories)
        if sampled:
            ids, log_counts = Shortlists(batches, vocab_size).shortlist(step, torch.device("cpu"))
            left_out = torch.full((vocab_size,), -math.inf).index_fill(0, ids, 0.0)
            logits = logits + left_out.index_copy(0, ids, log_counts)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        if step < 12 * grow_at:
            second.zero_grad()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            warmup = min(1, (step + 1) / 2)
            group["lr"] = 1e-3 * warmup * (1 + np.cos(np.pi * step / 12)) / 2
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
        ends += (inputs == data.eot_id).sum().item()
    assert ends > 5
    np.testing.assert_allclose(losses(folder), expected, rtol=2e-6)
    rows = [row for row in metrics(folder) if "train_loss" in row]
    np.testing.assert_allclose([row["gradient_norm"] for row in rows], norms, rtol=1e-4)


def test_validation_keeps_to_the_story_too_and_drops_nothing(packed):
    """Against each story's part of each window read by itself."""
    data, runtime = load_data(packed), choose_runtime(torch.device("cpu"), "float32", "off")
    torch.manual_seed(0)
    model = GPT(GPTConfig(400, 64, 2, 2, 32, dropout=0.5)).eval()
    for parameter in model.parameters():  # so that what a token sees matters
        torch.nn.init.normal_(parameter, std=0.5)
    windows = validation_windows(data.validation.tokens, 64, 64)
    total = 0.0
    for window in windows.tolist():
        begins = sorted({0, *(k for k in range(64) if window[k] == data.eot_id)})
        for begin, end in zip(begins, [*begins[1:], 64], strict=True):
            ids = torch.tensor([window[begin : end + 1]])
            total += model(ids[:, :-1], ids[:, 1:]).item() * (end - begin)
    rows = []
    for mask in (True, False):
        run = make_run(data=data, validation=windows, runtime=runtime, recipe=Recipe(mask_stories=mask))
        rows.append(validate(run, model.train()))
        assert model.training
    losses, split = [row["validation_loss"] for row in rows], data.validation
    assert losses[0] == pytest.approx(total / (64 * len(windows)), rel=1e-5)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)
    bits = losses[0] / math.log(2) * len(split.tokens) / split.bytes
    assert rows[0]["bits_per_byte"] == pytest.approx(bits)


def test_a_run_begins_as_a_bigram_model(train, packed):
    folder, result = train("run", "--max-steps", 1, "--dtype", "float32")
    assert "initialised  as a bigram model of the stories, counted in" in result.out
    data = load_data(packed)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(400, 32, 2, 2, 32, tie_weights=False))
    begin_as_bigrams(model, data.train.tokens)
    batches = Batches(data.train.tokens, 32, 16, seed=1337)
    windows = torch.from_numpy(batches.windows(batches.starts(0)))
    np.testing.assert_allclose(losses(folder), model(windows[:, :-1], windows[:, 1:]).item(), rtol=1e-5)

    for name, flag in (("random", "--no-bigram-start"), ("tied", "--tie-weights")):
        folder, result = train(name, "--max-steps", 1, flag)
        assert "as a bigram" not in result.out
        assert losses(folder) == pytest.approx(np.log(400), rel=0.01)
        assert load_checkpoint(folder / "ckpt_1.pt")["settings"]["bigram_start"] is False
    for flags in (["--tie-weights"], ["--blocks", "gpt2"]):
        with pytest.raises(UserError, match="--bigram-start needs modern blocks"):
            train("never", "--bigram-start", *flags)


@pytest.mark.parametrize("bigrams", ["--bigram-start", "--no-bigram-start"])
def test_the_second_half_of_the_blocks_joins_later(train, bigrams):
    flags = ["--n-layer", 3, "--grow-at", 0.6, "--save-interval", 1, "--keep", 20]
    folder, result = train("run", bigrams, *flags)
    assert "3 layers" in result.out and "2 layers until 60 % are done" in result.out
    assert "step 8: from here on, all 3 layers train" in result.err + result.out
    first, before, after = (load_checkpoint(folder / f"ckpt_{step}.pt") for step in (1, 8, 9))
    assert [checkpoint["depth"] for checkpoint in (first, before, after)] == [2, 2, 3]
    for name, weight in before["weights"].items():
        last = name.startswith("blocks.2.")
        assert last == torch.equal(weight, first["weights"][name]), name
        silent = last and name.endswith(("proj.weight", "down.weight"))
        assert not (silent and weight.any())
        assert not (silent and torch.equal(weight, after["weights"][name]))


def make_progress_bar(recipe, depth):
    """At step 100, after 50 seconds."""
    config = GPTConfig(400, 32, 4, 2, 32)
    model = GPT(config)
    model.set_depth(depth)
    state = TrainingState(model, [], None, step=100, seconds=50.0)
    runtime = Runtime(torch.device("cpu"), torch.float32, False, "")
    run = make_run(recipe=recipe, config=config, runtime=runtime, processes=Processes(rank=1, world_size=2))
    vars(run)["shortlists"] = SimpleNamespace(size=100)
    return ProgressBar(run, state, stop=None)


def test_the_loss_shown_is_a_moving_average_without_what_is_not_finite():
    bar, shown = make_progress_bar(Recipe(max_steps=1_000), depth=4), []
    for loss in (3.0, 1.0, math.nan, 1.0):
        bar.state.step, bar.state.seconds = bar.state.step + 1, bar.state.seconds + 1
        bar.update(loss)
        shown.append(bar.bar.postfix.partition(",")[0])
    assert shown == ["loss 3.000", "loss 1.947", "loss nan", "loss 1.598"]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_minutes": 10.0},
        {"max_steps": 10**6, "max_minutes": 10.0},
        {"max_steps": None, "max_minutes": 10.0},
    ],
)
@pytest.mark.parametrize(("depth", "grow_at"), [(2, 0.8), (4, 0.8), (4, 0.0)])
def test_the_time_left_includes_that_steps_become_slower(limits, depth, grow_at):
    """Against steps counted one by one, from step 100 after 50 seconds, at half a second per step for now."""
    recipe = Recipe(**{"max_steps": 1_000, "grow_at": grow_at, "batch_tokens": 512, **limits})
    bar = make_progress_bar(recipe, depth)
    state, model = bar.state, bar.state.model
    bar.speed = 1_024.0
    slower = model.flops_per_token(4, 100) / model.flops_per_token(depth, 100)
    assert 1 < slower < 2 if depth == 2 else slower == 1
    step, seconds = state.step, state.seconds
    while (progress := recipe.progress(step, seconds)) < 1:
        step, seconds = step + 1, seconds + 0.5 * (slower if progress >= grow_at else 1)
    steps_left, minutes_left = bar.remaining()
    assert steps_left == pytest.approx(step - 100, abs=1)
    assert minutes_left == pytest.approx((seconds - 50) / 60, abs=slower / 60)


def test_a_run_that_has_grown_never_shrinks(train):
    """Made longer without the checkpoint from before its decay, it is below the fraction at which it grew."""
    folder, _ = train("run")
    (folder / "before_decay.pt").unlink()
    train("run", "--max-steps", 40, "--save-interval", 20, tiny=["--compile", "off"])
    assert load_checkpoint(folder / "ckpt_20.pt")["depth"] == 2


@pytest.mark.parametrize(
    "dtype, how",
    [
        ("float32", signal.SIGINT),
        ("bfloat16", signal.SIGTERM),
        ("bfloat16", signal.SIGKILL),
        ("float16", signal.SIGKILL),
    ],
)
def test_an_interrupted_run_goes_on_exactly(train, packed, tmp_path, dtype, how):
    flags = f"--dtype {dtype} --dropout 0.1 --micro-batch 5 --save-interval 3".split() + LARGE_VOCABULARY
    whole, _ = train("whole", *flags)
    broken = tmp_path / "broken"
    places = ["--data-dir", packed, "--checkpoint-dir", broken]
    command = list(map(str, [sys.executable, REPO / "train.py", *TINY, *flags, *places]))
    # last bits depend on the number of threads, which other tests may have set here
    env, pipe = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}, subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)
    wait_for_checkpoint(broken, process)
    process.send_signal(how)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how), errors
    if how != signal.SIGKILL:
        assert "resume with: python" in output
    assert load_checkpoint(list_checkpoints(broken)[0])["step"] < 12
    train(
        "broken", "--dtype", dtype, "--micro-batch", "5", tiny=["--compile", "off"]
    )  # the rest it remembers
    assert_same_run(whole, broken)
    scalers = [load_checkpoint(folder / "ckpt_12.pt")["scaler"] for folder in (whole, broken)]
    assert scalers[0] == scalers[1]


def test_the_micro_batch_does_not_change_the_losses(train):
    runs = [train(f"micro{n}", "--dtype", "float32", "--micro-batch", n)[0] for n in (0, 1, 7)]
    for other in runs[1:]:
        np.testing.assert_allclose(losses(other), losses(runs[0]), rtol=1e-5)


def torchrun_command(processes, packed, folder, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [REPO / "train.py", *TINY, "--dtype", "float32", "--micro-batch", 3, *flags]
    return [*map(str, command), "--data-dir", str(packed), "--checkpoint-dir", str(folder)]


def torchrun(*arguments, check=True):
    command, env = torchrun_command(*arguments), {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=env)
    assert not check or result.returncode == 0, result.stderr
    return result


def test_four_processes_train_as_one_does(train, packed, tmp_path):
    flags = ["--dropout", 0.1, "--micro-batch", 4, *LARGE_VOCABULARY]
    one, _ = train("one", "--dtype", "float32", *flags)
    result = torchrun(4, packed, tmp_path / "four", *flags)
    assert result.stdout.count("steps: 12") == 1  # only the first process speaks
    assert "Warning" not in result.stderr, result.stderr
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(one), rtol=1e-5)


def test_a_rank_alone_is_no_torchrun(monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as other launchers and users may set it
    assert start_processes("cpu") == Processes()


def test_fewer_windows_than_processes_are_refused(packed, tmp_path):
    result = torchrun(2, packed, tmp_path / "two", "--batch-tokens", 32, check=False)
    assert "error: a step has 1 windows for 2 processes" in result.stderr and "Traceback" not in result.stdout


def test_processes_that_would_share_a_gpu_are_refused(packed, tmp_path):
    result = torchrun(2, packed, tmp_path / "two", "--device", "cuda:1", check=False)
    assert "leave out --device cuda:1" in result.stderr and "Traceback" not in result.stdout


def test_a_run_moves_from_one_process_to_two_and_back(train, packed, tmp_path):
    """Made longer twice; a decay over the last step alone leaves all others alike."""
    whole, _ = train("whole", "--dtype", "float32", "--decay-fraction", "0.01")
    folder, _ = train("moved", "--dtype", "float32", "--decay-fraction", "0.01", "--max-steps", 4)
    torchrun(2, packed, folder, "--decay-fraction", "0.01", "--max-steps", 8)
    train("moved", "--dtype", "float32", "--decay-fraction", "0.01", "--max-steps", 12)
    np.testing.assert_allclose(losses(folder), losses(whole), rtol=1e-5)


def test_three_processes_resume_exactly(packed, tmp_path):
    """With more than two, sums depend on the order in which the processes' gradients are added."""
    flags = ["--n-embd", 64, "--n-layer", 2, "--grow-at", 0.6, "--batch-tokens", 128, "--max-steps", 10]
    flags += ["--save-interval", 3, "--keep", 9, "--eval-interval", 20]
    torchrun(3, packed, tmp_path / "whole", *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "whole" / "ckpt_3.pt", tmp_path / "resumed")
    torchrun(3, packed, tmp_path / "resumed", *flags)
    whole, resumed = (
        load_checkpoint(tmp_path / name / "ckpt_10.pt")["weights"] for name in ("whole", "resumed")
    )
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


INTERRUPTED = """
import sys

sys.path.insert(0, sys.argv[1])
from model.processes import start_processes, stop_processes
from model.script import run_script


def main():
    start_processes("cpu")
    try:
        raise eval(sys.argv[2])
    finally:
        stop_processes()


run_script(main)
"""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("KeyboardInterrupt", 130),
        ("BrokenPipeError", 141),
        ("OSError(28, 'No space left', 'a.pt')", 2),
        ("KeyError('defect')", 1),
    ],
)
def test_a_process_of_several_ends_with_the_status_of_its_error(tmp_path, error, status):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [str(tmp_path / "interrupted.py"), str(REPO), error]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert re.search(rf"exitcode +: {status} ", result.stderr), result.stderr


LATE = """
import contextlib
import os
import sys

import torch.distributed as dist

sys.path.insert(0, sys.argv[1])
from model.processes import start_processes, stop_processes

processes = start_processes("cpu")
group = dist.group.WORLD  # held, and its threads with it, as by what training imports
try:
    processes.barrier()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may have ended
            with open(f"/proc/self/task/{thread}/comm") as name:
                if "gloo" in name.read():
                    os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    processes.barrier()
finally:
    stop_processes()
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux has it")
def test_threads_that_finish_late_abort_no_process(tmp_path):
    """Those of gloo hold the tensors of an operation until after its end, and let go of them when they get a turn."""
    (tmp_path / "late.py").write_text(LATE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=6"]
    command += [str(tmp_path / "late.py"), str(REPO)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr


def test_torchrun_restarts_a_killed_worker_and_the_losses_stay_the_same(train, packed, tmp_path):
    """With --fresh, too: a restart resumes the new run instead of moving it aside."""
    flags = ["--max-steps", 40, "--save-interval", 2, "--fresh"]
    one, _ = train("one", "--dtype", "float32", *flags)
    command = torchrun_command(2, packed, tmp_path / "two", *flags)
    command.insert(command.index("--standalone"), "--max-restarts=1")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, **pipes)
    wait_for_checkpoint(tmp_path / "two", process)
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = sorted(int(child) for thread in threads for child in thread.read_text().split())
    os.kill(workers[1], signal.SIGKILL)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "resuming" in output and not list((tmp_path / "two").glob("earlier-*"))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one), rtol=1e-5)


def test_compiled_and_eager_runs_agree_and_a_compiled_one_goes_on_exactly(train, tmp_path):
    flags = ["--dtype", "float32", "--dropout", 0.2, *LARGE_VOCABULARY]
    eager, _ = train("eager", *flags)
    compiled, result = train("compiled", *flags, "--compile", "on")
    assert result.err == ""
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=1e-5)
    for name, mode in (("broken", "on"), ("broken, then eager", "off")):
        folder = shutil.copytree(compiled, tmp_path / name)
        for file in ("ckpt_12.pt", "best.pt"):
            (folder / file).unlink()
        train(name, *flags, "--compile", mode)
    assert_same_run(compiled, tmp_path / "broken")
    np.testing.assert_allclose(losses(tmp_path / "broken, then eager"), losses(eager), rtol=1e-5)


def test_two_hundred_fast_steps_are_those_of_the_plain_path(train, monkeypatch):
    """Compiled bfloat16 and all that is fast, against float32, the fused attention kernel and one window at a time."""
    recipe = ["--max-steps", 200, *LARGE_VOCABULARY]
    fast, _ = train("fast", *recipe, "--dtype", "bfloat16", "--compile", "on")
    monkeypatch.setattr("model.attention.PLAIN_UP_TO", 0)
    plain, _ = train("plain", *recipe, "--dtype", "float32", "--micro-batch", 1)
    assert losses(plain)[-1] < 0.8 * losses(plain)[0]
    np.testing.assert_allclose(losses(fast), losses(plain), rtol=0.02)


def test_where_compilation_fails_it_warns_once_and_goes_on(train, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nand a long trace")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    torch._dynamo.reset()
    _, result = train("run", "--compile", "on")
    lines = result.err.strip().splitlines()
    torch.compiler.set_stance("default")
    assert len(lines) == 1 and lines[0].startswith("warning: torch.compile does not work here"), result.err


@pytest.fixture
def clock(monkeypatch):
    """By which a step takes one second, and an evaluation 99."""
    seconds, evaluation = itertools.count(), train_script.evaluate_and_keep_best
    monkeypatch.setattr(train_script, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))

    def evaluate_slowly(*words):
        list(itertools.islice(seconds, 99))
        return evaluation(*words)

    monkeypatch.setattr(train_script, "evaluate_and_keep_best", evaluate_slowly)


def test_the_clock_counts_nothing_but_steps(train, clock):
    folder, result = train("run", "--no-bigram-start")
    assert "tokens_per_second: 512\n" in result.out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train_loss" in row]
    counted = [(row["tokens"], row["seconds"], row["tokens_per_second"]) for row in rows]
    assert counted == [(512 * step, step, 512) for step in range(1, 13)]


def test_max_minutes_ends_the_run_with_the_schedule(train, clock):
    flags = ["--max-steps", 1_000_000, "--max-minutes", 0.2, "--no-bigram-start", "--log-interval", 1_000]
    folder, _ = train("run", *flags)
    (row,) = (row for row in metrics(folder) if "train_loss" in row)
    last = load_checkpoint(list_checkpoints(folder)[0])
    assert (row["step"], last["step"], last["seconds"]) == (12, 12, 12)  # logged, whatever the interval
    decayed = 1 / 12 / last["settings"]["decay_fraction"]
    assert row["learning_rate"] == pytest.approx(decayed * last["settings"]["learning_rate"])


def test_a_run_too_short_for_a_step_leaves_what_it_began_with(train):
    folder, result = train("run", "--max-minutes", 1e-9)
    assert "already finished" not in result.out and "steps: 0\n" in result.out
    assert load_checkpoint(folder / "best.pt")["step"] == 0


def test_a_finished_run_says_so(train):
    folder, _ = train("run")
    before = metrics(folder)
    _, result = train("run")
    assert "already finished" in result.out and metrics(folder) == before
    _, result = train("run", "--max-steps", 8)
    assert "step 12 is already beyond this --max-steps: nothing is left to train" in result.out


def test_a_finished_run_made_longer_is_the_longer_run(train):
    """It goes back to before the decay; what the shorter run left stays under other names."""
    folder, _ = train("run", "--max-steps", 12)
    best = load_checkpoint(folder / "ckpt_12.pt")
    _, result = train("run", "--max-steps", 20, tiny=["--compile", "off"])
    whole, _ = train("whole", "--max-steps", 20)
    assert "going back" in result.out
    assert_same_run(folder, whole, "ckpt_20.pt")
    kept = load_checkpoint(folder / "shorter_12_ckpt_12.pt")["weights"]
    assert all(torch.equal(kept[name], weight) for name, weight in best["weights"].items())
    # What is exported or evaluated has the evaluations of its own run
    shorter, longer = (
        [row for row in metrics(folder, prefix) if "validation_loss" in row] for prefix in ("shorter_12_", "")
    )
    names = {"shorter_12_ckpt_12.pt": shorter, "ckpt_20.pt": longer, "best.pt": longer}
    for name, rows in names.items():
        assert read_history(folder / name, load_checkpoint(folder / name)) == rows
    save_checkpoint(folder / "best.pt", best)  # had the longer run become no better
    assert read_history(folder / "best.pt", best) == shorter
    save_checkpoint(folder / "best_12.pt", best)  # as it is called after a change of --eval-tokens
    assert read_history(folder / "best_12.pt", best) == shorter
    assert (folder / "shorter_12_ckpt_8.pt").exists()  # all that --keep had kept


def test_what_a_run_left_is_not_replaced_when_it_is_made_longer_twice(train):
    folder, _ = train("run", "--max-steps", 12)
    before = (folder / "ckpt_12.pt").read_bytes()
    train("run", "--max-steps", 20, tiny=["--compile", "off"])
    for path in list_checkpoints(folder):
        path.unlink()
    save_checkpoint(
        folder / "ckpt_12.pt", {**load_checkpoint(folder / "shorter_12_ckpt_12.pt"), "seconds": 0.5}
    )
    train("run", "--max-steps", 20, tiny=["--compile", "off"])
    assert (folder / "shorter_12_ckpt_12.pt").read_bytes() == before
    rows = read_history(path := folder / "shorter_12-2_ckpt_12.pt", load_checkpoint(path))
    assert rows == [row for row in metrics(folder, "shorter_12-2_") if "validation_loss" in row] != []


def test_a_run_that_begins_beyond_its_turning_point_can_be_made_longer(train, monkeypatch):
    """As one of seconds, of which counting bigrams took half."""
    monkeypatch.setattr("model.training_state.timed", lambda function, *words: [function(*words), 1.5][1])
    folder, _ = train("run", "--max-minutes", 2.9 / 60, "--max-steps", 100_000)
    assert load_checkpoint(folder / "before_decay.pt")["step"] == 0
    monkeypatch.setattr("model.training_state.timed", lambda function, *words: [function(*words), 99.0][1])
    folder, _ = train("nothing but counting", "--max-minutes", 2.9 / 60)
    assert load_checkpoint(folder / "ckpt_0.pt")["step"] == 0


def test_a_stop_before_the_first_step_is_saved(train, monkeypatch, tmp_path):
    monkeypatch.setattr(StopRequest, "__bool__", lambda stop: True)
    with pytest.raises(SystemExit):
        train("run", "--learning-rate", 0.004)
    assert load_checkpoint(tmp_path / "run" / "ckpt_0.pt")["settings"]["learning_rate"] == 0.004


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(train, monkeypatch, error):
    folder, _ = train("run", "--max-steps", 4)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("model.checkpoint.torch.load", fail)
    with pytest.raises(type(error)):
        load_latest(folder)


def test_a_run_made_longer_remembers_its_length_and_its_best_if_it_is_killed_at_once(train):
    folder, _ = train("run", "--max-steps", 12)
    path = folder / "ckpt_12.pt"
    best = {**load_checkpoint(path), "best_loss": 0.5}
    run = make_run(settings=settings_of(best, folder, max_steps=20), recipe=Recipe(max_steps=20))
    _, rewound = rewind(run, path, best)
    path, latest = load_latest(folder)
    assert latest["step"] == rewound["step"] < 12 and latest["best_loss"] == rewound["best_loss"] == 0.5
    assert latest["settings"]["max_steps"] == 20
    assert rewind(run, path, latest) == (path, latest)


def test_a_preset_that_decays_from_the_start_is_made_longer_without_a_warning(train):
    flags = ["--schedule", "cosine", "--decay-fraction", 1]
    folder, _ = train("run", *flags, "--max-steps", 8)
    _, result = train("run", "--max-steps", 12, tiny=["--compile", "off"])
    assert "extended run: going on from step 8, with the learning rate of the longer run" in result.out
    assert result.err == "" and load_checkpoint(folder / "ckpt_12.pt")["step"] == 12


def test_a_run_made_longer_goes_on_from_its_end_if_what_came_before_its_decay_is_damaged(train):
    folder, _ = train("run")
    (folder / "before_decay.pt").write_bytes(b"not a checkpoint")
    _, result = train("run", "--max-steps", 16, tiny=["--compile", "off"])
    assert "before_decay.pt does not load" in result.err and "going on from step 12" in result.err
    assert load_checkpoint(folder / "ckpt_16.pt")["step"] == 16


def test_only_a_run_in_its_decay_goes_back(train):
    """What a shorter run left from before its decay does not count for a longer one that is far from its own."""
    folder, _ = train("run", "--max-steps", 12)
    path = folder / "ckpt_12.pt"
    then = load_checkpoint(path)
    steps = {"far from it": 40, "in it": 15}
    for max_steps in steps.values():
        then["settings"]["max_steps"] = max_steps
        run = make_run(
            settings=settings_of(then, folder),
            recipe=Recipe(max_steps=80),
            processes=Processes(rank=1, world_size=2),
        )
        rewound, checkpoint = rewind(run, path, then)
        assert checkpoint["step"] == (12 if max_steps == steps["far from it"] else 5)
        assert (rewound == path) == (max_steps == steps["far from it"])


def test_a_run_made_shorter_keeps_what_came_before_its_decay(train, capsys):
    """At 12 of 40 steps nothing has decayed; of 20, it should have since the 8th. Later it becomes longer again."""
    folder, _ = train("run", "--max-steps", 12)
    path, kept = folder / "ckpt_12.pt", folder / "before_decay.pt"
    then = load_checkpoint(path)
    then["settings"]["max_steps"] = 40

    def resumed(max_steps, checkpoint):
        settings = settings_of(checkpoint, folder)
        return rewind(make_run(settings=settings, recipe=Recipe(max_steps=max_steps)), path, checkpoint)

    kept.unlink()
    assert resumed(31, then)[0] == path and not kept.exists()
    assert resumed(30, then)[0] == path and load_checkpoint(kept)["step"] == 12
    kept.unlink()
    assert resumed(20, then)[0] == path and load_checkpoint(kept)["step"] == 12
    later = {**then, "step": 16, "settings": {**then["settings"], "max_steps": 20}}
    assert resumed(40, later)[0] == kept
    kept.unlink()
    assert resumed(40, later)[0] == path
    assert "there is no checkpoint" in (warning := capsys.readouterr().err)
    assert "going on from step 16, with the learning rate of the longer run" in warning


def test_another_weight_decay_counts_when_a_run_goes_on(train):
    folder, _ = train("run", "--max-steps", 8, "--decay-fraction", "0.01", "--grow-at", 0)
    train("run", "--max-steps", 12, "--weight-decay", "0.5", tiny=["--compile", "off"])
    groups = [
        group for o in load_checkpoint(folder / "ckpt_12.pt")["optimizers"] for group in o["param_groups"]
    ]
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.5, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("errors", ["", "2>&1"])
def test_a_run_whose_output_nobody_reads_is_saved(packed, tmp_path, errors):
    words = [sys.executable, REPO / "train.py", *TINY, "--max-steps", 4000, "--eval-interval", 2]
    words += ["--data-dir", packed, "--checkpoint-dir", tmp_path / "run", "--save-interval", 4000]
    command = f"{shlex.join(map(str, words))} {errors} | sed /^step/q; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 128 + signal.SIGPIPE and "Traceback" not in result.stderr, result.stderr
    assert result.stdout.startswith("stories") and list_checkpoints(tmp_path / "run")


def test_a_home_that_cannot_be_written_is_no_matter(run, packed, tmp_path):
    flags = [*TINY, "--max-steps", 2, "--data-dir", packed, "--checkpoint-dir", tmp_path / "run"]
    homeless = {"HOME": "/proc/none", "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": ""}
    assert "atplotlib" not in run("train.py", *flags, env=homeless, check=0).stderr
    assert (tmp_path / "run" / "loss_curve.png").exists()


def test_results_without_a_checkpoint_are_moved_aside_too(train, tmp_path):
    folder, _ = train("run", "--max-steps", 4)
    results = {
        name: (folder / name).read_bytes() for name in ("metrics.jsonl", "loss_curve.png", "samples.md")
    }
    for attempt in range(2):  # in one second, perhaps
        for path in folder.glob("*.pt"):
            path.unlink()
        _, result = train("run", "--max-steps", 4)
        assert "moved the earlier run to" in result.out and len(list(folder.glob("earlier-*"))) == attempt + 1
    first = min(folder.glob("earlier-*"))
    assert {file.name: file.read_bytes() for file in first.iterdir()} == results


def test_a_file_is_no_folder_for_checkpoints(train, tmp_path):
    for name in ("run", "run/a"):
        (tmp_path / "run").write_text("mine")
        with pytest.raises(UserError, match=r"--checkpoint-dir .*run is a file, not a folder"):
            train(name)


def test_a_warm_up_beyond_the_run_is_noted(train):
    _, result = train("run", "--max-steps", 1, "--warmup-steps", 2)
    assert "note         2 --warmup-steps: the learning rate will not reach its peak" in result.out


def test_fresh_moves_the_old_run_aside(train, tmp_path):
    folder, _ = train("run", "--seed", 1)
    _, result = train("run", "--seed", 2, "--fresh")
    (moved,) = folder.glob("earlier-*")
    assert moved.name in result.out and (moved / "ckpt_12.pt").exists()
    assert load_checkpoint(folder / "ckpt_12.pt")["settings"]["seed"] == 2


def test_fresh_moves_only_what_belongs_to_the_run(train, tmp_path):
    """Here the folder is a link, and has files of others in it."""
    folder, real = tmp_path / "run", tmp_path / "on another disk"
    real.mkdir()
    folder.symlink_to(real)
    train("run", "--max-steps", 1)
    made = {path.name for path in folder.iterdir()}
    for name in ("best_3.pt", "shorter_9_ckpt_9.pt", "notes.txt"):
        (folder / name).write_text("mine")
    train("run", "--max-steps", 1, "--fresh")
    (moved,) = real.glob("earlier-*")
    assert folder.is_symlink()
    assert {path.name for path in moved.iterdir()} == made | {"best_3.pt", "shorter_9_ckpt_9.pt"}
    assert {path.name for path in real.iterdir()} == made | {"notes.txt", moved.name}


def test_fresh_that_was_killed_is_finished_by_the_next_start(train, tmp_path):
    folder, _ = train("run", "--max-steps", 2)
    names = {path.name for path in folder.iterdir()}
    (folder / ".earlier").mkdir()
    (folder / "ckpt_2.pt").rename(folder / ".earlier" / "ckpt_2.pt")
    _, result = train("run", "--max-steps", 1)
    (moved,) = folder.glob("earlier-*")
    assert {path.name for path in moved.iterdir()} == names and not (folder / ".earlier").exists()
    assert "resuming" not in result.out and load_checkpoint(folder / "ckpt_1.pt")["step"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n-head", 5], "not divisible"),
        (["--seed", -1], "seed must be"),
        (["--block-size", 10_000_000], "too long for"),
        (["--device", "cuda"], "no CUDA GPU"),
    ],
)
def test_fresh_moves_nothing_where_the_new_run_cannot_begin(train, flags, message):
    folder, _ = train("run", "--max-steps", 1)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message):
        train("run", "--fresh", *flags)
    assert sorted(folder.iterdir()) == before and [path.name for path in folder.parent.glob("run*")] == [
        "run"
    ]


def test_fresh_moves_nothing_for_a_model_that_is_too_large(train):
    folder, _ = train("run", "--max-steps", 1)
    before = sorted(folder.iterdir())
    with pytest.raises(RuntimeError, match="allocate"):
        train("run", "--fresh", "--vocab-size", 10**15)
    assert sorted(folder.iterdir()) == before


def test_the_command_to_resume_has_the_flags_that_no_checkpoint_remembers(monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    flags = [
        "--max-steps",
        "9",
        "--fresh",
        "--checkpoint-dir",
        "my run",
        "--no-bigram-start",
        "--device",
        "cpu",
    ]
    state = SimpleNamespace(step=3)
    print_stop(make_run(settings=read_settings(REPO / "train.py", flags)), state)
    wanted = "resume with: python train.py --device cpu --checkpoint-dir 'my run'\n"
    assert capsys.readouterr().out.endswith(wanted)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    print_stop(make_run(settings=read_settings(REPO / "train.py", [])), state)
    assert capsys.readouterr().out.endswith("resume with: torchrun --nproc_per_node=2 train.py\n")


def test_how_it_computes_is_remembered(train):
    flags = ["--dtype", "float32", "--micro-batch", 5]
    folder, _ = train("run", *flags, "--max-steps", 8, "--decay-fraction", "0.01", "--grow-at", 0)
    train("run", "--max-steps", 12, tiny=[])
    saved = load_checkpoint(folder / "ckpt_12.pt")["settings"]
    assert (saved["dtype"], saved["compile"], saved["micro_batch"]) == ("float32", "off", 5)


def test_the_micro_batch_of_another_device_is_not(train):
    flags = ["--micro-batch", 5, "--decay-fraction", "0.01", "--grow-at", 0]
    folder, _ = train("run", *flags, "--max-steps", 2)
    path = folder / "ckpt_2.pt"
    save_checkpoint(path, {**load_checkpoint(path), "device": "cuda"})
    _, result = train("run", "--max-steps", 4, tiny=[])
    assert "micro_batch 5 is now chosen anew" in result.out
    assert load_checkpoint(folder / "ckpt_4.pt")["settings"]["micro_batch"] == 16


def test_a_gpu_that_this_pytorch_cannot_use_is_mentioned_unless_it_is_hidden(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(Path, "exists", lambda self: True)  # /proc/driver/nvidia/version
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto") == CPU and not capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert choose_device("auto") == CPU and "using the CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "able", "dtype"),
    [
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (7, 5), torch.float16),
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False, "avx2": True}, torch.float32),
        ("mps", None, torch.float32),
    ],
)
def test_the_precision_suits_the_device(monkeypatch, device, able, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: able)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert choose_dtype(torch.device(device), "auto")[0] == dtype


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """programs(name, ...): only these are installed, and Python's headers."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("model.runtime.sysconfig", SimpleNamespace(get_path=lambda name: str(tmp_path)))
    monkeypatch.setattr("model.runtime.COMPILED", tmp_path / "inductor")
    for name in ("CXX", "CC", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"):
        monkeypatch.setenv(name, "")  # so that they are as before in the end
        monkeypatch.delenv(name)

    def programs(*names):
        (tmp_path / "bin").mkdir()
        for name in names:
            (tmp_path / "bin" / name).write_text("#!/bin/sh")
            (tmp_path / "bin" / name).chmod(0o755)

    return programs


@pytest.mark.parametrize(
    ("installed", "named", "taken"),
    [
        (["g++", "clang++"], None, "g++"),
        (["clang++", "c++"], None, "clang++"),
        (["mine", "g++"], "mine", "mine"),
        (["c++"], "missing", "c++"),
        (["gcc"], None, None),
    ],
)
def test_the_compiler_is_one_that_is_installed(programs, monkeypatch, installed, named, taken):
    programs(*installed)
    if named:
        monkeypatch.setenv("CXX", named)
    monkeypatch.setenv("CC", "gcc")  # for C++, it does not count
    compiles, reason = choose_compile(CPU, "auto")
    assert compiles == (taken is not None) and (taken or reason == "no C++ compiler here")
    choose_runtime(CPU, "float32", "auto")
    assert os.environ.get("CXX") == taken
    assert os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] == "0"  # they take openssl


def test_where_compiled_code_cannot_be_kept_or_has_a_space_in_its_path(programs, monkeypatch, tmp_path):
    programs("g++")
    monkeypatch.setattr("model.runtime.COMPILED", tmp_path / "a b" / "inductor")
    compiles, reason = choose_compile(CPU, "auto")
    assert not compiles and "has a space in its name" in reason
    monkeypatch.setattr("model.runtime.COMPILED", tmp_path / "inductor")
    assert choose_compile(CPU, "auto")[0]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    choose_runtime(CPU, "float32", "auto")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_headers_are_kept_with_the_compiled_code_that_is_discarded_if_it_was_cut_short(monkeypatch):
    codecache = importlib.import_module("torch._inductor.codecache")
    for name in ("_HEADER_DIR", "_HEADER_LOCK_DIR"):  # fails if PyTorch calls them otherwise one day
        monkeypatch.setattr(codecache, name, "elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "a user's own")
    keep_headers()
    assert codecache._HEADER_DIR == "elsewhere"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(COMPILED))
    keep_headers()
    assert COMPILED in Path(codecache._HEADER_DIR).parents
    assert Path(codecache._HEADER_DIR) in Path(codecache._HEADER_LOCK_DIR).parents


def test_the_reason_that_a_compiler_gives_is_shown():
    error = RuntimeError("C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\na.cpp:1: error: no room\nmore")
    assert first_line(error) == "a.cpp:1: error: no room"


@pytest.mark.parametrize(
    ("device", "minutes", "tokens"), [("cpu", 1, 2_048), ("cpu", 30, 4_096), ("cuda", 1, 65_536)]
)
def test_the_steps_suit_the_device_and_the_time(packed, device, minutes, tokens):
    settings = read_settings(REPO / "train.py", ["--max-minutes", str(minutes)])
    recipe = complete_settings(settings, None, load_data(packed), torch.device(device))[1]
    assert recipe.batch_tokens == tokens


def test_mps_takes_no_more_than_its_products_can_add_up(packed, monkeypatch):
    monkeypatch.setattr("model.run.choose_device", lambda name: torch.device("mps"))
    flags = ["--data-dir", str(packed), "--micro-batch", "126", "--block-size", "256"]
    with pytest.raises(UserError, match="--micro-batch 126: on this GPU, 125 is the most"):
        plan_run(read_settings(REPO / "train.py", flags), Processes(), None)


def test_an_edited_micro_batch_holds_on_another_device(packed):
    data, first = load_data(packed), read_settings(REPO / "train.py", [])
    complete_settings(first, None, data, CPU)
    checkpoint = {
        "settings": vars(first),
        "defaults": first.defaults,
        "data": fingerprints(data),
        "device": "cuda",
    }
    settings = read_settings(REPO / "train.py", [])
    settings.micro_batch = settings.defaults["micro_batch"] = 4
    complete_settings(settings, checkpoint, data, CPU)
    assert settings.micro_batch == 4


def test_checkpoints_follow_another_interval_of_evaluation(train):
    flags = ["--decay-fraction", "0.01", "--grow-at", 0]
    folder, _ = train("run", *flags, "--max-steps", 4)
    train("run", "--max-steps", 10, "--eval-interval", 3, tiny=[])
    assert [path.name for path in list_checkpoints(folder)] == ["ckpt_10.pt", "ckpt_9.pt", "ckpt_6.pt"]


def test_a_run_that_ended_by_the_clock_needs_more_time(train):
    """More steps change nothing then, so that it does not go back either."""
    folder, _ = train("run", "--max-steps", 1_000_000, "--max-minutes", 0.02)
    before = metrics(folder)
    _, result = train("run", "--max-steps", 2_000_000, "--max-minutes", 0.02)
    assert (
        "already finished: a larger --max-minutes extends this run" in result.out
        and metrics(folder) == before
    )


@pytest.mark.parametrize(
    "flags, rate",
    [
        ([], 6e-3),
        (["--optimizer", "adamw"], 1e-3),
        (["--optimizer", "adamw", "--learning-rate", "3e-4"], 3e-4),
        (["--preset", "slm-30m"], 1e-4),
        (["--preset", "slm-30m", "--optimizer", "adamw"], 1e-4),
        (["--preset", "slm-30m", "--optimizer", "muon"], 6e-3),
    ],
)
def test_the_learning_rate_suits_the_optimizer(packed, flags, rate):
    settings = read_settings(REPO / "train.py", [*flags, "--vocab-size", "50257"])
    assert complete_settings(settings, None, load_data(packed), CPU)[1].learning_rate == rate


@pytest.mark.parametrize(
    ("flags", "new", "resumed"),
    [
        ("", (2_400, 3.5), (70, 8.0)),
        ("--max-minutes 30", (None, 30.0), (None, 30.0)),
        ("--max-steps 50", (50, None), (50, None)),
        ("--max-steps 50 --max-minutes 30", (50, 30.0), (50, 30.0)),
        ("--max-minutes none", (2_400, None), (70, None)),
        ("--max-steps none", (None, 3.5), (None, 8.0)),
    ],
)
def test_a_limit_that_is_chosen_replaces_the_others(packed, flags, new, resumed):
    data, limits = load_data(packed), attrgetter("max_steps", "max_minutes")

    def settings():
        return read_settings(REPO / "train.py", ["--preset", "quickstart", *flags.split()])

    first, again = settings(), settings()
    assert limits(complete_settings(first, None, data, CPU)[1]) == new
    saved = {**vars(first), "max_steps": 70, "max_minutes": 8.0}
    checkpoint = {"settings": saved, "defaults": first.defaults, "data": fingerprints(data)}
    assert limits(complete_settings(again, checkpoint, data, CPU)[1]) == resumed == limits(again)


def test_a_limit_in_the_script_is_one_on_resume_too(packed):
    """The file says MAX_MINUTES = 30, the run was started with --max-minutes 60, and gets --max-steps 50."""
    data = load_data(packed)
    settings = read_settings(REPO / "train.py", ["--max-steps", "50"])
    settings.max_minutes = settings.defaults["max_minutes"] = 30.0
    first = read_settings(REPO / "train.py", ["--max-minutes", "60"])
    complete_settings(first, None, data, CPU)
    checkpoint = {"settings": vars(first), "defaults": settings.defaults, "data": fingerprints(data)}
    recipe = complete_settings(settings, checkpoint, data, CPU)[1]
    assert (recipe.max_steps, recipe.max_minutes) == (50, 30.0)


@pytest.mark.parametrize(
    "flags, needles",
    [
        (["--seed", "2"], ["seed 1337 is now 2"]),
        (["--n-layer", "3", "--n-embd", "64"], ["n_layer 1 is now 3", "n_embd 16 is now 64"]),
        (["--batch-tokens", "512", "--dropout", "0.1"], ["batch_tokens 64 is", "dropout 0.0 is now 0.1"]),
        (["--preset", "stories-9m"], ["preset quickstart is now stories-9m"]),
        (["--optimizer", "adamw"], ["optimizer muon is now adamw"]),
        (["--no-bigram-start"], ["bigram_start True is now False"]),
        (["--no-mask-stories"], ["mask_stories True is now False"]),
    ],
)
def test_what_makes_the_run_may_not_change(train, trained, tmp_path, flags, needles):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as error:
        train("run", *flags, tiny=[])
    assert all(needle in str(error.value) for needle in [*needles, "--fresh"])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("what", ["training stories", "validation stories", "tokenizer"])
def test_a_run_on_other_data_is_not_resumed(packed, trained, what):
    checkpoint = load_checkpoint(trained / "best.pt")
    checkpoint["data"][what] = "0"
    with pytest.raises(UserError, match=f"changed {what}"):
        complete_settings(read_settings(REPO / "train.py", []), checkpoint, load_data(packed), CPU)


def test_a_run_that_lacks_a_setting_is_of_an_earlier_version(packed, trained):
    checkpoint = load_checkpoint(trained / "best.pt")
    del checkpoint["settings"]["grow_at"]
    with pytest.raises(UserError, match="started by an earlier version"):
        complete_settings(read_settings(REPO / "train.py", []), checkpoint, load_data(packed), CPU)


def test_a_run_whose_optimizer_was_another_cannot_be_resumed(train):
    """As of a version in which Muon cut matrices in other pieces: its momenta would go to the wrong matrices."""
    folder, _ = train("run", "--max-steps", 8, "--decay-fraction", "0.01", "--grow-at", 0)
    checkpoint = load_checkpoint(folder / "ckpt_8.pt")
    for group in checkpoint["optimizers"][0]["param_groups"]:
        del group["pieces"]
    save_checkpoint(folder / "ckpt_8.pt", checkpoint)
    with pytest.raises(UserError, match="started by an earlier version .* --fresh"):
        train("run", "--decay-fraction", "0.01")


@pytest.fixture
def poison(monkeypatch):
    """poison({5, 6}): the losses of the 5th and 6th step become nan (one micro-batch a step, no evaluation)."""

    def poison(steps):
        calls, forward = [], GPT.forward

        def poisoned(self, idx, targets=None, *others):
            calls.append(1)  # the first call tries the micro-batch
            loss = forward(self, idx, targets, *others)
            return loss * float("nan") if len(calls) - 1 in steps else loss

        monkeypatch.setattr(GPT, "forward", poisoned)

    return poison


def test_what_does_not_make_the_run_may_change(train):
    folder, _ = train("run", "--max-steps", 8, "--decay-fraction", "0.01", "--grow-at", 0)
    flags = "--max-steps 12 --dtype bfloat16 --micro-batch 1 --eval-interval 3 --save-interval 5 --keep 1"
    train("run", *flags.split(), "--learning-rate", "1e-3", "--warmup-steps", 1, tiny=["--compile", "off"])
    assert [row["step"] for row in metrics(folder) if "validation_loss" in row] == [4, 8, 9, 12]
    assert [path.name for path in list_checkpoints(folder)] == ["ckpt_12.pt"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_is_not_finite_changes_nothing(train, poison, optimizer):
    poison({5})
    folder, _ = train(
        "run", "--save-interval", 1, "--eval-interval", 12, "--keep", 20, "--optimizer", optimizer
    )
    four, five, six = (load_checkpoint(folder / f"ckpt_{step}.pt") for step in (4, 5, 6))
    assert all(torch.equal(four["weights"][name], five["weights"][name]) for name in four["weights"])
    for before, after in zip(four["optimizers"], five["optimizers"], strict=True):
        for key, state in before["state"].items():
            assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())
    assert not torch.equal(
        five["weights"]["token_embedding.weight"], six["weights"]["token_embedding.weight"]
    )
    assert all(weight.isfinite().all() for weight in six["weights"].values())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("train_loss", 0) is None] == [5]


@pytest.mark.parametrize("where", ["head.weight", "blocks.0.attention.qkv.weight"])
@pytest.mark.parametrize("clip", [0, 1])
def test_what_overflows_in_float16_keeps_both_optimizers_from_their_step(train, monkeypatch, where, clip):
    initialise = GPT.__init__

    def with_an_overflow(self, config):
        initialise(self, config)
        calls = []

        def overflow(gradient):
            calls.append(1)  # the first call tries the micro-batch
            return torch.where(torch.tensor(len(calls) - 1 == 5), math.inf, gradient)

        self.get_parameter(where).register_hook(overflow)

    monkeypatch.setattr(GPT, "__init__", with_an_overflow)
    flags = [
        "--dtype",
        "float16",
        "--grad-clip",
        clip,
        "--save-interval",
        1,
        "--eval-interval",
        12,
        "--keep",
        20,
        "--grow-at",
        0,
    ]
    folder, _ = train("run", *flags)
    four, five, six = (load_checkpoint(folder / f"ckpt_{step}.pt") for step in (4, 5, 6))
    assert all(torch.equal(four["weights"][name], five["weights"][name]) for name in four["weights"])
    assert five["scaler"]["scale"] == four["scaler"]["scale"] / 2
    assert not any(torch.equal(five["weights"][name], six["weights"][name]) for name in four["weights"])


def test_a_run_that_stays_not_finite_stops_and_says_where(train, poison, tmp_path):
    poison(range(6, 1000))
    with pytest.raises(
        UserError, match="not finite, 5 steps in a row up to step 10; .*lower --learning-rate .*--fresh"
    ):
        train("run", "--eval-interval", 12, "--save-interval", 1)
    assert len(list_checkpoints(tmp_path / "run")) == 3
    for path in list_checkpoints(tmp_path / "run"):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path)["weights"].values())


def test_float16_has_more_steps_to_find_its_scale(train, poison):
    poison(range(6, 14))
    folder, _ = train("run", "--dtype", "float16", "--max-steps", 16, "--eval-interval", 16, "--grow-at", 0)
    assert load_checkpoint(folder / "ckpt_16.pt")["scaler"]["scale"] == 65_536 / 2**8


def test_a_ruined_model_is_no_result(train, tmp_path):
    recipe = ["--blocks", "gpt2", "--optimizer", "adamw", "--learning-rate", 1e12, "--warmup-steps", 0]
    with pytest.raises(
        UserError, match=r"after step 4 the validation loss is (nan|inf).*lower --learning-rate"
    ):
        train("run", *recipe, "--grow-at", 0, "--max-steps", 4, "--eval-interval", 4)
    recipe += ["--learning-rate", 1e39, "--save-interval", 1]
    with pytest.raises(UserError, match=r"after step 1 some weights are not finite.*lower --learning-rate"):
        train("infinite", *recipe, "--grow-at", 0, "--eval-interval", 4)
    assert not list_checkpoints(tmp_path / "infinite")
    assert not list((tmp_path / "run").glob("*[!y].pt"))  # at most before_decay.pt
    assert "validation" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_where_memory_runs_out_it_takes_half_or_says_what_to_take(train, monkeypatch):
    forward = GPT.forward

    def too_large(self, idx, targets=None, *others):
        if len(idx) > 4 and targets is not None and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, targets, *others)

    monkeypatch.setattr(GPT, "forward", too_large)
    _, result = train("run", "--max-steps", 2)
    assert "micro-batch  4 windows, 4 per step" in result.out

    calls = []

    def sudden(self, idx, targets=None, *others):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, targets, *others)

    monkeypatch.setattr(GPT, "forward", sudden)
    with pytest.raises(UserError, match="--micro-batch 8"):
        train("other")


@pytest.mark.parametrize(("windows", "fits", "chosen"), [(64, 13, 8), (128, 14, 8), (8, 16, 8), (17, 5, 5)])
def test_micro_batches_are_equal_if_slightly_smaller_ones_are(monkeypatch, windows, fits, chosen):
    monkeypatch.setattr("model.forward.guess_micro_batch", lambda model, runtime: fits)
    model = GPT(GPTConfig(vocab_size=16, block_size=4, n_layer=1, n_head=1, n_embd=4))
    runtime = Runtime(torch.device("cpu"), torch.float32, False, "")
    recipe = Recipe(sampled_softmax=False, mask_stories=False)
    settings = SimpleNamespace(micro_batch=0)
    run = make_run(settings=settings, config=model.config, runtime=runtime, recipe=recipe)
    prepare_forward(run, model, windows)
    assert settings.micro_batch == chosen


def test_all_processes_take_the_smallest_micro_batch(monkeypatch):
    """One of them, with 36 windows to the other's 35, has memory for 6 at once, the other for 9."""
    others = iter([36, 0, 6, 6])  # windows, no FlexAttention, micro-batches

    def all_reduce(facts, op):
        other = next(others)
        facts.copy_(torch.maximum(facts, torch.tensor([-other, other])))

    monkeypatch.setattr("model.processes.dist.all_reduce", all_reduce)
    monkeypatch.setattr("model.forward.guess_micro_batch", lambda model, runtime: 9)
    tried = []
    monkeypatch.setattr("model.forward.try_out", lambda run, forward, size: tried.append(size))
    model = GPT(GPTConfig(vocab_size=16, block_size=4, n_layer=1, n_head=1, n_embd=4))
    model.flex = False
    settings, runtime = SimpleNamespace(micro_batch=0), Runtime(CPU, torch.float32, False, "")
    run = make_run(settings=settings, config=model.config, runtime=runtime, processes=Processes(world_size=2))
    prepare_forward(run, model, 35)
    assert settings.micro_batch == 6 and sorted(tried) == [5, 6, 8, 9]


@pytest.mark.parametrize(
    ("changes", "capability", "expected"),
    [
        ({}, (8, 0), True),
        ({}, (7, 5), False),
        ({"config": GPTConfig(block_size=128)}, (8, 0), False),
        ({"config": GPTConfig(block_size=129, dropout=0.1)}, (8, 0), False),
        ({"recipe": Recipe(mask_stories=False)}, (8, 0), False),
        ({"runtime": Runtime(CPU, torch.bfloat16, True, "")}, (8, 0), False),
        ({"runtime": Runtime(torch.device("cuda"), torch.float16, True, "")}, (8, 0), False),
        ({"runtime": Runtime(torch.device("cuda"), torch.bfloat16, False, "")}, (8, 0), False),
    ],
)
def test_flex_attention_is_tried_where_it_may_pay(monkeypatch, changes, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    runtime = Runtime(torch.device("cuda"), torch.bfloat16, True, "")
    parts = {"config": GPTConfig(block_size=129), "recipe": Recipe(), "runtime": runtime}
    assert flex_may_pay(make_run(**{**parts, **changes})) == expected


def test_a_resumed_run_keeps_the_choice_of_flex_attention_on_the_same_kind_of_device(train, monkeypatch):
    flags, chosen = ["--decay-fraction", "0.01", "--grow-at", 0], []
    folder, _ = train("run", "--max-steps", 1, *flags)
    prepare = train_script.prepare_forward

    def noting(run, model, windows):
        chosen.append(model.flex)
        return prepare(run, model, windows)

    monkeypatch.setattr(train_script, "prepare_forward", noting)
    for step, device in ((1, "cpu"), (2, "cuda")):
        path = folder / f"ckpt_{step}.pt"
        checkpoint = load_checkpoint(path)
        assert checkpoint["flex"] is None  # not compiled
        save_checkpoint(path, {**checkpoint, "flex": True, "device": device})
        train("run", "--max-steps", step + 1, *flags)
    assert chosen == [True, None]


@pytest.mark.parametrize("blocks", ["modern", "gpt2"])
def test_flex_attention_is_used_only_if_it_is_right_and_faster(monkeypatch, capsys, blocks):
    """On a CPU it has no gradients, so plain attention takes its place here: with the right mask, then a wrong one."""
    config = GPTConfig(vocab_size=16, block_size=64, n_layer=1, n_head=2, n_embd=16, blocks=blocks)
    run = make_run(
        config=config, runtime=Runtime(torch.device("cpu"), torch.float32, True, ""), recipe=Recipe()
    )
    assert not choose_flex(run, 2)  # not even tried
    monkeypatch.setattr("model.forward.flex_may_pay", lambda run: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # as a CPU run sets it
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    clock = itertools.accumulate(itertools.cycle([0, 1, 0, 2]))  # flex 1 s, plain 2 s, and so on
    monkeypatch.setattr("model.forward.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    mask = {"right": lambda stories, flex: story_mask(stories)}
    mask["wrong"] = lambda stories, flex: story_mask(torch.zeros_like(stories) if flex else stories)
    for name in mask:
        monkeypatch.setattr("model.forward.story_mask", mask[name])
        assert choose_flex(run, 2) == (name == "right")
    assert "FlexAttention does not work here (its results are wrong here)" in capsys.readouterr().err
    monkeypatch.setattr("model.forward.story_mask", mask["right"])
    clock = itertools.accumulate(itertools.cycle([0, 2, 0, 1]))
    assert not choose_flex(run, 2)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_flex(run, 2)  # a measurement must not decide
    monkeypatch.setattr("model.forward.story_mask", story_mask)
    assert not choose_flex(run, 2)
    assert "does not support backward on CPU" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried", "CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_memory_that_runs_out_inside_a_library_is_known_too(message):
    assert ran_out_of_memory(RuntimeError(message))
    assert not ran_out_of_memory(RuntimeError("Triton Error"))
    assert not ran_out_of_memory(
        RuntimeError("g++ -O3 main.cpp\ncc1plus: out of memory allocating 65536 bytes")
    )


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA L40", None),
    ],
)
def test_only_a_gpu_of_that_name_has_that_peak(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_without_a_terminal_progress_is_a_line_now_and_then(train, monkeypatch):
    monkeypatch.setattr("model.console.QUIET_SECONDS", -1)
    _, result = train("run", "--max-steps", 2)
    assert re.search(
        r"step 2 of 2: loss \d\.\d{3}, [\d,]+ tokens/s, 0\.0 minutes left\n", result.out + result.err
    )


def test_a_lost_terminal_does_not_end_a_run(monkeypatch):
    def lost(*_):
        raise OSError(errno.EIO, "Input/output error")

    bar = SimpleNamespace(shows=True, bar=SimpleNamespace(write=lost), stop=None)
    closed = []
    monkeypatch.setattr("model.console.close_output", lambda: closed.append(True))
    ProgressBar.say(bar, "step 2")
    assert closed


def test_a_second_ctrl_c_stops_at_once():
    stop = StopRequest(Processes())
    try:
        stop.receive(signal.SIGINT, None)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            stop.receive(signal.SIGINT, None)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(("ours", "other"), [(signal.SIGTERM, 0), (0, signal.SIGTERM)])
def test_several_processes_stop_together(monkeypatch, ours, other):
    """Not before all have heard of it: the others would wait for gradients of one that is gone."""

    def all_reduce(facts, op):
        facts.copy_(torch.maximum(facts, torch.tensor([other, 0.0], dtype=facts.dtype)))

    monkeypatch.setattr("model.processes.dist.all_reduce", all_reduce)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop = StopRequest(Processes(rank=0, world_size=2))
    if ours:
        stop.receive(ours, None)
    assert not stop
    stop.synchronise(1.0)
    assert stop and stop.agreed == signal.SIGTERM


@pytest.mark.parametrize("rank", [0, 1])
def test_training_time_is_the_first_process_own(monkeypatch, rank):
    """Meanwhile, the other has waited for it to evaluate."""
    seconds, other = [(5.0, [0.0, 0.0]), (9.0, [0.0, 5.0])][rank]

    def all_reduce(facts, op):
        facts.copy_(torch.maximum(facts, torch.tensor(other, dtype=facts.dtype)))

    monkeypatch.setattr("model.processes.dist.all_reduce", all_reduce)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert StopRequest(Processes(rank=rank, world_size=2)).synchronise(seconds) == 5.0


def test_float16_trains_like_float32_and_its_scaler_is_kept(train):
    exact, _ = train("float32", "--dtype", "float32")
    scaled, _ = train("float16", "--dtype", "float16")
    np.testing.assert_allclose(losses(scaled), losses(exact), rtol=1e-3)
    scaler = load_checkpoint(scaled / "ckpt_12.pt")["scaler"]
    assert scaler["scale"] == 65_536 and scaler["_growth_tracker"] == 12  # steps since the scale changed


def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(run, packed, tmp_path):
    places = ["--data-dir", packed, "--checkpoint-dir", tmp_path / "run"]
    command = [sys.executable, REPO / "train.py", *TINY, *places, "--max-steps", "100000"]
    first = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for_checkpoint(tmp_path / "run", first)
        for flags in ([], ["--fresh"]):
            assert_one_line_error(run("train.py", *TINY, *places, *flags), "another train.py is running")
    finally:
        first.kill()
        first.communicate()
    step = load_checkpoint(list_checkpoints(tmp_path / "run")[0])["step"]
    run("train.py", "--compile", "off", *places, "--max-steps", step + 8, check=0)


def test_a_full_disk_stops_with_one_line_and_leaves_the_earlier_checkpoints(train, run, packed, tmp_path):
    folder, _ = train("run", "--max-steps", 8, "--decay-fraction", "0.01", "--grow-at", 0)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    script = limit + f"import runpy; runpy.run_path({str(REPO / 'train.py')!r}, run_name='__main__')"
    places = ["--data-dir", packed, "--checkpoint-dir", folder, "--compile", "off"]
    command = [sys.executable, "-c", script, *places, "--max-steps", 20, "--decay-fraction", "0.01"]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=REPO, timeout=PATIENCE
    )
    assert_one_line_error(result, "cannot write")
    after = {path.name: path.read_bytes() for path in folder.glob("*.pt")}
    assert before.items() <= after.items()
    assert not list(folder.glob(".*.tmp"))
    train("run", "--max-steps", 20, "--decay-fraction", "0.01")


def test_killed_again_and_again_it_ends_as_if_never_interrupted(run, packed):
    flags = ["--kills", 4, "--max-steps", 60, "--longest", 0.8, "--data", packed]
    result = run("benchmarks/kill_resume.py", *flags, timeout=2 * PATIENCE)
    assert result.returncode == 0 and "identical: True" in result.stdout, result.stdout + result.stderr


def test_evaluating_more_often_does_not_change_training(train, monkeypatch):
    """With a seed of dropout for each micro-batch of each step."""
    seeds, dropout_seed = [], train_script.dropout_seed
    monkeypatch.setattr(
        train_script, "dropout_seed", lambda *numbers: seeds.append(dropout_seed(*numbers)) or seeds[-1]
    )
    flags = ["--dropout", 0.1, "--micro-batch", 8]
    seldom, _ = train("seldom", *flags, "--eval-interval", 12)
    assert len(set(seeds)) == len(seeds) == 12 * 2
    often, _ = train("often", *flags, "--eval-interval", 1)
    np.testing.assert_array_equal(losses(seldom), losses(often))


def test_a_samples_paragraphs_stay_apart_in_markdown(tmp_path):
    row = {"step": 2, "validation_loss": 1.0, "sample": "Once upon a time.\nThe end.\n\nOr not."}
    write_samples([row], tmp_path / "samples.md")
    assert "Once upon a time.\n\nThe end.\n\nOr not.\n" in (tmp_path / "samples.md").read_text()


def test_the_smoothed_loss_of_a_short_run_is_a_mean_of_its_neighbours():
    assert smooth([2.0]) == [2.0]
    jagged = [3.0, 1.0] * 10
    assert all(1.5 < value < 2.5 for value in smooth(jagged)[4:])


@pytest.mark.parametrize(
    ("steps", "minutes", "dropout", "hinted"),
    [(41, None, 0.0, True), (40, None, 0.0, False), (41, None, 0.1, False), (41, 5.0, 0.0, False)],
)
def test_many_epochs_without_dropout_get_a_hint(capsys, steps, minutes, dropout, hinted):
    config = GPTConfig(vocab_size=16, block_size=4, n_layer=1, n_head=1, n_embd=4, dropout=dropout)
    split = Split(np.zeros(1_000, np.uint16), stories=10, bytes=4_000, sha256="")
    settings = SimpleNamespace(init_from=None, preset="quickstart", checkpoint_dir="runs")
    recipe = Recipe(max_steps=steps, max_minutes=minutes, batch_tokens=100)
    state, runtime = (
        TrainingState(GPT(config), [], None),
        Runtime(torch.device("cpu"), torch.float32, False, ""),
    )
    data = Data(split, split, 16, 0, "")
    print_plan(
        make_run(settings=settings, config=config, recipe=recipe, data=data, runtime=runtime), state, None
    )
    assert ("--dropout 0.1 prevents overfitting" in capsys.readouterr().out) == hinted
