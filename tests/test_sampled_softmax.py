"""The loss over part of the vocabulary, against the loss over all of it."""

import numpy as np
import pytest
import torch

from model.batches import Batches
from model.config import GPTConfig
from model.gpt import GPT
from model.sampled_softmax import Shortlists, make_shortlists

CPU = torch.device("cpu")
V = 400


@pytest.fixture(scope="module")
def batches():
    """Tokens whose frequencies fall like those of words, shuffled so that ids say nothing about them."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(V)
    return Batches(ids[np.minimum(rng.zipf(1.4, 20_000), V) - 1].astype(np.uint16), 16, 8, seed=5)


def test_a_shortlist_has_the_targets_the_frequent_and_a_random_few(batches):
    shortlists = Shortlists(batches, V)
    counts = np.bincount(batches.tokens, minlength=V)
    all_drawn = []
    for step in range(20):
        ids, log_counts = (x.numpy() for x in shortlists.shortlist(step, CPU))
        assert len(ids) == 100 and (np.diff(ids) > 0).all()
        sure, drawn = ids[log_counts == 0], ids[log_counts > 0]
        targets = set(batches.windows(batches.starts(step))[:, 1:].ravel().tolist())
        assert len(sure) == 75 and targets < set(sure.tolist())
        assert min(counts[list(set(sure.tolist()) - targets)]) >= max(np.delete(counts, sure))
        np.testing.assert_allclose(np.exp(log_counts[log_counts > 0]), 325 / 25, rtol=1e-6)
        all_drawn.append(drawn)
        again = Shortlists(batches, V).shortlist(step, CPU)
        assert np.array_equal(again.ids, ids) and np.array_equal(again.log_counts, log_counts)
    assert len(np.unique(all_drawn, axis=0)) == 20 and len(np.unique(all_drawn)) > 200


def test_the_loss_and_its_gradients_are_those_of_all_tokens_on_average(batches, monkeypatch):
    """The estimated sum over the vocabulary has no bias; its logarithm, and so the loss, a small one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, 16, 1, 2, 16, tie_weights=False)).double()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    window = torch.from_numpy(batches.windows(batches.starts(0)))
    inputs, targets = window[:, :-1], window[:, 1:]
    logits = model(inputs)
    exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (gradient,) = torch.autograd.grad(exact, model.head.weight)

    shortlists = Shortlists(batches, V)
    # always the same targets
    monkeypatch.setattr(batches, "starts", lambda step: Batches.starts(batches, 0))
    losses, gradients, sums = [], [], []
    for step in range(400):
        shortlist = shortlists.shortlist(step, CPU)
        loss = model(inputs, targets, None, shortlist)
        # the definition: each token in the sum as often as it counts
        counted = (logits[..., shortlist.ids].exp() * shortlist.log_counts.exp()).sum(-1)
        chosen = logits.gather(-1, targets[..., None])[..., 0]
        assert loss.item() == pytest.approx((counted.log() - chosen).mean().item(), abs=1e-5)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, model.head.weight)[0])
        sums.append(counted.detach())
    assert 0.001 < np.std(losses) < 0.1
    ratio = torch.stack(sums).mean(0) / logits.exp().sum(-1)
    assert (ratio - 1).abs().mean() < 0.02
    assert np.mean(losses) == pytest.approx(exact.item(), abs=0.03)
    mean = torch.stack(gradients).mean(0)
    assert (mean - gradient).norm() < 0.1 * gradient.norm()
    assert (gradients[0] - gradient).norm() > (mean - gradient).norm()


def test_targets_that_are_too_many_are_trained_over_all_tokens(batches):
    assert make_shortlists(batches, V) is not None
    large = Batches(batches.tokens, 16, 200, seed=5)
    assert len(np.unique(large.windows(large.starts(0))[:, 1:])) > 75
    assert make_shortlists(large, V) is None
    assert Shortlists(large, V).shortlist(0, CPU) is None


@pytest.mark.parametrize(("targets", "expected"), [(60, True), (61, False)])
def test_targets_may_fill_six_tenths_of_a_shortlist(batches, monkeypatch, targets, expected):
    monkeypatch.setattr(Shortlists, "targets", lambda self, step: np.arange(targets))
    assert (make_shortlists(batches, 400) is not None) == expected
