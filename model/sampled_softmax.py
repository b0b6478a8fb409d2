"""Sampled softmax: train over a part of the vocabulary that changes from step to step.

A step's stories contain a few hundred different tokens, and the model gives almost no probability to most others, so
a random few of these stand for all (importance sampling: Bengio and Senécal 2008, Jean et al. 2015).
"""

import numpy as np
import torch

from model.batches import Batches, to_device
from model.loss import Shortlist
from model.packed_data import excerpt

SIZE = 0.25  # tokens in a shortlist, as a fraction of the vocabulary
SURE = 0.75  # fraction of a shortlist that is not drawn: a step's targets, and other tokens by frequency
FILLED = 0.6  # fraction that the first step's targets may fill, so that all steps' fit in what is sure


class Shortlists:
    """The shortlist of each step: like the step's batch, a pure function of the step."""

    def __init__(self, batches: Batches, vocab_size: int):
        self.batches, self.vocab_size = batches, vocab_size
        self.size = int(SIZE * vocab_size)
        self.sure = int(SURE * self.size)
        counts = np.bincount(excerpt(batches.tokens), minlength=vocab_size)
        self.by_frequency = np.argsort(-counts, kind="stable")

    def targets(self, step: int) -> np.ndarray:
        """The different targets of a step, (N,) int64, ascending."""
        return np.unique(self.batches.windows(self.batches.starts(step))[:, 1:])

    def shortlist(self, step: int, device: torch.device) -> Shortlist | None:
        """The shortlist of a step, which has all its targets; None if there are too many."""
        targets = self.targets(step)
        if len(targets) > self.sure:
            return None
        others = self.by_frequency[~np.isin(self.by_frequency, targets)]
        frequent, rare = np.split(others, [self.sure - len(targets)])
        rng = np.random.default_rng((self.batches.seed, step))
        drawn = rng.choice(rare, self.size - self.sure, replace=False)
        log_counts = np.zeros(self.vocab_size, np.float32)
        log_counts[drawn] = np.log(len(rare) / len(drawn))
        ids = np.sort(np.concatenate((targets, frequent, drawn)))
        return Shortlist(to_device(ids, device), to_device(log_counts[ids], device))


def make_shortlists(batches: Batches, vocab_size: int) -> Shortlists | None:
    """Shortlists for these batches; None if steps are so large, or the vocabulary so small, that little is saved."""
    shortlists = Shortlists(batches, vocab_size)
    return shortlists if len(shortlists.targets(0)) <= FILLED * shortlists.size else None
