"""Step 1: collect stories, clean them, and split them into training and validation sets.

    python data/ingestion.py                                  # TinyStories from the Hugging Face hub
    python data/ingestion.py --source owner/name              # another data set there
    python data/ingestion.py --source sample                  # the built-in stories, no network needed
    python data/ingestion.py --source my_stories/ more.jsonl  # files, folders, globs

Files are .txt (stories separated by `<|endoftext|>`, or by blank lines if there is none; flags make each line
or file a story), .jsonl, .json and .csv, optionally compressed as .gz or .zst, and .parquet. Empty stories and exact
duplicates are dropped, no validation story is also a training story, and near-duplicates between the two are counted.
The output is data/raw/train and data/raw/validation, readable with datasets.load_from_disk, and data/raw/manifest.json,
which records what they were made from.
"""

import contextlib
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.script import run_script  # before torch: see there

# isort: split
import numpy as np

from data.hub_stories import open_hub
from data.near_duplicates import count_near_duplicates
from data.raw_stories import (
    SPLITS,
    Progress,
    open_split,
    raw_batches,
    read_manifest,
    story_digest,
    write_arrow,
    write_split,
)
from data.story_files import find_files, read_file, story_per, tidy
from model.errors import UserError, require
from model.files import atomic_folder, command, require_space, sha256_file, shown, size_text, write_json
from model.settings import REPO, read_settings, require_within

SOURCE: list[str] = ["hub"]  # hub (TinyStories), sample (built-in), a hub data set's name[:config], or files
VALIDATION_SOURCE: list[str] = []  # like --source; none: the hub's validation split, else a random share
TEXT_COLUMN: str = "text"  # column or JSON key that holds the story
STORY_PER_LINE: bool = False  # each line of a .txt file is a story
STORY_PER_FILE: bool = False  # each .txt file is a story; if there is only one, its end is for validation
MAX_STORIES: int = 0  # training stories to keep; 0: all (19,000 of the built-in ones)
VALIDATION_FRACTION: float = 0.05  # share of stories drawn at random if there is no validation split
SEED: int = 1  # seed for the built-in stories and the random split
DATA_DIR: str = "data"  # folder for raw/, tokenizer/ and processed/

FORMAT = 2
TINYSTORIES = "roneneldan/TinyStories"
SAMPLE_STORIES = 20_000
# beyond, the grammar makes ever more near copies, which it rejects
MOST_SAMPLE_STORIES = 50_000
# numbers that a NumberSet collects before sorting them in
LATEST = 1_000_000


def main() -> None:
    settings = read_settings(__file__)
    require_within(settings, validation_fraction="(0, 1)", max_stories="[0, inf)")
    settings.story_per = story_per(settings.story_per_line, settings.story_per_file)
    sources = find_sources(settings.source, settings.data_dir)
    validation_sources = find_sources(settings.validation_source, settings.data_dir)
    names = ("text_column", "story_per_line", "story_per_file", "max_stories", "validation_fraction", "seed")
    made_from = {name: getattr(settings, name) for name in names}
    if not settings.story_per_line:
        # so that what was made before there was this setting stays up to date
        del made_from["story_per_line"]
    made_from["source"] = [identity(source) for source in sources]
    made_from["validation_source"] = [identity(source) for source in validation_sources]

    raw = settings.data_dir / "raw"
    if splits := up_to_date(settings.data_dir, made_from):
        print(f"{shown(raw)} is up to date (delete it to rebuild it)")
    else:
        start = time.monotonic()
        with atomic_folder(raw) as folder:
            splits = write_splits(folder, sources, validation_sources, settings)
            write_json(folder / "manifest.json", {"format": FORMAT, "made_from": made_from, "splits": splits})
        print(f"wrote {shown(raw)} in {time.monotonic() - start:.1f} s")
    for split, counts in splits.items():
        print(f"{split:<10} {counts['stories']:>9,} stories  {size_text(counts['bytes']):>9}")
    validation = splits["validation"]
    if near := validation["near_duplicates"]:
        kind, remark = "near-duplicates", ""
        if sources == ["sample"]:
            remark = " (built-in stories are made of the same sentences)"
        elif near > validation["compared"] / 100:
            kind, remark = "warning", ", so scores look too good"
        print(
            f"{kind}: {near:,} of {validation['compared']:,} validation stories share at least half of their sentences "
            f"with a training story{remark}"
        )
    print(f"next: {command('data/train_tokenizer.py', data_dir=settings.data_dir)}")


# Sources: a hub data set's name, the word "sample", or a file path


def find_sources(words: list[str], data_dir: Path) -> list[str | Path]:
    sources = []
    for word in words:
        if word == "sample":
            sources.append(word)
        elif word == "hub":
            sources.append(TINYSTORIES)
        else:
            sources += find_files(word, generated=data_dir) or [word]
    return list(dict.fromkeys(sources))  # a file matched by two globs counts once


def identity(source: str | Path) -> dict:
    """What identifies the content of a source; for a hub data set, only its name."""
    if isinstance(source, Path):
        status = source.stat()
        return {"file": str(source), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    if source == "sample":
        return {"sample": sha256_file(REPO / "data" / "sample_stories.py")}
    return {"hub": source}


def up_to_date(data_dir: Path, made_from: dict) -> dict:
    """The split counts of data/raw if it is complete and made from the same sources, else {}."""
    with contextlib.suppress(UserError):
        manifest = read_manifest(data_dir)
        if manifest.get("format") == FORMAT and manifest.get("made_from") == made_from:
            for split in SPLITS:
                open_split(data_dir / "raw", split, manifest["splits"])
            return manifest["splits"]
    return {}


def open_source(
    source: str | Path, limit: int, settings: SimpleNamespace, bar: Progress
) -> dict[str, Iterator[str]]:
    """The stories of a source as lazy iterators: {"train": ...}, and "validation" if it has that split."""
    if isinstance(source, Path):
        return {"train": read_file(source, settings.text_column, bar, settings.story_per)}
    if source == "sample":
        return {"train": built_in(limit, settings.seed)}
    print(f"opening {source} on the Hugging Face hub", flush=True)
    return open_hub(source, settings.text_column, settings.max_stories > 0, settings.data_dir)


def built_in(limit: int, seed: int) -> Iterator[str]:
    from data.sample_stories import sample_stories

    count = limit or SAMPLE_STORIES
    most = f"{MOST_SAMPLE_STORIES:,} stories, for training and validation together"
    require(count <= MOST_SAMPLE_STORIES, f"--source sample makes at most {most}")
    with Progress(total=count, desc="built-in stories", unit=" stories") as bar:
        # with a limit twice as many, since other sources may have some of them; not all are made
        for story in sample_stories(2 * count if limit else count, seed):
            bar.update()
            yield story


# Cleaning and splitting


def write_splits(folder: Path, sources: list, validation_sources: list, settings: SimpleNamespace) -> dict:
    """Write both splits into the folder; return stories, bytes and digest of each."""
    fraction, limit = settings.validation_fraction, settings.max_stories
    total = stories_in_all(limit, fraction) if limit else 0
    files = [source for source in (*sources, *validation_sources) if isinstance(source, Path)]
    size = sum(file.stat().st_size for file in files)
    dropped = Counter()
    with Progress(disable=None if files else True, total=size, unit="B", desc="reading") as bar:
        opened = [open_source(source, total, settings, bar) for source in sources]
        validation = [source["validation"] for source in opened if "validation" in source]
        if validation_sources:
            apart = [open_source(source, 0, settings, bar) for source in validation_sources]
            validation = [source.get("validation", source["train"]) for source in apart]
        train = itertools.chain(*(source["train"] for source in opened))
        if not limit:
            # split_at_random() writes everything twice
            require_space(folder, size if validation else 2 * size)
        if validation:
            taken = NumberSet()
            stories = clean(itertools.chain(*validation), dropped, taken)
            splits = {"validation": write_split(folder / "validation", stories, bar)}
            stories = itertools.islice(clean(train, dropped, NumberSet(), taken), limit or None)
            splits["train"] = write_split(folder / "train", stories, bar)
            for split, counts in splits.items():
                require(counts["stories"] > 0, f"no {split} stories found; dropped: {listed(dropped)}")
        else:
            stories = itertools.islice(clean(train, dropped, NumberSet()), total or None)
            splits = split_at_random(folder, stories, settings, dropped, bar)
    splits["validation"] |= count_near_duplicates(*(open_split(folder, split, splits) for split in SPLITS))
    print(f"dropped: {listed(dropped)}")
    return {split: splits[split] for split in SPLITS}


class NumberSet:
    """A set of 64-bit numbers in 8 bytes each: most in a sorted array, the latest in a Python set."""

    def __init__(self):
        self.sorted = np.empty(0, np.int64)
        self.latest: set[int] = set()

    def __contains__(self, number: int) -> bool:
        place = self.sorted.searchsorted(number)
        return number in self.latest or (place < len(self.sorted) and self.sorted[place] == number)

    def add(self, number: int) -> None:
        self.latest.add(number)
        if len(self.latest) == LATEST:
            self.sorted = np.concatenate([self.sorted, np.fromiter(self.latest, np.int64)])
            self.sorted.sort()
            self.latest.clear()


def clean(stories: Iterable[str], dropped: Counter, seen: NumberSet, taken: Container = ()) -> Iterator[str]:
    """Yield tidied stories; drop and count empty, repeated and `taken` ones."""
    for story in stories:
        story = tidy(story)
        # 64 bits: of corpora of 20 million stories, one in 90,000 has a collision
        key = int.from_bytes(story_digest(story)[:8], "little", signed=True)
        if not story:
            dropped["empty"] += 1
        elif key in taken:
            dropped["in validation too"] += 1
        elif key in seen:
            dropped["duplicates"] += 1
        else:
            seen.add(key)
            yield story


def listed(dropped: Counter) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in sorted(dropped.items())) or "nothing"


def validation_count(total: int, fraction: float) -> int:
    return max(1, round(total * fraction))


def stories_in_all(train: int, fraction: float) -> int:
    """How many stories are needed for `train` to remain after the validation share is taken."""
    total = int(train / (1 - fraction))
    while total - validation_count(total, fraction) < train:
        total += 1
    return total


def split_at_random(
    folder: Path, stories: Iterable[str], settings: SimpleNamespace, dropped: Counter, bar: Progress
) -> dict:
    """Draw the validation stories at random; both splits keep the source order. A single story is cut in two."""
    from datasets import Dataset

    everything = folder / "everything.arrow"
    total = write_arrow(everything, stories, bar)["stories"]
    require(total > 0, f"no stories found in {' '.join(settings.source)}; dropped: {listed(dropped)}")
    splits, whole = {}, Dataset.from_file(str(everything))
    if total == 1:
        halves = cut_in_two(whole[0]["text"], settings.validation_fraction)
        everything.unlink()
        return {
            split: write_split(folder / split, [part]) for split, part in zip(SPLITS, halves, strict=True)
        }
    count = min(total - 1, validation_count(total, settings.validation_fraction))
    chosen = set(random.Random(settings.seed).sample(range(total), count))
    with Progress(total=2 * whole.data.nbytes, unit="B", desc="splitting") as splitting:
        for split in SPLITS:
            numbered = enumerate(itertools.chain.from_iterable(raw_batches(whole, splitting)))
            mine = (story for index, story in numbered if (index in chosen) == (split == "validation"))
            splits[split] = write_split(folder / split, mine)
    everything.unlink()
    return splits


def cut_in_two(story: str, fraction: float) -> tuple[str, str]:
    """Hold out the end of a story, from the beginning of a line or, if lines are too long, of a word; returns both."""
    held = fraction * len(story)
    wanted = int(len(story) - held)
    cuts = [
        cut
        for mark in "\n "
        for cut in (story.rfind(mark, 0, wanted + 1), story.find(mark, wanted))
        if cut > 0
    ]
    cut = next((cut for cut in cuts if abs(cut - wanted) <= held / 2), 0)
    require(
        cut,
        "only one story found, but training and validation need one each: add stories, or name others with "
        "--validation-source",
    )
    print(
        f"only one story: the last {len(story) - cut:,} of its {len(story):,} characters are for validation"
    )
    return story[:cut].rstrip(), story[cut:].lstrip()


if __name__ == "__main__":
    run_script(main)
