"""What the tests of training share: tiny runs, and how they compare."""

import json
import time
from types import SimpleNamespace

import numpy as np
import torch
from conftest import PATIENCE

from model.checkpoint import list_checkpoints, load_checkpoint
from model.processes import Processes
from model.run import Run

TINY = (
    "--preset quickstart --n-layer 2 --n-head 2 --n-embd 32 --block-size 32 --batch-tokens 512 --max-steps 12 "
    "--warmup-steps 2 --eval-interval 4 --eval-tokens 1024 --log-interval 1 --sample-tokens 8 --compile off"
).split()
CPU = torch.device("cpu")
LARGE_VOCABULARY = ["--vocab-size", "2000"]  # of which a softmax may be sampled


def make_run(**parts):
    """A run that has only these parts."""
    empty = dict.fromkeys("settings config recipe data batches validation_windows runtime".split())
    no_stories = SimpleNamespace(train=SimpleNamespace(tokens=()))
    return Run(**{**empty, "data": no_stories, "processes": Processes(), **parts})


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
