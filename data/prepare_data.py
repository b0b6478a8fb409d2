"""Step 3: encode the stories as token ids, all that training reads beside the tokenizer.

    python data/prepare_data.py              # on all cores, if there is enough text
    python data/prepare_data.py --workers 2  # on two cores

The output is data/processed/train.bin and validation.bin, raw little-endian uint16 (uint32 for a vocabulary
above 65,536 tokens) without a header: the stories in order, with `<|endoftext|>` after each. meta.json next to
them records how to read them and what they were made from.
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

from model.script import run_script  # before torch: see there

# isort: split
import numpy as np

from data.encoder import Encoder, encode_all
from data.raw_stories import SPLITS, Progress, open_split, raw_batches, read_manifest
from model.config import GPTConfig
from model.errors import UserError, note, require
from model.files import (
    atomic_write,
    command,
    read_json,
    require_space,
    sha256_file,
    shown,
    size_text,
    write_json,
)
from model.settings import read_settings, require_within
from model.tokenizer import END_OF_TEXT, read_tokenizer, tokenizer_file

WORKERS: int = 0  # encoding processes, at most; 0: one per core; each gets 10 MB or more
DATA_DIR: str = "data"  # folder for raw/, tokenizer/ and processed/

FORMAT = 2
# bytes of text per process; with less, starting a process takes longer than its work
WORKER_BYTES = 10_000_000
# the default model's; training splits longer stories across windows
CONTEXT = GPTConfig().block_size


def main() -> None:
    settings = read_settings(__file__)
    require_within(settings, workers="[0, inf)")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallelism is across processes
    manifest = read_manifest(settings.data_dir)
    file = tokenizer_file(settings.data_dir)
    tokenizer = read_tokenizer(file)
    end = tokenizer.token_to_id(END_OF_TEXT)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    wanted = {
        "format": FORMAT,
        "dtype": "uint16" if vocab_size <= 65_536 else "uint32",
        "vocab_size": vocab_size,
        "eot_id": end,
        "tokenizer_sha256": sha256_file(file),
    }

    folder = settings.data_dir / "processed"
    splits = up_to_date(folder, wanted, manifest)
    if splits:
        print(f"{shown(folder)} is up to date (delete it to rebuild it)")
    else:
        note_foreign_tokenizer(settings.data_dir, manifest)
        splits = pack_all(folder, settings, manifest, Encoder(tokenizer, wanted["dtype"]), wanted)
        write_json(folder / "meta.json", {**wanted, "splits": splits})
    for split, counts in splits.items():
        print(
            f"{split:<10} {counts['stories']:>9,} stories  {counts['tokens']:>13,} tokens  "
            f"{size_text(counts['bytes']):>9}  {counts['bytes'] / counts['tokens']:.2f} bytes per token  "
            f"{counts['longer'] / counts['stories']:.1%} longer than {CONTEXT} tokens"
        )
    print(f"next: {command('train.py', data_dir=settings.data_dir)}")


def note_foreign_tokenizer(data_dir: Path, manifest: dict) -> None:
    """Say so if step 2 has learned the tokenizer from other stories than these."""
    file = tokenizer_file(data_dir)
    with contextlib.suppress(UserError):  # its record is broken
        made_from = read_json(file.with_name("made_from.json"))
        learned_from = made_from.get("raw_sha256")
        if learned_from not in (None, manifest["splits"]["train"]["sha256"]):
            note(
                f"{shown(file)} was learned from other stories, so these take more tokens; "
                f"{command('data/train_tokenizer.py', data_dir=data_dir)} learns one from these"
            )


def available_cores() -> int:
    """The cores that this process may use: a job or a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def up_to_date(folder: Path, wanted: dict, manifest: dict) -> dict:
    """The splits in meta.json if it was made from the same inputs and matches the .bin files, else {}."""
    try:
        meta = read_json(folder / "meta.json")
        splits = meta.pop("splits", {})
        whole = meta == wanted and all(
            splits[split]["raw_sha256"] == manifest["splits"][split]["sha256"]
            and sha256_file(folder / f"{split}.bin") == splits[split]["sha256"]
            for split in SPLITS
        )
    except (UserError, OSError, KeyError, TypeError, AttributeError):  # missing, broken or in another format
        return {}
    return splits if whole else {}


def pack_all(folder: Path, settings: SimpleNamespace, manifest: dict, encoder: Encoder, wanted: dict) -> dict:
    """Write a .bin for each split; return their counts and digests."""
    stories = {split: open_split(settings.data_dir / "raw", split, manifest["splits"]) for split in SPLITS}
    require_space(folder, sum(packed_size(stories[s], manifest["splits"][s], encoder) for s in SPLITS))
    splits = {}
    with contextlib.ExitStack() as stack:  # both files are renamed together, at the end of this block
        for split in SPLITS:
            path = stack.enter_context(atomic_write(folder / f"{split}.bin"))
            raw, start = manifest["splits"][split], time.monotonic()
            workers = min(settings.workers or available_cores(), 1 + raw["bytes"] // WORKER_BYTES)
            pairs = encode_all(
                raw_batches(stories[split]), tokenizer_file(settings.data_dir), wanted["dtype"], workers
            )
            with Progress(total=raw["bytes"], unit="B", desc=split) as bar, contextlib.closing(pairs):
                splits[split] = pack(path, pairs, wanted, bar)
            seconds, size = time.monotonic() - start, raw["bytes"]
            print(f"{split}: {size_text(size)} in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s")
            same = all(splits[split][count] == raw[count] for count in ("stories", "bytes"))
            require(
                same, f"{shown(settings.data_dir / 'raw')} changed while it was being read: run this again"
            )
            splits[split]["raw_sha256"] = raw["sha256"]
        (folder / "meta.json").unlink(missing_ok=True)  # until it is rewritten, training has no data
    return splits


def packed_size(stories: object, raw: dict, encoder: Encoder) -> float:
    """Estimate the bytes of a packed split from its first stories."""
    sample = next(raw_batches(stories))
    return raw["bytes"] * len(encoder(sample)) / sum(len(story.encode()) for story in sample)


def pack(path: Path, pairs: Iterator[tuple[list[str], bytes]], wanted: dict, bar: Progress) -> dict:
    """Write the tokens of (stories, tokens) pairs to a file; return its counts and digest."""
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
            counts["stories"] += len(batch)
            counts["tokens"] += len(tokens)
            counts["bytes"] += size
            counts["longer"] += int(np.sum(np.diff(ends, prepend=-1) - 1 > CONTEXT))
            bar.add(len(batch), size)
    return {**counts, "sha256": digest.hexdigest()}


if __name__ == "__main__":
    run_script(main)
