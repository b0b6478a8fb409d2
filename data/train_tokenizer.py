"""Step 2: make the tokenizer, which turns text into token ids and back.

    python data/train_tokenizer.py               # train a BPE of 10,000 tokens on data/raw/train
    python data/train_tokenizer.py --kind gpt2   # GPT-2's 50,257 tokens, from the Hugging Face hub
    python data/train_tokenizer.py --kind char   # one token per character of the stories
    python data/train_tokenizer.py --kind NAME   # from a Hugging Face folder, a hub model (owner/name) or a checkpoint

The output is data/tokenizer/tokenizer.json, in the format of the tokenizers library. bpe, gpt2 and char encode
any Unicode text and decode to exactly that text. `<|endoftext|>`, which follows each story, is a special token;
the scripts set `encode_special_tokens`, so that no text in a story becomes that token.
"""

import hashlib
import json
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # train and encode on all cores

from model.script import run_script  # before torch: see there

# isort: split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.raw_stories import Progress, open_split, raw_batches, read_manifest
from model.errors import UserError, first_line, require
from model.files import command, read_json, sha256_file, shown, write_json, write_text
from model.hub import hub_errors
from model.settings import read_settings, require_within
from model.tokenizer import END_OF_TEXT, tokenizer_file

KIND: str = "bpe"  # bpe (trained here), gpt2 (its 50,257 tokens), char, a Hugging Face folder or name, or a checkpoint
VOCAB_SIZE: int = 10_000  # for bpe: `<|endoftext|>`, the 256 bytes and learned word pieces
MAX_STORIES: int = 0  # learn from only the first N training stories; 0: all
GPT2_FILES: list[str] = []  # vocab.json merges.txt, for gpt2 without a network
DATA_DIR: str = "data"  # folder for raw/, tokenizer/ and processed/

FORMAT = 1
# checksum of GPT-2's vocabulary and merges
GPT2_SHA256 = "7af2255eedd60b16dd34cbba614d328a4b0726f23b66fb09c942a867f3ccac38"
EXAMPLE = 60  # characters of a story, to show as tokens


def main() -> None:
    settings = read_settings(__file__)
    check(settings)
    manifest = read_manifest(settings.data_dir)
    stories = open_split(settings.data_dir / "raw", "train", manifest["splits"])
    if settings.max_stories:
        stories = stories.select(range(min(settings.max_stories, len(stories))))

    path = tokenizer_file(settings.data_dir)
    made_from = {"format": FORMAT, "kind": settings.kind}
    if settings.kind == "bpe":
        made_from["vocab_size"] = settings.vocab_size
    if settings.kind in ("bpe", "char"):
        made_from |= {
            "max_stories": settings.max_stories,
            "raw_sha256": manifest["splits"]["train"]["sha256"],
        }
    if settings.kind in KINDS and up_to_date(path, made_from):
        print(f"{shown(path)} is up to date (delete it to rebuild it)")
        tokenizer = Tokenizer.from_file(str(path))
    else:
        start = time.monotonic()
        tokenizer = KINDS.get(settings.kind, take_over)(stories, settings)
        write_text(path, tokenizer.to_str(pretty=True))
        write_json(path.with_name("made_from.json"), {**made_from, "tokenizer_sha256": sha256_file(path)})
        print(f"wrote {shown(path)} in {time.monotonic() - start:.1f} s")
    describe(tokenizer, stories, asked=made_from.get("vocab_size", 0))
    print(f"next: {command('data/prepare_data.py', data_dir=settings.data_dir)}")


def check(settings: SimpleNamespace) -> None:
    kind = settings.kind
    bytes_and_end = 257
    known = kind in KINDS or "/" in kind or Path(kind).exists()
    require(
        known,
        f"--kind takes bpe, gpt2 or char, or a Hugging Face folder or name; there is no folder {kind} here",
    )
    require(
        kind == "bpe" or "vocab_size" not in settings.given,
        f"--vocab-size works only with --kind bpe, not {kind}",
    )
    require(
        settings.vocab_size >= bytes_and_end,
        f"--vocab-size must be at least {bytes_and_end}: one token per byte, and {END_OF_TEXT}",
    )
    require_within(settings, max_stories="[0, inf)", vocab_size="[0, 1e7]")
    require(kind == "gpt2" or not settings.gpt2_files, "--gpt2-files works only with --kind gpt2")


def up_to_date(path: Path, made_from: dict) -> bool:
    try:
        recorded = read_json(path.with_name("made_from.json"))
    except UserError:  # broken: rebuild
        return False
    return path.is_file() and recorded == {**made_from, "tokenizer_sha256": sha256_file(path)}


# The kinds. In bpe, gpt2 and char, `<|endoftext|>` is the only special token.


def byte_level(model: models.BPE) -> Tokenizer:
    """A BPE over UTF-8 bytes, like GPT-2's: text is split into words, and words into learned pieces."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def learn_bpe(stories: object, settings: SimpleNamespace) -> Tokenizer:
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=2,  # a pair seen once is noise
        special_tokens=[END_OF_TEXT],  # gets id 0
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that any text can be encoded
        show_progress=False,
    )
    stop = threading.Event()
    with Progress(total=stories.data.nbytes, unit="B", desc="words") as bar, ThreadPoolExecutor(1) as thread:

        def counted() -> Iterator[list[str]]:
            for batch in raw_batches(stories, bar):
                if stop.is_set():
                    raise RuntimeError("stopped")
                yield batch

        # In a thread: Ctrl-C goes to the main thread, which could not react inside the library.
        learning = thread.submit(tokenizer.train_from_iterator, counted(), trainer)
        try:
            learning.result()
        finally:
            stop.set()
    return tokenizer


def load_gpt2(stories: object, settings: SimpleNamespace) -> Tokenizer:
    model = gpt2_from_files(settings.gpt2_files) if settings.gpt2_files else gpt2_from_hub()
    tokenizer = byte_level(model)
    tokenizer.add_special_tokens([END_OF_TEXT])
    content = json.loads(tokenizer.to_str())["model"]
    table = json.dumps([tokenizer.get_vocab(), content["merges"]], sort_keys=True)
    whole = hashlib.sha256(table.encode()).hexdigest() == GPT2_SHA256
    source = " and ".join(settings.gpt2_files) or "the hub's copy"
    require(whole, f"{source}: this is not GPT-2's vocabulary of 50,257 tokens and 50,000 merges")
    return tokenizer


def gpt2_from_hub() -> models.BPE:
    with hub_errors("GPT-2's vocabulary", "use --gpt2-files vocab.json merges.txt"):
        return Tokenizer.from_pretrained("gpt2").model


def gpt2_from_files(names: list[str]) -> models.BPE:
    """GPT-2's model from its two files, in either order: a JSON object and a list of merges."""
    require(len(names) == 2, "--gpt2-files takes two files, vocab.json and merges.txt")
    vocab, merges = None, None
    for name in names:
        path = Path(os.path.expanduser(name))
        require(path.is_file(), f"there is no file {name}")
        try:
            text = path.read_text(encoding="utf-8")
            if text.lstrip().startswith("{"):
                vocab = json.loads(text)
            else:
                lines = [line for line in text.splitlines() if line and not line.startswith("#version")]
                merges = [tuple(line.split(" ")) for line in lines]
        except ValueError as error:
            raise UserError(
                f"{name} is neither GPT-2's vocab.json nor its merges.txt: {first_line(error)}"
            ) from None
    require(vocab is not None and merges is not None, "--gpt2-files takes one vocab.json and one merges.txt")
    try:
        return models.BPE(vocab, merges)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{' and '.join(names)} do not match: {first_line(error)}") from None


def collect_characters(stories: object, settings: SimpleNamespace) -> Tokenizer:
    """One token per character of the stories; any other character becomes its UTF-8 bytes."""
    characters = set()
    with Progress(total=stories.data.nbytes, unit="B", desc="characters") as bar:
        for batch in raw_batches(stories, bar):
            characters.update(*batch)
    tokens = [END_OF_TEXT, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(characters)]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def take_over(stories: object, settings: SimpleNamespace) -> Tokenizer:
    """The tokenizer of an existing model, to fine-tune it or compare with it."""
    from model.huggingface import load_tokenizer_json  # imports torch, which takes seconds

    parts = json.loads(load_tokenizer_json(settings.kind))
    for token in parts["added_tokens"]:
        token["special"] |= token["content"] == END_OF_TEXT  # so that it is text within a story
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    found = tokenizer.token_to_id(END_OF_TEXT) is not None
    require(
        found, f"the tokenizer of {settings.kind} has no {END_OF_TEXT} token to separate stories: use another"
    )
    return tokenizer


KINDS = {"bpe": learn_bpe, "gpt2": load_gpt2, "char": collect_characters}


# Output


def describe(tokenizer: Tokenizer, stories: object, asked: int) -> None:
    tokenizer.encode_special_tokens = True
    sample = next(raw_batches(stories))
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(sample))
    ratio = sum(len(story.encode()) for story in sample) / tokens
    size = tokenizer.get_vocab_size()
    fewer = "" if size >= asked else f" (not {asked:,}: no more pairs occur twice in these stories)"
    print(f"vocabulary: {size:,} tokens{fewer}; {ratio:.2f} bytes per token on these stories")
    pieces = [tokenizer.decode([number]) for number in tokenizer.encode(beginning(sample[0])).ids]
    print(f"example:    {'|'.join(pieces)}")


def beginning(story: str) -> str:
    """Its first words, on one line."""
    return textwrap.shorten(story[: 2 * EXAMPLE], EXAMPLE, placeholder="")


if __name__ == "__main__":
    run_script(main)
