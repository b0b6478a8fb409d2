"""Scores of stories against a loop that takes one story and one window at a time, in float64."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from model import scoring
from model.candidates import OwnModel
from model.config import GPTConfig
from model.errors import UserError
from model.gpt import GPT
from model.runtime import Runtime
from model.scoring import Scores, bootstrap, interval, score_stories, sliding_windows
from model.tokenizer import text_tokenizer

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


def make_tokenizer():
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


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_model(blocks, block_size=BLOCK_SIZE):
    torch.manual_seed(0)
    model = GPT(GPTConfig(300, block_size, n_layer=2, n_head=2, n_embd=16, blocks=blocks)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


class InMemory(OwnModel):
    def __init__(self, model, tokenizer):
        self.name, self.network, self.tokenizer = "a model", model, tokenizer
        self.start_id = self.end_id = EOT
        self.block_size, self.vocab_size = model.config.block_size, model.config.vocab_size


def score(model, tokenizer, stories=STORIES, batch_size=0, runtime=CPU):
    return score_stories(InMemory(model, tokenizer), stories, runtime, batch_size)


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


@pytest.mark.parametrize("blocks", FAMILIES)
@pytest.mark.parametrize("block_size", [4, 15, 16, 400])
def test_scores_are_those_of_one_token_at_a_time(tokenizer, blocks, block_size):
    model = make_model(blocks, block_size).double()
    scores = score(model, tokenizer)
    expected = score_one_by_one(model, tokenizer, STORIES)
    assert scores.tokens.tolist() == [tokens for _, _, tokens in expected]
    assert scores.right.tolist() == [right for _, right, _ in expected]
    np.testing.assert_allclose(scores.loss, [loss for loss, _, _ in expected], rtol=1e-6)
    assert max(scores.tokens) > 90 and min(scores.tokens) == 1


def test_the_end_of_a_story_is_scored(tokenizer):
    """A model that always expects the end is right once a story, at the only sure cost of that token."""
    model = make_model("modern")
    with torch.no_grad():
        model.token_embedding.weight.zero_()
        model.token_embedding.weight[EOT] = 0.25
        model.norm.weight.fill_(1.0)
    model.hidden = lambda idx, cache=None: torch.ones(*idx.shape, 16)
    scores = score(model, tokenizer)
    assert scores.right.tolist() == [1] * len(STORIES)
    cost = math.log(math.exp(4) + 299)  # of another token, whose logit is 0
    expected = (scores.tokens - 1) * cost + (cost - 4)
    np.testing.assert_allclose(scores.loss, expected, rtol=1e-5)


def test_tokens_and_bytes_are_those_of_the_text(tokenizer):
    scores = score(make_model("modern"), tokenizer)
    lengths = [len(tokenizer.encode(story, add_special_tokens=False).ids) + 1 for story in STORIES]
    assert scores.tokens.tolist() == lengths
    assert scores.bytes.tolist() == [len(story.encode("utf-8")) for story in STORIES]
    assert scores.bytes[4] > len(STORIES[4])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 1_000])
def test_the_batch_size_changes_nothing(tokenizer, batch_size):
    model = make_model("gpt2").double()
    scores, expected = score(model, tokenizer, batch_size=batch_size), score(model, tokenizer)
    for name in ("right", "tokens", "bytes"):
        assert getattr(scores, name).tolist() == getattr(expected, name).tolist()
    np.testing.assert_allclose(scores.loss, expected.loss, rtol=1e-6)


def test_windows_of_similar_length_are_read_together(tokenizer, monkeypatch):
    """Longest first: a batch takes the memory of its first window times their number."""
    lengths, lay_out = [], scoring.lay_out

    def noting(batch, *others):
        lengths.extend(window.end - window.first for window in batch)
        return lay_out(batch, *others)

    monkeypatch.setattr(scoring, "lay_out", noting)
    score(make_model("modern"), tokenizer, batch_size=2)
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 3


def test_the_order_of_the_stories_changes_nothing(tokenizer, monkeypatch):
    model = make_model("modern").double()
    expected = score(model, tokenizer)
    monkeypatch.setattr(scoring, "ENCODED_AT_ONCE", 3)
    order = np.random.default_rng(0).permutation(len(STORIES))
    scores = score(model, tokenizer, [STORIES[k] for k in order], batch_size=3)
    for name in ("right", "tokens", "bytes"):
        assert getattr(scores, name).tolist() == getattr(expected, name)[order].tolist()
    np.testing.assert_allclose(scores.loss, expected.loss[order], rtol=1e-6)


def test_bfloat16_scores_are_close(tokenizer, monkeypatch):
    """Within 1 %: eight bits a number, and the errors of many tokens even out. Probabilities are in float32."""
    model, dtypes, largest = make_model("modern"), [], scoring.largest
    monkeypatch.setattr(scoring, "largest", lambda logits: dtypes.append(logits.dtype) or largest(logits))
    rough = Runtime(torch.device("cpu"), torch.bfloat16, False, "")
    scores = score(model, tokenizer, runtime=rough)
    assert scores.loss.sum() == pytest.approx(score(model, tokenizer).loss.sum(), rel=0.01)
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 15, 16])
def test_windows_score_each_position_once_with_half_a_context_before_it(block_size):
    for length in range(1, 8 * block_size + 3):
        scored = []
        for number, (_, first, end, begin) in enumerate(sliding_windows(0, length, block_size)):
            assert first == number * max(1, block_size // 2)
            assert first <= begin < end <= min(length, first + block_size)
            assert number == 0 or begin - first >= block_size // 2
            scored += range(begin, end)
        assert scored == list(range(length))


def make_scores(loss, size, right=None, tokens=None, position_loss=()):
    ones = np.ones(len(loss), int)
    arrays = (loss, ones if right is None else right, ones if tokens is None else tokens, size, position_loss)
    return Scores(*(np.asarray(array) for array in arrays))


def test_a_summary_divides_sums_by_sums():
    assert make_scores([8.0, 2.0], [30, 10], [3, 1], [7, 3]).summary() == {
        "loss": pytest.approx(1.0),
        "perplexity": pytest.approx(math.e),
        "bits_per_byte": pytest.approx(10 / math.log(2) / 40),
        "accuracy": pytest.approx(0.4),
        "stories": 2,
        "tokens": 10,
        "bytes": 40,
    }


def test_loss_by_position_is_that_of_one_token_at_a_time(tokenizer):
    """A single story of as many tokens as there are positions, scored token by token in float64."""
    model, story = make_model("modern").double(), STORIES[3]
    ranges = score(model, tokenizer, [story]).by_position()
    ids = [EOT, *tokenizer.encode(story, add_special_tokens=False).ids, EOT]
    expected = []
    for target in range(1, len(ids)):
        begin = max(0, -(-(target - BLOCK_SIZE) // (BLOCK_SIZE // 2))) * (BLOCK_SIZE // 2)
        log_probabilities = model(torch.tensor([ids[begin:target]]))[0, -1].log_softmax(-1)
        expected.append(-log_probabilities[ids[target]].item())
    assert [r["first"] for r in ranges][:3] == [0, 1, 2] and ranges[-1]["end"] == len(expected)
    for r in ranges:
        assert r["tokens"] == r["end"] - r["first"]
        assert r["loss"] == pytest.approx(np.mean(expected[r["first"] : r["end"]]), rel=1e-6)


def test_loss_by_position_adds_up_over_stories(tokenizer):
    scores = score(make_model("gpt2"), tokenizer)
    ranges = scores.by_position()
    assert sum(r["tokens"] for r in ranges) == scores.tokens.sum()
    assert sum(r["tokens"] * r["loss"] for r in ranges) == pytest.approx(scores.loss.sum())
    assert ranges[0]["tokens"] == len(STORIES)  # each has a first token


def test_logits_in_pieces_change_nothing(tokenizer, monkeypatch):
    model = make_model("modern").double()
    expected = score(model, tokenizer)
    monkeypatch.setattr(scoring, "CPU_LOGITS", 3 * 300)  # three positions at a time
    scores = score(model, tokenizer)
    np.testing.assert_allclose(scores.loss, expected.loss, rtol=1e-9)
    assert scores.right.tolist() == expected.right.tolist()


@pytest.mark.parametrize("size", [3 * scoring.SEARCH_BLOCK, 2 * scoring.SEARCH_BLOCK + 7])
def test_the_largest_value_is_the_first_of_those_tied(size):
    values = torch.randint(1_000, (400, size), generator=torch.Generator().manual_seed(0)).float()
    largest = values.max(1, keepdim=True)[0]
    assert ((values == largest).sum(1) > 1).sum() > 50  # ties within a block and between blocks
    for found, expected in zip(scoring.largest(values), values.max(1), strict=True):
        assert torch.equal(found, expected)


def test_weights_that_are_not_finite_are_named(tokenizer):
    model = make_model("modern")
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(UserError, match="a model gives a loss that is not finite"):
        score(model, tokenizer)


def test_a_tokenizer_of_another_model_is_named(tokenizer):
    model = GPT(GPTConfig(40, BLOCK_SIZE, n_layer=1, n_head=1, n_embd=16)).eval()
    with pytest.raises(UserError, match="its tokenizer produces token .* its model has only 40"):
        score(model, tokenizer)


# Intervals


def noisy_scores(count, seed=0, factor=1.0):
    """Stories whose losses have a spread of their own, beside that of their lengths."""
    rng = np.random.default_rng(seed)
    size = rng.integers(200, 1_500, count)
    return make_scores(factor * size * rng.normal(0.5, 0.1, count), size)


def test_the_interval_is_that_of_the_ratio_estimator():
    """Against the delta method's standard error of a ratio of sums, at 400 stories within 10 %."""
    scores = noisy_scores(400)
    ratio = scores.loss.sum() / scores.bytes.sum()
    residual = scores.loss - ratio * scores.bytes
    error = residual.std(ddof=1) * 400**0.5 / scores.bytes.sum() / math.log(2)
    low, high = interval(bootstrap([scores], seed=1)[0])
    value = scores.summary()["bits_per_byte"]
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_differences_are_paired():
    """A model that costs 1 % more on every story is told apart, though the intervals overlap."""
    one, other = noisy_scores(300), noisy_scores(300, factor=1.01)
    samples = bootstrap([one, other], seed=1)
    assert interval(samples[0])[1] > interval(samples[1])[0]
    low, high = interval(samples[1] - samples[0])
    difference = other.summary()["bits_per_byte"] - one.summary()["bits_per_byte"]
    assert 0 < low < difference < high < 2 * difference


def test_chance_is_not_taken_for_a_difference():
    """Two models that differ by luck alone: 95 of 100 intervals hold zero, give or take four deviations."""
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        one = noisy_scores(60, seed)
        other = make_scores(one.loss + rng.normal(0, 5, 60), one.bytes)
        samples = bootstrap([one, other], seed)
        low, high = interval(samples[1] - samples[0])
        held += low <= 0 <= high
    assert 86 <= held <= 100


def test_the_seed_alone_decides_the_draws():
    scores = [noisy_scores(50)]
    assert (bootstrap(scores, 3) == bootstrap(scores, 3)).all()
    assert (bootstrap(scores, 3) != bootstrap(scores, 4)).any()
