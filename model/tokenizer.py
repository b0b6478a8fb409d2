"""Tokenizers as the scripts use them: text in, the ids of exactly this text out."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from model.errors import UserError, first_line, require
from model.files import command, shown

END_OF_TEXT = "<|endoftext|>"  # follows each story; the token before a story is the end of the one before


def text_tokenizer(tokenizer_json: str) -> Tokenizer:
    """A tokenizer that adds no token, cuts nothing off, and encodes an end-of-text marker within a story as text."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def readable(word: str) -> str:
    """Text from the command line: bytes that are not UTF-8 arrive as lone surrogates, which tokenizers reject."""
    return word.encode(errors="surrogateescape").decode(errors="replace")


def require_room(vocab_size: int, tokenizer: Tokenizer, name: str) -> None:
    """Raise UserError if a model has no embedding for some of its tokenizer's tokens, without special ones, which no
    text has."""
    tokens = tokenizer.get_vocab_size(with_added_tokens=False)
    require(
        tokens <= vocab_size,
        f"the tokenizer of {name} has {tokens:,} tokens, but the model only {vocab_size:,}",
    )


def tokenizer_file(data_dir: Path) -> Path:
    """Where step 2 writes the tokenizer."""
    return data_dir / "tokenizer" / "tokenizer.json"


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that step 2 wrote. Raises UserError if it is missing, damaged or cannot separate stories."""
    step = command("data/train_tokenizer.py", data_dir=path.parent.parent)
    require(path.is_file(), f"no tokenizer yet in {shown(path.parent)}: run {step}")
    try:
        tokenizer = text_tokenizer(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{shown(path)} is not a tokenizer ({first_line(error)}): run {step}") from None
    known = tokenizer.token_to_id(END_OF_TEXT) is not None
    require(known, f"{shown(path)} has no {END_OF_TEXT} token to separate stories: run {step}")
    return tokenizer


def splits_as_gpt2(pre_tokenizer: dict | None) -> bool:
    """Whether a tokenizer's pre_tokenizer splits text into words by GPT-2's pattern, and changes nothing else."""
    cut = pre_tokenizer or {}
    return cut.get("type") == "ByteLevel" and cut["use_regex"] and not cut["add_prefix_space"]


def token_table(tokenizer_json: str) -> tuple:
    """Everything that determines a text's token ids: tokenizers are the same if theirs are equal."""
    parts = json.loads(Tokenizer.from_str(tokenizer_json).to_str())
    cut = {key: value for key, value in (parts["pre_tokenizer"] or {}).items() if key != "trim_offsets"}
    added = {token["content"]: token["id"] for token in parts["added_tokens"]}
    return parts["normalizer"], cut, parts["model"]["vocab"], parts["model"].get("merges"), added
