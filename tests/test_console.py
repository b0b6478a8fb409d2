"""What train.py prints, and the files that it draws from its metrics."""

import errno
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO
from training import make_run

from model.config import GPTConfig, Recipe
from model.console import ProgressBar, duration, print_finished, print_plan, print_stop
from model.gpt import GPT
from model.metrics import Metrics, smooth, write_samples
from model.packed_data import Data, Split
from model.processes import Processes
from model.runtime import Runtime
from model.settings import read_settings
from model.training_state import TrainingState


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


@pytest.mark.parametrize(("last_evaluation", "left"), [(-1, [1, 4]), (4, [1, 4, 4])])
def test_what_a_killed_run_wrote_after_its_checkpoint_is_dropped(tmp_path, last_evaluation, left):
    """As of the checkpoint after step 4, which may be from before that step's evaluation."""
    rows = [{"step": step, "train_loss": 3.0} for step in (1, 4, 5)]
    rows.insert(2, {"step": 4, "validation_loss": 3.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["step"] for row in Metrics(tmp_path, 4, last_evaluation).rows] == left
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(left)


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


def test_a_warm_up_beyond_the_run_is_noted(train):
    _, result = train("run", "--max-steps", 1, "--warmup-steps", 2)
    assert "note         2 --warmup-steps: the learning rate will not reach its peak" in result.out


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
    assert capsys.readouterr().out.endswith(
        "resume with: torchrun --standalone --nproc_per_node=2 train.py\n"
    )


def test_without_a_terminal_progress_is_a_line_now_and_then(train, monkeypatch):
    monkeypatch.setattr("model.console.QUIET_SECONDS", -1)
    _, result = train("run", "--max-steps", 2)
    assert re.search(
        r"step 2 of 2: loss \d\.\d{3}, [\d,]+ tokens/s, 0\.0 minutes left\n", result.out + result.err
    )
    _, result = train("timed", "--max-steps", 2, "--max-minutes", 9)
    assert re.search(r"step 1: loss .* minutes left\n", result.out + result.err)


def test_a_lost_terminal_does_not_end_a_run(monkeypatch):
    def lost(*_):
        raise OSError(errno.EIO, "Input/output error")

    nothing = SimpleNamespace(write=lost, set_postfix_str=lambda *_, **__: None)
    bar = SimpleNamespace(shows=True, bar=nothing, stop=None, text="")
    closed = []
    monkeypatch.setattr("model.console.close_output", lambda: closed.append(True))
    ProgressBar.say(bar, "step 2")
    assert closed


def test_a_samples_paragraphs_stay_apart_in_markdown(tmp_path):
    row = {"step": 2, "validation_loss": 1.0, "sample": "Once upon a time.\nThe end.\n\nOr not."}
    write_samples([row], tmp_path / "samples.md")
    assert "Once upon a time.\n\nThe end.\n\nOr not.\n" in (tmp_path / "samples.md").read_text()


def test_the_smoothed_loss_of_a_short_run_is_a_mean_of_its_neighbours():
    assert smooth([2.0]) == [2.0]
    jagged = [3.0, 1.0] * 10
    assert all(1.5 < value < 2.5 for value in smooth(jagged)[1:])
    for length, reach in ((5, 1), (200, 5)):  # what rises or falls evenly comes no later
        assert smooth(range(length))[:-reach] == list(range(length - reach))


@pytest.mark.parametrize(("own_limit", "flag"), [(20_000, "--max-epochs"), (391, "--max-steps")])
def test_a_finished_run_names_the_limit_that_ended_it(capsys, own_limit, flag):
    settings, data = SimpleNamespace(max_steps=own_limit), SimpleNamespace(outdated="")
    run = make_run(settings=settings, recipe=Recipe(max_steps=391, max_epochs=8.0), data=data)
    print_finished(run, 391, {})
    assert f"a larger {flag} extends this run" in capsys.readouterr().out


def test_the_time_left_in_a_unit_that_suits_it():
    said = [duration(minutes) for minutes in (0, 119.94, 300, 15_589.5)]
    assert said == ["0.0 minutes", "119.9 minutes", "5.0 hours", "10.8 days"]


@pytest.mark.parametrize(
    ("steps", "minutes", "dropout", "hinted"),
    [(121, None, 0.0, True), (120, None, 0.0, False), (121, None, 0.1, False), (121, 5.0, 0.0, False)],
)
def test_many_epochs_without_dropout_get_a_hint(capsys, steps, minutes, dropout, hinted):
    config = GPTConfig(vocab_size=16, block_size=4, n_layer=1, n_head=1, n_embd=4, dropout=dropout)
    split = Split(np.zeros(1_000, np.uint16), stories=10, bytes=4_000, sha256="")
    settings = SimpleNamespace(init_from=None, preset="quickstart", checkpoint_dir="runs")
    recipe = Recipe(max_steps=steps, max_minutes=minutes, max_epochs=None, batch_tokens=100)
    state, runtime = (
        TrainingState(GPT(config), [], None),
        Runtime(torch.device("cpu"), torch.float32, False, ""),
    )
    data = Data(split, split, 16, 0, "")
    print_plan(
        make_run(settings=settings, config=config, recipe=recipe, data=data, runtime=runtime), state, None
    )
    assert ("--dropout 0.1 may help" in capsys.readouterr().out) == hinted


def test_what_is_drawn_is_drawn_again_after_a_while_or_at_the_end(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("model.metrics.time", SimpleNamespace(monotonic=lambda: now[0]))
    metrics, drawn = Metrics(tmp_path, 0, 0), []
    monkeypatch.setattr("model.metrics.draw_loss_curve", lambda rows, path: drawn.append(len(rows)))
    for later, every in ((0, 20), (5, 20), (16, 20), (1, 20), (0, 0), (50, 0)):
        now[0] += later
        if later != 50:
            metrics.add({"step": 1, "train_loss": 1.0})
        metrics.draw(every)
    assert drawn == [1, 3, 5]
