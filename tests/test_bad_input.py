"""What the user can get wrong ends in one line on stderr and exit status 2, and changes no file."""

import json
import shutil

import pytest
from conftest import TINY, assert_one_line_error


@pytest.fixture
def data(packed, tmp_path):
    """A data folder of one's own to break."""
    return shutil.copytree(packed, tmp_path / "data")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_steps_out_of_order_name_the_command_to_run(run, packed, tmp_path):
    empty = ["--data-dir", tmp_path / "data"]
    assert_one_line_error(run("data/train_tokenizer.py", *empty), "no raw data", "python data/ingestion.py")
    assert_one_line_error(run("data/prepare_data.py", *empty), "no raw data", "python data/ingestion.py")
    shutil.copytree(packed / "raw", tmp_path / "data" / "raw")
    assert_one_line_error(
        run("data/prepare_data.py", *empty), "no tokenizer", "python data/train_tokenizer.py"
    )
    assert_one_line_error(run("train.py", *empty), "no packed stories", "python data/prepare_data.py")
    nothing = ["--checkpoint-dir", tmp_path / "checkpoints"]
    assert_one_line_error(run("generate.py", *nothing), "no checkpoint", "python train.py")
    assert_one_line_error(run("evaluate.py", *nothing), "no checkpoint", "python train.py")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "flags, needles",
    [
        (["--n-embd", "30", "--n-head", "4"], ["n_embd 30", "n_head 4"]),
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
        (["--head-size", "33"], ["head_size is 33"]),
        (["--rope-base", "0"], ["rope_base must be above 0"]),
        (
            ["--max-steps", "none", "--max-minutes", "none"],
            ["a run needs an end: set max_steps or max_minutes"],
        ),
        (["--max-minutes", "inf"], ["max_minutes must be above 0 and finite, not inf"]),
        (["--learning-rate", "nan"], ["learning_rate must be above 0, not nan"]),
    ],
)
def test_train_refuses(run, packed, tmp_path, flags, needles):
    places = ["--data-dir", packed, "--checkpoint-dir", tmp_path / "checkpoints"]
    assert_one_line_error(run("train.py", *TINY, *places, *flags), *needles)
    assert not (tmp_path / "checkpoints").exists()


def test_a_bin_cut_short(run, data, tmp_path):
    path = data / "processed" / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    before = contents(data)
    result = run("train.py", *TINY, "--data-dir", data, "--checkpoint-dir", tmp_path / "checkpoints")
    assert_one_line_error(result, "train.bin", "python data/prepare_data.py")
    assert contents(data) == before


def test_a_damaged_bin_is_found_on_request(run, data, tmp_path):
    path = data / "processed" / "validation.bin"
    path.write_bytes(b"\1\0" + path.read_bytes()[2:])
    result = run(
        "train.py", *TINY, "--verify", "--data-dir", data, "--checkpoint-dir", tmp_path / "checkpoints"
    )
    assert_one_line_error(result, "validation.bin", "damaged")


def test_tokens_of_another_tokenizer(run, data, tmp_path):
    run("data/train_tokenizer.py", "--vocab-size", 300, "--data-dir", data, check=0)
    result = run("train.py", *TINY, "--data-dir", data, "--checkpoint-dir", tmp_path / "checkpoints")
    assert_one_line_error(result, "another tokenizer", "python data/prepare_data.py")


def test_stories_that_are_newer_than_the_packed_ones(run, data, trained, tmp_path):
    here = ["--data-dir", data]
    run("data/ingestion.py", "--source", "sample", "--max-stories", 200, *here, check=0)
    checkpoints = tmp_path / "checkpoints"
    trains = run("train.py", *TINY, "--max-steps", 1, *here, "--checkpoint-dir", checkpoints, check=0)
    evaluates = run("evaluate.py", "--checkpoint-dir", trained, "--max-samples", 3, *here, check=0)
    for result in (trains, evaluates):
        assert "raw has other stories than" in result.stderr
        assert f"python data/prepare_data.py --data-dir {data} packs them" in result.stderr
    packs = run("data/prepare_data.py", *here, check=0)
    assert "tokenizer.json was learned from other stories" in packs.stderr
    assert "learned" not in run("data/prepare_data.py", *here, check=0).stderr  # nothing to do: it is known
    again = run(
        "train.py", *TINY, "--max-steps", 1, "--fresh", *here, "--checkpoint-dir", checkpoints, check=0
    )
    assert "other stories" not in again.stderr


def test_a_meta_json_that_is_none(run, data, tmp_path):
    (data / "processed" / "meta.json").write_text("{")
    result = run("train.py", *TINY, "--data-dir", data, "--checkpoint-dir", tmp_path / "checkpoints")
    assert_one_line_error(result, "meta.json")
    (data / "processed" / "meta.json").write_text(json.dumps({"format": 1}))
    result = run("train.py", *TINY, "--data-dir", data, "--checkpoint-dir", tmp_path / "checkpoints")
    assert_one_line_error(result, "meta.json", "python data/prepare_data.py")


def test_a_checkpoint_of_another_vocabulary(run, data, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "checkpoints")
    before = contents(folder)
    run("data/train_tokenizer.py", "--vocab-size", 300, "--data-dir", data, check=0)
    run("data/prepare_data.py", "--data-dir", data, check=0)
    result = run("train.py", *TINY, "--max-steps", 4, "--data-dir", data, "--checkpoint-dir", folder)
    assert_one_line_error(result, "changed tokenizer", "--fresh")
    assert contents(folder) == before


def test_no_checkpoint_that_loads(run, packed, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "checkpoints")
    for path in folder.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    before = contents(folder)
    result = run("train.py", *TINY, "--data-dir", packed, "--checkpoint-dir", folder)
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
def test_generate_refuses(run, trained, flags, needles):
    assert_one_line_error(run("generate.py", "--checkpoint-dir", trained, *flags), *needles)


def test_evaluate_refuses(run, packed, trained, tmp_path):
    places = ["--checkpoint-dir", trained]
    assert_one_line_error(run("evaluate.py", *places, "--data-dir", tmp_path), "no packed stories")
    places += ["--data-dir", packed]
    assert_one_line_error(
        run("evaluate.py", *places, "--split", "test"), "--split takes train, validation or all"
    )
    assert_one_line_error(run("evaluate.py", *places, "--max-samples", "-1"), "--max-samples")
