import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from conftest import PATIENCE, REPO, assert_one_line_error
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data import prepare_data
from data.raw_stories import read_manifest
from model.config import PRESETS
from model.errors import UserError

STORIES = [f"Story {number}: Tim saw {number % 7} big caf\u00e9s 🐉.\n\nThe end." for number in range(120)]
STORIES += ["A story that spells <|endoftext|> out.", "<|endoftext|>", "日本語"]


@pytest.fixture(scope="module")
def ready(tmp_path_factory, tokenizer_json):
    """A data folder after the first two steps."""
    folder = tmp_path_factory.mktemp("ready")
    source = folder / "stories.jsonl"
    source.write_text("\n".join(json.dumps({"text": story}) for story in STORIES), encoding="utf-8")
    subprocess.run(
        [sys.executable, REPO / "data/ingestion.py", "--source", source, "--data-dir", folder / "data"],
        check=True,
    )
    (folder / "data" / "tokenizer").mkdir()
    (folder / "data" / "tokenizer" / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    return folder / "data"


@pytest.fixture(scope="module")
def tokenizer_json():
    """A byte-level tokenizer with a few merges, whose end of text is not number 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        piece: number for number, piece in enumerate([*alphabet, "<|endoftext|>", "St", "or", "Stor", "Ġb"])
    }
    tokenizer = Tokenizer(models.BPE(vocab, [("S", "t"), ("o", "r"), ("St", "or"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.enable_truncation(5)  # as a file from elsewhere may say; a story must not be cut
    tokenizer.enable_padding(length=50)
    return tokenizer.to_str()


@pytest.fixture
def data_dir(ready, tmp_path):
    return shutil.copytree(ready, tmp_path / "data")


def read_stories(data_dir, split):
    return datasets.load_from_disk(str(data_dir / "raw" / split))["text"][:]


def brute_force(data_dir, split):
    """Each story encoded on its own, by the tokenizer as it is documented."""
    tokenizer = Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = []
    for story in read_stories(data_dir, split):
        ids += [*tokenizer.encode(story, add_special_tokens=False).ids, end]
    return ids, end


def meta(data_dir):
    return json.loads((data_dir / "processed" / "meta.json").read_text(encoding="utf-8"))


def test_the_files_hold_each_storys_tokens_and_an_end_of_text(data_dir, monkeypatch, capsys):
    assert PRESETS["stories-9m"].config.block_size == prepare_data.CONTEXT  # the default model's
    monkeypatch.setattr("data.raw_stories.BATCH", 7)  # several batches, the last one short
    monkeypatch.setattr(prepare_data, "CONTEXT", 42)  # between the lengths of these stories
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "--data-dir", str(data_dir)])
    prepare_data.main()
    written, said = meta(data_dir), capsys.readouterr().out
    assert written["dtype"] == "uint16" and written["vocab_size"] == 261 and written["eot_id"] == 256
    tokenizer_file = data_dir / "tokenizer" / "tokenizer.json"
    assert written["tokenizer_sha256"] == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    for split, counts in written["splits"].items():
        content = (data_dir / "processed" / f"{split}.bin").read_bytes()
        ids, end = brute_force(data_dir, split)
        assert np.frombuffer(content, "<u2").tolist() == ids
        stories = read_stories(data_dir, split)
        assert ids.count(end) == len(stories) == counts["stories"] and ids[-1] == end
        assert counts["tokens"] == len(ids)
        ends = [-1, *(place for place, number in enumerate(ids) if number == end)]
        lengths = [after - before - 1 for before, after in itertools.pairwise(ends)]
        assert counts["longer"] == sum(length > 42 for length in lengths)
        assert split == "validation" or 0 < counts["longer"] < counts["stories"]
        assert counts["bytes"] == sum(len(story.encode()) for story in stories)
        assert f"{counts['bytes'] / len(ids):.2f} bytes per token" in said
        assert counts["sha256"] == hashlib.sha256(content).hexdigest()
        assert counts["raw_sha256"] == read_manifest(data_dir)["splits"][split]["sha256"]
    assert sorted(path.name for path in (data_dir / "processed").iterdir()) == [
        "meta.json",
        "train.bin",
        "validation.bin",
    ]


def test_a_vocabulary_above_65536_takes_four_bytes(run, data_dir):
    words = sorted({word for story in STORIES for word in story.split()} - {"<|endoftext|>"})
    vocab = {
        word: number
        for number, word in enumerate(["<|endoftext|>", *(f"#{n}" for n in range(70_000)), *words, "?"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(data_dir / "tokenizer" / "tokenizer.json"))
    run("data/prepare_data.py", "--data-dir", data_dir, check=0)
    assert meta(data_dir)["dtype"] == "uint32" and meta(data_dir)["vocab_size"] == len(vocab)
    for split in ("train", "validation"):
        ids, _ = brute_force(data_dir, split)
        assert max(ids) > 65_535
        assert np.fromfile(data_dir / "processed" / f"{split}.bin", "<u4").tolist() == ids


@pytest.mark.parametrize(("last", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_65536_tokens_still_fit_in_two_bytes(data_dir, run, last, dtype):
    vocab = {"<|endoftext|>": 0} | {f"#{number}": number for number in range(1, last)} | {"?": last}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(data_dir / "tokenizer" / "tokenizer.json"))
    run("data/prepare_data.py", "--data-dir", data_dir, check=0)
    assert meta(data_dir)["dtype"] == dtype
    assert np.fromfile(data_dir / "processed" / "train.bin", dtype).max() == last


@pytest.fixture(scope="module")
def finished(ready, tmp_path_factory):
    folder = shutil.copytree(ready, tmp_path_factory.mktemp("finished") / "data")
    subprocess.run([sys.executable, REPO / "data/prepare_data.py", "--data-dir", folder], check=True)
    return folder


def test_what_is_up_to_date_is_left_alone(run, finished):
    made = {path: path.stat().st_mtime_ns for path in (finished / "processed").iterdir()}
    result = run("data/prepare_data.py", "--data-dir", finished, check=0)
    assert "up to date" in result.stdout and "117 stories" in result.stdout and "train.py" in result.stdout
    assert made == {path: path.stat().st_mtime_ns for path in (finished / "processed").iterdir()}


def damage_bin(data_dir):
    path = data_dir / "processed" / "train.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1  # the size stays
    path.write_bytes(content)


def cut_bin(data_dir):
    path = data_dir / "processed" / "validation.bin"
    path.write_bytes(path.read_bytes()[:-2])


def swap_in_another_bin(data_dir):  # as a run killed between its renames would leave it
    shutil.copy(data_dir / "processed" / "validation.bin", data_dir / "processed" / "train.bin")


def lose_bin(data_dir):
    (data_dir / "processed" / "train.bin").unlink()


def lose_meta(data_dir):
    (data_dir / "processed" / "meta.json").unlink()


def break_meta(data_dir):
    (data_dir / "processed" / "meta.json").write_text('{"format": 1, ', encoding="utf-8")


def empty_meta(data_dir):
    (data_dir / "processed" / "meta.json").write_text("[]", encoding="utf-8")


def strange_splits(data_dir):
    (data_dir / "processed" / "meta.json").write_text(
        json.dumps({**meta(data_dir), "splits": ["train"]}), encoding="utf-8"
    )


def change_tokenizer(data_dir):
    path = data_dir / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


def change_manifest(data_dir):
    path = data_dir / "raw" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["splits"]["validation"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    "harm",
    [
        damage_bin,
        cut_bin,
        swap_in_another_bin,
        lose_bin,
        lose_meta,
        break_meta,
        empty_meta,
        strange_splits,
        change_tokenizer,
        change_manifest,
    ],
)
def test_what_does_not_belong_together_is_made_again(finished, tmp_path, harm, monkeypatch, capsys):
    data_dir = shutil.copytree(finished, tmp_path / "data")
    good = {name: (data_dir / "processed" / name).read_bytes() for name in ("train.bin", "validation.bin")}
    harm(data_dir)
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "--data-dir", str(data_dir)])
    prepare_data.main()
    assert "up to date" not in capsys.readouterr().out
    assert {name: (data_dir / "processed" / name).read_bytes() for name in good} == good
    prepare_data.main()
    assert "up to date" in capsys.readouterr().out


def test_too_little_space_is_said_before_anything_is_written(data_dir, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1_500))
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "--data-dir", str(data_dir)])
    with pytest.raises(UserError, match=r"not enough disk space .* kB needed, 1\.5 kB free"):
        prepare_data.main()
    assert not (data_dir / "processed").exists()


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_killed_before_a_rename_it_leaves_no_meta_json(finished, tmp_path, monkeypatch, moment):
    """One that is there belongs to the files beside it."""
    data_dir = shutil.copytree(finished, tmp_path / "data")
    change_tokenizer(data_dir)
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "--data-dir", str(data_dir)])

    class Killed(BaseException):
        pass

    replace, calls = os.replace, []

    def die(*names):
        calls.append(names)
        if len(calls) == moment:
            raise Killed
        replace(*names)

    monkeypatch.setattr("model.files.os.replace", die)
    with pytest.raises(Killed):
        prepare_data.main()
    assert not (data_dir / "processed" / "meta.json").exists()


def test_sigterm_leaves_the_old_files(run, tmp_path, tokenizer_json, finished):
    data_dir = shutil.copytree(finished, tmp_path / "data")
    many = tmp_path / "many.txt"
    many.write_text(
        "\n<|endoftext|>\n".join(f"{n} " + "once upon a time " * 300 for n in range(5_000)), encoding="utf-8"
    )
    run("data/ingestion.py", "--source", many, "--data-dir", data_dir, check=0)
    before = {path.name: path.read_bytes() for path in (data_dir / "processed").iterdir()}
    command = [sys.executable, REPO / "data/prepare_data.py", "--data-dir", data_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + PATIENCE
        written = (data_dir / "processed").glob
        while not any(path.stat().st_size for path in written(".train.bin*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143 and b"Traceback" not in errors
    assert before == {path.name: path.read_bytes() for path in (data_dir / "processed").iterdir()}


# Wrong inputs


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": 3}'])
def test_a_tokenizer_that_is_none(run, data_dir, content):
    (data_dir / "tokenizer" / "tokenizer.json").write_text(content, encoding="utf-8")
    assert_one_line_error(
        run("data/prepare_data.py", "--data-dir", data_dir), "tokenizer.json", "train_tokenizer.py"
    )


def test_a_tokenizer_without_end_of_text(run, data_dir):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(data_dir / "tokenizer" / "tokenizer.json"))
    assert_one_line_error(run("data/prepare_data.py", "--data-dir", data_dir), "<|endoftext|>")


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"splits": {}}', '{"splits": {"train": 1, "validation": 2}}']
)
def test_a_broken_manifest(run, data_dir, content):
    (data_dir / "raw" / "manifest.json").write_text(content, encoding="utf-8")
    assert_one_line_error(run("data/prepare_data.py", "--data-dir", data_dir), "manifest.json", "delete")


def test_damaged_stories(run, data_dir):
    next((data_dir / "raw" / "validation").glob("*.arrow")).write_bytes(b"x")
    assert_one_line_error(
        run("data/prepare_data.py", "--data-dir", data_dir), "validation", "data/ingestion.py"
    )
    assert not (data_dir / "processed" / "train.bin").exists()


def test_stories_that_are_not_the_manifests(run, data_dir):
    path = data_dir / "raw" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["splits"]["train"]["bytes"] += 1
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert_one_line_error(run("data/prepare_data.py", "--data-dir", data_dir), "raw")
    assert list((data_dir / "processed").iterdir()) == []


def test_workers_below_zero(run, data_dir):
    assert_one_line_error(run("data/prepare_data.py", "--workers", "-1", "--data-dir", data_dir), "--workers")
