"""The built-in stories: distinct, well formed, reproducible, and no near copies of one another."""

import re
from collections import Counter, defaultdict

import pytest

from data.sample_stories import sample_stories

SHE_WORDS = re.compile(r"\b(she|her|hers|herself)\b", re.IGNORECASE)
HE_WORDS = re.compile(r"\b(he|him|his|himself)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def many_stories():
    return list(sample_stories(50_000))


@pytest.fixture(scope="module")
def stories(many_stories):
    return many_stories[:5_000]


def outside_quotes(text):
    return re.sub(r'"[^"]*"', "", text)


def test_stories_are_distinct(many_stories):
    assert len(set(many_stories)) == 50_000


def test_stories_have_three_paragraphs(stories):
    for story in stories:
        paragraphs = story.split("\n\n")
        assert len(paragraphs) == 3
        assert all(paragraph == paragraph.strip() and "\n" not in paragraph for paragraph in paragraphs)
        assert 90 <= len(story.split()) <= 220


def test_vocabulary_is_large_and_every_word_is_used_often(many_stories):
    words = Counter(re.findall(r"[a-z]+", "\n".join(many_stories[:20_000]).lower()))
    assert len(words) >= 1_500
    assert sum(count < 5 for count in words.values()) < 20


def test_seed_decides_the_stories(stories):
    assert list(sample_stories(100)) == list(sample_stories(1_000))[:100] == stories[:100]
    assert not set(sample_stories(1_000, seed=2)) & set(stories)
    assert list(sample_stories(0)) == []


def test_only_plain_characters_and_nothing_unfilled(stories):
    for story in stories:
        assert re.fullmatch(r"[A-Za-z .,!?:'\"\n-]+", story), story


def test_spaces_and_punctuation(stories):
    for story in stories:
        assert not re.search(
            r" [.,!?:]|[ ]{2}|,\.|(?<!\.)\.\.(?!\.)|[,!?][,!?]|[.,!?:](?=[A-Za-z])", story
        ), story
        assert not re.search(r"\b(\w+) \1\b", story, re.IGNORECASE), story


def test_quotes_are_balanced_and_stand_well(stories):
    for story in stories:
        for paragraph in story.split("\n\n"):
            assert paragraph.count('"') % 2 == 0, paragraph
            outside, inside = paragraph.split('"')[::2], paragraph.split('"')[1::2]
            assert all(quote[0].isupper() and quote[-1] in ".,!?" for quote in inside), paragraph
            assert all(text[0] == " " for text in outside[1:] if text), paragraph
            assert all(text[-1] == " " for text in outside[:-1] if text), paragraph


def test_sentences_start_with_a_capital_and_end(stories):
    for story in stories:
        for paragraph in story.split("\n\n"):
            assert paragraph[-1] in '.!?"'
            assert re.match(r'"?[A-Z]', paragraph)
            assert not re.search(
                r'[.!?] "?[a-z]|\." [a-z]', paragraph.replace("... ", "").replace("Mr. ", "")
            ), paragraph


def test_a_before_consonants_and_an_before_vowels(stories):
    for story in stories:
        assert not re.search(r"\ba (?=[aeiou])|\ban (?![aeiou])", story, re.IGNORECASE), story


def test_pronouns_fit_the_hero(stories):
    """Where the hero is the only one named, the narrator's every he or she is the hero."""
    checked = 0
    for story in stories:
        names = set(
            re.findall(r"(?<![.!?] )(?<!\")(?<!^)\b[A-Z][a-z]+\b", outside_quotes(story), re.MULTILINE)
        )
        elders = re.findall(r"\b(mom|mommy|mama|grandma|granny|nana|dad|daddy|papa|grandpa)\b", story)
        if len(names - {elder.capitalize() for elder in elders} - {"I"}) > 1:
            continue
        hero = re.search(r"\b(girl|boy)\b", story)
        if hero:
            checked += 1
            wrong = HE_WORDS if hero[1] == "girl" else SHE_WORDS
            assert not wrong.search(outside_quotes(story)), story
    assert checked > 500


def test_every_name_has_one_sex(stories):
    """After 'a girl named X' or 'his friend X', X keeps that sex in every story."""
    sexes = defaultdict(set)
    for story in stories:
        for kind, name in re.findall(
            r"\b(girl|boy)(?: named| called| whose name was|,) ([A-Z][a-z]+)", story
        ):
            sexes[name].add(kind)
        for owner, name in re.findall(
            r"\b(his|her) (?:friend|cousin|sister|brother) ([A-Z][a-z]+)\b(?! the)", story
        ):
            sexes[name].add("girl" if owner == "his" else "boy")
    assert len(sexes) > 60
    assert all(len(kinds) == 1 for kinds in sexes.values())


def test_hero_is_named_in_every_paragraph(stories):
    names = set(re.findall(r"(?:named|called|whose name was) ([A-Z][a-z]+)", "\n".join(stories)))
    for story in stories:
        first, second, third = (re.findall(r"\b[A-Z][a-z]+\b", text) for text in story.split("\n\n"))
        assert names.intersection(first).intersection(second).intersection(third), story


def differs_in_one_span(first, second, longest=4):
    """Whether two word lists are equal but for one stretch of at most `longest` words."""
    start, end = 0, 0
    shorter = min(len(first), len(second))
    while start < shorter and first[start] == second[start]:
        start += 1
    while end < shorter - start and first[-1 - end] == second[-1 - end]:
        end += 1
    return max(len(first), len(second)) - start - end <= longest


def test_no_story_is_another_with_one_phrase_changed(stories):
    # Two such stories share their first 40 or their last 40 words, so only those pairs need comparing.
    groups = defaultdict(list)
    for story in stories:
        words = story.split()
        groups["first", " ".join(words[:40])].append(words)
        groups["last", " ".join(words[-40:])].append(words)
    for group in groups.values():
        for i, words in enumerate(group):
            assert not any(differs_in_one_span(words, other) for other in group[:i]), " ".join(words)


def test_no_two_stories_differ_only_in_their_names(many_stories):
    nameless = {re.sub(r"\b[A-Z][a-z]+\b", "X", story) for story in many_stories[:20_000]}
    assert len(nameless) == 20_000
