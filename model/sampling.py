"""The next token: probabilities from logits, filtered as in transformers, and draws from them.

Shapes: B sequences, V = vocab_size, K tokens that are looked at.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import kernels
from model.settings import require_within

# How many of the likeliest tokens are looked at: nearly always all that the filters keep, whereas sorting the whole
# vocabulary would take longer than the model. In a CUDA graph, too few cost more, so a GPU takes more.
LIKELIEST, LIKELIEST_ON_GPU = 64, 1_024


@dataclass(frozen=True)
class Sampling:
    """Sampling settings, applied in transformers' order: repetition penalty, temperature, top-k, top-p, min-p.

    The defaults are those of generate.py, of sample stories, and of an exported model.
    """

    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # only the k most likely; 0: off
    top_p: float = 0.95  # only the most likely that together hold this probability; 1: off
    min_p: float = 0.0  # only tokens with at least this share of the top probability; 0: off
    repetition_penalty: float = 1.0  # above 1: tokens that already occurred become less likely

    def __post_init__(self):
        require_within(self, temperature="[0, inf)", top_k="[0, inf)", top_p="(0, 1]", min_p="[0, 1]")
        require_within(self, repetition_penalty="(0, inf)")

    @property
    def filters(self) -> bool:
        """Whether some tokens may be left out."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)

    @property
    def divisor(self) -> float:
        """The temperature, if it is not 0; float32 flushes smaller ones to 0."""
        return max(self.temperature, 1e-30)

    def for_kernels(self, count: int) -> kernels.Filters:
        """As kernels.c takes it, which is to look at the `count` likeliest tokens."""
        if self.temperature == 0:
            return kernels.Filters(1, 1, 1.0, 1.0, 0.0)
        return kernels.Filters(count, min(self.top_k, count), self.divisor, self.top_p, self.min_p)

    def for_transformers(self) -> dict[str, object]:
        """As arguments of transformers' generate(). Without top_k, it would take 50."""
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def next_distribution(
    logits: Tensor,
    previous: Tensor | None,
    sampling: Sampling,
    likeliest: int = LIKELIEST,
    short: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, K) of the next token after all filters, and the K tokens' ids (B, K), from logits (B, V).

    The ids are None if the K = V probabilities are in vocabulary order; otherwise the most likely token comes first,
    tokens not listed have probability 0, and so may some that are, even twice. `previous` (B, V) is True for tokens
    that have occurred; None: none have. Temperature 0 gives the most likely token probability 1.

    Without top-k, the `likeliest` tokens are looked at, and more where these do not suffice. With `short` (bool, a
    scalar), that is not decided here, which would wait for a GPU: it is set to True if they may not suffice, and the
    result is to be discarded.
    """
    logits = penalise(logits, previous, sampling)
    if sampling.temperature == 0:
        first = logits.argmax(-1, keepdim=True)
        return torch.ones_like(first, dtype=logits.dtype), first
    if not sampling.filters:
        return softmax(logits, sampling.divisor), None
    return filter_top(logits, sampling, sampling.top_k or likeliest, short)


def penalise(logits: Tensor, previous: Tensor | None, sampling: Sampling) -> Tensor:
    """Logits (B, V) with those of tokens that have occurred, for which `previous` (B, V) is True, made smaller."""
    if sampling.repetition_penalty == 1 or previous is None:
        return logits
    smaller = torch.where(
        logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
    )
    return torch.where(previous, smaller, logits)


def filter_top(logits: Tensor, sampling: Sampling, count: int, short: Tensor | None) -> tuple[Tensor, Tensor]:
    """next_distribution() from the `count` likeliest tokens, or from more in the rows where more pass the filters."""
    count = min(count, logits.size(-1))
    probabilities, ids = top_probabilities(logits, count, sampling.divisor)
    outside = torch.zeros_like(probabilities, dtype=torch.bool)
    if sampling.top_k:
        outside[:, sampling.top_k :] = True
        probabilities = probabilities.masked_fill(outside, 0)
        probabilities = probabilities / total(probabilities)
    if sampling.top_p < 1:
        # Keep a token if those before it hold less than top_p.
        outside |= probabilities.cumsum(-1) - probabilities >= sampling.top_p
    if sampling.min_p > 0:
        outside |= probabilities < sampling.min_p * probabilities[:, :1]
    outside[:, 0] = False  # even if a tiny top_p is rounded to 0
    probabilities = probabilities.masked_fill(outside, 0)
    probabilities = probabilities / total(probabilities)
    if count in (logits.size(-1), sampling.top_k):  # no others can pass
        return probabilities, ids
    rows = ~outside[:, -1]  # in which others may
    if short is not None:
        short.logical_or_(rows.any())
    elif rows.any():
        more, more_ids = filter_top(logits[rows], sampling, 8 * count, None)
        padding = (0, more.size(1) - count)
        probabilities, ids = F.pad(probabilities, padding), F.pad(ids, padding)
        probabilities[rows], ids[rows] = more, more_ids
    return probabilities, ids


def total(probabilities: Tensor) -> Tensor:
    """The sum of each row, (B, 1). Added up in order: the bits of sum() may depend on the number of rows."""
    return probabilities.cumsum(-1)[:, -1:]


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities (B, V). With the maximum subtracted first, any temperature works."""
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)


def top_probabilities(logits: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The probabilities (B, count) of the likeliest tokens, in descending order, and their ids."""
    probabilities = softmax(logits, temperature)
    return probabilities.sort(descending=True) if count == logits.size(-1) else probabilities.topk(count)


def in_kernels(logits: Tensor, count: int) -> bool:
    """Whether kernels.c is to draw from the `count` likeliest tokens."""
    here = logits.device.type == "cpu" and logits.dtype == torch.float32 and count <= kernels.Filters.MOST
    return here and kernels.load().library is not None


def sample(
    logits: Tensor,
    previous: Tensor | None,
    sampling: Sampling,
    uniforms: Tensor,
    likeliest: int = LIKELIEST,
    short: Tensor | None = None,
) -> Tensor:
    """The next tokens (B,), drawn from next_distribution() with one uniform number in [0, 1) per row."""
    count = min(sampling.top_k or likeliest, logits.size(-1))
    if sampling.filters and sampling.temperature and in_kernels(logits, count):
        # One call instead of 25 operations, which take as long as half of a small model
        logits = penalise(logits, previous, sampling)
        new = kernels.sample(logits, sampling.for_kernels(count), uniforms)
        if (rest := new < 0).any():
            new[rest] = sample(logits[rest], None, sampling, uniforms[rest], 8 * likeliest)
        return new
    probabilities, ids = next_distribution(logits, previous, sampling, likeliest, short)
    new = draw(probabilities, uniforms)
    return new if ids is None else ids.gather(1, new[:, None])[:, 0]


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Sample indices (B,) from probabilities (B, K) by inverse transform, one uniform number in [0, 1) per row."""
    cumulative = probabilities.cumsum(-1)
    # Scale by the sum and stay below it, so that rounding cannot select past the last nonzero probability.
    targets = uniforms.type_as(cumulative).clamp(max=1 - 2**-22)[:, None] * cumulative[:, -1:]
    # Of probabilities that are not numbers, as a model that diverged has them, it takes the last.
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=probabilities.size(1) - 1)
