"""The weights that a new model begins with, against bigrams counted in a loop."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from model import packed_data
from model.bigrams import PRIOR, SCALE, begin_as_bigrams, count_bigrams, factors
from model.config import GPTConfig
from model.gpt import GPT


def text(vocab_size, length=20_000, seed=0):
    """Tokens of which each makes some others likely."""
    rng = np.random.default_rng(seed)
    table = rng.permuted(np.tile(np.arange(vocab_size), (vocab_size, 1)), axis=1)
    tokens = [0]
    for rank in (rng.zipf(1.5, length) - 1) % vocab_size:
        tokens.append(table[tokens[-1], rank])
    return np.array(tokens, dtype=np.uint16)


def begun(tokens, vocab_size, n_embd=64, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size, 16, 2, 2, n_embd, tie_weights=False))
    begin_as_bigrams(model, tokens)
    return model.eval()


def test_counts_are_those_of_a_loop():
    tokens = text(50).tolist()
    first, second, counts, frequency = count_bigrams(np.array(tokens, dtype=np.uint16), 50)
    pairs = Counter(itertools.pairwise(tokens))
    assert dict(zip(zip(first.tolist(), second.tolist(), strict=True), counts.tolist(), strict=True)) == pairs
    expected = np.array([tokens.count(token) + 0.5 for token in range(50)])
    np.testing.assert_allclose(frequency, expected / expected.sum(), rtol=1e-12)


def test_of_a_long_text_pieces_from_all_over_are_counted(monkeypatch):
    monkeypatch.setattr(packed_data, "PIECE", 10)
    monkeypatch.setattr(packed_data, "COUNTED", 400)
    tokens = np.repeat(np.arange(100), 10)  # a thousand, of which each tenth is of its own kind
    frequency = count_bigrams(tokens, 100)[3]
    seen = np.flatnonzero(frequency > frequency.min())
    assert len(seen) == 34 and seen[0] == 0 and seen[-1] == 99


def test_logits_are_the_bigrams_log_probabilities():
    """With as many dimensions as tokens nothing is cut off, so that they are exact, whatever stands before."""
    V = 40
    tokens = text(V)
    model = begun(tokens, V)
    pairs, ones = Counter(itertools.pairwise(tokens.tolist())), Counter(tokens.tolist())
    frequency = [(ones[token] + 0.5) / (len(tokens) + V / 2) for token in range(V)]
    expected = torch.tensor(
        [
            [math.log(pairs[a, b] + PRIOR * frequency[b]) - math.log(ones[a] + PRIOR) for b in range(V)]
            for a in range(V)
        ]
    )
    ids = torch.from_numpy(tokens[:320].astype(np.int64)).view(20, 16)
    with torch.no_grad():
        found = model(ids).log_softmax(-1)
    # the last token has no successor, and so its row one count less than it occurs
    torch.testing.assert_close(found, expected[ids].log_softmax(-1), atol=2e-4, rtol=0)


@pytest.mark.parametrize("rank", [10, 40])
def test_factors_are_those_of_a_whole_decomposition(rank):
    V = 200
    tokens = text(V, seed=3)
    A, B, log_p = factors(tokens, V, rank)
    frequency = np.exp(log_p.numpy())
    dense = np.zeros((V, V))
    for (a, b), count in Counter(itertools.pairwise(tokens.tolist())).items():
        dense[a, b] = math.log(1 + count / (PRIOR * frequency[b]))
    weight = np.sqrt(np.outer(frequency, frequency))
    S = np.linalg.svd(dense * weight, compute_uv=False)
    best = np.linalg.norm(S[rank:])
    error = np.linalg.norm((dense - (A @ B.T).numpy()) * weight)
    assert best <= error < 1.1 * best


@pytest.mark.parametrize("vocab_size", [30, 300])
def test_a_model_begins_below_what_single_tokens_tell(vocab_size):
    tokens = text(vocab_size)
    model = begun(tokens, vocab_size)
    windows = torch.from_numpy(tokens[: 17 * 64].astype(np.int64)).view(64, 17)
    with torch.no_grad():
        loss = model(windows[:, :-1], windows[:, 1:]).item()
    frequency = count_bigrams(tokens, vocab_size)[3]
    assert loss < 0.9 * -(frequency * np.log(frequency)).sum()
    lengths = model.token_embedding.weight.square().mean(1).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, SCALE))


def test_the_seed_turns_the_weights_and_nothing_else():
    tokens = text(30)
    one, again, other = (begun(tokens, 30, seed=seed) for seed in (1, 1, 2))
    ids = torch.arange(16)[None]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.allclose(one.token_embedding.weight, other.token_embedding.weight, atol=0.1)
    torch.testing.assert_close(one(ids), other(ids), atol=2e-4, rtol=0)


def test_the_number_of_threads_changes_no_bit():
    tokens = text(600)
    before = torch.get_num_threads()
    try:
        models = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            models.append(begun(tokens, 600, n_embd=128))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one, two = models
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
