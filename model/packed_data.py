"""The packed stories that step 3 wrote: token files, memory-mapped, with what meta.json says of them."""

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.errors import UserError, require
from model.files import command, read_json, sha256_file, shown
from model.tokenizer import text_tokenizer, tokenizer_file

META = ("dtype", "vocab_size", "eot_id", "tokenizer_sha256", "splits")
COUNTED = 2**23  # at most so many tokens, in pieces, where frequencies are counted
PIECE = 2**16


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
    outdated: str = ""  # a note if step 1 has brought other stories since


def load_data(data_dir: Path, verify: bool = False, model: str | None = None) -> Data:
    """Memory-map data_dir/processed and check it against meta.json (with `verify`, the SHA-256 too). `model`: whose
    tokenizer it is to be packed with.

    Raises UserError if a file is missing, truncated, or made with another tokenizer.
    """
    processed, prepare = data_dir / "processed", command("data/prepare_data.py", data_dir=data_dir)
    meta = read_json(processed / "meta.json")
    if not meta:
        first = "prepare_data" if tokenizer_file(data_dir).exists() else "train_tokenizer"
        first = first if (data_dir / "raw").exists() else "ingestion"
        kind = f" --kind {shlex.quote(model)}" if model and first == "train_tokenizer" else ""
        run = command(f"data/{first}.py", data_dir=data_dir) + kind
        raise UserError(f"no packed stories in {shown(processed)} yet: run {run}")
    missing = [entry for entry in META if entry not in meta]
    require(not missing, f"{shown(processed / 'meta.json')} lacks {', '.join(missing)}: run {prepare}")
    tokenizer, learn = tokenizer_file(data_dir), command("data/train_tokenizer.py", data_dir=data_dir)
    require(tokenizer.exists(), f"no tokenizer at {shown(tokenizer)} yet: run {learn}")
    require(
        sha256_file(tokenizer) == meta["tokenizer_sha256"],
        f"{shown(processed)} was packed with another tokenizer than {shown(tokenizer)}: run {prepare}",
    )
    splits = {}
    for name in ("train", "validation"):
        path, facts = processed / f"{name}.bin", meta["splits"].get(name)
        require(facts and facts["tokens"], f"{shown(processed)} has no {name} stories: run {prepare}")
        expected = facts["tokens"] * np.dtype(meta["dtype"]).itemsize
        size = path.stat().st_size if path.exists() else 0
        require(
            size == expected,
            f"{shown(path)} has {size:,} bytes, but meta.json says {expected:,}: run {prepare}",
        )
        require(
            not verify or sha256_file(path) == facts["sha256"],
            f"{shown(path)} is damaged (its SHA-256 differs from meta.json's): run {prepare}",
        )
        tokens = np.memmap(path, dtype=np.dtype(meta["dtype"]).newbyteorder("<"), mode="r")
        splits[name] = Split(tokens, facts["stories"], facts["bytes"], facts["sha256"])
    outdated = ""
    if not packed_from_raw(data_dir, meta):
        raw = shown(data_dir / "raw")
        outdated = (
            f"{raw} has other stories than {shown(processed)}, which is used here; {prepare} packs them"
        )
    return Data(
        splits["train"],
        splits["validation"],
        meta["vocab_size"],
        meta["eot_id"],
        tokenizer.read_text(encoding="utf-8"),
        outdated,
    )


def data_files(data_dir: Path) -> list[Path]:
    """The files that load_data() reads, whether they exist or not."""
    packed = [data_dir / "processed" / name for name in ("meta.json", "train.bin", "validation.bin")]
    return [*packed, tokenizer_file(data_dir), data_dir / "raw" / "manifest.json"]


def packed_from_raw(data_dir: Path, meta: dict) -> bool:
    """Whether step 1's stories are those that were packed, or are not there any more."""
    try:
        raw = read_json(data_dir / "raw" / "manifest.json").get("splits", {})
        return all(facts["sha256"] == meta["splits"][name]["raw_sha256"] for name, facts in raw.items())
    except (UserError, KeyError, TypeError, AttributeError):  # in another format
        return True


def fingerprints(data: Data) -> dict[str, str]:
    """SHA-256 of both splits and of the tokenizer, which must not change when a run resumes."""
    return {
        "training stories": data.train.sha256,
        "validation stories": data.validation.sha256,
        "tokenizer": hashlib.sha256(data.tokenizer_json.encode()).hexdigest(),
    }


def real_stories(splits: list[Split], data: Data, count: int) -> list[str]:
    """The text of `count` stories, evenly spread over the splits; of all if count is 0."""
    bounds = [(split, *ends) for split in splits for ends in story_bounds(split, data.eot_id)]
    ids = [split.tokens[first:end].tolist() for split, first, end in spread(bounds, count)]
    stories = text_tokenizer(data.tokenizer_json).decode_batch(ids, skip_special_tokens=False)
    return [story.lstrip(" ") for story in stories]  # some tokenizers put a space before each


def spread(items: list, count: int) -> list:
    """`count` of the items, evenly spread; all of them if count is 0 or too large."""
    if not count or count >= len(items):
        return items
    return [items[k] for k in np.linspace(0, len(items) - 1, count).round().astype(int)]


def story_bounds(split: Split, eot_id: int) -> list[tuple[int, int]]:
    """The first and end index of each story in the tokens, without its end-of-text token."""
    ends = np.flatnonzero(np.asarray(split.tokens) == eot_id)
    return list(zip([0, *(ends[:-1] + 1).tolist()], ends.tolist(), strict=True)) if len(ends) else []


def excerpt(tokens: np.ndarray) -> np.ndarray:
    """At most COUNTED of the tokens, to count: pieces spread evenly over all."""
    pieces = np.array_split(tokens, -(-len(tokens) // PIECE))
    return np.concatenate(pieces[:: -(-len(tokens) // COUNTED)])
