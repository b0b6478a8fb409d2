"""Count near-duplicates: validation stories that share at least half of their sentences with one training story.

Case, whitespace and punctuation are ignored. Exact duplicates have already been removed. Two stories are compared only
if they share a sentence that is not commonplace.
"""

import string
from itertools import chain

from data.raw_stories import Progress, raw_batches

COMPARED = 25_000  # maximum number of validation stories to check, evenly spaced, to bound memory
TELLING = 20  # letters; shorter sentences may match by chance
COMMONPLACE = 5  # validation stories; a sentence found in more of them is commonplace

ENDS = b".!?\n"
PLAIN = bytes.maketrans(string.ascii_uppercase.encode() + ENDS, string.ascii_lowercase.encode() + b"....")
DROPPED = bytes(c for c in range(128) if chr(c) not in string.ascii_letters + string.digits + ENDS.decode())


def sentences(story: str) -> set[bytes]:
    """A story's longer sentences, as bare letters and digits; if it has none, the whole story."""
    plain = story.encode().translate(PLAIN, DROPPED)
    return {part for part in plain.split(b".") if len(part) >= TELLING} or {plain.replace(b".", b"")}


def count_near_duplicates(train: object, validation: object) -> dict:
    """{"compared": validation stories checked, "near_duplicates": how many of them are}, for two datasets."""
    step = -(-len(validation) // COMPARED)
    chosen = validation.select(range(0, len(validation), step))
    found_in: dict[bytes, list[int]] = {}
    validation_sentences = []
    for number, story in enumerate(chain.from_iterable(raw_batches(chosen))):
        validation_sentences.append(sentences(story))
        for sentence in validation_sentences[-1]:
            found_in.setdefault(sentence, []).append(number)
    found_in = {sentence: numbers for sentence, numbers in found_in.items() if len(numbers) <= COMMONPLACE}

    near = set()
    with Progress(total=train.data.nbytes, unit="B", desc="near-duplicates") as bar:
        for story in chain.from_iterable(raw_batches(train, bar)):
            own = sentences(story)
            alike = {number for sentence in own & found_in.keys() for number in found_in[sentence]}
            for number in alike - near:
                theirs = validation_sentences[number]
                if 2 * len(own & theirs) >= len(theirs):
                    near.add(number)
    return {"compared": len(validation_sentences), "near_duplicates": len(near)}
