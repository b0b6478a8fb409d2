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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tokenizers import Tokenizer

from data.stories import (
    END_OF_TEXT,
    SPLITS,
    first_line,
    next_step,
    open_raw,
    progress,
    raw_batches,
    read_manifest,
)
from model.files import atomic_write, read_json, sha256_file, shown, size_text, write_json
from model.settings import REPO, UserError, read_settings, require, run_script

WORKERS = 0  # threads that encode; 0 takes all cores
DATA_DIR = "data"  # the folder of raw/, tokenizer/ and processed/

FORMAT = 1
# encoded at once: enough for every core, little enough for memory
BATCH_STORIES = 1_000


def main():
    settings = read_settings(__file__)
    require(settings.workers >= 0, "--workers is 0 (all cores) or more")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if settings.workers:
        os.environ["RAYON_NUM_THREADS"] = str(settings.workers)  # read when the first batch is encoded

    manifest = read_manifest(settings.data_dir)
    tokenizer_file = settings.data_dir / "tokenizer" / "tokenizer.json"
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
        splits = {}
        with (
            contextlib.ExitStack() as stack
        ):  # both files take their names together, at the end of this block
            for split in SPLITS:
                path = stack.enter_context(atomic_write(folder / f"{split}.bin"))
                splits[split] = pack(
                    path, split, settings.data_dir, manifest, tokenizer, end, wanted["dtype"]
                )
            (folder / "meta.json").unlink(missing_ok=True)  # until it is there again, training has no data
        write_json(folder / "meta.json", {**wanted, "splits": splits})
    for split, counts in splits.items():
        print(
            f"{split:<10} {counts['stories']:>9,} stories  {counts['tokens']:>13,} tokens  "
            f"{size_text(counts['bytes']):>9}  {counts['bytes'] / counts['tokens']:.2f} bytes per token"
        )
    print(next_step("train.py", settings))


def load_tokenizer(path: Path) -> Tokenizer:
    command = shown(REPO / "data" / "train_tokenizer.py")
    require(path.is_file(), f"no tokenizer yet in {shown(path.parent)}: run: python {command}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises the bare class
        raise UserError(
            f"{shown(path)} is not a tokenizer ({first_line(error)}): run: python {command}"
        ) from None
    end = tokenizer.token_to_id(END_OF_TEXT)
    require(end is not None, f"{shown(path)} has no token {END_OF_TEXT}, which stands between stories")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a story that spells out <|endoftext|> stays text
    return tokenizer


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


def pack(
    path: Path, split: str, data_dir: Path, manifest: dict, tokenizer: Tokenizer, end: int, dtype: str
) -> dict:
    """Encode a split's stories into a file of token numbers; returns their counts and digests."""
    stories = open_raw(data_dir, split, manifest)
    raw = manifest["splits"][split]
    counts = {"stories": 0, "tokens": 0, "bytes": 0}
    digest, start = hashlib.sha256(), time.monotonic()
    number = np.dtype(dtype).newbyteorder("<")
    with path.open("wb") as file, progress(total=raw["bytes"], unit="B", desc=split) as bar:
        for batch in raw_batches(stories, BATCH_STORIES):
            tokens = []
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                tokens += encoding.ids
                tokens.append(end)
            packed = np.array(tokens, number).tobytes()
            file.write(packed)
            digest.update(packed)
            size = sum(len(story.encode()) for story in batch)
            counts["stories"] += len(batch)
            counts["tokens"] += len(tokens)
            counts["bytes"] += size
            bar.update(size)
    seconds = time.monotonic() - start
    whole = counts["stories"] == raw["stories"] and counts["bytes"] == raw["bytes"]
    require(whole, f"{shown(data_dir / 'raw')} has changed while it was read: run this again")
    print(
        f"{split}: {size_text(counts['bytes'])} in {seconds:.1f} s, {counts['bytes'] / 1e6 / seconds:.1f} MB/s"
    )
    return {**counts, "sha256": digest.hexdigest(), "raw_sha256": raw["sha256"]}


if __name__ == "__main__":
    run_script(main)
