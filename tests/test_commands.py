"""quickstart.sh where something is missing: one line that says what. (That it works, .ci/run shows.)"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, REPO

from model.checkpoint import locked, set_aside

SET_ASIDE = """
import sys; from pathlib import Path; from model.checkpoint import set_aside
set_aside(Path(sys.argv[1]) / 'checkpoints')
"""


@pytest.fixture
def quickstart(tmp_path):
    """quickstart(flags...) runs a copy of quickstart.sh in tmp_path, where PATH begins with tmp_path/bin."""
    for name in ("quickstart.sh", "environment.sh", "requirements.txt"):
        shutil.copy(REPO / name, tmp_path)

    def quickstart(*flags, cwd=tmp_path):
        env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        env.pop("PYTHON", None)
        command = ["bash", tmp_path / "quickstart.sh", *flags]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE)

    return quickstart


def write_program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def assert_last_line(result, *needles):
    assert result.returncode == 2, result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(needle in last for needle in needles), result.stderr


def test_no_python_or_one_too_old(quickstart, tmp_path):
    for name in set(re.findall(r"\bpython[\d.]*(?=[ ;])", (REPO / "environment.sh").read_text())):
        write_program(tmp_path / "bin" / name, "exit 1")
    assert_last_line(quickstart(), "Python 3.10 or newer")
    assert not (tmp_path / ".venv").exists()


def test_an_installation_that_fails(quickstart, tmp_path):
    write_program(tmp_path / ".venv/bin/python", 'case "$*" in *install*) exit 1 ;; esac; echo Python 3.12')
    assert_last_line(quickstart(), "installation of requirements.txt failed")


PRETEND = """case "$*" in
*"pip config list"*) for i in 1 2 3; do echo "$INDEX"; sleep 0.1; done ;;
*pip*) echo "ran $*" ;;
esac"""


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="has an NVIDIA GPU")
@pytest.mark.parametrize(
    "index, gpu, expected",
    [
        ("", False, ["cpu", "requirements"]),
        ("", True, ["requirements"]),
        ("global.index-url='x'", False, ["requirements"]),
    ],
)
def test_without_a_gpu_pytorch_comes_without_cuda(quickstart, tmp_path, monkeypatch, index, gpu, expected):
    write_program(tmp_path / ".venv/bin/python", PRETEND)
    if gpu:
        write_program(tmp_path / "bin/nvidia-smi", "exit 0")
    monkeypatch.setenv("INDEX", index)
    ran = [line for line in quickstart().stdout.splitlines() if " install " in line]
    assert ["cpu" if "--index-url" in line else "requirements" for line in ran] == expected
    assert (
        re.search(r" torch==[\d.]+ --index-url https://download.pytorch.org/whl/cpu$", ran[0])
        or "cpu" not in expected
    )


def test_a_step_that_fails(quickstart, tmp_path):
    script = 'case "$1" in */prepare_data.py) echo "error: the disk is on fire" >&2; exit 2 ;; esac; echo Python 3.12'
    write_program(tmp_path / ".venv/bin/python", script)
    result = quickstart()
    assert_last_line(result, "step 3 (data/prepare_data.py) failed")
    assert "error: the disk is on fire" in result.stderr


def test_each_flag_goes_to_the_step_that_knows_it(quickstart, tmp_path):
    write_program(
        tmp_path / ".venv/bin/python", 'echo "ran $*"; mkdir -p data/processed; : >data/processed/meta.json'
    )
    flags = ["--source", "a.txt", "b.txt", "--max-minutes", "1", "--kind", "char", "--text_column", "x"]
    ran = [line for line in quickstart(*flags).stdout.splitlines() if re.match(r"ran [\w/]+\.py\b", line)]
    assert ran == [
        "ran data/ingestion.py --source a.txt b.txt --text_column x",
        "ran data/train_tokenizer.py --kind char",
        "ran data/prepare_data.py",
        "ran train.py --preset quickstart --max-minutes 1",
        "ran generate.py",
        "ran evaluate.py --checkpoint best --max-samples 300",
    ]


def test_a_wrong_flag_is_found_before_any_story_is_replaced(quickstart, tmp_path):
    checking = f'[ "$1" != -c ] || {{ cd "{REPO}"; exec "{sys.executable}" "$@"; }}'
    write_program(tmp_path / ".venv/bin/python", f'{checking}; echo "ran $*"')
    wrong = ("--vocab-size=x", "--max-stories=x", "--workers=x")
    for flag, step in (
        ("--sorce", "train.py"),
        *((flag, f"{flag[:-2]} takes a whole number") for flag in wrong),
    ):
        result = quickstart("--seed", "1", "--max-stories", "9", flag)
        assert_last_line(result, step)
        assert "ran data/ingestion.py" not in result.stdout


def test_files_are_named_relative_to_the_callers_folder(quickstart, tmp_path):
    script = f'echo "ran $* in $PWD"; cd "{tmp_path}"; mkdir -p data/processed; : >data/processed/meta.json'
    write_program(tmp_path / ".venv/bin/python", script)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    ran = quickstart("--source", "a.txt", cwd=elsewhere).stdout.splitlines()
    assert f"ran {tmp_path}/data/ingestion.py --source a.txt in {elsewhere}" in ran
    assert f"ran {tmp_path}/generate.py in {elsewhere}" in ran and not list(elsewhere.iterdir())


def test_a_run_on_other_stories_is_kept(quickstart, tmp_path):
    write_program(
        tmp_path / ".venv/bin/python",
        'case "$*" in *prepare_data*) mkdir -p data/processed; cp stories data/processed/meta.json ;; esac',
    )
    (tmp_path / "stories").write_text("first")
    quickstart()
    (tmp_path / "checkpoints/best.pt").write_text("precious")
    quickstart()
    assert (tmp_path / "checkpoints/best.pt").exists()
    (tmp_path / "stories").write_text("second")
    quickstart()
    (kept,) = tmp_path.glob("checkpoints-before-*")
    assert (kept / "best.pt").read_text() == "precious" and not (tmp_path / "checkpoints/best.pt").exists()


def test_a_run_that_train_py_made_on_other_stories_is_kept(quickstart, tmp_path):
    """--fresh moves the mark of quickstart.sh away, which is back when that ends, however it ends."""
    fresh = f'cd "{REPO}"; [ "$1" != train.py ] || exec {sys.executable} -c "{SET_ASIDE}" "{tmp_path}"'
    packing = 'case "$*" in *prepare_data*) mkdir -p data/processed; echo 1 >data/processed/meta.json ;; esac'
    write_program(tmp_path / ".venv/bin/python", f"{packing}; {fresh}")
    quickstart()
    assert (tmp_path / "checkpoints/quickstart.json").exists()
    (tmp_path / "checkpoints/best.pt").write_text("old")
    quickstart("--fresh")
    assert (tmp_path / "checkpoints/quickstart.json").exists()
    (old,) = (file.read_text() for file in tmp_path.glob("checkpoints/earlier-*/best.pt"))
    (tmp_path / "checkpoints/best.pt").write_text("ours")
    set_aside(tmp_path / "checkpoints")  # as train.py --fresh
    (tmp_path / "checkpoints/best.pt").write_text("theirs")
    assert "moved them to checkpoints-before-" in quickstart().stdout
    (kept,) = tmp_path.glob("checkpoints-before-*/best.pt")
    assert (old, kept.read_text()) == ("old", "theirs")


def test_a_run_that_is_going_on_is_not_moved(quickstart, tmp_path):
    only_python = f'case "$2" in *fcntl*) exec "{sys.executable}" "$@" ;; esac'
    packing = "mkdir -p data/processed; echo 1 >data/processed/meta.json"
    write_program(tmp_path / ".venv/bin/python", f"{only_python}; {packing}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/ckpt_7.pt").write_text("precious")
    with locked(tmp_path / "checkpoints"):
        assert_last_line(quickstart(), "a train.py is running in checkpoints")
    assert (tmp_path / "checkpoints/ckpt_7.pt").exists()
    assert "moved them to checkpoints-before-" in quickstart().stdout


def test_a_run_that_was_started_otherwise_is_kept(quickstart, tmp_path):
    """Nobody knows on which stories: those that lay there have just been replaced."""
    write_program(
        tmp_path / ".venv/bin/python", 'mkdir -p data/processed; echo "first" >data/processed/meta.json'
    )
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/ckpt_7.pt").write_text("precious")
    assert "moved them to checkpoints-before-" in quickstart().stdout
    (kept,) = tmp_path.glob("checkpoints-before-*/*.pt")
    assert kept.read_text() == "precious" and (tmp_path / "checkpoints/quickstart.json").exists()
