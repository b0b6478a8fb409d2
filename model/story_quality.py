"""Quality of generated stories: do they end, do they repeat themselves, do they copy?

The TinyStories paper (Eldan and Li 2023, section 4) looked for copied stories by hand and with Rouge; here every
span of a story is looked up in all training stories. Stock phrases ("Once upon a time there was") occur in new
stories too, so real validation stories get the same figures, for comparison.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from model.errors import UserError, first_line, require
from model.files import read_text
from model.packed_data import Data
from model.tokenizer import text_tokenizer

# Shortest span, in tokens, that counts as copied; a power of two
SPAN = 8
# Training tokens processed at once, to bound memory
CHUNK = 1 << 20
# Base (odd) of the polynomial hashes modulo 2**64 that identify spans
BASE = 0x9E3779B97F4A7C15
# Leading hash bits that index the filter table, the first and fastest test
FILTER_BITS = 22
# A run of letters and digits, with inner apostrophes
WORD = re.compile(r"\w+(?:['’]\w+)*")
EXAMPLES = 8


@dataclass(frozen=True)
class Story:
    text: str  # including the prompt
    ended: bool | None = True  # by itself, not cut off; None: not known


def words_in(text: str) -> list[str]:
    return WORD.findall(text.lower())


def describe(groups: dict[str, list[Story]], data: Data | None) -> dict[str, dict]:
    """Figures for each group of stories; with `data`, compared with its training stories.

    All groups share the two passes over the packed training tokens.
    """
    words = {name: [words_in(story.text) for story in stories] for name, stories in groups.items()}
    figures = {name: describe_words(lists) for name, lists in words.items()}
    for name, stories in groups.items():
        ended = [story.ended for story in stories]
        figures[name]["ended"] = None if None in ended else sum(ended) / len(ended)
    if data is None:
        return figures
    tokenizer = text_tokenizer(data.tokenizer_json)
    known = {word for lists in words.values() for own_words in lists for word in own_words}
    unseen = unseen_words(known, data, tokenizer)
    texts = [story.text for stories in groups.values() for story in stories]
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = [np.array(encoding.ids, int) for encoding in encoded]
    judged = list(zip(ids, copied_spans(ids, data.train.tokens), strict=True))
    for name, stories in groups.items():
        own, judged = judged[: len(stories)], judged[len(stories) :]
        figures[name] |= describe_copies(own, tokenizer)
        strange = [word for own_words in words[name] for word in own_words if word in unseen]
        figures[name]["unseen_words"] = len(strange) / max(1, sum(map(len, words[name])))
        figures[name]["unseen_examples"] = sorted(set(strange))[:EXAMPLES]
    return figures


def describe_words(stories: list[list[str]]) -> dict[str, float]:
    """Words per story, distinct-n and repeated 4-grams, for the words of each story.

    distinct-n (Li et al. 2016): distinct word n-grams / all of them, over the whole group; it falls as a group
    grows, so compare groups of equal size. repeated_4grams: the share of a story's word 4-grams that occurred
    in it before.
    """
    figures = {"stories": len(stories), "words": sum(map(len, stories)) / len(stories)}
    for n in (1, 2, 3):
        grams = [gram for words in stories for gram in n_grams(words, n)]
        figures[f"distinct_{n}"] = len(set(grams)) / max(1, len(grams))
    fours = [list(n_grams(words, 4)) for words in stories]
    repeated = sum(len(grams) - len(set(grams)) for grams in fours)
    return {**figures, "repeated_4grams": repeated / max(1, sum(map(len, fours)))}


def n_grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[k:] for k in range(n)), strict=False)


def describe_copies(stories: list[tuple[np.ndarray, "Copies"]], tokenizer: Tokenizer) -> dict[str, object]:
    """The share of the stories' eight-token spans found in training, and the longest spans found."""
    spans = sum(copies.spans for _, copies in stories)
    ids, longest = max(stories, key=lambda pair: pair[1].longest)
    span = ids[longest.start : longest.start + longest.longest].tolist()
    return {
        "copied_8grams": sum(copies.found for _, copies in stories) / max(1, spans),
        "mean_longest_copy": sum(copies.longest for _, copies in stories) / len(stories),
        "longest_copy": longest.longest,
        "longest_copy_text": tokenizer.decode(span, skip_special_tokens=False),
    }


@dataclass(frozen=True)
class Copies:
    """What a story shares with the training stories, in tokens."""

    spans: int  # number of spans of SPAN tokens
    found: int  # of these, in training
    longest: int  # longest span found; 0 if none of SPAN tokens
    start: int  # its start in the story


class SpansOfOneLength:
    """All spans of `length` tokens in the generated stories, as hashes, and which were found in training."""

    def __init__(self, length: int, starts: np.ndarray, hashes: np.ndarray):
        self.length, self.starts, self.hashes = length, starts, hashes
        self.known, self.which = np.unique(hashes, return_inverse=True)
        self.found = np.zeros(len(self.known), bool)

    def look_up(self, hashes: np.ndarray) -> np.ndarray:
        """Mark the spans with these hashes as found; return which hashes match a span."""
        if not len(self.known):
            return np.zeros(len(hashes), bool)
        place = np.searchsorted(self.known, hashes).clip(max=len(self.known) - 1)
        hits = self.known[place] == hashes
        self.found[place[hits]] = True
        return hits

    def longer(self, tokens: np.ndarray, left: np.ndarray) -> "SpansOfOneLength":
        """The spans one token longer; `left` is the number of story tokens from each position on."""
        inside = left[self.starts] > self.length
        starts, hashes = self.starts[inside], self.hashes[inside]
        return SpansOfOneLength(self.length + 1, starts, extend(hashes, tokens[starts + self.length]))


def extend(hashes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Hashes of spans extended by one token."""
    return hashes * np.uint64(BASE) + tokens.astype(np.uint64)


def span_hashes(tokens: np.ndarray) -> np.ndarray:
    """The hash of the SPAN tokens from each position on, by doubling: 2, 4, then 8 tokens."""
    hashes, width = tokens.astype(np.uint64), 1
    while width < SPAN:
        hashes = hashes[:-width] * np.uint64(pow(BASE, width, 2**64)) + hashes[width:]
        width *= 2
    return hashes


def copied_spans(stories: list[np.ndarray], training: np.ndarray) -> list[Copies]:
    """For each story (token ids), which of its spans occur anywhere in the training tokens.

    The training tokens are not indexed: they are streamed once, in chunks, and looked up in the stories' spans.
    If 8 tokens match, 9 are compared, then 10, and so on. Memory depends on the stories and the chunk size, not on
    the training tokens. Exact except for collisions of 64-bit hashes.
    """
    tokens = np.concatenate([np.zeros(0, int), *stories])
    lengths = np.array([len(story) for story in stories])
    first = np.concatenate(([0], np.cumsum(lengths)))
    left = np.concatenate([np.zeros(0, int), *(np.arange(length, 0, -1) for length in lengths)])
    starts = np.flatnonzero(left >= SPAN)
    levels = [SpansOfOneLength(SPAN, starts, span_hashes(tokens)[starts])]
    shift = np.uint64(64 - FILTER_BITS)
    filter_table = np.zeros(1 << FILTER_BITS, bool)
    filter_table[levels[0].known >> shift] = True
    last = len(training) - SPAN + 1
    for begin in tqdm(range(0, max(0, last), CHUNK), desc="novelty", disable=None, delay=2, leave=False):
        hashes = span_hashes(training[begin : min(last, begin + CHUNK) + SPAN - 1])
        at = np.flatnonzero(filter_table[hashes >> shift])
        hashes, at, level = hashes[at], at + begin, 0
        while len(at):
            if level == len(levels):
                levels.append(levels[-1].longer(tokens, left))
            hits = levels[level].look_up(hashes)
            hits &= at + SPAN + level < len(training)
            at, hashes = at[hits], hashes[hits]
            hashes = extend(hashes, training[at + SPAN + level])
            level += 1
    longest, start = np.zeros(len(stories), int), np.zeros(len(stories), int)
    found = np.zeros(len(tokens), bool)
    for spans in levels:
        copied = spans.starts[spans.found[spans.which]]
        story = np.searchsorted(first, copied, side="right") - 1
        longest[story], start[story] = spans.length, copied - first[story]
        if spans.length == SPAN:
            found[copied] = True
    return [
        Copies(max(0, int(n) - SPAN + 1), int(found[a : a + n].sum()), int(length), int(begin))
        for a, n, length, begin in zip(first, lengths, longest, start, strict=False)
    ]


def unseen_words(words: set[str], data: Data, tokenizer: Tokenizer) -> set[str]:
    """The words that no training story has. Reads the packed tokens in chunks of whole stories."""
    unseen, training, begin = set(words), data.train.tokens, 0
    with tqdm(total=len(training), desc="words", unit_scale=True, disable=None, delay=2, leave=False) as bar:
        while unseen and begin < len(training):
            piece = training[begin : begin + CHUNK]
            ends = np.flatnonzero(piece == data.eot_id) + 1
            if len(ends):
                piece = piece[: ends[-1]]
            texts = tokenizer.decode_batch(
                [part.tolist() for part in np.split(piece, ends[99:-1:100])], skip_special_tokens=False
            )
            # deduplicate whitespace-separated pieces first: the pattern is slower than a split
            unseen -= set(words_in(" ".join({piece for text in texts for piece in text.split()})))
            begin += len(piece)
            bar.update(len(piece))
    return unseen


def read_written(path: str) -> list[Story]:
    """The stories in a .jsonl that generate.py wrote. Raises UserError naming a line that is not a story."""
    stories = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, story = row["prompt"], row["story"]
            (prompt + story).encode()  # which fails for half of a surrogate pair, such as "\ud83d"
            reason = row.get("finish_reason")
            ended = None if reason is None else reason != "length"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            lacking = f" ({first_line(error)})" if isinstance(error, KeyError) else ""
            raise UserError(
                f"{path} line {number} is not a story written by generate.py --output{lacking}"
            ) from None
        stories.append(Story(prompt + story, ended))
    require(stories, f"{path} holds no stories")
    return stories
