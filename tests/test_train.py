"""train.py as its users run it: a tiny model, some steps, on the built-in stories."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import REPO

from model.batches import Batches, load_data
from model.checkpoint import list_checkpoints, load_checkpoint
from model.config import PRESETS, GPTConfig
from model.gpt import GPT
from model.settings import UserError
from train import main

TINY = (
    "--preset quickstart --n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --batch-tokens 512 --max-steps 12 "
    "--warmup-steps 2 --eval-interval 4 --eval-tokens 1024 --log-interval 1 --sample-tokens 8 --compile off"
).split()


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


def metrics(folder):
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def losses(folder):
    return np.array([row["train_loss"] for row in metrics(folder) if "train_loss" in row])


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    for name in ("ckpt_12.pt", "best.pt"):
        weights, others = (load_checkpoint(folder / name)["weights"] for folder in (one, other))
        assert weights.keys() == others.keys()
        assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_a_run_leaves_what_it_promises(train):
    folder, result = train("run")
    assert [path.name for path in list_checkpoints(folder)] == ["ckpt_12.pt", "ckpt_8.pt", "ckpt_4.pt"]
    rows = metrics(folder)
    assert [row["step"] for row in rows if "train_loss" in row] == list(range(1, 13))
    evaluations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in evaluations] == [4, 8, 12]
    assert evaluations[-1]["validation_loss"] < evaluations[0]["validation_loss"] < 6.1
    best = load_checkpoint(folder / "best.pt")
    assert best["best_loss"] == min(row["validation_loss"] for row in evaluations)
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples.md").read_text().count("Once upon a time") == 3
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    assert "best_checkpoint" in result.out and result.err == ""


def test_keep_limits_the_checkpoints(train):
    folder, _ = train("run", "--keep", 1)
    assert [path.name for path in list_checkpoints(folder)] == ["ckpt_12.pt"]


def test_losses_are_those_of_a_plain_loop(train, packed):
    """GPT-2's blocks under AdamW in float32, against the textbook loop: no micro-batches, nothing fused."""
    flags = "--blocks gpt2 --optimizer adamw --dtype float32 --micro-batch 3 --learning-rate 1e-3 --weight-decay 0.1"
    folder, _ = train("run", *flags.split(), "--schedule", "cosine", "--decay-fraction", 1)
    data = load_data(packed)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(400, 32, 2, 2, 32, blocks="gpt2")).double()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    batches = Batches(data.train.tokens, 32, 16, seed=1337)
    expected = []
    for step in range(12):
        windows = torch.from_numpy(batches.windows(batches.starts(step)))
        logits = model(windows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            warmup = min(1, (step + 1) / 2)
            group["lr"] = 1e-3 * warmup * (1 + np.cos(np.pi * step / 12)) / 2
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    np.testing.assert_allclose(losses(folder), expected, rtol=2e-6)


@pytest.mark.parametrize(
    "dtype, how", [("float32", signal.SIGINT), ("bfloat16", signal.SIGTERM), ("bfloat16", signal.SIGKILL)]
)
def test_an_interrupted_run_goes_on_exactly(train, packed, tmp_path, dtype, how):
    flags = ["--dtype", dtype, "--dropout", "0.1", "--micro-batch", "5", "--save-interval", "3"]
    whole, _ = train("whole", *flags)
    broken = tmp_path / "broken"
    places = ["--data-dir", packed, "--checkpoint-dir", broken]
    command = [sys.executable, REPO / "train.py", *TINY, *flags, *places]
    process = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list_checkpoints(broken) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how), errors
    if how != signal.SIGKILL:
        assert "go on with: python" in output
    assert load_checkpoint(list_checkpoints(broken)[0])["step"] < 12
    train(
        "broken", "--dtype", dtype, "--micro-batch", "5", tiny=["--compile", "off"]
    )  # the rest it remembers
    assert_same_run(whole, broken)


def test_the_micro_batch_does_not_change_the_losses(train):
    runs = [train(f"micro{n}", "--dtype", "float32", "--micro-batch", n)[0] for n in (0, 1, 7)]
    for other in runs[1:]:
        np.testing.assert_allclose(losses(other), losses(runs[0]), rtol=1e-5)


def test_two_processes_train_as_one_does(train, packed, tmp_path):
    one, _ = train("one", "--dtype", "float32")
    two = tmp_path / "two"
    places = ["--data-dir", str(packed), "--checkpoint-dir", str(two)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*torchrun, str(REPO / "train.py"), *TINY, "--dtype", "float32", "--micro-batch", "3", *places],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("steps: 12") == 1  # only the first process speaks
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


def test_compiled_and_eager_runs_agree(train):
    eager, _ = train("eager", "--dtype", "float32")
    compiled, result = train("compiled", "--dtype", "float32", "--compile", "on")
    assert result.err == ""
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=1e-5)


def test_where_compilation_fails_it_warns_once_and_goes_on(train, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nand a long trace")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    torch._dynamo.reset()
    _, result = train("run", "--compile", "on")
    lines = result.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: torch.compile does not work here"), result.err


def test_max_minutes_ends_the_run_with_the_schedule(train):
    folder, _ = train("run", "--max-steps", 1_000_000, "--max-minutes", 0.03)
    rows = [row for row in metrics(folder) if "train_loss" in row]
    assert rows[-1]["learning_rate"] < 0.3 * max(row["learning_rate"] for row in rows)
    assert load_checkpoint(list_checkpoints(folder)[0])["seconds"] >= 1.8


def test_a_finished_run_says_so_and_can_be_extended(train):
    folder, _ = train("run")
    before = metrics(folder)
    _, result = train("run")
    assert "finished already" in result.out and metrics(folder) == before
    train("run", "--max-steps", 16)
    assert list_checkpoints(folder)[0].name == "ckpt_16.pt"


def test_fresh_moves_the_old_run_aside(train, tmp_path):
    folder, _ = train("run", "--seed", 1)
    _, result = train("run", "--seed", 2, "--fresh")
    (moved,) = tmp_path.glob("run-*")
    assert moved.name in result.out and (moved / "ckpt_12.pt").exists()
    assert load_checkpoint(folder / "ckpt_12.pt")["settings"]["seed"] == 2


@pytest.mark.parametrize(
    "flags, needles",
    [
        (["--seed", "2"], ["seed 1337 is now 2"]),
        (["--n-layer", "3", "--n-embd", "64"], ["n_layer 2 is now 3", "n_embd 32 is now 64"]),
        (["--preset", "stories-9m"], ["preset quickstart is now stories-9m"]),
        (["--optimizer", "adamw"], ["optimizer muon is now adamw"]),
    ],
)
def test_what_makes_the_run_may_not_change(train, flags, needles):
    folder, _ = train("run")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as error:
        train("run", *flags)
    assert all(needle in str(error.value) for needle in [*needles, "--fresh"])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_loss_that_is_not_finite_stops_and_is_not_saved(train, tmp_path):
    with pytest.raises(UserError, match="the loss is nan at step .* lower --learning-rate"):
        train("run", "--learning-rate", "1e30", "--grad-clip", 0, "--optimizer", "adamw")
    for path in list_checkpoints(tmp_path / "run"):
        assert all(w.isfinite().all() for w in load_checkpoint(path)["weights"].values())


def test_evaluating_more_often_does_not_change_training(train):
    seldom, _ = train("seldom", "--eval-interval", 12, "--dropout", 0.1)
    often, _ = train("often", "--eval-interval", 1, "--dropout", 0.1)
    np.testing.assert_array_equal(losses(seldom), losses(often))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_sound_model(name):
    config = PRESETS[name].config
    with torch.device("meta"):
        logits = GPT(config)(torch.zeros(1, 8, dtype=torch.long))
    assert logits.shape == (1, 8, config.vocab_size)
