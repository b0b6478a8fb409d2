"""Initialise a model as a bigram model: which token follows which is counted, not learned step by step.

A second or two of counting reaches a loss that takes training more than a hundred thousand tokens.
"""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from model.gpt import GPT
from model.packed_data import excerpt

# Pseudo-count of the unigram prior; 30 is worse, 300 has higher losses in the first steps (benchmarks/RESULTS.md)
PRIOR = 100.0
# RMS of the embedding weights: large compared to a training step, small compared to normalised states
SCALE = 0.4
# Fraction of each embedding's norm in one shared coordinate, which the head multiplies by unigram log-probabilities
SHARED = 0.3


def count_bigrams(
    tokens: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bigrams as first token, second token and count (each (N,) int64), and unigram frequencies (V,)."""
    sample = excerpt(tokens).astype(np.int64)
    pairs, counts = np.unique(sample[:-1] * vocab_size + sample[1:], return_counts=True)
    frequency = np.bincount(sample, minlength=vocab_size) + 0.5  # no token gets probability zero
    return pairs // vocab_size, pairs % vocab_size, counts, frequency / frequency.sum()


def factors(tokens: np.ndarray, vocab_size: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factor the bigram log-probabilities into A (V, rank), B (V, rank) and unigram log-probabilities (V,).

    log p(b | a) = log p(b) + log(1 + n(a, b) / (PRIOR p(b))) + a term that depends on a alone, with counts n(a, b).
    The middle term is 0 for pairs that do not occur; A @ B.T is its truncated SVD, weighted by sqrt(p(a) p(b)), like
    the factorisation of word co-occurrences by Levy and Goldberg (2014).
    """
    first, second, counts, frequency = count_bigrams(tokens, vocab_size)
    weight = np.sqrt(frequency)
    values = np.log1p(counts / (PRIOR * frequency[second])) * weight[first] * weight[second]
    values, weight, log_p = (torch.from_numpy(x).float() for x in (values, weight, np.log(frequency)))
    places, shape = np.stack((first, second)), (vocab_size, vocab_size)
    with torch.sparse.check_sparse_tensor_invariants(False):  # PyTorch warns unless told explicitly
        matrix = torch.sparse_coo_tensor(places, values, shape)
        U, S, V = torch.svd_lowrank(matrix, q=min(rank, vocab_size), niter=1)
    A, B = (X * S.sqrt() / weight[:, None] for X in (U, V))
    return A, B, log_p


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, so that results are bit-identical on any number of cores (which would split sums)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
@torch.no_grad()
def begin_as_bigrams(model: GPT, tokens: np.ndarray) -> None:
    """Set a new model's weights so that its logits are the log-probabilities of the bigrams in `tokens`.

    The blocks add nothing yet. The final norm divides by an embedding's length, so all get the same length: A's row, a
    coordinate that all tokens share (the head holds log p(b) there), and one that makes up the difference. Needs
    modern blocks and an untied head; randomness comes from torch's global generator.
    """
    V, C = model.config.vocab_size, model.config.n_embd
    A, B, log_p = factors(tokens, V, C - 2)
    embedding, head = A.new_zeros(2, V, C)
    rank = A.size(1)
    longest = A.norm(dim=1).max() / math.sqrt(1 - SHARED**2)
    embedding[:, :rank] = A / longest
    embedding[:, -2] = SHARED
    embedding[:, -1] = (1 - embedding.square().sum(1)).clamp(min=0).sqrt()
    head[:, :rank] = B * longest
    head[:, -2] = (log_p - log_p.mean()) / SHARED
    # A random rotation spreads the special coordinates, since AdamW and the norms treat all coordinates alike
    turn = torch.linalg.qr(torch.randn(C, C)).Q
    model.token_embedding.weight.copy_(embedding @ turn * math.sqrt(C) * SCALE)
    model.head.weight.copy_(head @ turn / math.sqrt(C))
    model.silence(0)
