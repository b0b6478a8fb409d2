import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE, REPO, assert_one_line_error
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data import encoder, prepare_data
from data.encoder import WORD, Encoder, encode_all, encodes_word_by_word
from model.tokenizer import read_tokenizer

USUAL = [chr(code) for code in (*range(256), *range(0x2010, 0x2028))]


@pytest.fixture(scope="module")
def tokenizer(packed):
    return read_tokenizer(packed / "tokenizer" / "tokenizer.json")


def encoded_by_the_library(tokenizer, stories):
    end = tokenizer.token_to_id("<|endoftext|>")
    return [
        number
        for story in stories
        for number in [*tokenizer.encode(story, add_special_tokens=False).ids, end]
    ]


def words_by_the_library(text):
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


def test_words_are_cut_as_the_library_cuts_them():
    """Every usual character beside a letter, a digit, a space, a mark, a line end, an apostrophe and itself."""
    neighbours = ["a", "7", " ", "!", "\n", "'", "\xa0", "\u201d", ""]
    for character in USUAL:
        beside = [*neighbours, character]
        text = "".join(f"{left}{character}{right}\0" for left in beside for right in beside)
        assert WORD.findall(text) == words_by_the_library(text), repr(character)


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(st.sampled_from([*USUAL, *" \n'stmdlvre" * 20])))
def test_any_usual_text_is_cut_as_the_library_cuts_it(text):
    assert WORD.findall(text) == words_by_the_library(text)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.text(st.sampled_from(USUAL)) | st.text() | st.just("a <|endoftext|> b \0 שלום 👨‍👩‍👧")))
def test_tokens_are_the_librarys_and_give_the_stories_back(tokenizer, stories):
    for number in ("uint16", "uint32"):
        packed = np.frombuffer(Encoder(tokenizer, number)(stories), number)
        assert packed.tolist() == encoded_by_the_library(tokenizer, stories)
    ends = np.flatnonzero(packed == tokenizer.token_to_id("<|endoftext|>"))
    parts = np.split(packed, ends + 1)[:-1]
    assert [tokenizer.decode(part[:-1]) for part in parts] == stories


def test_a_full_table_begins_anew(tokenizer, monkeypatch):
    monkeypatch.setattr(encoder, "TABLE_WORDS", 10)
    stories = [f"Once {n} little cats" for n in range(50)]
    encode = Encoder(tokenizer, "uint16")
    assert np.frombuffer(encode(stories), "<u2").tolist() == encoded_by_the_library(tokenizer, stories)
    assert 0 < len(encode.table) <= 10


def test_tokenizers_of_another_kind_do_it_all_themselves(tokenizer):
    assert encodes_word_by_word(tokenizer)
    other = {
        "prefix": Tokenizer.from_str(tokenizer.to_str()),
        "lower": Tokenizer.from_str(tokenizer.to_str()),
    }
    other["prefix"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    other["lower"].normalizer = normalizers.Lowercase()
    other["added"] = Tokenizer.from_str(tokenizer.to_str())
    other["added"].add_tokens(["little cat"])
    other["dropout"] = Tokenizer.from_str(tokenizer.to_str())
    other["dropout"].model.dropout = 0.5
    other["words"] = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a"))
    for name, one in other.items():
        assert not encodes_word_by_word(one), name
        if name != "dropout":
            stories = ["A little cat's cat", "little cat"]
            packed = np.frombuffer(Encoder(one, "uint16")(stories), "<u2").tolist()
            assert packed == encoded_by_the_library(one, stories)


# Several processes


@pytest.fixture(scope="module")
def much(packed, tmp_path_factory):
    """Raw data enough for two processes to be at it for some seconds, and a tokenizer."""
    folder = tmp_path_factory.mktemp("much")
    (folder / "tokenizer").symlink_to(packed / "tokenizer")
    source = folder / "stories.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for number in range(3_200):
            file.write(json.dumps({"text": f"{number} \u05d0 " + "once upon a time " * 200}) + "\n")
    command = [sys.executable, REPO / "data/ingestion.py", "--source", source, "--data-dir", folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_processes_do_not_change_a_byte(packed, tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("raw", "tokenizer"):
        (data / name).symlink_to(packed / name)
    monkeypatch.setattr(prepare_data, "WORKER_BYTES", 1)
    monkeypatch.setattr("data.raw_stories.BATCH", 16)
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "--workers", "3", "--data-dir", str(data)])
    prepare_data.main()
    for name in ("train.bin", "validation.bin"):
        assert (data / "processed" / name).read_bytes() == (packed / "processed" / name).read_bytes()


def at_work(data):
    """prepare_data.py just when its processes have begun, and these processes' numbers."""
    command = [sys.executable, REPO / "data/prepare_data.py", "--workers", "2", "--data-dir", data]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not any(path.stat().st_size for path in (data / "processed").glob(".train.bin*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, [child for child in map(int, children) if b"spawn_main" in commandline(child)]


def commandline(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_fault_in_reading_is_not_taken_for_a_dead_process(packed):
    def stories():
        yield ["Once upon a time"]
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        list(encode_all(stories(), packed / "tokenizer" / "tokenizer.json", "uint16", workers=2))


def test_a_killed_process_ends_the_step_with_one_line(much):
    process, children = at_work(much)
    os.kill(children[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=PATIENCE)
    note, errors = errors.split("\n", 1)
    assert "learned from other stories" in note
    result = subprocess.CompletedProcess([], process.returncode, output, errors)
    assert_one_line_error(result, "process", "--workers 1")
    assert list((much / "processed").iterdir()) == []


def test_killed_as_a_whole_it_leaves_no_process_and_the_next_start_tidies_up(much, run):
    process, children = at_work(much)
    process.kill()
    process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while any(map(commandline, children)):  # a dead process has none, even before it is reaped
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [path.name for path in (much / "processed").iterdir()] == [f".train.bin.{process.pid}.tmp"]
    run("data/prepare_data.py", "--data-dir", much, check=0)
    names = sorted(path.name for path in (much / "processed").iterdir())
    assert names == ["meta.json", "train.bin", "validation.bin"]
