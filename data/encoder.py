"""Stories to packed token numbers, several times faster than by the tokenizer alone, with the same numbers.

A byte-level BPE cuts a text into words and encodes each on its own. Stories use few words again and again, so a
table from word to tokens does the work, and the tokenizer is asked only about words that the table lacks.
"""

import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from tokenizers import Tokenizer

from model.settings import UserError

# GPT-2's pattern, as pre_tokenizers.ByteLevel applies it, for the characters of which no version of Unicode
# changes the class: Latin-1 and the punctuation of English texts. All else goes to the tokenizer.
LETTER, DIGIT, SPACE = "A-Za-zªµºÀ-ÖØ-öø-ÿ", "0-9²³¹¼-¾", "\t-\r \x85\xa0"
WORD = re.compile(
    rf"'(?:[sdmt]|ll|ve|re)| ?[{LETTER}]+| ?[{DIGIT}]+| ?[^{SPACE}{LETTER}{DIGIT}]+"
    rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
)
UNUSUAL = re.compile("[^\x00-\xff\u2010-\u2027]")
TABLE_WORDS = 500_000  # about 100 MB


class Encoder:
    """encoder(stories) gives the stories' tokens as bytes, an `end` after each story."""

    def __init__(self, tokenizer: Tokenizer, end: int, number: str):
        tokenizer.encode_special_tokens = True  # a story that spells out <|endoftext|> stays text
        self.tokenizer, self.number = tokenizer, np.dtype(number).newbyteorder("<")
        self.end = np.array(end, self.number).tobytes()
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
        return np.array(encoding.ids, self.number).tobytes()


class WordTable(dict):
    """Tokens of each word met so far, as bytes; begins anew when it is full."""

    def __init__(self, encode: Callable[[str], bytes]):
        self.encode = encode

    def __missing__(self, word: str) -> bytes:
        if len(self) >= TABLE_WORDS:
            self.clear()
        self[word] = tokens = self.encode(word)
        return tokens


def encodes_word_by_word(tokenizer: Tokenizer) -> bool:
    """Whether WORD cuts as the tokenizer does, and each word's tokens depend on the word alone."""
    parts = json.loads(tokenizer.to_str())
    cut = parts["pre_tokenizer"] or {}
    return (
        cut.get("type") == "ByteLevel"
        and cut["use_regex"]
        and not cut["add_prefix_space"]
        and parts["normalizer"] is None
        and parts["model"]["type"] == "BPE"
        and not parts["model"]["dropout"]
        and all(token["special"] for token in parts["added_tokens"])
    )


# In several processes


def encode_all(
    batches: Iterable[list[str]], tokenizer: Tokenizer, end: int, number: str, workers: int
) -> Iterator[tuple[list[str], bytes]]:
    """Each batch with its tokens, in order. Raises UserError where a process dies."""
    if workers == 1:
        encoder = Encoder(tokenizer, end, number)
        yield from ((batch, encoder(batch)) for batch in batches)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, start_worker, (tokenizer, end, number))

    def submitted() -> Iterator[tuple[list[str], Future]]:
        waiting = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(encode_here, batch)))
            if len(waiting) > 4 * workers:  # so far ahead that nobody waits, and memory stays small
                yield waiting.popleft()
        yield from waiting

    try:
        for batch, future in submitted():
            yield batch, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that encodes has died, perhaps for want of memory: try --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(tokenizer: Tokenizer, end: int, number: str) -> None:
    global encoder_here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=die_with_parent, daemon=True).start()
    encoder_here = Encoder(tokenizer, end, number)


def die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_here(stories: list[str]) -> bytes:
    return encoder_here(stories)
