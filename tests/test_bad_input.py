"""What the user can get wrong ends in one line on stderr and exit status 2, and changes no file."""

import shutil

import pytest
from conftest import SMALL, assert_one_line_error


@pytest.fixture
def data(packed, tmp_path):
    """A data folder of one's own to break."""
    return shutil.copytree(packed, tmp_path / "data")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("script", "place", "flags", "needle"),
    [
        ("data/ingestion.py", "--data-dir", ["--max-stories", "-1"], "--max-stories must be at least 0"),
        ("data/train_tokenizer.py", "--data-dir", ["--kind", "word"], "bpe, gpt2 or char"),
        ("train.py", "--checkpoint-dir", ["--blocks", "gpt3"], "--blocks takes modern or gpt2"),
        ("generate.py", "--checkpoint-dir", ["--top-p", "0"], "top_p must be above 0"),
    ],
)
def test_a_script_that_refuses_ends_in_one_line_and_status_2(run, tmp_path, script, place, flags, needle):
    assert_one_line_error(run(script, place, tmp_path, *flags), needle)


def test_steps_out_of_order_name_the_command_to_run(refused, packed, tmp_path):
    data, checkpoints = ["--data-dir", tmp_path / "data"], ["--checkpoint-dir", tmp_path / "checkpoints"]

    def assert_refused(script, places, *needles):
        message = refused(script, *places)
        assert all(needle in message for needle in needles), message

    for script in ("data/train_tokenizer.py", "data/prepare_data.py"):
        assert_refused(script, data, "no raw data", "python data/ingestion.py")
    shutil.copytree(packed / "raw", tmp_path / "data" / "raw")
    assert_refused("data/prepare_data.py", data, "no tokenizer", "python data/train_tokenizer.py")
    assert not (tmp_path / "data" / "processed").exists()
    assert_refused("train.py", data + checkpoints, "no packed stories", "python data/train_tokenizer.py")
    tuning = [*data, *checkpoints, "--init-from", "a/my model"]
    assert_refused("train.py", tuning, "python data/train_tokenizer.py", " --kind 'a/my model'")
    for script in ("generate.py", "evaluate.py", "export.py"):
        assert_refused(script, checkpoints, "no checkpoint", "python train.py")
        assert_refused(script, [f"--out_dir={checkpoints[1]}"], f"no checkpoint in {checkpoints[1]}")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "flags, needles",
    [
        (["--n-embd", "30", "--n-head", "4"], ["n_embd 30", "n_head 4"]),
        (["--no-bigram-start", "--block-size", "0"], ["block_size must be at least 1"]),
        (["--block-size", "1000000"], ["block_size 1000000", "lower it"]),
        (["--preset", "storys-9m"], ["storys-9m", "stories-9m"]),
        (["--learning-rte", "1"], ["--learning-rte", "did you mean --learning-rate?"]),
        (["--max-steps", "many"], ["--max-steps takes a whole number", "'many'"]),
        (["--learning-rate", "fast"], ["--learning-rate takes a number"]),
        (["--max-steps"], ["--max-steps"]),
        (["--max-steps", "0"], ["max_steps must be at least 1"]),
        (["--blocks", "gpt3"], ["--blocks takes modern or gpt2"]),
        (["--device", "gpu"], ["gpu", "choose auto"]),
        (["--vocab-size", "100"], ["vocab_size 100", "400"]),
        (["--vocab-size", "9" * 20], ["--vocab-size must be below 2**63"]),
        (["--micro-batch", "-1"], ["--micro-batch"]),
        (["--dropout", "1"], ["dropout"]),
        (["--head-size", "-2"], ["head_size must be at least 1"]),
        (["--n-embd", "9e18"], ["n_embd must be at least 1 and at most 1000000000"]),
        (["--sample-tokens", "1e12"], ["--sample-tokens must be at least 0 and at most 100000"]),
        (["--head-size", "33"], ["head_size is 33"]),
        (["--rope-base", "0"], ["rope_base must be above 0"]),
        (
            ["--max-steps", "none", "--max-minutes", "none", "--max-epochs", "none"],
            ["a run needs an end: set max_steps, max_minutes or max_epochs"],
        ),
        (["--max-minutes", "inf"], ["max_minutes must be above 0 and at most 1000000000, not inf"]),
        (["--learning-rate", "nan"], ["learning_rate must be above 0, not nan"]),
        (["--wandb_log=True"], ["no flag --wandb_log (metrics.jsonl has every number"]),
        (["--num_train_epochs=0"], ["max_epochs must be above 0"]),
        (["--early_stopping_patience=3"], ["no flag --early_stopping_patience; --help lists all"]),
        (
            ["--eval_iters=5", "--max_steps=3", "--batch_size", "8", "--zzz"],
            [
                "no flag --eval_iters (--eval-tokens sets",
                "often), --batch_size (a step",
                "windows), --zzz; --help",
            ],
        ),
        (["--bias=False"], ["no flag --bias (--blocks gpt2 has biases"]),
        (["--eval_only"], ["no flag --eval_only (evaluate.py scores a checkpoint"]),
    ],
)
def test_train_refuses(refused, packed, tmp_path, flags, needles):
    places = ["--data-dir", packed, "--checkpoint-dir", tmp_path / "checkpoints"]
    message = refused("train.py", *SMALL, *places, *flags)
    assert all(needle in message for needle in needles), message
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_bin_is_found_on_request(run, data, tmp_path):
    path = data / "processed" / "validation.bin"
    path.write_bytes(b"\1\0" + path.read_bytes()[2:])
    result = run(
        "train.py", *SMALL, "--verify", "--data-dir", data, "--checkpoint-dir", tmp_path / "checkpoints"
    )
    assert_one_line_error(result, "validation.bin", "damaged")


def test_stories_that_are_newer_than_the_packed_ones(run, data, trained, tmp_path):
    here = ["--data-dir", data]
    run("data/ingestion.py", "--source", "sample", "--max-stories", 200, *here, check=0)
    checkpoints = tmp_path / "checkpoints"
    trains = run("train.py", *SMALL, "--max-steps", 1, *here, "--checkpoint-dir", checkpoints, check=0)
    evaluates = run("evaluate.py", "--checkpoint-dir", trained, "--max-samples", 3, *here, check=0)
    for result in (trains, evaluates):
        assert "raw has other stories than" in result.stderr
        assert f"python data/prepare_data.py --data-dir {data} packs them" in result.stderr
    packs = run("data/prepare_data.py", *here, check=0)
    assert "tokenizer.json was learned from other stories" in packs.stderr
    assert "learned" not in run("data/prepare_data.py", *here, check=0).stderr  # nothing to do: it is known
    again = run(
        "train.py", *SMALL, "--max-steps", 1, "--fresh", *here, "--checkpoint-dir", checkpoints, check=0
    )
    assert "other stories" not in again.stderr


def test_a_checkpoint_of_another_vocabulary(run, data, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "checkpoints")
    before = contents(folder)
    run("data/train_tokenizer.py", "--vocab-size", 300, "--data-dir", data, check=0)
    run("data/prepare_data.py", "--data-dir", data, check=0)
    result = run("train.py", *SMALL, "--max-steps", 4, "--data-dir", data, "--checkpoint-dir", folder)
    assert_one_line_error(result, "changed tokenizer", "--fresh")
    assert contents(folder) == before


def test_no_checkpoint_that_loads(run, packed, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "checkpoints")
    for path in folder.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    before = contents(folder)
    result = run("train.py", *SMALL, "--data-dir", packed, "--checkpoint-dir", folder)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: none of the")
    assert contents(folder) == before
    assert_one_line_error(run("generate.py", "--checkpoint-dir", folder), "does not load")


@pytest.mark.parametrize(
    "flags, needles",
    [
        (["--checkpoint", "nowhere.pt"], ["nowhere.pt"]),
        (["--checkpoint", "77"], ["77"]),
        (["--temperature", "-1"], ["temperature"]),
        (["--top-p", "0"], ["top_p"]),
        (["--num-samples", "0"], ["--num-samples"]),
        (["--max-tokens", "0"], ["--max-tokens"]),
        (["--max-tokens", "1000000000000"], ["--max-tokens must be at least 1 and at most 100000"]),
        (["--prompts-file", "nowhere.txt"], ["nowhere.txt"]),
        (["--promt", "x"], ["did you mean --prompt?"]),
    ],
)
def test_generate_refuses(refused, trained, flags, needles):
    message = refused("generate.py", "--checkpoint-dir", trained, *flags)
    assert all(needle in message for needle in needles), message
