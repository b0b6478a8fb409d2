"""Packed tokens: what is read, in which order, and what is refused."""

import hashlib
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from model.batches import Batches, dropout_seed, shuffled, validation_windows
from model.errors import UserError
from model.packed_data import fingerprints, load_data

# (tokens, block_size, windows_per_step): the epochs are cut evenly, with a rest, within a step, to one window
SHAPES = [(1_000, 10, 5), (1_003, 10, 7), (97, 8, 5), (50, 7, 40), (9, 8, 3), (200, 1, 9)]

PINNED = [
    [140, 450, 560, 200, 913, 813, 963],
    [680, 570, 78, 588, 208, 278, 298],
    [149, 989, 239, 399, 999, 249, 649],
]


def make_batches(length=1_003, block_size=10, windows_per_step=7, seed=3):
    return Batches(np.arange(length, dtype=np.uint16), block_size, windows_per_step, seed)


def epoch_starts(batches, epoch):
    """The starts of one epoch's windows, collected from the steps that hold them."""
    first, count = epoch * batches.windows_per_epoch, batches.windows_per_epoch
    steps = range(first // batches.windows_per_step, (first + count - 1) // batches.windows_per_step + 1)
    starts = np.concatenate([batches.starts(step) for step in steps])
    skipped = first - steps[0] * batches.windows_per_step
    return starts[skipped : skipped + count]


# The order of training


@pytest.mark.parametrize("shape", SHAPES)
def test_an_epoch_shows_each_token_once_but_for_the_rest(shape):
    length, block_size, _ = shape
    batches = make_batches(*shape)
    for epoch in range(4):
        windows = batches.windows(epoch_starts(batches, epoch))
        seen = Counter(windows[:, :-1].flatten().tolist())  # token k of the ring is the number k
        assert set(seen.values()) == {1}
        assert len(seen) == length - length % block_size


@pytest.mark.parametrize("shape", SHAPES)
def test_a_window_is_that_piece_of_the_ring_and_the_token_after_it(shape):
    length, block_size, windows_per_step = shape
    batches = make_batches(*shape)
    wrapped = 0
    for step in range(30):
        starts = batches.starts(step)
        windows = batches.windows(starts)
        assert windows.shape == (windows_per_step, block_size + 1) and windows.dtype == np.int64
        for start, window in zip(starts.tolist(), windows.tolist(), strict=True):
            assert window == [(start + k) % length for k in range(block_size + 1)]
            wrapped += start + block_size >= length
    assert wrapped


@pytest.mark.parametrize("budget", [0, 1e9])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_device_gets_the_same_windows_whether_or_not_the_tokens_are_there(monkeypatch, dtype, budget):
    monkeypatch.setattr("model.batches.PIECE", 64)
    tokens = np.random.default_rng(0).integers(60_000, size=1_000).astype(dtype)
    batches, device = Batches(tokens, 8, 5, seed=3), torch.device("cpu")
    batches.move_to(device, budget)
    for step in range(40):  # round the ring
        starts = batches.starts(step)
        windows = batches.tensor(starts, device)
        assert windows.dtype == torch.int64 and windows.tolist() == batches.windows(starts).tolist()
    assert (batches._resident is not None) == (budget > 0)


def test_a_step_is_a_pure_function_of_seed_and_step():
    batches = make_batches()
    in_order = [batches.starts(step).tolist() for step in range(80)]
    for step in (79, 0, 41, 40, 79, 13):  # over several epochs, back and forth
        assert batches.starts(step).tolist() == in_order[step]
        assert make_batches().starts(step).tolist() == in_order[step]


def test_the_order_stays_what_it_was_when_runs_began():
    """A run goes on with the data order of the version that began it, so it is pinned here."""
    starts = [make_batches().starts(step).tolist() for step in (0, 14, 1_000)]
    assert starts == PINNED


def test_the_size_of_a_step_does_not_change_the_order():
    small, large = make_batches(windows_per_step=3), make_batches(windows_per_step=12)
    pieces = [small.starts(step) for step in range(40)]
    assert np.array_equal(np.concatenate(pieces), np.concatenate([large.starts(step) for step in range(10)]))


def test_epochs_and_seeds_differ_in_order_and_in_cut():
    orders = [tuple(epoch_starts(make_batches(seed=seed), epoch)) for seed in (1, 2) for epoch in range(5)]
    assert len(set(orders)) == 10
    cuts = {frozenset(start % 10 for start in order if start < 990) for order in orders}
    assert len(cuts) > 5
    for order in orders:
        assert list(order) != sorted(order)


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 1_000, 4_097])
def test_shuffled_numbers_are_each_there_once(count):
    keys = np.random.default_rng(0).integers(2**64, size=8, dtype=np.uint64)
    assert sorted(shuffled(np.arange(count), count, keys).tolist()) == list(range(count))


def test_a_shuffled_order_looks_like_chance():
    """Where the first things and neighbours come to lie, over many keys: chi-squared tests, and no correlation."""
    count, trials = 10, 4_000
    rng = np.random.default_rng(0)
    orders = [
        shuffled(np.arange(count), count, rng.integers(2**64, size=8, dtype=np.uint64)) for _ in range(trials)
    ]
    pairs = Counter((order[0] * count + order[1]).item() for order in orders)
    expected = trials / (count * (count - 1))
    assert sum(
        (pairs[a * count + b] - expected) ** 2 for a in range(count) for b in range(count) if a != b
    ) < (
        expected * 155  # the 99.99th percentile of chi-squared with 89 degrees of freedom
    )
    order = shuffled(np.arange(20_000), 20_000, rng.integers(2**64, size=8, dtype=np.uint64))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_token_numbers_come_out_whole(dtype):
    top = np.iinfo(dtype).max
    tokens = np.array([0, 1, top, top - 1, 2] * 10, dtype=dtype)
    batches = Batches(tokens, 6, 4, seed=0)
    assert set(batches.windows(batches.starts(0)).flatten().tolist()) == {0, 1, 2, top - 1, top}


@pytest.mark.parametrize("length", [1, 5, 10])
def test_too_few_training_tokens_are_a_user_error(length):
    with pytest.raises(UserError, match=f"block_size 10 is too long for the {length} training tokens"):
        make_batches(length)
    assert make_batches(11).windows_per_epoch == 1


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_generators_do_not_take_is_a_user_error(seed):
    with pytest.raises(UserError, match=f"seed must be .*, not {seed}"):
        make_batches(seed=seed)
    assert len(make_batches(seed=2**63 - 1).starts(0)) == 7


def test_dropout_differs_by_seed_step_and_window():
    assert len({dropout_seed(*numbers) for numbers in itertools.product((1, 2), (0, 1), (0, 5))}) == 8


# The windows of validation


@pytest.mark.parametrize("limit", [1, 2, 5, 9, 10, 1_000])
@pytest.mark.parametrize("length", [91, 100, 101])
def test_validation_windows_are_spread_evenly(length, limit):
    windows = validation_windows(np.arange(length, dtype=np.uint16), 10, limit)
    available = (length - 1) // 10
    assert windows.shape == (min(limit, available), 11) and windows.dtype == np.int64
    firsts = windows[:, 0]
    assert (windows == firsts[:, None] + np.arange(11)).all() and (firsts % 10 == 0).all()
    assert firsts[0] == 0 and windows.max() < length
    if limit > 1:
        assert firsts[-1] == (available - 1) * 10
        gaps = np.diff(firsts)
        assert gaps.min() > 0 and gaps.max() - gaps.min() <= 10


def test_too_few_validation_tokens_are_a_user_error():
    with pytest.raises(UserError, match="block_size 10 is too long for the 10 validation tokens"):
        validation_windows(np.arange(10), 10, 5)
    assert len(validation_windows(np.arange(11), 10, 5)) == 1


# Reading what prepare_data.py wrote


def write_data(folder, dtype="uint16"):
    """A packed data folder, written by hand."""
    (folder / "processed").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    tokenizer.write_text('{"version": "1.0", "ö": 1}', encoding="utf-8")
    meta = {"dtype": dtype, "vocab_size": 500, "eot_id": 4, "splits": {}}
    meta["tokenizer_sha256"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    for split, count in (("train", 300), ("validation", 70)):
        tokens = (np.arange(count) * 7 % 500).astype(np.dtype(dtype).newbyteorder("<"))
        (folder / "processed" / f"{split}.bin").write_bytes(tokens.tobytes())
        sha256 = hashlib.sha256(tokens.tobytes()).hexdigest()
        facts = {"tokens": count, "stories": count // 10, "bytes": 4 * count, "sha256": sha256}
        meta["splits"][split] = facts
    (folder / "processed" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


@pytest.fixture
def data_dir(tmp_path):
    return write_data(tmp_path / "data")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_data_comes_back_as_written(tmp_path, dtype):
    data = load_data(write_data(tmp_path / "data", dtype), verify=True)
    assert data.train.tokens.tolist() == [k * 7 % 500 for k in range(300)]
    assert data.validation.tokens.tolist() == [k * 7 % 500 for k in range(70)]
    assert (data.vocab_size, data.eot_id) == (500, 4)
    assert data.tokenizer_json == '{"version": "1.0", "ö": 1}'
    assert (data.train.stories, data.train.bytes, data.train.bytes_per_token) == (30, 1_200, 4.0)
    assert isinstance(data.train.tokens, np.memmap) and not data.train.tokens.flags.writeable
    names = ("processed/train.bin", "processed/validation.bin", "tokenizer/tokenizer.json")
    digests = [hashlib.sha256((tmp_path / "data" / name).read_bytes()).hexdigest() for name in names]
    assert list(fingerprints(data).values()) == digests and len(set(digests)) == 3


@pytest.mark.parametrize("changed", [[], ["train"], ["validation"]])
def test_other_stories_of_step_1_are_noted(data_dir, changed):
    path = data_dir / "processed" / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    for facts in meta["splits"].values():
        facts["raw_sha256"] = "old"
    path.write_text(json.dumps(meta), encoding="utf-8")
    (data_dir / "raw").mkdir()
    splits = {name: {"sha256": "new" if name in changed else "old"} for name in meta["splits"]}
    (data_dir / "raw" / "manifest.json").write_text(json.dumps({"splits": splits}))
    assert ("has other stories than" in load_data(data_dir).outdated) == bool(changed)


def edit(path, change):
    path.write_bytes(bytes(change(bytearray(path.read_bytes()))))


def flip(content):
    content[41] ^= 1
    return content


PREPARE = "run python data/prepare_data.py"


@pytest.mark.parametrize(
    ("spoil", "needles"),
    [
        (lambda d: shutil.rmtree(d), ["no packed stories", "run python data/ingestion.py"]),
        (lambda d: (d / "processed/meta.json").unlink(), ["no packed", "run python data/ingestion.py"]),
        (lambda d: (shutil.rmtree(d / "processed"), (d / "raw").mkdir()), ["no packed stories", PREPARE]),
        (lambda d: edit(d / "processed/meta.json", lambda c: c[:40]), ["meta.json is not a JSON object"]),
        (lambda d: (d / "processed/meta.json").write_bytes(b"\xff\xfe"), ["meta.json is not a JSON object"]),
        (lambda d: (d / "processed/meta.json").write_text("[1]"), ["meta.json is not a JSON object"]),
        (lambda d: (d / "processed/meta.json").write_text('{"a": 1}'), ["meta.json", PREPARE]),
        (lambda d: (d / "tokenizer/tokenizer.json").unlink(), ["run python data/train_tokenizer.py"]),
        (lambda d: edit(d / "tokenizer/tokenizer.json", lambda c: c + b" "), ["another tokenizer", PREPARE]),
        (lambda d: (d / "processed/train.bin").unlink(), ["train.bin has 0 bytes", "says 600", PREPARE]),
        (lambda d: edit(d / "processed/train.bin", lambda c: c[:-1]), ["has 599 bytes", PREPARE]),
        (lambda d: edit(d / "processed/train.bin", lambda c: c + b"\0"), ["has 601 bytes", PREPARE]),
        (lambda d: edit(d / "processed/validation.bin", lambda c: c[:10]), ["validation.bin has 10 bytes"]),
    ],
)
def test_data_that_is_not_whole_is_a_user_error_that_names_the_command(data_dir, spoil, needles):
    spoil(data_dir)
    with pytest.raises(UserError) as caught:
        load_data(data_dir)
    for needle in needles:
        assert needle in str(caught.value)


@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
def test_verify_finds_one_flipped_bit(data_dir, name):
    load_data(data_dir, verify=True)
    edit(data_dir / "processed" / name, flip)
    load_data(data_dir)  # as long as it should be: reading it all takes time, so it is asked for
    with pytest.raises(UserError, match=f"{name} is damaged .* {PREPARE}"):
        load_data(data_dir, verify=True)
