"""The protocol for comparing models: every story is scored from its own beginning, each token once.

A story follows its start token, and its end counts as a token. Beyond the model's context, a window slides by
half of it; each token is scored in the first window that reaches it. Bits per byte (summed loss / ln 2 / UTF-8
bytes) are comparable between tokenizers; loss per token and perplexity are not.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model.batches import to_device
from model.candidates import Candidate
from model.errors import UserError, ran_out_of_memory, require
from model.loss import bits_per_byte
from model.runtime import GPU_LOGITS, Runtime, tokens_at_once

# Logits computed at once. A CPU is fastest while they fit in its caches.
CPU_LOGITS = 256 * 10_000
ENCODED_AT_ONCE = 1_000  # stories: the tokenizer's output takes ten times the memory of their ids
SEARCH_BLOCK = 200  # see largest(); divides 10,000 and 32,000
RESAMPLES = 1_000
# Fewest stories for a verdict: with 5, one of two equal models wins all of them in 2 / 2**5 = 6 % of cases
ENOUGH = 6
# Differences in bits per byte that rounding may cause
ROUNDING = 1e-6


class Window(NamedTuple):
    """A part of a story that is read at once."""

    story: int  # index of the story
    first: int  # positions first to end - 1 are read,
    end: int
    scored: int  # and of these, `scored` to end - 1 are scored


@dataclass(frozen=True)
class Scores:
    """Scores of n stories, arrays (n,)."""

    loss: np.ndarray  # nats, summed over the story's tokens
    right: np.ndarray  # tokens predicted correctly
    tokens: np.ndarray  # including the end of the story
    bytes: np.ndarray  # of its UTF-8 text
    position_loss: np.ndarray  # (longest,) nats by position in the story, summed over stories

    def summary(self) -> dict[str, float]:
        tokens, size = self.tokens.sum().item(), self.bytes.sum().item()
        loss = self.loss.sum().item() / tokens
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # larger would overflow a float
            "bits_per_byte": bits_per_byte(self.loss.sum(), max(1, size)).item(),
            "accuracy": self.right.sum().item() / tokens,
            "stories": len(self.loss),
            "tokens": tokens,
            "bytes": size,
        }

    def by_position(self) -> list[dict[str, float]]:
        """Mean loss in nats of story tokens first to end - 1, in widening ranges."""
        edges = np.unique(np.round(1.25 ** np.arange(80)).astype(int)) - 1
        edges = [*edges[edges < len(self.position_loss)].tolist(), len(self.position_loss)]
        ranges = []
        for first, end in itertools.pairwise(edges):
            tokens = int((self.tokens.clip(first, end) - first).sum())
            loss = float(self.position_loss[first:end].sum()) / tokens
            ranges.append({"first": first, "end": end, "tokens": tokens, "loss": loss})
        return ranges


def sliding_windows(story: int, length: int, block_size: int) -> list[Window]:
    """Windows over a story of so many positions, so that each is scored once."""
    windows, end = [], 0
    while end < length:
        first = len(windows) * max(1, block_size // 2)
        windows.append(Window(story, first, min(length, first + block_size), scored=end))
        end = windows[-1].end
    return windows


def encode_stories(candidate: Candidate, stories: list[str]) -> list[np.ndarray]:
    """Each story's token ids, enclosed in the start and end tokens."""
    sequences = []
    for first in range(0, len(stories), ENCODED_AT_ONCE):
        part = stories[first : first + ENCODED_AT_ONCE]
        for encoding in candidate.tokenizer.encode_batch_fast(part, add_special_tokens=False):
            sequences.append(np.array([candidate.start_id, *encoding.ids, candidate.end_id], np.int32))
    highest_id = max(int(ids.max()) for ids in sequences)
    require(
        highest_id < candidate.vocab_size,
        f"{candidate.name}: its tokenizer produces token {highest_id}, but its model has only {candidate.vocab_size}",
    )
    return sequences


@torch.no_grad()
def score_stories(candidate: Candidate, stories: list[str], runtime: Runtime, batch_size: int = 0) -> Scores:
    """Score one or more stories, `batch_size` windows at a time (0: as many as suit the device)."""
    sequences = encode_stories(candidate, stories)
    tokens = np.array([len(ids) - 1 for ids in sequences])
    windows = [
        window
        for story, length in enumerate(tokens.tolist())
        for window in sliding_windows(story, length, candidate.block_size)
    ]
    # longest first, so that windows in a batch have similar lengths
    windows.sort(key=lambda window: window.first - window.end)
    loss, right = np.zeros(len(stories)), np.zeros(len(stories), int)
    position_loss = np.zeros(tokens.max())

    def add(
        story: np.ndarray, position: np.ndarray, results: list[Tensor], copied: torch.cuda.Event | None
    ) -> None:
        if copied:
            copied.synchronize()
        losses, hits = (values.numpy() for values in results)
        np.add.at(loss, story, losses)
        np.add.at(right, story, hits)
        np.add.at(position_loss, position, losses)

    tokens_per_batch = tokens_at_once(runtime.device, candidate.vocab_size if candidate.whole_logits else 1)
    waiting = None  # a GPU computes a batch while the previous results are accumulated
    with tqdm(total=len(windows), unit="window", disable=None, delay=1, leave=False) as bar:
        for batch in pack(windows, batch_size, tokens_per_batch):
            story, position, inputs, rows, targets = lay_out(batch, sequences, candidate.end_id)
            try:
                results = score_tokens(candidate, inputs, rows, targets, runtime)
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                fewer = max(1, len(batch) // 2)
                raise UserError(f"out of GPU memory: use --batch-size {fewer} or lower") from None
            if waiting:
                add(*waiting)
            waiting = story, position, *copy_to_host(results)
            bar.update(len(batch))
    add(*waiting)
    sizes = np.array([len(story.encode()) for story in stories])
    require(
        np.isfinite(loss).all(),
        f"{candidate.name} gives a loss that is not finite: its weights are bad",
    )
    return Scores(loss, right, tokens, sizes, position_loss)


def pack(windows: list[Window], batch_size: int, tokens: int) -> Iterator[list[Window]]:
    """Group windows, longest first, in batches of `batch_size`, or of about `tokens` tokens."""
    first = 0
    while first < len(windows):
        longest = windows[first].end - windows[first].first
        batch = windows[first : first + (batch_size or max(1, tokens // longest))]
        yield batch
        first += len(batch)


def lay_out(
    batch: list[Window], sequences: list[np.ndarray], pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For N scored positions: story, position in the story, inputs padded to (B, T), index in (B * T,), target."""
    width = max(window.end - window.first for window in batch)
    inputs = np.full((len(batch), width), pad)
    story, position, rows, targets = [], [], [], []
    for row, (number, first, end, scored) in enumerate(batch):
        ids = sequences[number]
        inputs[row, : end - first] = ids[first:end]
        position.append(np.arange(scored, end))
        story.append(np.full(end - scored, number))
        rows.append(position[-1] + (row * width - first))
        targets.append(ids[scored + 1 : end + 1])
    story, position, rows, targets = map(np.concatenate, (story, position, rows, targets))
    return story, position, inputs, rows, targets.astype(np.int64)


def copy_to_host(results: tuple[Tensor, Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """The results in the CPU's memory, and on CUDA the event after which they are there."""
    on_cuda = results[0].is_cuda
    copies = [values.to("cpu", non_blocking=on_cuda) for values in results]
    return copies, torch.cuda.current_stream().record_event() if on_cuda else None


def score_tokens(
    candidate: Candidate, inputs: np.ndarray, rows: np.ndarray, targets: np.ndarray, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Loss in nats at each of N positions, and whether the target was the most likely token, both (N,)."""
    idx, at, wanted = (to_device(array, runtime.device) for array in (inputs, rows, targets))
    logits_at_once = CPU_LOGITS if runtime.device.type == "cpu" else GPU_LOGITS
    losses, hits = [], []
    with runtime.autocast():
        states = candidate.states(idx).flatten(0, 1)
        size = max(1, logits_at_once // candidate.vocab_size)
        for chunk, target in zip(at.split(size), wanted.split(size), strict=True):
            logits = candidate.head(states[chunk])
            if logits.dtype in (torch.bfloat16, torch.float16):
                logits = logits.float()
            highest, predicted = largest(logits)
            wanted_logits = logits.gather(1, target[:, None])[:, 0]
            # In-place cross-entropy: copying the logits would cost more than the exponentials
            sums = logits.sub_(highest[:, None]).exp_().sum(1)
            losses.append(sums.log_() + highest - wanted_logits)
            hits.append(predicted == target)
    return torch.cat(losses), torch.cat(hits)


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values.max(1)`, (N, V) -> (N,) and (N,).

    On a CPU in a third of the time: there, only the search without an index is vectorised, so it first finds the
    block with the largest value, then the value's index within that block.
    """
    if values.device.type != "cpu":
        return values.max(1)
    if beyond := values.size(1) % SEARCH_BLOCK:
        values = F.pad(values, (0, SEARCH_BLOCK - beyond), value=-math.inf)
    blocks = values.unflatten(1, (-1, SEARCH_BLOCK))
    highest, block = blocks.amax(2).max(1)
    within = blocks[torch.arange(len(values)), block].argmax(1)
    return highest, block * SEARCH_BLOCK + within


def bootstrap(scores: list[Scores], seed: int) -> np.ndarray:
    """Bits per byte of every model on the same 1,000 resamples of the stories, (models, 1,000).

    Percentile bootstrap (Efron 1979) over stories, not tokens, because the tokens of a story are not independent.
    All models share the resamples, which makes differences paired.
    """
    rng = np.random.default_rng(seed)
    count = len(scores[0].loss)
    values = np.stack([*(s.loss for s in scores), scores[0].bytes.astype(float)])
    totals = np.empty((len(values), RESAMPLES))
    for k in range(RESAMPLES):
        times_drawn = np.bincount(rng.integers(count, size=count), minlength=count)
        totals[:, k] = values @ times_drawn
    return bits_per_byte(totals[:-1], np.maximum(totals[-1], 1))


def interval(samples: np.ndarray) -> list[float]:
    """The middle 95 % of resampled values: [low, high]."""
    return np.quantile(samples, (0.025, 0.975)).tolist()


def compare(results: list[dict], resampled: np.ndarray) -> None:
    """Add to each result, of two or more stories, the interval of its bits per byte, and of the difference from the
    first result."""
    for k, (result, samples) in enumerate(zip(results, resampled, strict=True)):
        result["bits_per_byte_interval"] = interval(samples)
        if k:
            low, high = interval(samples - resampled[0])
            result["difference"] = result["bits_per_byte"] - results[0]["bits_per_byte"]
            result["difference_interval"] = [low, high]
            better, worse = high < -ROUNDING, low > ROUNDING
            clear = (better or worse) and result["stories"] >= ENOUGH
            result["verdict"] = ("better" if better else "worse") if clear else "no clear difference"
