"""Runs that are stopped, killed, resumed, made longer or shorter, or begun afresh."""

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PATIENCE, REPO, assert_one_line_error
from training import (
    LARGE_VOCABULARY,
    TINY,
    assert_same_run,
    make_run,
    metrics,
    settings_of,
    wait_for_checkpoint,
)

import train as train_script
from model.checkpoint import list_checkpoints, load_checkpoint, load_latest, save_checkpoint
from model.config import Recipe
from model.errors import UserError
from model.metrics import read_history
from model.processes import Processes, StopRequest
from model.training_state import rewind


def test_what_changes_is_kept_from_before_the_first_step(train, monkeypatch):
    flags = ["--decay-fraction", "0.01", "--grow-at", 0, "--max-steps", 6]
    folder, _ = train("run", *flags)
    monkeypatch.setattr(train_script, "take_step", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        train("run", "--max-steps", 12, "--learning-rate", "1e-3", tiny=[])
    saved = load_checkpoint(folder / "ckpt_6.pt")["settings"]
    assert (saved["max_steps"], saved["learning_rate"]) == (12, 1e-3)


def test_the_best_loss_is_remembered(train):
    folder, _ = train("run", "--decay-fraction", "0.01", "--grow-at", 0, "--max-steps", 4)
    path = folder / "ckpt_4.pt"
    save_checkpoint(path, {**load_checkpoint(path), "best_loss": 0.5})
    train("run", "--max-steps", 8, tiny=[])
    assert load_checkpoint(folder / "ckpt_8.pt")["best_loss"] == 0.5
    with pytest.raises(
        UserError, match="cannot be resumed with: eval_tokens 1024 is now 512"
    ):  # nothing to compare
        train("run", "--max-steps", 12, "--eval-tokens", 512, tiny=[])


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
    folder, _ = train("run", "--decay-fraction", "0.01", "--grow-at", 0, "--max-steps", 4)
    checkpoint = load_checkpoint(folder / "ckpt_4.pt")
    del checkpoint["weights"]["norm.weight"]
    save_checkpoint(folder / "ckpt_4.pt", checkpoint)
    with pytest.raises(UserError, match="after step 4 do not fit together .*norm.weight"):
        train("run", "--max-steps", 8, tiny=[])


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


def test_a_closed_terminal_ends_in_a_checkpoint(packed, tmp_path):
    """As when a connection breaks: the terminal's other end is gone, and nothing can be printed any more."""
    folder = tmp_path / "run"
    flags = ["--data-dir", packed, "--checkpoint-dir", folder, "--save-interval", 3, "--max-steps", 10**6]
    command = [sys.executable, str(REPO / "train.py"), *map(str, [*TINY, *flags])]
    ours, terminal = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    # the terminal is the new session's, so its end is a hang-up for this process
    start = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", start, *command]
    process = subprocess.Popen(command, **streams, start_new_session=True)
    os.close(terminal)
    deadline = time.monotonic() + PATIENCE
    while not list_checkpoints(folder) and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.01)[0]:
            os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGHUP
    last = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert load_checkpoint(list_checkpoints(folder)[0])["step"] == last


def test_a_finished_run_says_so(train):
    folder, _ = train("run")
    before = metrics(folder)
    _, result = train("run")
    assert result.out.startswith("already finished") and metrics(folder) == before
    _, result = train("run", "--max-steps", 8)
    assert result.out.startswith("step 12 is already beyond this --max-steps: nothing is left to train")


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
    run = make_run(settings=settings_of(then, folder), recipe=Recipe(max_steps=15), processes=run.processes)
    assert rewind(run, path, then) == (path, then)  # in its decay, but no longer than it was


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
    for name in ("shorter_9_ckpt_9.pt", "notes.txt"):
        (folder / name).write_text("mine")
    train("run", "--max-steps", 1, "--fresh")
    (moved,) = real.glob("earlier-*")
    assert folder.is_symlink()
    assert {path.name for path in moved.iterdir()} == made | {"shorter_9_ckpt_9.pt"}
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
        train("run", "--fresh", "--vocab-size", 10**9, "--n-embd", 10**6)
    assert sorted(folder.iterdir()) == before


def test_a_run_that_ended_by_the_clock_needs_more_time(train):
    """More steps change nothing then, so that it does not go back either."""
    folder, _ = train("run", "--max-steps", 1_000_000, "--max-minutes", 0.02)
    before = metrics(folder)
    _, result = train("run", "--max-steps", 2_000_000, "--max-minutes", 0.02)
    assert (
        "already finished: a larger --max-minutes extends this run" in result.out
        and metrics(folder) == before
    )


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
