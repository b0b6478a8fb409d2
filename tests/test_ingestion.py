import csv
import errno
import gzip
import io
import json
import os
import random
import shlex
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import REPO, assert_one_line_error
from fake_hub import serve_hub
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ingestion, raw_stories
from data.hub_stories import open_hub
from data.raw_stories import BATCH_BYTES, raw_batches, write_split
from data.story_files import find_files, read_file
from model.errors import UserError

STORIES = [
    "Once there was a cat.\n\nIt purred.",
    "A \u201cquoted\u201d, comma'd story, with 🐉 and caf\u00e9.",
    'He said, "Hello!"\nThen he left.',
    "The end.",
]


def read_split(data_dir, split):
    return datasets.load_from_disk(str(data_dir / "raw" / split))["text"][:]


def read_all(data_dir):
    return read_split(data_dir, "train"), read_split(data_dir, "validation")


def manifest(data_dir):
    return json.loads((data_dir / "raw" / "manifest.json").read_text(encoding="utf-8"))


def parquet(stories, column="text"):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(stories))), column: stories}), buffer)
    return buffer.getvalue()


def write_stories(path, stories=STORIES):
    """The stories as a file of the type that the suffix says."""
    rows = [{"id": number, "text": story} for number, story in enumerate(stories)]
    if path.suffix == ".parquet":
        path.write_bytes(parquet(stories))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(
            {
                ".txt": "\n<|endoftext|>\n".join(stories),
                ".jsonl": "\n".join(map(json.dumps, rows)),
                ".json": json.dumps(rows, indent=1),
            }[path.suffix],
            encoding="utf-8",
        )
    return path


# Reading files


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet", ".TXT"])
def test_every_file_type_gives_the_stories(tmp_path, suffix):
    path = write_stories(tmp_path / f"stories{suffix.lower()}").rename(tmp_path / f"stories{suffix}")
    assert [story.strip() for story in read_file(path, "text")] == STORIES


PACKERS = {
    ".gz": gzip.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
def test_packed_files(tmp_path, suffix, packed):
    content = write_stories(tmp_path / f"stories{suffix}").read_bytes()
    path = tmp_path / f"packed{suffix}{packed}"
    middle = len(content) // 2  # packed in two parts, one behind the other, as `cat a.gz b.gz` makes
    path.write_bytes(PACKERS[packed](content[:middle]) + PACKERS[packed](content[middle:]))
    assert [story.strip() for story in read_file(path, "text")] == STORIES
    assert find_files(str(tmp_path / "*.??*"), tmp_path / "data") == [path, tmp_path / f"stories{suffix}"]


def cut_short(content):
    return content[:-9]


def not_packed(content):
    return b"x" * 99


def bit_flipped(content):
    return content[:30] + bytes([content[30] ^ 255]) + content[31:]


@pytest.mark.parametrize(
    ("packed", "harm"),  # a .zst may lack the checksum by which a flipped bit is found
    [
        (".gz", cut_short),
        (".gz", not_packed),
        (".gz", bit_flipped),
        (".zst", cut_short),
        (".zst", not_packed),
    ],
)
def test_packed_files_that_are_damaged(tmp_path, packed, harm):
    path = tmp_path / f"stories.txt{packed}"
    path.write_bytes(harm(PACKERS[packed](" ".join(map(str, range(999))).encode())))
    with pytest.raises(UserError, match=r"stories\.txt\.(gz|zst) is cut short or damaged"):
        list(read_file(path, "text"))


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(STORIES),
        json.dumps({"data": [{"text": story} for story in STORIES]}),
        json.dumps({"id": [1, 2, 3, 4], "text": STORIES}),
        json.dumps({"text": {str(number): story for number, story in enumerate(STORIES)}}),
        "\n\n".join(json.dumps({"text": story}) for story in STORIES),
        "\ufeff \r\n [" + ",\r\n".join(json.dumps({"text": story}) for story in STORIES) + " ]\n",
    ],
    ids=["texts", "data", "columns", "pandas", "lines", "array"],
)
def test_every_form_of_json(tmp_path, text):
    path = tmp_path / "stories.json"
    path.write_bytes(text.encode())
    assert list(read_file(path, "text")) == STORIES


def test_json_elements_may_lie_across_the_blocks_it_is_read_in(tmp_path, monkeypatch):
    monkeypatch.setattr("data.story_files.BLOCK", 7)
    path = write_stories(tmp_path / "stories.json")
    assert list(read_file(path, "text")) == STORIES


def test_blank_lines_part_stories_only_where_no_separator_is(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("one\nstill one\n\n\n \ntwo\n\nthree", encoding="utf-8")
    assert [story.strip() for story in read_file(path, "text")] == ["one\nstill one", "two", "three"]
    path.write_text("one\n\nstill one\n  <|endoftext|> \ntwo\n\nstill two\n", encoding="utf-8")
    assert [story.strip() for story in read_file(path, "text")] == ["one\n\nstill one", "two\n\nstill two"]


def test_a_separator_within_a_line_parts_stories_too(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("one\n\nstill one <|endoftext|>\ntwo <|endoftext|>\nthree", encoding="utf-8")
    assert [story.strip() for story in read_file(path, "text")] == ["one\n\nstill one", "two", "three"]
    path.write_text("<|endoftext|>one<|endoftext|>two\n\nstill two<|endoftext|>\n\n", encoding="utf-8")
    assert [story.strip() for story in read_file(path, "text")] == ["", "one", "two\n\nstill two"]


def test_a_file_may_be_one_story(run, tmp_path):
    texts = ["One\n\n day.", "Two <|endoftext|> days.", "Three.\n"]
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text, encoding="utf-8")
    flags = ["--source", tmp_path / "in", "--data-dir", tmp_path]
    result = run("data/ingestion.py", *flags, "--story-per-file", check=0)
    train, validation = read_all(tmp_path)
    assert sorted(train + validation) == sorted(text.strip() for text in texts)
    assert "--story-per-file" not in result.stdout
    result = run("data/ingestion.py", *flags, check=0)
    train, validation = read_all(tmp_path)
    assert sorted(train + validation) == ["One", "Three.", "Two", "day.", "days."]
    assert result.stdout.count("with --story-per-file each file") == 1  # however many files there are
    result = run("data/ingestion.py", *flags, "--story-per-line", check=0)
    train, validation = read_all(tmp_path)
    assert sorted(train + validation) == ["One", "Three.", "Two <|endoftext|> days.", "day."]


def test_a_text_may_be_a_single_story(run, tmp_path):
    """Such as a book: its end is for validation."""
    (tmp_path / "book.txt").write_text("".join(f"line {number}\n\n" for number in range(100)))
    flags = ["--source", tmp_path / "book.txt", "--data-dir", tmp_path, "--story-per-file"]
    result = run("data/ingestion.py", *flags, "--validation-fraction", 0.1, check=0)
    (train,), (validation,) = read_all(tmp_path)
    assert f"{train}\n\n{validation}\n\n" == (tmp_path / "book.txt").read_text()
    assert (
        train.endswith("\nline 89")
        and "the last 89 of its 888 characters are for validation" in result.stdout
    )


def test_folders_and_globs(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".hidden").mkdir()
    names = ("b.txt", "deep/a.jsonl", "a.csv", "notes.md", ".hidden/x.txt", ".x.txt")
    for name in names:
        (tmp_path / "in" / name).write_text("x", encoding="utf-8")
    found = [
        path.relative_to(tmp_path / "in").as_posix() for path in find_files(str(tmp_path / "in"), tmp_path)
    ]
    assert found == ["a.csv", "b.txt", "deep/a.jsonl"]
    found = [path.name for path in find_files(str(tmp_path / "in" / "*.txt"), tmp_path)]
    assert found == ["b.txt"]
    found = [path.name for path in find_files(str(tmp_path / "in" / "**" / "*.jsonl"), tmp_path)]
    assert found == ["a.jsonl"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("x", encoding="utf-8")
    (tmp_path / "in" / "link").symlink_to("../elsewhere")
    (tmp_path / "in" / "deep" / "round").symlink_to("..")
    found = [path.name for path in find_files(str(tmp_path / "in"), tmp_path)]
    assert found == ["a.csv", "b.txt", "a.jsonl", "c.txt"]  # each once


def test_a_folder_source_leaves_out_what_the_scripts_wrote(tmp_path):
    write_stories(tmp_path / "mine.json")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "link").symlink_to(".")
    for source, generated in (
        (tmp_path, tmp_path),
        (tmp_path, tmp_path / "link"),
        (tmp_path / "link", tmp_path),
    ):
        assert [path.name for path in find_files(str(source), generated)] == ["mine.json"]


BROKEN = {
    "bad.txt": (b"fine\r\nstill fine\r\nbad \xff\r\n", "line 3 is not UTF-8"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2 is not UTF-8"),
    "utf16.txt": ("text".encode("utf-16"), "line 1 is not UTF-8"),
    "cut.jsonl": (b'{"text": "a"}\n\n{"text": "b\n', "line 3 is not JSON"),
    "cut.json": (b'[{"text": "a"},\n{"text": "b"}\n', "line 3 is not JSON"),
    "comma.json": (b'[{"text": "a"}\n{"text": "b"}]', "line 2 is not JSON"),
    "more.json": (b'[{"text": "a"}]\n[]', "line 1 is not JSON"),
    "object.json": (b'{"text": \n oops}', "line 2 is not JSON"),
    "deep.json": (b"[" * 100_000, "line 1 is not JSON"),
    "column.json": (
        b'[{"text": "a"},\n {"title": "b", "story": "c"}]',
        "line 2 has no column 'text': it has title, story",
    ),
    "column.jsonl": (b'{"title": "b"}', "line 1 has no column 'text': it has title"),
    "column.csv": (b"title,story\na,b\n", "line 1 has no column 'text': it has title, story"),
    "quote.csv": (b'text\n"one"\n"two\n', "line 3 is not CSV"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 4}', "line 2: a story must be text, not int"),
    "list.json": (b'[["a"]]', "line 1: a story must be text, not list"),
    "half.jsonl": (b'{"text": "\\ud83d"}', "line 1: the story contains half of a surrogate pair"),
    "bad.parquet": (b"PAR1 and no more", "is not a readable parquet file"),
    "column.parquet": (parquet(["a"], "story"), "has no column 'text': it has id, story"),
    "number.parquet": (parquet([1, 2]), "row 1: a story must be text, not int"),
}


def test_a_blank_line_of_a_csv_is_an_empty_story(tmp_path):
    (tmp_path / "stories.csv").write_text("id,text\n1,one\n\n3,three\n")
    assert list(read_file(tmp_path / "stories.csv", "text")) == ["one", "", "three"]


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_file(tmp_path / name, "text"))
    assert name in str(caught.value) and message in str(caught.value)
    assert len(str(caught.value)) < 400


# Cleaning and parting


def test_mixed_sources_line_ends_duplicates_and_empties(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbf  one\r\n\r\nmore\r<|endoftext|>\r\n\r\n<|endoftext|>\r\ntwo\r\n"
    )
    rows = [{"story": "two"}, {"story": "one\n\nmore\n"}, {"story": None}, {"story": "three "}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "c.txt").write_text("four\n\nfive\n\ntwo", encoding="utf-8")
    data = tmp_path / "data"
    result = run(
        "data/ingestion.py", "--source", "a.txt", "*.jsonl", "c.txt", "a.txt", "--text-column", "story",
        "--validation-fraction", "0.4", "--data-dir", data, cwd=tmp_path, check=0,
    )  # fmt: skip
    train, validation = read_all(data)
    assert sorted(train + validation) == sorted(["one\n\nmore", "two", "three", "four", "five"])
    assert len(validation) == 2
    order = ["one\n\nmore", "two", "three", "four", "five"]
    assert train == [story for story in order if story in train]
    assert "dropped: 3 duplicates, 2 empty" in result.stdout
    assert (
        "3 stories" in result.stdout
        and "2 stories" in result.stdout
        and "data/train_tokenizer.py" in result.stdout
    )
    assert result.stderr == ""
    counts = manifest(data)["splits"]
    assert counts["train"]["bytes"] == sum(len(story.encode()) for story in train)
    assert counts["validation"]["stories"] == 2
    leftovers = sorted(path.name for path in data.rglob("*") if path.is_file())
    assert leftovers == sorted(
        ["manifest.json", *["data-00000-of-00001.arrow", "dataset_info.json", "state.json"] * 2]
    )


def test_the_seed_decides_the_built_in_stories():
    def stories(seed):
        return list(ingestion.open_source("sample", 3, SimpleNamespace(seed=seed), None)["train"])

    assert stories(1) == stories(1) != stories(2)


def test_the_drawn_part_depends_on_the_seed_alone(tmp_path, run):
    path = write_stories(tmp_path / "many.txt", [f"story {number}" for number in range(200)])
    drawn = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("data/ingestion.py", "--source", path, "--seed", seed, "--data-dir", tmp_path / name, check=0)
        drawn[name] = read_all(tmp_path / name)
    assert drawn["a"] == drawn["b"] != drawn["c"]
    train, validation = drawn["a"]
    assert len(train) == 190 and len(validation) == 10 and not set(train) & set(validation)
    assert (
        manifest(tmp_path / "a")["splits"]
        == manifest(tmp_path / "b")["splits"]
        != manifest(tmp_path / "c")["splits"]
    )


def test_a_validation_source_is_taken_whole_and_kept_out_of_training(run, tmp_path):
    write_stories(tmp_path / "train.txt", ["a", "b", "c", "b", "d"])
    write_stories(tmp_path / "valid.csv", ["c", "x", "x"])
    result = run(
        "data/ingestion.py", "--source", "train.txt", "--validation-source", "valid.csv", "--data-dir", "out",
        cwd=tmp_path, check=0,
    )  # fmt: skip
    assert read_all(tmp_path / "out") == (["a", "b", "d"], ["c", "x"])
    assert "dropped: 2 duplicates, 1 in validation too" in result.stdout


@pytest.mark.parametrize(("limit", "fraction"), [(1, 0.05), (10, 0.05), (19, 0.05), (50, 0.3), (3, 0.9)])
def test_max_stories_counts_training_stories_without_duplicates(tmp_path, limit, fraction, monkeypatch):
    path = write_stories(tmp_path / "many.txt", [f"story {number // 2}" for number in range(300)])
    arguments = [
        "--source",
        path,
        "--max-stories",
        limit,
        "--validation-fraction",
        fraction,
        "--data-dir",
        tmp_path / "d",
    ]
    monkeypatch.setattr("sys.argv", ["ingestion.py", *map(str, arguments)])
    ingestion.main()
    train, validation = read_all(tmp_path / "d")
    assert len(train) == limit
    assert len(validation) == max(1, round((limit + len(validation)) * fraction))


def test_one_story_remains_for_training(tmp_path, monkeypatch):
    path = write_stories(tmp_path / "two.txt", ["one", "two"])
    words = ["--source", path, "--validation-fraction", 0.9, "--data-dir", tmp_path / "d"]
    monkeypatch.setattr("sys.argv", ["ingestion.py", *map(str, words)])
    ingestion.main()
    assert [len(part) for part in read_all(tmp_path / "d")] == [1, 1]


def test_a_validation_source_that_has_a_validation_part_gives_that(tmp_path, monkeypatch):
    parts = {"a/a": {"train": ["one", "two"]}, "b/b": {"train": ["three"], "validation": ["four"]}}
    monkeypatch.setattr(
        ingestion, "open_source", lambda source, *_: {part: iter(s) for part, s in parts[source].items()}
    )
    words = ["--source", "a/a", "--validation-source", "b/b", "--data-dir", tmp_path]
    monkeypatch.setattr("sys.argv", ["ingestion.py", *map(str, words)])
    ingestion.main()
    assert read_all(tmp_path) == (["one", "two"], ["four"])


def test_line_ends_are_the_same_everywhere():
    dropped = ingestion.Counter()
    stories = ["a\r\nb\rc\n", "\ufeff a\nb\nc", "\r\n", "d"]
    assert list(ingestion.clean(stories, dropped, ingestion.NumberSet())) == ["a\nb\nc", "d"]
    assert dropped == {"duplicates": 1, "empty": 1}


def test_near_duplicates_are_counted(run, tmp_path):
    said = [
        f"This is sentence number {chr(97 + n % 26) * 3}{chr(97 + n // 26) * 3} of them." for n in range(80)
    ]
    train = [" ".join(said[n : n + 8]) for n in range(0, 80, 8)]
    valid = [
        said[0].upper()
        + "  "
        + said[1].replace("This", "This,")
        + " One more that is different. And yet another one.",
        said[8] + " " + said[9] + " " + said[16] + " " + said[17] + " Not half of it comes from one story.",
        "Nothing of this has been seen before.",
        "Short. " + said[24],
        "The end.",
        *(
            f"{said[40]} {said[41 + n]} Most of number {'abcdef'[n] * 9} is new. Quite so in all of it."
            for n in range(6)
        ),
        f"{said[40]} {said[46]} A third one that is quite new.",
    ]
    write_stories(tmp_path / "train.jsonl", [*train, "The end!"])
    write_stories(tmp_path / "valid.jsonl", valid)
    words = ("--source", tmp_path / "train.jsonl", "--validation-source", tmp_path / "valid.jsonl")
    for _ in range(2):  # and said again where nothing is to be done
        result = run("data/ingestion.py", *words, "--data-dir", tmp_path / "data", check=0)
        assert "warning: 10 of 12 validation stories share at least half of their sentences" in result.stdout
    assert manifest(tmp_path / "data")["splits"]["validation"]["near_duplicates"] == 10


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5)))
def test_a_number_set_is_a_set(numbers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingestion, "LATEST", 3)
        ours, reference = ingestion.NumberSet(), set()
        for number in numbers:
            assert (number in ours) == (number in reference)
            if number not in reference:
                ours.add(number)
                reference.add(number)


def test_stories_of_every_length_in_batches_that_memory_holds(run, tmp_path, monkeypatch):
    long = "long " * 2_000_000
    stories = ["a", *(f"{n} {long}" for n in range(3)), *(f"short {n}" for n in range(30)), "z" * 10_000_000]
    path = write_stories(tmp_path / "stories.jsonl", stories)
    run(
        "data/ingestion.py",
        "--source",
        path,
        "--data-dir",
        tmp_path,
        "--validation-fraction",
        "0.01",
        check=0,
    )
    train, validation = read_all(tmp_path)
    assert sorted(train + validation) == sorted(story.strip() for story in stories)
    dataset = datasets.load_from_disk(str(tmp_path / "raw" / "train"))
    for batches in (raw_batches(dataset), raw_stories.batches(stories)):
        sizes = [(len(batch), sum(map(len, batch))) for batch in batches]
        assert all(count == 1 or size < BATCH_BYTES + 1e7 for count, size in sizes), sizes
        assert max(count for count, _ in sizes) > 1


def test_the_digest_is_of_every_story_in_its_order(tmp_path):
    lists = (["a", "b"], ["a", "c"], ["b", "a"], ["ab"], ["a", "b", ""], [])
    digests = {write_split(tmp_path / str(k), stories)["sha256"] for k, stories in enumerate(lists)}
    assert len(digests) == len(lists) and write_split(tmp_path / "again", ["a", "b"])["sha256"] in digests


def test_a_folder_of_many_files(run, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(2_000):
        (folder / f"{number:04}.txt").write_text(f"story {number}", encoding="utf-8")
    run("data/ingestion.py", "--source", folder, "--data-dir", tmp_path / "data", check=0)
    train, validation = read_all(tmp_path / "data")
    assert sorted(train + validation) == sorted(f"story {number}" for number in range(2_000))


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    path = write_stories(tmp_path / "a.txt", ["x" * 1_000, "y" * 1_000])
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1_500))
    monkeypatch.setattr(
        "sys.argv", ["ingestion.py", "--source", str(path), "--data-dir", str(tmp_path / "d")]
    )
    with pytest.raises(UserError, match=r"not enough disk space .* 4\.0 kB needed, 1\.5 kB free"):
        ingestion.main()
    assert not list((tmp_path / "d").iterdir())


def test_a_disk_that_fills_up_leaves_the_old_stories(run, tmp_path):
    run(
        "data/ingestion.py",
        "--source",
        write_stories(tmp_path / "a.txt"),
        "--data-dir",
        tmp_path / "d",
        check=0,
    )
    before = manifest(tmp_path / "d")
    large = write_stories(tmp_path / "b.txt", ["x" * 500_000, "y" * 500_000, "z"])
    words = [sys.executable, REPO / "data/ingestion.py", "--source", large, "--data-dir", tmp_path / "d"]
    limited = f"ulimit -f 400; trap '' XFSZ; exec {shlex.join(map(str, words))}"
    assert_one_line_error(
        subprocess.run(["bash", "-c", limited], capture_output=True, text=True), "too large"
    )
    assert manifest(tmp_path / "d") == before and [path.name for path in (tmp_path / "d").iterdir()] == [
        "raw"
    ]


def test_what_a_killed_run_left_is_removed(run, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = write_stories(tmp_path / "a.txt")
    mine = [f".raw.{os.getpid()}.tmp", ".raw.notes.tmp", ".rawhide.1.tmp"]
    for name in (f".raw.{dead.pid}.tmp", f".raw.{dead.pid}.old", *mine):
        (tmp_path / "d" / name / "train").mkdir(parents=True)
    run("data/ingestion.py", "--source", path, "--data-dir", tmp_path / "d", check=0)
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == sorted([*mine, "raw"])


def test_more_built_in_stories_than_the_grammar_makes_are_refused(run, tmp_path):
    flags = ["--source", "sample", "--max-stories", 1_000_000, "--data-dir", tmp_path]
    assert_one_line_error(run("data/ingestion.py", *flags), "--source sample makes at most 50,000 stories")
    assert not (tmp_path / "raw").exists()


def test_built_in_stories(run, tmp_path):
    run("data/ingestion.py", "--source", "sample", "--max-stories", 60, "--data-dir", tmp_path / "a", check=0)
    run("data/ingestion.py", "--source", "sample", "--max-stories", 30, "--data-dir", tmp_path / "b", check=0)
    train, validation = read_all(tmp_path / "a")
    fewer = [story for part in read_all(tmp_path / "b") for story in part]
    assert len(train) == 60 and set(fewer) < set(train + validation)


# Up to date


def test_what_is_up_to_date_is_left_alone(run, tmp_path):
    path = write_stories(tmp_path / "a.txt")
    arguments = ("data/ingestion.py", "--source", path, "--data-dir", tmp_path / "data")
    run(*arguments, check=0)
    made = (tmp_path / "data" / "raw" / "manifest.json").stat().st_mtime_ns
    again = run(*arguments, check=0)
    assert "up to date" in again.stdout and "3 stories" in again.stdout
    assert (tmp_path / "data" / "raw" / "manifest.json").stat().st_mtime_ns == made

    assert "up to date" not in run(*arguments, "--seed", 5, check=0).stdout
    write_stories(path, [*STORIES, "one more"])
    assert "up to date" not in run(*arguments, "--seed", 5, check=0).stdout
    assert len(read_split(tmp_path / "data", "train")) == 4
    write_stories(path, [*STORIES, "one MORE"])  # of the same size
    assert "up to date" not in run(*arguments, "--seed", 5, check=0).stdout
    next((tmp_path / "data" / "raw" / "train").glob("*.arrow")).write_bytes(b"damaged")
    assert "up to date" not in run(*arguments, "--seed", 5, check=0).stdout
    assert len(read_split(tmp_path / "data", "train")) == 4
    (tmp_path / "data" / "raw" / "manifest.json").write_text('{"format": 1', encoding="utf-8")
    assert "up to date" not in run(*arguments, "--seed", 5, check=0).stdout


def test_every_setting_that_changes_the_stories_makes_them_anew(tmp_path, monkeypatch, capsys):
    for name in "abc":
        rows = [{"text": f"{name} {number}", "other": f"{name} {number}!"} for number in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["ingestion.py", "--data-dir", tmp_path / "data", "--source", tmp_path / "a.jsonl"]
    changes = [
        [],
        ["--validation-fraction", 0.3],
        ["--text-column", "other"],
        ["--max-stories", 4],
        ["--seed", 2],
        ["--story-per-line"],
        ["--no-story-per-line", "--story-per-file"],
        ["--validation-source", tmp_path / "b.jsonl"],
        ["--source", tmp_path / "c.jsonl"],
    ]
    for change in changes:
        words += change
        monkeypatch.setattr("sys.argv", list(map(str, words)))
        for known in (False, True):
            ingestion.main()
            assert ("up to date" in capsys.readouterr().out) == known, change


def test_a_failure_leaves_the_old_stories(run, tmp_path):
    path = write_stories(tmp_path / "a.txt")
    run("data/ingestion.py", "--source", path, "--data-dir", tmp_path / "data", check=0)
    before = manifest(tmp_path / "data")
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text":', encoding="utf-8")
    result = run("data/ingestion.py", "--source", tmp_path / "b.jsonl", "--data-dir", tmp_path / "data")
    assert_one_line_error(result, "b.jsonl line 2")
    assert manifest(tmp_path / "data") == before and len(read_split(tmp_path / "data", "train")) == 3
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["raw"]


def test_file_sources_need_no_home(run, tmp_path):
    path = write_stories(tmp_path / "a.parquet")
    (tmp_path / "home").mkdir()
    env = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    env |= {"HF_HOME": str(tmp_path / "home" / "hf")}
    run("data/ingestion.py", "--source", path, "--data-dir", tmp_path / "data", env=env, check=0)
    assert [file for file in (tmp_path / "home").rglob("*") if file.is_file()] == []


# Wrong settings


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--source", "missing.txt"], ["no file or folder missing.txt"]),
        (["--source", "missing/"], ["missing/"]),
        (["--source", "./missing"], ["./missing"]),
        (["--source", "*.csv"], ["*.csv"]),
        (["--source", "empty"], ["empty", "no story files"]),
        (["--source", "notes.md"], ["notes.md", ".jsonl"]),
        (["--source", "blank.txt"], ["no stories", "blank.txt"]),
        (["--source", "one.txt"], ["only one story"]),
        (["--source", "one.txt", "--story-per-line", "--story-per-file"], ["choose one of the two"]),
        (["--source", "json"], ["'json'"]),
        (
            ["--source", "one.txt", "--validation-source", "one.txt"],
            ["no train stories", "1 in validation too"],
        ),
        (["--source", "one.txt", "--validation-source", "blank.txt"], ["no validation stories"]),
        (["--validation-fraction", "1"], ["--validation-fraction"]),
        (["--max-stories", "-1"], ["--max-stories"]),
        (["--source", "one.txt", "--data-dir", "one.txt"], ["one.txt"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_wrong_settings_are_refused(refused, tmp_path, monkeypatch, arguments, needles):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    (tmp_path / "blank.txt").write_text("\n \n\n", encoding="utf-8")
    (tmp_path / "one.txt").write_text("one", encoding="utf-8")
    directory = [] if "--data-dir" in arguments else ["--data-dir", "out"]
    monkeypatch.chdir(tmp_path)
    message = refused("data/ingestion.py", *arguments, *directory)
    assert all(needle in message for needle in needles), message
    assert not (tmp_path / "out" / "raw").exists()


# The hub: the real client against a small hub on this machine


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    stories = [f"story {number}" for number in range(1_100)]
    repositories = {
        "datasets/roneneldan/TinyStories": {
            "data/train-00000-of-00002.parquet": parquet([*stories, "story 3", ""]),
            "data/train-00001-of-00002.parquet": parquet(["last story"]),
            "data/validation-00000-of-00001.parquet": parquet(["story 7", "story 100"]),
        },
        "datasets/someone/lines": {"train.jsonl": b"".join(b'{"story": "tale %d"}\n' % n for n in range(30))},
        "datasets/someone/tested": {"test.csv": b"text\na\nb\n"},
        "datasets/someone/empty": {"README.md": b"nothing here"},
    }
    with serve_hub(repositories, tmp_path_factory.mktemp("hub")) as served:
        yield served


def test_hub_with_a_validation_split(run, tmp_path, hub):
    env, _ = hub
    result = run("data/ingestion.py", "--data-dir", tmp_path, env=env, check=0)
    train, validation = read_all(tmp_path)
    assert validation == ["story 7", "story 100"]
    assert train == [f"story {number}" for number in range(1_100) if number not in (7, 100)] + ["last story"]
    assert "1 duplicates, 1 empty, 2 in validation too" in result.stdout and result.stderr == ""
    assert "up to date" in run("data/ingestion.py", "--data-dir", tmp_path, check=0).stdout

    offline = run(
        "data/ingestion.py", "--data-dir", tmp_path / "b", env={**env, "HF_HUB_OFFLINE": "1"}, check=0
    )
    assert offline.stderr == "" and read_all(tmp_path / "b") == (train, validation)


def test_hub_is_streamed_when_only_a_part_is_wanted(run, tmp_path, hub):
    env, requests = hub
    env = {**env, "HF_HOME": str(tmp_path / "cache")}
    requests.clear()
    run("data/ingestion.py", "--data-dir", tmp_path, "--max-stories", 8, env=env, check=0)
    expected = [*range(7), 8]  # without story 7, which is for validation
    assert read_split(tmp_path, "train") == [f"story {number}" for number in expected]
    assert any("GET" in request and "train-00000" in request for request in requests)
    assert not any("GET" in request and "train-00001" in request for request in requests)
    assert not list((tmp_path / "cache").rglob("*.parquet"))


@pytest.mark.parametrize("limit", [0, 12])
def test_hub_without_a_validation_split(run, tmp_path, hub, limit):
    arguments = ("--source", "someone/lines", "--text-column", "story", "--max-stories", limit)
    run("data/ingestion.py", *arguments, "--data-dir", tmp_path, env=hub[0], check=0)
    train, validation = read_all(tmp_path)
    assert len(train) == (limit or 28) and len(validation) == (1 if limit else 2)


def test_an_entry_without_text_on_the_hub_is_an_empty_story(monkeypatch, tmp_path):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a", None, "b"]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    stories = open_hub("someone/stories", "text", False, tmp_path)
    assert list(stories["train"]) == ["a", "", "b"]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_a_hub_validation_split_has_one_of_several_names(monkeypatch, tmp_path, name):
    splits = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("test", name, "train")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(splits))
    stories = open_hub("someone/stories", "text", False, tmp_path)
    assert {part: list(texts) for part, texts in stories.items()} == {
        "train": ["train"],
        "validation": [name],
    }


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["someone/tested"], ["no train split", "test"]),
        (["someone/lines"], ["no column 'text'", "story"]),
        (["someone/lines", "--max-stories", "3"], ["no column 'text'", "story"]),
        (["someone/empty"], ["someone/empty"]),
        (["someone/nothing"], ["someone/nothing", "--source sample"]),
        (["roneneldan/TinyStories:big"], ["big"]),
    ],
    ids=" ".join,
)
def test_what_the_hub_does_not_have(run, tmp_path, hub, arguments, needles):
    result = run("data/ingestion.py", "--data-dir", tmp_path, "--source", *arguments, env=hub[0])
    assert_one_line_error(result, *needles)


def test_no_network_is_one_line_that_offers_a_way_on(run, tmp_path):
    """And soon: the hub's library would try each file for 25 seconds."""
    took = []
    for hub in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}):
        started = time.monotonic()
        env = {**hub, "HF_HOME": str(tmp_path / "cache")}
        result = run("data/ingestion.py", "--data-dir", tmp_path / "data", env=env)
        took.append(time.monotonic() - started)
        assert_one_line_error(result, "roneneldan/TinyStories", "--source sample", "files")
        assert not (tmp_path / "data" / "raw").exists()
    assert took[1] < 3 * took[0] + 15


def test_a_download_that_breaks_off_is_gone_on_with(run, tmp_path):
    """Broken off twice, within a run; then until the client gives up, and on the next day with what was whole."""
    stories = [random.Random(number).randbytes(1_500).hex() for number in range(8_000)]
    whole, broken = "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"
    files, cuts = {whole: parquet(["the first"]), broken: parquet(stories)}, {}
    with serve_hub({"datasets/someone/large": files}, tmp_path / "hub", cuts) as (env, requests):

        def ingest(cache, check, cut):
            requests.clear()
            cuts[broken] = cut
            words = ("data/ingestion.py", "--source", "someone/large", "--data-dir", tmp_path / cache)
            result = run(*words, env={**env, "HF_HOME": str(tmp_path / cache)}, check=check)
            return result, [request for request in requests if request.startswith("GET data/")]

        _, asked = ingest("a", 0, cut=2)
        asked.remove(f"GET {whole} None")
        assert len(asked) == 3 and asked[0] == f"GET {broken} None" and f"GET {broken} bytes=" in asked[-1]
        train, validation = read_all(tmp_path / "a")
        assert sorted(train + validation) == sorted(["the first", *stories])

        result, asked = ingest("b", 2, cut=1_000)
        assert_one_line_error(result, "someone/large", "--source sample")
        assert not (tmp_path / "b" / "raw").exists()
        _, asked = ingest("b", 0, cut=0)
        assert asked == [f"GET {broken} None"]
        assert read_all(tmp_path / "b") == (train, validation)


def test_fewer_stories_than_the_data_set_says_it_has(run, tmp_path):
    card = b"---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n  - name: train\n"
    card += b"    num_bytes: 9\n    num_examples: 4\n---\n"
    files = {"train.parquet": parquet(["a", "b", "c"]), "README.md": card}
    with serve_hub({"datasets/someone/short": files}, tmp_path / "hub") as (env, _):
        result = run("data/ingestion.py", "--source", "someone/short", "--data-dir", tmp_path, env=env)
    assert_one_line_error(result, "someone/short")


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    for folder in ("open", "closed", ".hidden"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "stories.txt").write_text("A story.")
    (tmp_path / ".stories.txt").write_text("A story.")
    assert find_files(str(tmp_path), tmp_path) == [
        tmp_path / name / "stories.txt" for name in ("closed", "open")
    ]
    scandir, closed = os.scandir, {str(tmp_path / "closed"), str(tmp_path / ".hidden")}

    def as_another_user(folder):
        if str(folder) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", as_another_user)
    with pytest.raises(PermissionError, match="closed"):
        find_files(str(tmp_path), tmp_path)
    closed.remove(str(tmp_path / "closed"))
    assert len(find_files(str(tmp_path), tmp_path)) == 2
