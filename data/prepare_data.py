"""Step 3: turn the stories into token numbers, the only thing that training reads.

    python data/prepare_data.py              # on all cores
    python data/prepare_data.py --workers 2  # on two

The result is data/processed/train.bin and validation.bin, raw little-endian uint16 (uint32 for a vocabulary
above 65,536 tokens) without a header: the stories in order, `<|endoftext|>` after each. meta.json beside
them says how to read them and what they were made from.
"""

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from data.encoder import Encoder, encode_all, load_tokenizer
from data.stories import (
    END_OF_TEXT,
    SPLITS,
    Progress,
    next_step,
    open_raw,
    raw_batches,
    read_manifest,
)
from model.config import GPTConfig
from model.files import atomic_write, read_json, require_space, sha256_file, shown, size_text, write_json
from model.settings import UserError, read_settings, require, run_script

WORKERS = 0  # processes that encode; 0 takes one for each core
DATA_DIR = "data"  # the folder of raw/, tokenizer/ and processed/

FORMAT = 2
# bytes of text for each process: with less, starting it takes longer than its work
WORKER_BYTES = 10_000_000
# beyond it, training sees a story in two windows or more; of the default model
CONTEXT = GPTConfig().block_size


def main():
    settings = read_settings(__file__)
    require(settings.workers >= 0, "--workers is 0 (all cores) or more")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process does its own work
    manifest = read_manifest(settings.data_dir)
    tokenizer_file = tokenizer_path(settings)
    tokenizer = load_tokenizer(tokenizer_file)
    end = tokenizer.token_to_id(END_OF_TEXT)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    wanted = {
        "format": FORMAT,
        "dtype": "uint16" if vocab_size <= 65_536 else "uint32",
        "vocab_size": vocab_size,
        "eot_id": end,
        "tokenizer_sha256": sha256_file(tokenizer_file),
    }

    folder = settings.data_dir / "processed"
    splits = up_to_date(folder, wanted, manifest)
    if splits:
        print(f"{shown(folder)} is up to date (delete it to make it anew)")
    else:
        splits = pack_all(folder, settings, manifest, Encoder(tokenizer, wanted["dtype"]), wanted)
        write_json(folder / "meta.json", {**wanted, "splits": splits})
    for split, counts in splits.items():
        print(
            f"{split:<10} {counts['stories']:>9,} stories  {counts['tokens']:>13,} tokens  "
            f"{size_text(counts['bytes']):>9}  {counts['bytes'] / counts['tokens']:.2f} bytes per token  "
            f"{counts['longer'] / counts['stories']:.1%} longer than {CONTEXT} tokens"
        )
    print(next_step("train.py", settings))


def tokenizer_path(settings: SimpleNamespace) -> Path:
    return settings.data_dir / "tokenizer" / "tokenizer.json"


def up_to_date(folder: Path, wanted: dict, manifest: dict) -> dict:
    """The splits of a meta.json that was made from the same and belongs to the .bin files beside it, else {}."""
    try:
        meta = read_json(folder / "meta.json")
        splits = meta.pop("splits", {})
        whole = meta == wanted and all(
            splits[split]["raw_sha256"] == manifest["splits"][split]["sha256"]
            and sha256_file(folder / f"{split}.bin") == splits[split]["sha256"]
            for split in SPLITS
        )
    except (UserError, OSError, KeyError, TypeError, AttributeError):  # missing, broken or of another make
        return {}
    return splits if whole else {}


def pack_all(folder: Path, settings: SimpleNamespace, manifest: dict, encoder: Encoder, wanted: dict) -> dict:
    """Write a .bin for each split; returns their counts and digests."""
    stories = {split: open_raw(settings.data_dir, split, manifest) for split in SPLITS}
    require_space(folder, sum(packed_size(stories[s], manifest["splits"][s], encoder) for s in SPLITS))
    splits = {}
    with contextlib.ExitStack() as stack:  # both files take their names together, at the end of this block
        for split in SPLITS:
            path = stack.enter_context(atomic_write(folder / f"{split}.bin"))
            raw, start = manifest["splits"][split], time.monotonic()
            workers = min(settings.workers or os.cpu_count(), 1 + raw["bytes"] // WORKER_BYTES)
            pairs = encode_all(
                raw_batches(stories[split]), tokenizer_path(settings), wanted["dtype"], workers
            )
            with Progress(total=raw["bytes"], unit="B", desc=split) as bar, contextlib.closing(pairs):
                splits[split] = pack(path, pairs, wanted, bar)
            seconds, size = time.monotonic() - start, raw["bytes"]
            print(f"{split}: {size_text(size)} in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s")
            same = all(splits[split][count] == raw[count] for count in ("stories", "bytes"))
            require(same, f"{shown(settings.data_dir / 'raw')} has changed while it was read: run this again")
            splits[split]["raw_sha256"] = raw["sha256"]
        (folder / "meta.json").unlink(missing_ok=True)  # until it is there again, training has no data
    return splits


def packed_size(stories: object, raw: dict, encoder: Encoder) -> float:
    """The bytes that a split takes, judged by its first stories."""
    sample = next(raw_batches(stories))
    return raw["bytes"] * len(encoder(sample)) / sum(len(story.encode()) for story in sample)


def pack(path: Path, pairs: Iterator[tuple[list[str], bytes]], wanted: dict, bar: Progress) -> dict:
    """Write the tokens of (stories, tokens) pairs to a file; returns counts of what is in it, and its digest."""
    counts = {"stories": 0, "tokens": 0, "bytes": 0, "longer": 0}
    digest = hashlib.sha256()
    number = np.dtype(wanted["dtype"]).newbyteorder("<")
    with path.open("wb") as file:
        for batch, packed in pairs:
            file.write(packed)
            digest.update(packed)
            tokens = np.frombuffer(packed, number)
            ends = np.flatnonzero(tokens == wanted["eot_id"])
            size = sum(len(story.encode()) for story in batch)
            require(len(ends) >= len(batch), "stories were lost on the way to their tokens: run this again")
            counts["stories"] += len(batch)
            counts["tokens"] += len(tokens)
            counts["bytes"] += size
            counts["longer"] += int(np.sum(np.diff(ends, prepend=-1) - 1 > CONTEXT))
            bar.add(len(batch), size)
    require(
        path.stat().st_size == counts["tokens"] * number.itemsize,
        f"{shown(path)} is not whole: run this again",
    )
    return {**counts, "sha256": digest.hexdigest()}


if __name__ == "__main__":
    run_script(main)
