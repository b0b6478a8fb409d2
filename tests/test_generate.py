"""generate.py as its users run it, with a model that has learnt next to nothing."""

import json
import shutil

import pytest


@pytest.fixture
def generate(run, trained):
    return lambda *flags, **options: run("generate.py", "--checkpoint-dir", trained, *flags, **options)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_seed_makes_a_story_repeatable(generate):
    one, same, other = (generate("--seed", seed, "--max-tokens", 20, check=0).stdout for seed in (1, 1, 2))
    assert one == same != other


def test_without_a_seed_each_story_is_new_and_its_seed_is_said(generate):
    first, second = generate("--max-tokens", 20, check=0), generate("--max-tokens", 20, check=0)
    assert first.stdout != second.stdout
    seed = first.stderr.splitlines()[0].rpartition("seed ")[2]
    assert generate("--max-tokens", 20, "--seed", seed, check=0).stdout == first.stdout


def test_stories_go_to_a_file_one_json_object_a_line(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("Once\nThe big dog\n")
    flags = ["--prompt", "One day", "--prompts-file", tmp_path / "prompts.txt", "--num-samples", 2]
    generate(*flags, "--max-tokens", 9, "--seed", 5, "--output", tmp_path / "stories.jsonl", check=0)
    rows = read_rows(tmp_path / "stories.jsonl")
    assert [row["prompt"] for row in rows] == [
        p for p in ("One day", "Once", "The big dog") for _ in range(2)
    ]
    assert [row["seed"] for row in rows] == [5, 6, 7, 8, 9, 10]
    for row in rows:
        assert row["finish_reason"] == ("length" if row["tokens"] == 9 else "end_of_story")
        assert row["tokens"] <= 9 and isinstance(row["story"], str)


def test_a_sample_is_the_story_that_its_seed_gives_alone(generate, tmp_path):
    flags = ["--prompt", "One day", "--max-tokens", 12]
    generate(*flags, "--num-samples", 3, "--seed", 7, "--output", tmp_path / "three.jsonl", check=0)
    alone = generate(*flags, "--seed", 9, check=0).stdout
    third = read_rows(tmp_path / "three.jsonl")[2]
    assert alone == "One day" + third["story"] + "\n"


def test_a_checkpoint_file_is_all_it_needs(run, trained, tmp_path):
    shutil.copy(trained / "best.pt", tmp_path / "alone.pt")
    result = run("generate.py", "--checkpoint", "alone.pt", "--max-tokens", 5, cwd=tmp_path, check=0)
    assert "alone.pt: step 2" in result.stderr


def test_interactive_continues_each_line_until_the_end_of_input(trained):
    import subprocess
    import sys

    from conftest import REPO

    command = [sys.executable, REPO / "generate.py", "--checkpoint-dir", trained, "--interactive"]
    command += ["--max-tokens", 5, "--seed", 1]
    result = subprocess.run(
        list(map(str, command)), input="A cat\nTwo dogs\n", capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0 and "Ctrl-D or Ctrl-C leaves" in result.stderr
    assert result.stdout.startswith("A cat") and "\nTwo dogs" in result.stdout
    assert "\x1b[" not in result.stdout  # nothing meant for a terminal


def test_a_beginning_beyond_the_context_is_noted_and_continued(generate):
    result = generate("--prompt", "a big dog " * 30, "--max-tokens", 5, "--seed", 1, check=0)
    assert "its last part is read" in result.stderr and result.stdout.startswith("a big dog a big dog")
