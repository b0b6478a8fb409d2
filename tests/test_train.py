"""train.py as its users run it: a tiny model, some steps, on the built-in stories."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training import TINY, losses, make_run, metrics

import train as train_script
from model import training_state
from model.batches import Batches, validation_windows
from model.bigrams import begin_as_bigrams
from model.checkpoint import list_checkpoints, load_checkpoint, load_model
from model.config import GPTConfig, Recipe
from model.decoder import Decoder
from model.errors import UserError
from model.generation import generate_all
from model.gpt import GPT
from model.packed_data import load_data
from model.runtime import choose_runtime
from model.sampled_softmax import Shortlists
from model.sampling import Sampling
from model.validation import validate


def test_a_run_leaves_what_it_promises(train):
    folder, result = train("run")
    assert [path.name for path in list_checkpoints(folder)] == ["ckpt_12.pt", "ckpt_8.pt", "ckpt_4.pt"]
    rows = metrics(folder)
    assert [row["step"] for row in rows if "train_loss" in row] == list(range(1, 13))
    evaluations = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in evaluations] == [4, 8, 12]
    assert evaluations[-1]["validation_loss"] < evaluations[0]["validation_loss"] < 6.1
    for row in evaluations:
        figures = f"validation loss {row['validation_loss']:.4f} nats per token (training loss "
        weights = 0.9 ** np.arange(row["step"])[::-1]
        training_loss = np.average(losses(folder)[: row["step"]], weights=weights)
        figures += f"{training_loss:.3f}), {row['bits_per_byte']:.4f} bits per byte"
        assert f"step {row['step']}: {figures}" in result.out
    best = load_checkpoint(folder / "best.pt")
    muon, adamw = load_checkpoint(folder / "ckpt_12.pt")["optimizers"]
    assert muon["param_groups"][0]["momentum"] == pytest.approx(0.85 + 0.1 * 11 / 300)  # of the 12th step
    rate = [row["learning_rate"] for row in rows if "train_loss" in row][-1]
    assert adamw["param_groups"][0]["lr"] == pytest.approx(rate * 12 / 200)
    assert best["best_loss"] == min(row["validation_loss"] for row in evaluations)
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples.md").read_text().count("Once upon a time") == 3
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    assert f"best_validation_loss: {best['best_loss']:.4f}\n" in result.out
    assert f"best_bits_per_byte: {min(row['bits_per_byte'] for row in evaluations):.4f}\n" in result.out
    assert "best_checkpoint" in result.out and result.err == ""


def test_the_sample_is_what_the_checkpoint_writes(train):
    folder, _ = train("run", "--sample-prompt", "A cat", "--seed", 7)
    model, tokenizer, checkpoint = load_model(folder / "ckpt_12.pt")
    ids, eot_id = tokenizer.encode("A cat", add_special_tokens=False).ids, checkpoint["eot_id"]
    (written,) = generate_all(Decoder(model), [[eot_id, *ids]], 8, eot_id, Sampling(), [7])
    assert metrics(folder)[-1]["sample"] == tokenizer.decode(ids + written, skip_special_tokens=False)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", True), ("float32", False), ("float16", False)])
def test_muon_rounds_its_products_in_bfloat16_runs_only(train, monkeypatch, dtype, expected):
    made, make = [], training_state.make_optimizers
    monkeypatch.setattr(
        training_state, "make_optimizers", lambda *args, **kw: made.append(make(*args, **kw)) or made[-1]
    )
    train("run", "--max-steps", 1, "--dtype", dtype)
    assert made[0][0].low_precision == expected


def test_keep_limits_the_checkpoints(train):
    folder, _ = train("run", "--keep", 1)
    assert [path.name for path in list_checkpoints(folder)] == ["ckpt_12.pt"]


def test_what_is_printed_of_layers_is_what_trains(train):
    """Those that have joined stay, whatever --grow-at says on resume."""
    train("run", "--decay-fraction", "0.01", "--max-steps", 4, "--grow-at", 0)
    _, result = train("run", "--max-steps", 8, "--grow-at", 0.9, tiny=[])
    assert "changed      max_steps 4 is now 8; grow_at 0.0 is now 0.9\n" in result.out
    assert "layer until" not in result.out


@pytest.mark.parametrize(
    ("mask", "grow_at", "vocab_size"),
    [("--mask-stories", 0.5, 400), ("--no-mask-stories", 0, 400), ("--mask-stories", 0.5, 2_000)],
)
def test_losses_are_those_of_a_plain_loop(train, packed, mask, grow_at, vocab_size):
    """GPT-2's blocks under AdamW in float32, against the textbook loop: no micro-batches, nothing fused.

    Until it joins, the second block is there, but adds nothing and gets no gradients; and of a large vocabulary, the
    tokens that are not in a step's shortlist are left out.
    """
    flags = "--blocks gpt2 --optimizer adamw --dtype float32 --micro-batch 3 --learning-rate 1e-3 --weight-decay 0.1"
    flags += " --eval-tokens 1040"
    cosine = "--schedule cosine --decay-fraction 1".split()
    shape = ["--vocab-size", vocab_size, mask, "--grow-at", grow_at]
    folder, result = train("run", *flags.split(), *cosine, *shape)
    sampled = vocab_size == 2_000
    parts = "1 layer until 50 % are done\n", "; softmax over 500 tokens\n"
    assert [part in result.out for part in parts] == [bool(grow_at), sampled]
    data = load_data(packed)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(vocab_size, 32, 2, 2, 32, blocks="gpt2", tie_weights=False)).double()
    second = model.blocks[1]
    if grow_at:
        torch.nn.init.zeros_(second.attention.proj.weight)
        torch.nn.init.zeros_(second.mlp.down.weight)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    batches = Batches(data.train.tokens, 32, 16, seed=1337)

    def logits_of(inputs):
        if mask != "--mask-stories":
            return model(inputs)
        stories = [[row[: k + 1].count(data.eot_id) for k in range(32)] for row in inputs.tolist()]
        return model(inputs, story_ids=torch.tensor(stories))

    expected, norms, ends = [], [], 0
    for step in range(12):
        windows = torch.from_numpy(batches.windows(batches.starts(step)))
        inputs = windows[:, :-1]
        logits = logits_of(inputs)
        if sampled:
            ids, log_counts = Shortlists(batches, vocab_size).shortlist(step, torch.device("cpu"))
            left_out = torch.full((vocab_size,), -math.inf).index_fill(0, ids, 0.0)
            logits = logits + left_out.index_copy(0, ids, log_counts)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        if step < 12 * grow_at:
            second.zero_grad()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            warmup = min(1, (step + 1) / 2)
            group["lr"] = 1e-3 * warmup * (1 + np.cos(np.pi * step / 12)) / 2
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
        ends += (inputs == data.eot_id).sum().item()
    assert ends > 5
    np.testing.assert_allclose(losses(folder), expected, rtol=2e-6)
    rows = [row for row in metrics(folder) if "train_loss" in row]
    np.testing.assert_allclose([row["gradient_norm"] for row in rows], norms, rtol=1e-4)
    # The validation loss, over the whole vocabulary: of the 32 whole windows in --eval-tokens 1040
    windows = torch.from_numpy(validation_windows(data.validation.tokens, 32, 32))
    loss = torch.nn.functional.cross_entropy(
        logits_of(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
    )
    evaluation = metrics(folder)[-1]
    assert (evaluation["step"], evaluation["tokens"]) == (12, 12 * 512)
    assert evaluation["validation_loss"] == pytest.approx(loss.item(), rel=2e-6)


def test_validation_keeps_to_the_story_too_and_drops_nothing(packed):
    """Against each story's part of each window read by itself."""
    data, runtime = load_data(packed), choose_runtime(torch.device("cpu"), "float32", "off")
    torch.manual_seed(0)
    model = GPT(GPTConfig(400, 64, 2, 2, 32, dropout=0.5)).eval()
    for parameter in model.parameters():  # so that what a token sees matters
        torch.nn.init.normal_(parameter, std=0.5)
    windows = validation_windows(data.validation.tokens, 64, 64)
    total = 0.0
    for window in windows.tolist():
        begins = sorted({0, *(k for k in range(64) if window[k] == data.eot_id)})
        for begin, end in zip(begins, [*begins[1:], 64], strict=True):
            ids = torch.tensor([window[begin : end + 1]])
            total += model(ids[:, :-1], ids[:, 1:]).item() * (end - begin)
    rows = []
    for mask in (True, False):
        run = make_run(
            data=data, validation_windows=windows, runtime=runtime, recipe=Recipe(mask_stories=mask)
        )
        rows.append(validate(run, model.train()))
        assert model.training
    losses, split = [row["validation_loss"] for row in rows], data.validation
    assert losses[0] == pytest.approx(total / (64 * len(windows)), rel=1e-5)
    assert losses[1] != pytest.approx(losses[0], rel=1e-4)
    bits = losses[0] / math.log(2) * len(split.tokens) / split.bytes
    assert rows[0]["bits_per_byte"] == pytest.approx(bits)


def test_a_run_begins_as_a_bigram_model(train, packed):
    folder, result = train("run", "--max-steps", 1, "--dtype", "float32")
    assert "initialised  as a bigram model of the stories, counted in" in result.out
    data = load_data(packed)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(400, 32, 2, 2, 32, tie_weights=False))
    begin_as_bigrams(model, data.train.tokens)
    batches = Batches(data.train.tokens, 32, 16, seed=1337)
    windows = torch.from_numpy(batches.windows(batches.starts(0)))
    np.testing.assert_allclose(losses(folder), model(windows[:, :-1], windows[:, 1:]).item(), rtol=1e-5)

    for name, flag in (("random", "--no-bigram-start"), ("tied", "--tie-weights")):
        folder, result = train(name, "--max-steps", 1, flag)
        assert "as a bigram" not in result.out
        assert losses(folder) == pytest.approx(np.log(400), rel=0.01)
        assert load_checkpoint(folder / "ckpt_1.pt")["settings"]["bigram_start"] is False
    for flags in (["--tie-weights"], ["--blocks", "gpt2"]):
        with pytest.raises(UserError, match="--bigram-start needs modern blocks"):
            train("never", "--bigram-start", *flags)


@pytest.mark.parametrize("bigrams", ["--bigram-start", "--no-bigram-start"])
def test_the_second_half_of_the_blocks_joins_later(train, bigrams):
    flags = ["--n-layer", 3, "--grow-at", 0.6, "--save-interval", 1, "--keep", 20]
    folder, result = train("run", bigrams, *flags)
    assert "3 layers" in result.out and "2 layers until 60 % are done" in result.out
    assert "step 8: from here on, all 3 layers train" in result.err + result.out
    first, before, after = (load_checkpoint(folder / f"ckpt_{step}.pt") for step in (1, 8, 9))
    assert [checkpoint["depth"] for checkpoint in (first, before, after)] == [2, 2, 3]
    for name, weight in before["weights"].items():
        last = name.startswith("blocks.2.")
        assert last == torch.equal(weight, first["weights"][name]), name
        silent = last and name.endswith(("proj.weight", "down.weight"))
        assert not (silent and weight.any())
        assert not (silent and torch.equal(weight, after["weights"][name]))


def test_the_micro_batch_does_not_change_the_losses(train):
    runs = [train(f"micro{n}", "--dtype", "float32", "--micro-batch", n)[0] for n in (0, 1, 7)]
    for other in runs[1:]:
        np.testing.assert_allclose(losses(other), losses(runs[0]), rtol=1e-5)


@pytest.fixture
def clock(monkeypatch):
    """By which a step takes one second, and an evaluation 99."""
    seconds, evaluation = itertools.count(), train_script.evaluate_and_keep_best
    monkeypatch.setattr(train_script, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))

    def evaluate_slowly(*words):
        list(itertools.islice(seconds, 99))
        return evaluation(*words)

    monkeypatch.setattr(train_script, "evaluate_and_keep_best", evaluate_slowly)


def test_the_clock_counts_nothing_but_steps(train, clock):
    # A step takes whole windows: 16 of 32 tokens
    folder, result = train("run", "--no-bigram-start", "--batch-tokens", 530)
    assert "tokens: 6144\ntraining_seconds: 12.0\ntokens_per_second: 512\n" in result.out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train_loss" in row]
    counted = [(row["tokens"], row["seconds"], row["tokens_per_second"]) for row in rows]
    assert counted == [(512 * step, step, 512) for step in range(1, 13)]


def test_max_minutes_ends_the_run_with_the_schedule(train, clock):
    flags = ["--max-steps", 1_000_000, "--max-minutes", 0.2, "--no-bigram-start", "--log-interval", 1_000]
    folder, _ = train("run", *flags)
    (row,) = (row for row in metrics(folder) if "train_loss" in row)
    last = load_checkpoint(list_checkpoints(folder)[0])
    assert (row["step"], last["step"], last["seconds"]) == (12, 12, 12)  # logged, whatever the interval
    decayed = 1 / 12 / last["settings"]["decay_fraction"]
    assert row["learning_rate"] == pytest.approx(decayed * last["settings"]["learning_rate"])


def test_a_run_too_short_for_a_step_leaves_what_it_began_with(train):
    folder, result = train("run", "--max-minutes", 1e-9)
    assert "already finished" not in result.out and "steps: 0\n" in result.out
    assert load_checkpoint(folder / "best.pt")["step"] == 0


def test_a_home_that_cannot_be_written_is_no_matter(run, packed, tmp_path):
    flags = [*TINY, "--max-steps", 2, "--data-dir", packed, "--checkpoint-dir", tmp_path / "run"]
    homeless = {"HOME": "/proc/none", "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": ""}
    assert "atplotlib" not in run("train.py", *flags, env=homeless, check=0).stderr
    assert (tmp_path / "run" / "loss_curve.png").exists()


@pytest.fixture
def poison(monkeypatch):
    """poison({5, 6}): the losses of the 5th and 6th step become nan (one micro-batch a step, no evaluation)."""

    def poison(steps):
        calls, forward = [], GPT.forward

        def poisoned(self, idx, targets=None, *others):
            calls.append(1)  # the first call tries the micro-batch
            loss = forward(self, idx, targets, *others)
            return loss * float("nan") if len(calls) - 1 in steps else loss

        monkeypatch.setattr(GPT, "forward", poisoned)

    return poison


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_is_not_finite_changes_nothing(train, poison, optimizer):
    poison({5})
    folder, _ = train(
        "run", "--save-interval", 1, "--eval-interval", 12, "--keep", 20, "--optimizer", optimizer
    )
    four, five, six = (load_checkpoint(folder / f"ckpt_{step}.pt") for step in (4, 5, 6))
    assert all(torch.equal(four["weights"][name], five["weights"][name]) for name in four["weights"])
    for before, after in zip(four["optimizers"], five["optimizers"], strict=True):
        for key, state in before["state"].items():
            assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())
    assert not torch.equal(
        five["weights"]["token_embedding.weight"], six["weights"]["token_embedding.weight"]
    )
    assert all(weight.isfinite().all() for weight in six["weights"].values())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("train_loss", 0) is None] == [5]


@pytest.mark.parametrize("where", ["head.weight", "blocks.0.attention.qkv.weight"])
@pytest.mark.parametrize("clip", [0, 1])
def test_what_overflows_in_float16_keeps_both_optimizers_from_their_step(train, monkeypatch, where, clip):
    initialise = GPT.__init__

    def with_an_overflow(self, config):
        initialise(self, config)
        calls = []

        def overflow(gradient):
            calls.append(1)  # the first call tries the micro-batch
            return torch.where(torch.tensor(len(calls) - 1 == 5), math.inf, gradient)

        self.get_parameter(where).register_hook(overflow)

    monkeypatch.setattr(GPT, "__init__", with_an_overflow)
    flags = [
        "--dtype",
        "float16",
        "--grad-clip",
        clip,
        "--save-interval",
        1,
        "--eval-interval",
        12,
        "--keep",
        20,
        "--grow-at",
        0,
    ]
    folder, _ = train("run", *flags)
    four, five, six = (load_checkpoint(folder / f"ckpt_{step}.pt") for step in (4, 5, 6))
    assert all(torch.equal(four["weights"][name], five["weights"][name]) for name in four["weights"])
    assert five["scaler"]["scale"] == four["scaler"]["scale"] / 2
    assert not any(torch.equal(five["weights"][name], six["weights"][name]) for name in four["weights"])


def test_a_run_that_stays_not_finite_stops_and_says_where(train, poison, tmp_path):
    poison(range(6, 1000))
    with pytest.raises(
        UserError, match="not finite, 5 steps in a row up to step 10; .*lower --learning-rate .*--fresh"
    ):
        train("run", "--eval-interval", 12, "--save-interval", 1)
    assert len(list_checkpoints(tmp_path / "run")) == 3
    for path in list_checkpoints(tmp_path / "run"):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path)["weights"].values())


def test_float16_has_more_steps_to_find_its_scale(train, poison):
    poison(range(6, 14))
    folder, _ = train("run", "--dtype", "float16", "--max-steps", 16, "--eval-interval", 16, "--grow-at", 0)
    assert load_checkpoint(folder / "ckpt_16.pt")["scaler"]["scale"] == 65_536 / 2**8


def test_a_ruined_model_is_no_result(train, tmp_path):
    recipe = ["--blocks", "gpt2", "--optimizer", "adamw", "--learning-rate", 1e12, "--warmup-steps", 0]
    with pytest.raises(
        UserError, match=r"after step 4 the validation loss is (nan|inf).*lower --learning-rate"
    ):
        train("run", *recipe, "--grow-at", 0, "--max-steps", 4, "--eval-interval", 4)
    recipe += ["--learning-rate", 1e39, "--save-interval", 1]
    with pytest.raises(UserError, match=r"after step 1 some weights are not finite.*lower --learning-rate"):
        train("infinite", *recipe, "--grow-at", 0, "--eval-interval", 4)
    assert not list_checkpoints(tmp_path / "infinite")
    assert not list((tmp_path / "run").glob("*[!y].pt"))  # at most before_decay.pt
    assert "validation" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_float16_trains_like_float32_and_its_scaler_is_kept(train):
    exact, _ = train("float32", "--dtype", "float32")
    scaled, _ = train("float16", "--dtype", "float16")
    np.testing.assert_allclose(losses(scaled), losses(exact), rtol=1e-3)
    scaler = load_checkpoint(scaled / "ckpt_12.pt")["scaler"]
    assert scaler["scale"] == 65_536 and scaler["_growth_tracker"] == 12  # steps since the scale changed


def test_evaluating_more_often_does_not_change_training(train, monkeypatch):
    """With a seed of dropout for each micro-batch of each step."""
    seeds, dropout_seed = [], train_script.dropout_seed
    monkeypatch.setattr(
        train_script, "dropout_seed", lambda *numbers: seeds.append(dropout_seed(*numbers)) or seeds[-1]
    )
    flags = ["--dropout", 0.1, "--micro-batch", 8]
    seldom, _ = train("seldom", *flags, "--eval-interval", 12)
    assert len(set(seeds)) == len(seeds) == 12 * 2
    often, _ = train("often", *flags, "--eval-interval", 1)
    np.testing.assert_array_equal(losses(seldom), losses(often))
