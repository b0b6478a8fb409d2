"""Reading packed tokens: step number -> batch, as a pure function.

The tokens of a split form a ring. Each epoch cuts it into windows of block_size tokens, starting at a random
offset, and visits them in random order; both depend on (seed, epoch) alone. So any step's batch is known without
replaying earlier steps, and it is the same for 1 process and for 8.
"""

import numpy as np
import torch
from torch import Tensor

from model.errors import UserError
from model.settings import require_seed

AHEAD = 16  # steps whose windows are found together: numpy then takes an eighth of the time
PIECE = 2**24  # tokens that are copied to a device at once
SIGNED = {"i2": torch.int16, "i4": torch.int32}


class Batches:
    """An endless sequence of training windows, in steps of equal size."""

    def __init__(self, tokens: np.ndarray, block_size: int, windows_per_step: int, seed: int):
        if len(tokens) <= block_size:
            raise UserError(
                f"block_size {block_size} is too long for the {len(tokens):,} training tokens: "
                "lower it or ingest more stories"
            )
        require_seed(seed)
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.windows_per_step = windows_per_step
        self.windows_per_epoch = len(tokens) // block_size
        self._resident: Tensor | None = None
        self._ahead: tuple[int, np.ndarray] | None = None  # a first step, the starts of AHEAD steps from it

    def move_to(self, device: torch.device, budget: float) -> None:
        """Keep the tokens in device memory, if they take at most `budget` bytes there.

        Windows are then gathered on the device, without copies from the host.
        """
        if self.tokens.nbytes <= budget:
            signed = f"i{self.tokens.itemsize}"  # PyTorch hardly supports unsigned integers; tensor() undoes the sign
            self._resident = torch.empty(len(self.tokens), dtype=SIGNED[signed], device=device)
            for start in range(0, len(self.tokens), PIECE):
                piece = np.array(self.tokens[start : start + PIECE])
                self._resident[start : start + PIECE] = torch.from_numpy(piece.view(signed))

    def starts(self, step: int) -> np.ndarray:
        """Start of each window of a step in the ring, (windows_per_step,) int64."""
        first = step - step % AHEAD
        if self._ahead is None or self._ahead[0] != first:
            positions = np.arange(first * self.windows_per_step, (first + AHEAD) * self.windows_per_step)
            self._ahead = first, self.starts_at(positions).reshape(AHEAD, -1)
        return self._ahead[1][step - first]

    def starts_at(self, positions: np.ndarray) -> np.ndarray:
        """Start in the ring of the windows at these positions of the sequence, (N,) int64 -> (N,) int64."""
        epochs, inside = np.divmod(positions, self.windows_per_epoch)
        starts = np.empty_like(positions)
        for epoch in np.unique(epochs):
            rng = np.random.default_rng((self.seed, int(epoch)))
            offset, keys = rng.integers(len(self.tokens)), rng.integers(2**64, size=8, dtype=np.uint64)
            here = epochs == epoch
            windows = shuffled(inside[here], self.windows_per_epoch, keys)
            starts[here] = offset + windows * self.block_size
        return starts % len(self.tokens)

    def windows(self, starts: np.ndarray) -> np.ndarray:
        """The tokens of each window and the next token, (len(starts), block_size + 1) int64."""
        indices = starts[:, None] + np.arange(self.block_size + 1)
        return self.tokens[indices % len(self.tokens)].astype(np.int64)

    def tensor(self, starts: np.ndarray, device: torch.device) -> Tensor:
        """The same windows on the device, (len(starts), block_size + 1) int64."""
        if self._resident is None:
            return to_device(self.windows(starts), device)
        indices = to_device(starts, device)[:, None] + torch.arange(self.block_size + 1, device=device)
        return self._resident[indices % len(self.tokens)].long() & (2 ** (8 * self.tokens.itemsize) - 1)


def number_stories(idx: Tensor, eot_id: int) -> Tensor:
    """Index of the story in its window that each token of idx (B, T) belongs to, (B, T) int32. An end-of-text token
    belongs to the story after it, which is generated from it."""
    return (idx == eot_id).cumsum(1, dtype=torch.int32)


def dropout_seed(seed: int, step: int, window: int) -> int:
    """The dropout seed of the micro-batch that starts with this window of a step."""
    return int(np.random.SeedSequence((seed, step, window)).generate_state(1, np.uint64)[0] >> 1)


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device; to CUDA from pinned memory, asynchronously and in stream order."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def validation_windows(tokens: np.ndarray, block_size: int, limit: int) -> np.ndarray:
    """Up to `limit` windows spread evenly over the validation tokens, (N, block_size + 1) int64."""
    available = (len(tokens) - 1) // block_size
    if available < 1:
        raise UserError(
            f"block_size {block_size} is too long for the {len(tokens):,} validation tokens: "
            "lower it, or hold out more stories (data/ingestion.py --validation-fraction)"
        )
    chosen = np.linspace(0, available - 1, min(limit, available)).round().astype(np.int64)
    indices = chosen[:, None] * block_size + np.arange(block_size + 1)
    return tokens[indices].astype(np.int64)


# A shuffle that needs no table


def shuffled(positions: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Map positions (int64) through a random permutation of range(count), without a table.

    A Feistel network with one round per key (uint64) permutes the numbers below a power of 4; results not below
    `count` go through it again (cycle walking, Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    result = positions.astype(np.uint64)
    beyond = np.arange(len(result))
    while len(beyond):
        left, right = result[beyond] >> half, result[beyond] & low
        for key in keys:
            left, right = right, left ^ (splitmix64(right ^ key) & low)
        result[beyond] = left << half | right
        beyond = beyond[result[beyond] >= count]
    return result.astype(np.int64)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing function (Steele et al. 2014), elementwise, modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
