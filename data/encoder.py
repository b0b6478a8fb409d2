"""Encode stories as packed token ids, several times faster than the tokenizer alone and with the same result.

A byte-level BPE splits text into words and encodes each independently. Stories repeat few words, so a table from
word to tokens does most of the work; only words missing from it go to the tokenizer.
"""

import contextlib
import itertools
import json
import multiprocessing
import re
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from model.errors import UserError
from model.tokenizer import END_OF_TEXT, read_tokenizer, splits_as_gpt2

# GPT-2's pattern, as pre_tokenizers.ByteLevel applies it, for characters whose class is the same in every Unicode
# version: Latin-1 and English punctuation. Stories with other characters go to the tokenizer.
LETTER, DIGIT, SPACE = "A-Za-zªµºÀ-ÖØ-öø-ÿ", "0-9²³¹¼-¾", "\t-\r \x85\xa0"
WORD = re.compile(
    rf"'(?:[sdmt]|ll|ve|re)| ?[{LETTER}]+| ?[{DIGIT}]+| ?[^{SPACE}{LETTER}{DIGIT}]+"
    rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
)
UNUSUAL = re.compile("[^\x00-\xff\u2010-\u2027]")
TABLE_WORDS = 500_000  # about 100 MB
LONG_WORD = 100  # letters; longer words rarely repeat


class Encoder:
    """encoder(stories) returns the stories' tokens as bytes, with `<|endoftext|>` after each."""

    def __init__(self, tokenizer: Tokenizer, dtype: str):
        self.tokenizer, self.dtype = tokenizer, np.dtype(dtype).newbyteorder("<")
        self.end = np.array(tokenizer.token_to_id(END_OF_TEXT), self.dtype).tobytes()
        self.table = WordTable(self.encode) if encodes_word_by_word(tokenizer) else None

    def __call__(self, stories: list[str]) -> bytes:
        return b"".join(part for story in stories for part in (self.encode_story(story), self.end))

    def encode_story(self, story: str) -> bytes:
        known = story.isascii() or not UNUSUAL.search(story)
        if self.table is None or not known:
            return self.encode(story)
        return b"".join(map(self.table.__getitem__, WORD.findall(story)))

    def encode(self, text: str) -> bytes:
        (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, self.dtype).tobytes()


class WordTable(dict):
    """Tokens of each word seen so far, as bytes; cleared when full."""

    def __init__(self, encode: Callable[[str], bytes]):
        self.encode = encode

    def __missing__(self, word: str) -> bytes:
        if len(self) >= TABLE_WORDS:
            self.clear()
        tokens = self.encode(word)
        if len(word) <= LONG_WORD:
            self[word] = tokens
        return tokens


def encodes_word_by_word(tokenizer: Tokenizer) -> bool:
    """Whether WORD splits as the tokenizer does, and a word's tokens depend on that word alone."""
    parts = json.loads(tokenizer.to_str())
    return (
        splits_as_gpt2(parts["pre_tokenizer"])
        and parts["normalizer"] is None
        and parts["model"]["type"] == "BPE"
        and not parts["model"]["dropout"]
        and all(token["special"] for token in parts["added_tokens"])
    )


# Multiprocessing


def encode_all(
    batches: Iterable[list[str]], tokenizer_file: Path, dtype: str, workers: int
) -> Iterator[tuple[list[str], bytes]]:
    """Yield each batch with its tokens, in order. Raises UserError if a process dies.

    Each process has its own pipe, which breaks if the process is killed. (A ProcessPoolExecutor shares its pipes: a
    process killed during a write leaves the others waiting.)
    """
    if workers == 1:
        encoder = Encoder(read_tokenizer(tokenizer_file), dtype)
        yield from ((batch, encoder(batch)) for batch in batches)
        return
    started = [start_worker(tokenizer_file, dtype) for _ in range(workers)]
    at_work = deque((None, pipe) for _, pipe in started)  # each worker's batch, oldest first
    try:
        for batch in itertools.chain(batches, [None] * workers):
            earliest, pipe = at_work.popleft()
            try:
                tokens = pipe.recv_bytes() if earliest else b""
                if batch:
                    pipe.send(batch)
            except (EOFError, OSError):
                raise UserError("an encoding process died, possibly out of memory: try --workers 1") from None
            at_work.append((batch, pipe))
            if earliest:
                yield earliest, tokens
    finally:
        for process, _ in started:
            process.terminate()
            process.join()


def start_worker(tokenizer_file: Path, dtype: str) -> tuple[BaseProcess, Connection]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=work, args=(theirs, tokenizer_file, dtype), daemon=True)
    resource_tracker.ensure_running()  # start() would start it, which unblocks SIGINT
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: only the parent handles Ctrl-C
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    theirs.close()
    return process, ours


def work(pipe: Connection, tokenizer_file: Path, dtype: str) -> None:
    encoder = Encoder(read_tokenizer(tokenizer_file), dtype)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            pipe.send_bytes(encoder(pipe.recv()))
