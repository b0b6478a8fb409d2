"""Reading packed tokens: step number -> batch, as a pure function.

The tokens of a split form a ring. Each epoch cuts it into windows of block_size tokens, starting at a random
offset, and visits them in random order; both depend on (seed, epoch) alone. So any step's batch is known without
replaying earlier steps, and it is the same for 1 process and for 8.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.errors import UserError
from model.files import command, read_json, sha256_file, shown
from model.settings import require_seed

PREPARE = command("data/prepare_data.py")
COUNTED = 2**23  # at most so many tokens, in pieces, where frequencies are counted
PIECE = 2**16
AHEAD = 16  # steps whose windows are found together: numpy then takes an eighth of the time
SIGNED = {"i2": torch.int16, "i4": torch.int32}
META = ("dtype", "vocab_size", "eot_id", "tokenizer_sha256", "splits")


@dataclass(frozen=True)
class Split:
    """One packed file and its entry in meta.json."""

    tokens: np.ndarray  # memory-mapped, 1-D, uint16 or uint32
    stories: int
    bytes: int  # UTF-8 bytes of the stories' text
    sha256: str  # of the file

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / len(self.tokens)


@dataclass(frozen=True)
class Data:
    train: Split
    validation: Split
    vocab_size: int
    eot_id: int
    tokenizer_json: str


def load_data(data_dir: Path, verify: bool = False) -> Data:
    """Memory-map data_dir/processed and check it against meta.json (with `verify`, the SHA-256 too).

    Raises UserError if a file is missing, truncated, or made with another tokenizer.
    """
    processed = data_dir / "processed"
    meta = read_json(processed / "meta.json")
    if not meta:
        raise UserError(f"no packed stories in {shown(processed)} yet: run {PREPARE}")
    missing = [entry for entry in META if entry not in meta]
    if missing:
        raise UserError(f"{shown(processed / 'meta.json')} lacks {', '.join(missing)}: run {PREPARE}")
    tokenizer_path = data_dir / "tokenizer" / "tokenizer.json"
    if not tokenizer_path.exists():
        step = command("data/train_tokenizer.py")
        raise UserError(f"no tokenizer at {shown(tokenizer_path)} yet: run {step}")
    if sha256_file(tokenizer_path) != meta["tokenizer_sha256"]:
        raise UserError(
            f"{shown(processed)} was packed with another tokenizer than {shown(tokenizer_path)}: run {PREPARE}"
        )
    splits = {}
    for name in ("train", "validation"):
        path, facts = processed / f"{name}.bin", meta["splits"].get(name)
        if not facts or not facts["tokens"]:
            raise UserError(f"{shown(processed)} has no {name} stories: run {PREPARE}")
        expected = facts["tokens"] * np.dtype(meta["dtype"]).itemsize
        size = path.stat().st_size if path.exists() else 0
        if size != expected:
            raise UserError(
                f"{shown(path)} has {size:,} bytes, but meta.json says {expected:,}: run {PREPARE}"
            )
        if verify and sha256_file(path) != facts["sha256"]:
            raise UserError(f"{shown(path)} is damaged (its SHA-256 differs from meta.json's): run {PREPARE}")
        tokens = np.memmap(path, dtype=np.dtype(meta["dtype"]).newbyteorder("<"), mode="r")
        splits[name] = Split(tokens, facts["stories"], facts["bytes"], facts["sha256"])
    return Data(
        splits["train"],
        splits["validation"],
        meta["vocab_size"],
        meta["eot_id"],
        tokenizer_path.read_text(encoding="utf-8"),
    )


def fingerprints(data: Data) -> dict[str, str]:
    """SHA-256 of both splits and of the tokenizer, which must not change when a run resumes."""
    return {
        "training stories": data.train.sha256,
        "validation stories": data.validation.sha256,
        "tokenizer": hashlib.sha256(data.tokenizer_json.encode()).hexdigest(),
    }


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
            left, right = right, left ^ (scrambled(right ^ key) & low)
        result[beyond] = left << half | right
        beyond = beyond[result[beyond] >= count]
    return result.astype(np.int64)


def scrambled(x: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing function (Steele et al. 2014), elementwise, modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Batches:
    """An endless sequence of training windows, in steps of equal size."""

    def __init__(self, tokens: np.ndarray, block_size: int, windows_per_step: int, seed: int):
        if len(tokens) <= block_size:
            raise UserError(
                f"block_size {block_size} is longer than the {len(tokens):,} training tokens: "
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
            for first in range(0, len(self.tokens), 2**24):
                piece = np.array(self.tokens[first : first + 2**24])
                self._resident[first : first + 2**24] = torch.from_numpy(piece.view(signed))

    def starts(self, step: int) -> np.ndarray:
        """Start of each window of a step in the ring, (windows_per_step,) int64."""
        first = step - step % AHEAD
        if self._ahead is None or self._ahead[0] != first:
            positions = np.arange(first * self.windows_per_step, (first + AHEAD) * self.windows_per_step)
            self._ahead = first, self.places(positions).reshape(AHEAD, -1)
        return self._ahead[1][step - first]

    def places(self, positions: np.ndarray) -> np.ndarray:
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


def excerpt(tokens: np.ndarray) -> np.ndarray:
    """At most COUNTED of the tokens, to count: pieces spread evenly over all."""
    pieces = np.array_split(tokens, -(-len(tokens) // PIECE))
    return np.concatenate(pieces[:: -(-len(tokens) // COUNTED)])


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
            f"block_size {block_size} is longer than the {len(tokens):,} validation tokens: "
            "lower it or hold out more stories"
        )
    chosen = np.linspace(0, available - 1, min(limit, available)).round().astype(np.int64)
    indices = chosen[:, None] * block_size + np.arange(block_size + 1)
    return tokens[indices].astype(np.int64)
