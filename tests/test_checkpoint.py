"""Checkpoint files: whole or not at all, chosen rightly, and harmless."""

import dataclasses
import os
import pickle

import pytest
import torch
from conftest import assert_one_line_error
from tokenizers import Tokenizer, models

from model import checkpoint as module
from model.checkpoint import (
    BadCheckpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    load_model,
    prune,
    save_checkpoint,
)
from model.config import GPTConfig, Recipe
from model.errors import UserError
from model.gpt import GPT
from model.optimizer import make_optimizers

torch.set_num_threads(1)

VOCABULARY = {word: k for k, word in enumerate(["<|endoftext|>", "a", "b", "c", "d"])}
CONFIG = GPTConfig(vocab_size=5, block_size=8, n_layer=1, n_head=2, n_embd=8)


def make_checkpoint(step=7, config=CONFIG):
    """All that training writes, of a model that has made one step."""
    torch.manual_seed(step)
    model = GPT(config)
    optimizers = make_optimizers(model, Recipe(), low_precision=True)
    ids = torch.tensor([[1, 2, 3, 4, 1]])
    model(ids[:, :-1], ids[:, 1:]).backward()
    for optimizer in optimizers:
        optimizer.step()
    return {
        "config": dataclasses.asdict(config),
        "settings": {"preset": "stories-9m", "max_minutes": None, "seed": 1337, "learning_rate": 6e-3},
        "defaults": {"prompt": []},
        "depth": 1,
        "weights": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "scaler": {},
        "step": step,
        "seconds": 1.5,
        "best_loss": 2.25,
        "last_evaluation": -1,
        "tokenizer": Tokenizer(models.WordLevel(VOCABULARY, unk_token="a")).to_str(),
        "eot_id": 0,
        "data": {"training stories": "0" * 64},
    }


def save(folder, *steps, best=False):
    for step in steps:
        save_checkpoint(folder / f"ckpt_{step}.pt", make_checkpoint(step))
    if best:
        save_checkpoint(folder / "best.pt", make_checkpoint(1))
    return folder


def assert_equal(one, other):
    """The same values of the same types, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    else:
        assert one == other and type(one) is type(other)


# Writing and reading


@pytest.mark.parametrize("blocks", ["modern", "gpt2"])
def test_a_checkpoint_comes_back_as_it_was(tmp_path, blocks):
    written = make_checkpoint(config=dataclasses.replace(CONFIG, blocks=blocks))
    save_checkpoint(tmp_path / "new" / "ckpt_7.pt", written)
    assert_equal(load_checkpoint(tmp_path / "new" / "ckpt_7.pt"), {"format": module.FORMAT, **written})
    assert os.listdir(tmp_path / "new") == ["ckpt_7.pt"]


def test_a_checkpoint_saved_on_a_gpu_loads_on_a_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        save(tmp_path, 7)
    path = tmp_path / "ckpt_7.pt"
    assert load_checkpoint(path)["step"] == module.peek(path)["step"] == 7


def test_a_model_comes_back_with_its_logits_and_its_tokenizer(tmp_path):
    written = make_checkpoint()
    save_checkpoint(tmp_path / "ckpt_7.pt", written)
    model, tokenizer, rest = load_model(tmp_path / "ckpt_7.pt")
    expected = GPT(CONFIG)
    expected.load_state_dict(written["weights"])
    ids = torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(model(ids), expected.eval()(ids))
    assert not model.training and model.config == CONFIG
    assert tokenizer.token_to_id("d") == 4 and rest["eot_id"] == 0 and rest["step"] == 7


FULL = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 23424 vs 23318")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (FULL, UserError),
        (RuntimeError("CUDA error"), RuntimeError),
    ],
)
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, error, expected):
    path = tmp_path / "best.pt"
    save_checkpoint(path, make_checkpoint(1))
    before = path.read_bytes()

    def half_a_file(value, file):
        with open(file, "wb") as written:
            written.write(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(torch, "save", half_a_file)
    with pytest.raises(expected):
        save_checkpoint(path, make_checkpoint(2))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["best.pt"]
    with pytest.raises(expected):
        save_checkpoint(tmp_path / "ckpt_2.pt", make_checkpoint(2))
    assert os.listdir(tmp_path) == ["best.pt"]


def test_the_name_appears_after_the_content_is_on_disk_and_stays(tmp_path, monkeypatch):
    events = []

    def record(name):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *words: (events.append(name), original(*words))[1])

    record("fsync")
    record("replace")
    save(tmp_path, 7)
    assert events == ["fsync", "replace", "fsync"]


# Files that do not load


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_the_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip_a_bit_of_a_tensor(path):
    weight = load_checkpoint(path)["weights"]["token_embedding.weight"]
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


def zero_the_second_half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) // 2))


def garbage(path):
    path.write_bytes(b"<html>not found</html>\n" * 50)


def other_format(path):
    torch.save({**torch.load(path, weights_only=True), "format": 99}, path)


def bare_weights(path):
    torch.save(torch.load(path, weights_only=True)["weights"], path)


def a_list(path):
    torch.save([1, 2, 3], path)


def without_config(path):
    content = torch.load(path, weights_only=True)
    del content["config"], content["eot_id"]
    torch.save(content, path)


def without_optimizers(path):
    """As someone shares it, since it is a third of the size: enough for all but resuming."""
    content = torch.load(path, weights_only=True)
    del content["optimizers"]
    torch.save(content, path)


def a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    truncate: "does not load",
    cut_the_last_byte: "does not load",
    empty: "does not load",
    zero: "does not load",
    zero_the_second_half: "does not load",
    flip_a_bit_of_a_tensor: "is damaged",
    garbage: "does not load",
    a_folder: "does not load",
    other_format: f"has format 99; this version reads {module.FORMAT}",
    bare_weights: "is not a checkpoint of this project",
    a_list: "is not a checkpoint of this project",
    without_config: "lacks config, eot_id",
}


@pytest.mark.parametrize(
    ("damage", "message"), DAMAGES.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_a_damaged_file_is_named_and_passed_over(tmp_path, capsys, damage, message):
    save(tmp_path, 10, 20, 30)
    damage(tmp_path / "ckpt_30.pt")
    with pytest.raises(BadCheckpoint) as caught:
        load_checkpoint(tmp_path / "ckpt_30.pt")
    assert message in str(caught.value) and "ckpt_30.pt" in str(caught.value)
    assert "\n" not in str(caught.value)

    path, checkpoint = load_latest(tmp_path)
    assert path.name == "ckpt_20.pt" and checkpoint["step"] == 20
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "ckpt_30.pt" in warning and message in warning


def test_a_file_that_is_too_little_to_resume_from_is_passed_over(tmp_path, capsys):
    save(tmp_path, 10, 20)
    without_optimizers(tmp_path / "ckpt_20.pt")
    assert load_checkpoint(tmp_path / "ckpt_20.pt")["step"] == 20
    assert load_latest(tmp_path)[1]["step"] == 10
    assert "ckpt_20.pt lacks optimizers; trying the one before" in capsys.readouterr().err


def test_the_best_is_the_last_resort(tmp_path, capsys):
    save(tmp_path, 10, 20, best=True)
    truncate(tmp_path / "ckpt_10.pt")
    garbage(tmp_path / "ckpt_20.pt")
    path, checkpoint = load_latest(tmp_path)
    assert path.name == "best.pt" and checkpoint["step"] == 1
    assert capsys.readouterr().err.count("trying the one before") == 2


def test_where_none_loads_nothing_begins_anew(tmp_path, capsys):
    save(tmp_path, 10, best=True)
    for path in tmp_path.iterdir():
        garbage(path)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        load_latest(tmp_path)


def test_an_empty_or_missing_folder_has_no_latest(tmp_path):
    assert load_latest(tmp_path) is None and load_latest(tmp_path / "missing") is None


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint .*ckpt_5\.pt"):
        load_checkpoint(tmp_path / "ckpt_5.pt")


class Payload:
    """Pickled, it makes a file when it is read without care."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("way", ["zip", "old", "plain"])
def test_a_crafted_file_runs_nothing(tmp_path, way):
    path, mark = tmp_path / "ckpt_9.pt", tmp_path / "ran"
    content = {"format": module.FORMAT, **make_checkpoint(9), "data": Payload(mark)}
    if way == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(BadCheckpoint, match=r"ckpt_9\.pt does not load"):
        load_checkpoint(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if way != "plain" else pickle.loads(path.read_bytes())
    assert mark.exists()  # it was a real one


@pytest.mark.parametrize(
    "change",
    [
        {"config": {**dataclasses.asdict(CONFIG), "n_embd": 16}},
        {"config": {**dataclasses.asdict(CONFIG), "n_layer": 2}},
        {"config": {**dataclasses.asdict(CONFIG), "rotary": True}},
        {"config": {**dataclasses.asdict(CONFIG), "n_head": 3}},
        {"config": {**dataclasses.asdict(CONFIG), "vocab_size": "five"}},
        {"weights": {}},
        {"weights": [1, 2]},
        {"tokenizer": "not a tokenizer"},
        {"tokenizer": Tokenizer(models.WordLevel({**VOCABULARY, "one more": len(VOCABULARY)})).to_str()},
    ],
    ids=lambda change: next(iter(change)),
)
def test_parts_that_do_not_fit_together_are_a_user_error(tmp_path, change):
    save_checkpoint(tmp_path / "ckpt_7.pt", {**make_checkpoint(), **change})
    with pytest.raises(UserError):
        load_model(tmp_path / "ckpt_7.pt")


def test_a_script_ends_in_one_line_over_a_damaged_file(run, tmp_path):
    save(tmp_path, 7)
    truncate(tmp_path / "ckpt_7.pt")
    result = run("generate.py", "--checkpoint", tmp_path / "ckpt_7.pt", cwd=tmp_path)
    assert_one_line_error(result, "ckpt_7.pt does not load as a checkpoint")


# Choosing and deleting


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_checkpoints_are_listed_latest_first_by_number(tmp_path):
    touch(tmp_path, "ckpt_9.pt", "ckpt_100.pt", "ckpt_0.pt", "ckpt_20.pt")
    touch(
        tmp_path, "best.pt", "ckpt_x.pt", ".ckpt_300.pt.17.tmp", "ckpt_5.pt.bak", "ckpt_.pt", "my_ckpt_7.pt"
    )
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        f"ckpt_{step}.pt" for step in (100, 20, 9, 0)
    ]


@pytest.mark.parametrize(
    ("name", "prefer", "expected"),
    [
        (None, "best", "run/best.pt"),
        (None, "latest", "run/ckpt_100.pt"),
        ("best", "latest", "run/best.pt"),
        ("latest", "best", "run/ckpt_100.pt"),
        ("20", "best", "run/ckpt_20.pt"),
        ("ckpt_20.pt", "best", "run/ckpt_20.pt"),
        ("run/ckpt_20.pt", "best", "run/ckpt_20.pt"),
        ("mine.pt", "best", "mine.pt"),
        ("other", "best", "other/ckpt_3.pt"),  # a folder: what it has
        ("run", "latest", "run/ckpt_100.pt"),
        ("run", "best", "run/best.pt"),
    ],
)
def test_every_way_to_name_a_checkpoint(tmp_path, monkeypatch, name, prefer, expected):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "run", "ckpt_100.pt", "ckpt_20.pt", "best.pt")
    touch(tmp_path / "other", "ckpt_3.pt")
    touch(tmp_path, "mine.pt")
    found = find_checkpoint(tmp_path / "run", name, prefer)
    assert found.resolve() == (tmp_path / expected).resolve()
    assert find_checkpoint(tmp_path / "run", str(tmp_path / "mine.pt"), prefer) == tmp_path / "mine.pt"


def test_without_a_best_the_latest_does_and_the_other_way_round(tmp_path):
    touch(tmp_path / "a", "ckpt_1.pt", "ckpt_2.pt")
    touch(tmp_path / "b", "best.pt")
    assert find_checkpoint(tmp_path / "a", None, "best").name == "ckpt_2.pt"
    with pytest.raises(UserError, match="no best.pt in .* yet, .* use --checkpoint latest"):
        find_checkpoint(tmp_path / "a", "best", "best")
    assert find_checkpoint(tmp_path / "b", None, "latest").name == "best.pt"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "no checkpoint in .* yet: run python train.py --checkpoint-dir"),
        ("best", "no checkpoint in .* yet: run python train.py --checkpoint-dir"),
        ("latest", "no checkpoint in .* yet: run python train.py --checkpoint-dir"),
        ("7", "there is no checkpoint '7'"),
        ("missing.pt", "there is no checkpoint 'missing.pt'"),
        ("nowhere/ckpt_7.pt", "there is no checkpoint 'nowhere/ckpt_7.pt'"),
    ],
)
def test_what_is_not_there_is_a_user_error(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        find_checkpoint(tmp_path, name, "best")


def test_an_empty_file_or_quickstarts_mark_is_no_run(tmp_path):
    touch(tmp_path, "metrics.jsonl")
    (tmp_path / module.MARK).write_text("{}")
    assert module.set_aside(tmp_path) is None and len(os.listdir(tmp_path)) == 2
    (tmp_path / "metrics.jsonl").write_text("{}")
    moved = module.set_aside(tmp_path)
    assert os.listdir(tmp_path) == [moved.name] and len(os.listdir(moved)) == 2


@pytest.mark.parametrize(
    ("keep", "step", "left"),
    [
        (1, 100, [100]),
        (3, 100, [100, 20, 9]),
        (9, 100, [100, 20, 9, 4]),
        (0, 100, [100]),
        (1, 20, [100, 20]),  # one that did not load, and the one just written
    ],
)
def test_prune_keeps_the_latest_and_touches_nothing_else(tmp_path, keep, step, left):
    others = {"best.pt", "metrics.jsonl", "ckpt_x.pt", "ckpt_3.pt.bak"}
    touch(tmp_path, *others, *(f"ckpt_{step}.pt" for step in (4, 9, 20, 100)))
    prune(tmp_path, keep, step)
    assert set(os.listdir(tmp_path)) == others | {f"ckpt_{step}.pt" for step in left}
