"""The training loss: cross-entropy over the vocabulary, or over a shortlist of it; and bits per byte."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# On M1 and M2, PyTorch 2.13 sums wrongly over 32,767 numbers or more, as in the gradient of a large output matrix
# (pytorch#177116). So that is multiplied in parts, and micro-batches have fewer tokens.
MPS_TERMS = 32_000


def bits_per_byte(nats: float | np.ndarray, size: float | np.ndarray) -> float | np.ndarray:
    """A loss that compares models with different tokenizers, from nats and bytes of text: both in all, or both per
    token."""
    return nats / (math.log(2) * size)


class Shortlist(NamedTuple):
    """The tokens of a sampled softmax: see model/sampled_softmax.py."""

    ids: Tensor  # (K,) int64, ascending
    log_counts: Tensor  # (K,) float32: logarithm of how many tokens each stands for, 0 for itself alone


class CrossEntropy(nn.Module):
    """Mean cross-entropy in nats per token (float32) of hidden states (B, T, C), given the output matrix (V, C) and
    the targets (B, T); from a shortlist, an estimate."""

    def forward(
        self, states: Tensor, head_weight: Tensor, targets: Tensor, shortlist: Shortlist | None = None
    ) -> Tensor:
        if shortlist is None and head_weight.is_mps:
            logits = torch.cat([F.linear(states, rows) for rows in head_weight.split(MPS_TERMS)], dim=-1)
        elif shortlist is None:
            logits = F.linear(states, head_weight)
        else:
            logits = F.linear(states, head_weight[shortlist.ids]) + shortlist.log_counts
            targets = torch.searchsorted(shortlist.ids, targets.contiguous())
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
