"""Scores of stories against a loop that takes one story and one window at a time, in float64."""

import hashlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import evaluate as script
from model.config import GPTConfig
from model.generation import text_tokenizer
from model.gpt import GPT
from model.runtime import Runtime
from model.settings import UserError

torch.set_num_threads(1)

FAMILIES = ("modern", "gpt2")
EOT = 0
CPU = Runtime(torch.device("cpu"), torch.float32, False, "")
BLOCK_SIZE = 16
SENTENCES = ["Once upon a time there was a cat.", "The cat sat on a mat, and Zoë sat there too."]
STORIES = [
    "Once upon a time",
    "",  # nothing but its end
    "a",
    "The cat sat on the mat. " * 9,
    "Zoë saw a dragon 🐉!\n\n“Oh,” said the cat.",
    "Once there was a story that says <|endoftext|> and goes on.",
    "qzx" * 31,
    "The cat.",
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    # as a tokenizer from elsewhere may: it would add a token to each story, if it were asked
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOT)]
    )
    return text_tokenizer(tokenizer.to_str())


def make_model(blocks, block_size=BLOCK_SIZE):
    torch.manual_seed(0)
    model = GPT(GPTConfig(300, block_size, n_layer=2, n_head=2, n_embd=16, blocks=blocks)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def score_one_by_one(model, tokenizer, stories):
    """Loss, right predictions and tokens of each story: each token from the window that the text says.

    The first window predicts block_size tokens; each later one begins half a context further and
    predicts those that the one before did not reach.
    """
    model, block_size = model.double(), model.config.block_size
    scores = []
    for story in stories:
        ids = [EOT, *tokenizer.encode(story, add_special_tokens=False).ids, EOT]
        loss, right = 0.0, 0
        for target in range(1, len(ids)):
            begin = 0
            while target - begin > block_size:
                begin += block_size // 2
            log_probabilities = model(torch.tensor([ids[begin:target]]))[0, -1].log_softmax(-1)
            loss -= log_probabilities[ids[target]].item()
            right += log_probabilities.argmax().item() == ids[target]
        scores.append((loss, right, len(ids) - 1))
    return scores


def score(model, tokenizer, stories=STORIES, batch_size=0):
    return script.score_stories(model, tokenizer, EOT, stories, CPU, batch_size)


@pytest.mark.parametrize("blocks", FAMILIES)
@pytest.mark.parametrize("block_size", [4, 15, 16, 400])
def test_scores_are_those_of_one_token_at_a_time(tokenizer, blocks, block_size):
    model = make_model(blocks, block_size).double()
    scores = score(model, tokenizer)
    expected = score_one_by_one(model, tokenizer, STORIES)
    assert scores["tokens"].tolist() == [tokens for _, _, tokens in expected]
    assert scores["right"].tolist() == [right for _, right, _ in expected]
    np.testing.assert_allclose(scores["loss"], [loss for loss, _, _ in expected], rtol=1e-6)
    assert max(scores["tokens"]) > 90 and min(scores["tokens"]) == 1


@pytest.mark.parametrize("blocks", FAMILIES)
def test_float32_scores_are_close(tokenizer, blocks):
    model = make_model(blocks)
    scores = score(model, tokenizer)
    expected = [loss for loss, _, _ in score_one_by_one(model, tokenizer, STORIES)]
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)


def test_the_end_of_a_story_is_scored(tokenizer):
    """A model that always expects the end is right once a story, at the only sure cost of that token."""
    model = make_model("modern")
    with torch.no_grad():
        model.token_embedding.weight.zero_()
        model.token_embedding.weight[EOT] = 0.25
        model.norm.weight.fill_(1.0)
    model.hidden = lambda idx, cache=None: torch.ones(*idx.shape, 16)
    scores = score(model, tokenizer)
    assert scores["right"].tolist() == [1] * len(STORIES)
    cost = math.log(math.exp(4) + 299)  # of another token, whose logit is 0
    expected = (scores["tokens"] - 1) * cost + (cost - 4)
    np.testing.assert_allclose(scores["loss"], expected, rtol=1e-5)


def test_tokens_and_bytes_are_those_of_the_text(tokenizer):
    scores = score(make_model("modern"), tokenizer)
    lengths = [len(tokenizer.encode(story, add_special_tokens=False).ids) + 1 for story in STORIES]
    assert scores["tokens"].tolist() == lengths
    assert scores["bytes"].tolist() == [len(story.encode("utf-8")) for story in STORIES]
    assert scores["bytes"][4] > len(STORIES[4])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 1_000])
def test_the_batch_size_changes_nothing(tokenizer, batch_size):
    model = make_model("gpt2").double()
    scores, expected = score(model, tokenizer, batch_size=batch_size), score(model, tokenizer)
    for name in ("right", "tokens", "bytes"):
        assert scores[name].tolist() == expected[name].tolist()
    np.testing.assert_allclose(scores["loss"], expected["loss"], rtol=1e-6)


def test_the_order_of_the_stories_changes_nothing(tokenizer):
    model = make_model("modern").double()
    expected = score(model, tokenizer)
    order = np.random.default_rng(0).permutation(len(STORIES))
    scores = score(model, tokenizer, [STORIES[k] for k in order], batch_size=3)
    for name in ("right", "tokens", "bytes"):
        assert scores[name].tolist() == expected[name][order].tolist()
    np.testing.assert_allclose(scores["loss"], expected["loss"][order], rtol=1e-6)


def test_bfloat16_scores_are_close(tokenizer):
    """Within 1 %: eight bits a number, and the errors of many tokens even out."""
    model = make_model("modern")
    rough = Runtime(torch.device("cpu"), torch.bfloat16, False, "")
    scores = script.score_stories(model, tokenizer, EOT, STORIES, rough, 0)
    assert scores["loss"].sum() == pytest.approx(score(model, tokenizer)["loss"].sum(), rel=0.01)


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 15, 16])
def test_windows_score_each_position_once_with_half_a_context_before_it(block_size):
    for length in range(1, 8 * block_size + 3):
        scored = []
        for number, (first, end, begin) in enumerate(script.sliding_windows(length, block_size)):
            assert first == number * max(1, block_size // 2)
            assert first <= begin < end <= min(length, first + block_size)
            assert number == 0 or begin - first >= block_size // 2
            scored += range(begin, end)
        assert scored == list(range(length))


def test_a_summary_divides_sums_by_sums():
    scores = {"loss": [8.0, 2.0], "right": [3, 1], "tokens": [7, 3], "bytes": [30, 10]}
    summary = script.summarise({name: np.array(values) for name, values in scores.items()})
    assert summary == {
        "loss": pytest.approx(1.0),
        "perplexity": pytest.approx(math.e),
        "bits_per_byte": pytest.approx(10 / math.log(2) / 40),
        "accuracy": pytest.approx(0.4),
        "stories": 2,
        "tokens": 10,
        "bytes": 40,
    }


# The stories of a split


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tokenizer):
    """A packed data folder, written by hand."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "processed").mkdir()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    sha256 = hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    meta = {"dtype": "uint16", "vocab_size": 300, "eot_id": EOT, "tokenizer_sha256": sha256, "splits": {}}
    for split, stories in (("train", [f"Cat {k} sat." for k in range(10)]), ("validation", STORIES)):
        encoded = [tokenizer.encode(story, add_special_tokens=False).ids for story in stories]
        tokens = np.array([token for ids in encoded for token in (*ids, EOT)], dtype="<u2")
        (folder / "processed" / f"{split}.bin").write_bytes(tokens.tobytes())
        size = sum(len(story.encode()) for story in stories)
        facts = {"tokens": len(tokens), "stories": len(stories), "bytes": size, "sha256": "-"}
        meta["splits"][split] = facts
    (folder / "processed" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def read(data_dir, split, max_samples=0):
    return script.read_stories(SimpleNamespace(data_dir=data_dir, split=split, max_samples=max_samples))


def test_stories_come_back_from_the_packed_tokens(data_dir):
    train = [f"Cat {k} sat." for k in range(10)]
    assert read(data_dir, "validation") == STORIES
    assert read(data_dir, "train") == train
    assert read(data_dir, "all") == train + STORIES


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, range(10)), (99, range(10)), (0, range(10))],
)
def test_a_sample_is_spread_evenly_over_the_split(data_dir, count, expected):
    assert read(data_dir, "train", count) == [f"Cat {k} sat." for k in expected]


# The script


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    from model.checkpoint import save_checkpoint

    model = make_model("modern")
    content = {"config": vars(model.config), "settings": {}, "weights": model.state_dict(), "step": 40}
    content |= {"tokenizer": tokenizer.to_str(), "eot_id": EOT, "data": {}}
    for name in ("ckpt_40.pt", "best.pt"):
        save_checkpoint(tmp_path / "run" / name, content)
    return tmp_path / "run"


def test_the_script_prints_and_writes_the_scores(run, tmp_path, checkpoint, data_dir, tokenizer):
    places = ["--checkpoint-dir", checkpoint, "--data-dir", data_dir, "--device", "cpu"]
    report = tmp_path / "scores.json"
    result = run("evaluate.py", *places, "--output", report, cwd=tmp_path, check=0)
    expected = script.summarise(score(make_model("modern"), tokenizer))
    for key, value in expected.items():
        line = f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}"
        assert line in result.stdout.splitlines()
    (row,) = json.loads(report.read_text())["results"]
    assert row["step"] == 40 and row["checkpoint"].endswith("ckpt_40.pt")
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_several_checkpoints_are_rows_of_a_table(run, tmp_path, checkpoint, data_dir):
    places = ["--checkpoint-dir", checkpoint, "--data-dir", data_dir, "--device", "cpu"]
    few = ["--max-samples", "2", "--prompt", "Once upon"]
    result = run("evaluate.py", *places, *few, "--checkpoint", "best", "40", cwd=tmp_path, check=0)
    lines = result.stdout.splitlines()
    header = next(k for k, line in enumerate(lines) if line.split()[:1] == ["checkpoint"])
    first, second = (line.split() for line in lines[header + 1 :])
    assert first[0].endswith("best.pt") and second[0].endswith("ckpt_40.pt") and first[1:] == second[1:]
    assert lines[header - 1] == "2 validation stories"
    assert sum(": Once upon" in line for line in lines) == 2


@pytest.mark.parametrize(
    ("flags", "needle"),
    [
        (["--split", "test"], "--split takes train, validation or all, not 'test'"),
        (["--max-samples", "-1"], "--max-samples must be 0"),
        (["--checkpoint", "best", "41"], "there is no checkpoint '41'"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(run, tmp_path, checkpoint, data_dir, flags, needle):
    places = ["--checkpoint-dir", checkpoint, "--data-dir", data_dir]
    assert_one_line_error(run("evaluate.py", *places, *flags, cwd=tmp_path), needle)


def test_without_data_the_next_command_is_named(tmp_path):
    with pytest.raises(UserError, match=r"run python data/prepare_data\.py"):
        read(tmp_path, "validation")
