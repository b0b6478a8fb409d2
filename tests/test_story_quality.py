"""Figures of written stories against counting by hand and against loops over every span."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model import story_quality
from model.errors import UserError
from model.packed_data import Data, Split
from model.story_quality import (
    SPAN,
    Story,
    copied_spans,
    describe,
    describe_words,
    read_written,
    span_hashes,
    unseen_words,
    words_in,
)

EOT = 0
tokens_lists = st.lists(st.integers(1, 3), max_size=40)


def copies_by_loops(story, training):
    """(spans of eight found, longest span found) by looking for each span at each place."""
    text = [training[k : k + n].tolist() for n in (SPAN,) for k in range(len(training) - n + 1)]
    found = sum(story[k : k + SPAN].tolist() in text for k in range(len(story) - SPAN + 1))
    longest = 0
    for length in range(SPAN, len(story) + 1):
        places = [training[k : k + length].tolist() for k in range(len(training) - length + 1)]
        if any(story[k : k + length].tolist() in places for k in range(len(story) - length + 1)):
            longest = length
    return found, longest


@settings(max_examples=60, deadline=None)
@given(st.lists(tokens_lists, min_size=1, max_size=4), st.lists(tokens_lists, min_size=1, max_size=6))
def test_copied_spans_are_those_that_loops_find(stories, training):
    """Three different tokens, so that spans are found by chance; pieces of 16, so that they lie across two."""
    stories = [np.array(story, int) for story in stories]
    training = np.array([token for story in training for token in (*story, EOT)], "<u2")
    chunk, story_quality.CHUNK = story_quality.CHUNK, 16
    try:
        copies = copied_spans(stories, training)
    finally:
        story_quality.CHUNK = chunk
    for story, copy in zip(stories, copies, strict=True):
        assert copy.spans == max(0, len(story) - SPAN + 1)
        assert (copy.found, copy.longest) == copies_by_loops(story, training)
        span = story[copy.start : copy.start + copy.longest].tolist()
        assert any(training[k : k + copy.longest].tolist() == span for k in range(len(training)))


def test_a_planted_copy_is_found_where_it_lies():
    rng = np.random.default_rng(0)
    training = rng.integers(1, 10_000, 50_000).astype("<u2")
    new = rng.integers(10_000, 20_000, 300)
    story = new.copy()
    story[100:137] = training[40_000:40_037]
    none, copy = copied_spans([new, story], training)
    assert (none.found, none.longest) == (0, 0)
    assert (copy.found, copy.longest, copy.start) == (37 - SPAN + 1, 37, 100)


def test_a_copy_does_not_run_on_into_the_next_story():
    training = np.arange(1, 41).astype("<u2")
    first, second = np.arange(1, 13), np.arange(13, 25)
    assert [copy.longest for copy in copied_spans([first, second], training)] == [12, 12]


def test_hashes_are_of_the_tokens_alone():
    tokens = np.random.default_rng(0).integers(0, 9, 500).astype("<u2")
    hashes = span_hashes(tokens)
    spans = [tuple(tokens[k : k + SPAN].tolist()) for k in range(len(tokens) - SPAN + 1)]
    assert len(hashes) == len(spans)
    assert len(set(zip(spans, hashes.tolist(), strict=True))) == len(set(spans)) == len(set(hashes.tolist()))


# Words


def test_words_are_lower_case_with_their_apostrophes():
    assert words_in("“Don’t!” said Zoë's DOG, 2 times.") == ["don’t", "said", "zoë's", "dog", "2", "times"]


def test_figures_of_text_by_hand():
    texts = ["The cat sat. The cat sat. The cat sat.", "A dog ran."]
    figures = describe_words([words_in(text) for text in texts])
    words = 9 + 3
    assert figures["stories"] == 2 and figures["words"] == words / 2
    assert figures["distinct_1"] == 6 / words
    assert figures["distinct_2"] == (3 + 2) / (8 + 2)
    assert figures["distinct_3"] == (3 + 1) / (7 + 1)
    assert figures["repeated_4grams"] == 3 / 6  # cat-sat-the-cat comes again, and so do two others


def test_stories_without_words_have_figures_too():
    figures = describe_words([words_in(""), words_in("!")])
    assert figures["words"] == figures["distinct_2"] == figures["repeated_4grams"] == 0


@pytest.fixture(scope="module")
def data():
    """Training stories of bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<|endoftext|>": 0} | {c: k for k, c in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.encode_special_tokens = True
    stories = ["The cat sat on the mat", "“Oh,” said the dragonfly’s friend.", "Zoë ran away"]
    ids = [(*tokenizer.encode(story).ids, EOT) for story in stories]
    tokens = np.array([token for story in ids for token in story], "<u2")
    split = Split(tokens, len(stories), sum(len(s.encode()) for s in stories), "-")
    return Data(split, split, 300, EOT, tokenizer.to_str()), tokenizer, stories


@pytest.mark.parametrize("chunk", [7, 30, 50, 1_000])
def test_unseen_words_are_in_no_training_story(data, monkeypatch, chunk):
    packed, tokenizer, _ = data
    monkeypatch.setattr(story_quality, "CHUNK", chunk)
    words = {"cat", "mat", "oh", "dragonfly’s", "zoë", "away", "dragon", "at", "matoh", "zebra"}
    unseen = unseen_words(words, packed, tokenizer)
    if chunk >= 50:  # a piece holds a whole story: nothing is cut
        assert unseen == {"dragon", "at", "matoh", "zebra"}
    assert {"zebra", "matoh"} <= unseen


def test_a_group_of_training_stories_is_all_copied(data):
    packed, _, stories = data
    groups = {
        "copies": [Story(story, ended=k > 0) for k, story in enumerate(stories)],
        "new": [Story("Big bad zebras"), Story("")],
        "both": [Story(stories[0]), Story("Zebras, zebras!")],
    }
    figures = describe(groups, packed)
    assert figures["copies"]["copied_8grams"] == 1 and figures["copies"]["unseen_words"] == 0
    assert figures["copies"]["longest_copy"] == len(stories[1].encode())
    assert figures["copies"]["mean_longest_copy"] == np.mean([len(story.encode()) for story in stories])
    assert figures["copies"]["longest_copy_text"] == stories[1]
    assert figures["copies"]["ended"] == pytest.approx(2 / 3)
    assert figures["new"]["copied_8grams"] == 0 and figures["new"]["longest_copy"] == 0
    assert figures["new"]["unseen_words"] == 1
    assert figures["new"]["unseen_examples"] == ["bad", "big", "zebras"]
    assert figures["both"]["mean_longest_copy"] == len(stories[0]) / 2  # of all stories, and of all words
    assert figures["both"]["unseen_words"] == 2 / 8 and figures["both"]["unseen_examples"] == ["zebras"]


def test_without_training_stories_nothing_is_said_of_them():
    assert "copied_8grams" not in describe({"a": [Story("A cat.")]}, None)["a"]


# Files


def test_stories_of_generate_are_read(tmp_path):
    rows = [
        {"prompt": "Once", "story": " there was.", "finish_reason": "end_of_story"},
        {"prompt": "", "story": "And then", "finish_reason": "length"},
        {"prompt": "", "story": "By others."},
    ]
    path = tmp_path / "stories.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    stories = read_written(str(path))
    assert stories == [
        Story("Once there was.", True),
        Story("And then", False),
        Story("By others.", None),
    ]
    assert describe({"a": stories[:2], "b": stories}, None)["a"]["ended"] == 0.5
    assert describe({"b": stories}, None)["b"]["ended"] is None


@pytest.mark.parametrize(
    ("content", "needle"),
    [
        (b"", "holds no stories"),
        (b'{"prompt": "a", "story": "b"}\n{"text": "c"}\n', "line 2 is not a story .*no entry 'prompt'"),
        (b"Once upon\n", "line 1 is not a story"),
        (b"[1]\n", "line 1 is not a story"),
        (b'{"prompt": "a", "story": null}', "line 1 is not a story"),
        (b'{"prompt": ["a"], "story": ["b"]}', "line 1 is not a story"),
        (rb'{"prompt": "a", "story": "\ud83d"}', "line 1 is not a story"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (None, "there is no file"),
    ],
)
def test_what_is_no_story_is_named(tmp_path, content, needle):
    if content is not None:
        (tmp_path / "stories.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=needle):
        read_written(str(tmp_path / "stories.jsonl"))
