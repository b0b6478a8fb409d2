"""The settings of a run: what its preset fills in, what may change when it goes on, and what may not."""

import shutil
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
import torch
from conftest import REPO
from training import CPU, metrics

from model.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from model.errors import UserError
from model.packed_data import fingerprints, load_data
from model.processes import Processes
from model.run import complete_settings, plan_run
from model.settings import read_settings


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


def of_size(packed, tokens):
    """Packed stories as if they had so many training tokens."""
    data = load_data(packed)
    return replace(data, train=replace(data.train, tokens=np.zeros(tokens, np.uint16)))


@pytest.mark.parametrize(
    ("device", "minutes", "tokens", "expected"),
    [
        ("cpu", 1, 9_000_000, 2_048),
        ("cpu", 30, 9_000_000, 4_096),
        ("cuda", 1, 14_000_000, 65_536),
        ("cuda", 1, 1_700_000, 8_192),  # more would be fewer than 200 steps per epoch
        ("cuda", 30, 1_000, 2_048),
        ("cpu", 30, 300_000, 2_048),
    ],
)
def test_the_steps_suit_the_device_the_time_and_the_stories(packed, device, minutes, tokens, expected):
    settings = read_settings(REPO / "train.py", ["--max-minutes", str(minutes)])
    recipe = complete_settings(settings, None, of_size(packed, tokens), torch.device(device))[1]
    assert recipe.batch_tokens == expected and recipe.eval_interval <= 1_000


@pytest.mark.parametrize(
    ("tokens", "flags", "steps", "interval", "warmup"),
    [
        (12_000_000, "", 20_000, 200, 10),
        (4_000_000, "", 7_813, 200, 10),
        (100_000, "", 391, 79, 10),
        (3_000, "", 12, 3, 1),
        (4_000_000, "--max-epochs 0.5", 489, 98, 10),
        (100_000, "--max-epochs 5 --max-steps 100", 100, 20, 10),
        (100_000, "--max-epochs none --eval-interval 50", 20_000, 50, 10),
        (100_000, "--max-steps 700", 700, 200, 10),
        (5_000_000, "--preset tinystories-33m --vocab-size 50257", 14_300, 250, 100),
    ],
)
def test_the_length_in_epochs(packed, tokens, flags, steps, interval, warmup):
    settings, data = read_settings(REPO / "train.py", flags.split()), of_size(packed, tokens)
    recipe = complete_settings(settings, None, data, CPU)[1]
    assert (recipe.max_steps, recipe.eval_interval, recipe.warmup_steps) == (steps, interval, warmup)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [("", 391), ("--max-epochs none", 20_000), ("--max-epochs 10", 489), ("--max-steps 9", 9)],
)
def test_a_limit_in_epochs_can_be_lifted_and_moved(packed, flags, steps):
    data, first = of_size(packed, 100_000), read_settings(REPO / "train.py", [])
    complete_settings(first, None, data, CPU)
    checkpoint = {"settings": vars(first), "defaults": first.defaults, "data": fingerprints(data)}
    again = read_settings(REPO / "train.py", flags.split())
    assert complete_settings(again, checkpoint, data, CPU)[1].max_steps == steps


def test_mps_takes_no_more_than_its_products_can_add_up(packed, monkeypatch):
    monkeypatch.setattr("model.run.choose_device", lambda name: torch.device("mps"))
    flags = ["--data-dir", str(packed), "--micro-batch", "126", "--block-size", "256"]
    flags += ["--batch-tokens", "65536"]
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
    ("tokens", "flags", "expected"),
    [
        (110_000, [], 3.1),
        (307_226, [], 1.1),
        (4_830_165, [], 0.1),
        (1_000, [], 5.0),
        (110_000, ["--weight-decay", "0.1"], 0.1),
        (110_000, ["--optimizer", "adamw"], 0.1),
        (110_000, ["--preset", "tinystories-gpt"], 0.1),
    ],
)
def test_few_stories_get_more_weight_decay(packed, tokens, flags, expected):
    settings = read_settings(REPO / "train.py", flags)
    _, recipe = complete_settings(settings, None, of_size(packed, tokens), CPU)
    assert recipe.weight_decay == expected


@pytest.mark.parametrize(
    ("flags", "new", "resumed"),
    [
        ("", (2_400, 3.5), (70, 8.0)),
        ("--max-minutes 30", (None, 30.0), (None, 30.0)),
        ("--max-steps 50", (50, None), (50, None)),
        ("--max-steps 50 --max-minutes 30", (50, 30.0), (50, 30.0)),
        ("--max-minutes none", (2_400, None), (70, None)),
        ("--max-steps none --max-epochs none", (None, 3.5), (None, 8.0)),
        ("--max-epochs 2", (9_766, None), (9_766, None)),
    ],
)
def test_a_limit_that_is_chosen_replaces_the_others(packed, flags, new, resumed):
    data, limits = of_size(packed, 10_000_000), attrgetter("max_steps", "max_minutes")

    def settings():
        return read_settings(REPO / "train.py", ["--preset", "quickstart", *flags.split()])

    first, again = settings(), settings()
    assert limits(complete_settings(first, None, data, CPU)[1]) == new
    saved = {**vars(first), "max_steps": 70, "max_minutes": 8.0}
    checkpoint = {"settings": saved, "defaults": first.defaults, "data": fingerprints(data)}
    assert limits(complete_settings(again, checkpoint, data, CPU)[1]) == resumed


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


def test_what_does_not_make_the_run_may_change(train):
    folder, _ = train("run", "--max-steps", 8, "--decay-fraction", "0.01", "--grow-at", 0)
    flags = "--max-steps 12 --dtype bfloat16 --micro-batch 1 --eval-interval 3 --save-interval 5 --keep 1"
    train("run", *flags.split(), "--learning-rate", "1e-3", "--warmup-steps", 1, tiny=["--compile", "off"])
    assert [row["step"] for row in metrics(folder) if "validation_loss" in row] == [4, 8, 9, 12]
    assert [path.name for path in list_checkpoints(folder)] == ["ckpt_12.pt"]
