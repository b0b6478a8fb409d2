"""Sampling against transformers' logits processors, the kernel in C against plain operations, draws against odds."""

import itertools

import pytest
import torch
from test_decoder import needs_kernels
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.errors import UserError
from model.sampling import Sampling, draw, next_distribution, sample

torch.set_num_threads(1)


def distribution(logits, previous, sampling):
    """next_distribution in the order of the vocabulary."""
    probabilities, ids = next_distribution(logits, previous, sampling)
    if ids is None:
        return probabilities
    return torch.zeros_like(logits).scatter_add_(1, ids, probabilities)  # ids of probability 0 may repeat


def assert_drawn_from(tokens, probabilities):
    """Pearson's chi-squared at most 5 standard deviations above its mean, nothing from outside."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0 and possible.sum() > 3
    expected = len(tokens) * probabilities[possible].double()
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = possible.sum() - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


CHOICES = {
    "repetition_penalty": (1.0, 1.3, 0.7),
    "temperature": (1.0, 0.6, 1.7),
    "top_k": (0, 1, 5, 500),
    "top_p": (1.0, 0.9, 0.3),
    "min_p": (0.0, 0.1),
}


@pytest.mark.parametrize("vocabulary", [60, 1_500])  # the larger one is not always looked at in full
@pytest.mark.parametrize("spread", [1.0, 6.0])
def test_the_distribution_is_that_of_transformers(spread, vocabulary):
    generator = torch.Generator().manual_seed(0)
    for values in itertools.product(*CHOICES.values()):
        given = dict(zip(CHOICES, values, strict=True))
        logits = spread * torch.randn(8, vocabulary, generator=generator)
        ids = torch.randint(vocabulary, (8, 20), generator=generator)
        processors = LogitsProcessorList()
        if given["repetition_penalty"] != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(given["repetition_penalty"]))
        processors.append(TemperatureLogitsWarper(given["temperature"]))
        if given["top_k"]:
            processors.append(TopKLogitsWarper(given["top_k"]))
        if given["top_p"] < 1:
            processors.append(TopPLogitsWarper(given["top_p"]))
        if given["min_p"]:
            processors.append(MinPLogitsWarper(given["min_p"]))
        expected = processors(ids, logits.clone()).softmax(-1)
        previous = torch.zeros(8, vocabulary, dtype=torch.bool).scatter_(1, ids, True)
        untouched = logits.clone()
        result = distribution(logits, previous, Sampling(**given))
        assert torch.equal(result > 0, expected > 0), given
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(logits, untouched)


def test_tokens_on_a_limit_are_treated_as_transformers_treats_them():
    """Two tokens of exactly one half each: the first alone reaches that top_p, both that min_p."""
    logits = torch.zeros(1, 2)
    for given, warper, count in (
        ({"top_p": 0.5}, TopPLogitsWarper(0.5), 1),
        ({"top_p": 1.0, "min_p": 1.0}, MinPLogitsWarper(1.0), 2),
    ):
        result = distribution(logits, None, Sampling(temperature=1.0, **given))
        assert (result > 0).sum() == (warper(None, logits.clone()) > -torch.inf).sum() == count


def test_temperature_0_gives_the_likeliest_token_all():
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, -1.0, 4.0]])
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert distribution(logits, none, Sampling(temperature=0)).tolist() == [[0, 1, 0], [1, 0, 0]]
    seen = torch.tensor([[False, True, False], [False, False, False]])
    penalised = distribution(logits, seen, Sampling(temperature=0, repetition_penalty=1.1))
    assert penalised.tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-30, 1e-9, 1e-3, 1e30, 1e300])
def test_extreme_temperatures_give_probabilities(temperature):
    logits = torch.tensor([[0.5, 30.0, 29.0, -40.0]])
    for top_p in (0.9, 1.0):
        result = distribution(logits, None, Sampling(temperature, top_p=top_p))
        assert result.isfinite().all() and result.sum().item() == pytest.approx(1)
        assert result[0, 1] == result.max()


# Drawing


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.0, 0.3, 0.05, 0.0, 0.0, 0.4, 0.01, 0.04, 0.2, 0.0])
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    assert_drawn_from(draw(probabilities.expand(20_000, -1), uniforms), probabilities)


def test_no_draw_falls_on_a_token_without_probability():
    below_one = 1 - 2.0**-24
    edges = torch.tensor([0.0, 2.0**-24, 0.25, 0.5, 0.75, below_one])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits = 4 * torch.randn(1, 300, generator=generator)
        logits[:, torch.randperm(300, generator=generator)[:290]] = -torch.inf
        probabilities = logits.softmax(-1)
        tokens = draw(probabilities.expand(len(edges), -1), edges)
        assert (probabilities[0, tokens] > 0).all()
    single = torch.nn.functional.one_hot(torch.tensor([3] * len(edges)), 9).float()
    assert draw(single, edges).tolist() == [3] * len(edges)
    assert draw(torch.tensor([[0.5, 0.5]] * 2), torch.tensor([0.4999, 0.5])).tolist() == [0, 1]


@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=1e-300), Sampling(min_p=1), Sampling(top_p=1e-300, min_p=1)]
)
def test_the_most_likely_token_always_remains(sampling):
    probabilities, ids = next_distribution(torch.arange(300.0)[None], None, sampling)
    assert ids[0, 0] == 299 and probabilities[0].tolist() == [1] + [0] * (probabilities.size(1) - 1)


def test_a_model_that_diverged_draws_something():
    for sampling in (Sampling(), Sampling(top_p=1), Sampling(temperature=0), Sampling(top_k=3, min_p=0.1)):
        probabilities, ids = next_distribution(torch.full((2, 300), torch.nan), None, sampling)
        drawn = draw(probabilities, torch.tensor([0.0, 0.7]))
        tokens = drawn if ids is None else ids.gather(1, drawn[:, None])[:, 0]
        assert ((tokens >= 0) & (tokens < 300)).all()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_sampling_settings_that_make_no_sense_are_a_user_error(values):
    ((name, value),) = values.items()
    with pytest.raises(UserError, match=f"{name} must be .*, not {value}"):
        Sampling(**values)


@needs_kernels
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=1.0, min_p=1e-3), Sampling(top_k=700)])
def test_a_distribution_has_the_same_bits_beside_flatter_ones(sampling):
    """Of which some need 64, some 512 and some all of 10,000 tokens."""
    logits = torch.randn(12, 10_000, generator=torch.Generator().manual_seed(0))
    logits *= torch.tensor([[9.0], [2.5], [0.1]]).repeat(4, 1)
    together, ids = next_distribution(logits, None, sampling)
    for row in range(len(logits)):
        alone, alone_ids = next_distribution(logits[row : row + 1], None, sampling)
        count = alone.size(1)
        assert torch.equal(together[row, :count], alone[0]) and not together[row, count:].any()
        assert torch.equal(ids[row, :count], alone_ids[0])


@needs_kernels
@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_p": 0.95},
        {"top_k": 5, "top_p": 1.0},
        {"top_p": 1.0, "min_p": 0.02},
        {"top_k": 90, "top_p": 0.8, "min_p": 0.01},
    ],
)
def test_the_kernel_draws_what_plain_operations_draw(filters, penalty, monkeypatch):
    """Also where the likeliest 64 tokens do not suffice, which are about a third of the rows."""
    torch.manual_seed(0)
    sampling = Sampling(temperature=0.7, repetition_penalty=penalty, **filters)
    logits = torch.randn(3_000, 500) * torch.tensor([9.0, 2.5, 0.5]).repeat(1_000)[:, None]
    occurred, uniforms = torch.rand(3_000, 500) < 0.1, torch.rand(3_000)
    uniforms[:6] = torch.tensor([0.0, 1 - 2**-24]).repeat(3)
    found = sample(logits, occurred, sampling, uniforms)
    monkeypatch.setattr("model.sampling.in_kernels", lambda logits, count: count <= 0)
    assert (found == sample(logits, occurred, sampling, uniforms)).float().mean() > 0.999  # rounding
