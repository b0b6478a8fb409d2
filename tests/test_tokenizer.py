import functools
import json

import datasets
import numpy as np
import pytest
from conftest import assert_one_line_error
from fake_hub import serve_hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.encoder import Encoder
from model.tokenizer import read_tokenizer

STORY = (
    "Once upon a time, there was a little dog named {}. {} liked to run, and to play with his friend Tim.\n\n"
)
STORIES = [
    STORY.format(name, name) + f"He had {n} balls. He said, \u201cYes!\u201d"
    for n, name in enumerate("ABCDEFGHIJKLMNOP")
]

AWKWARD = """Hello world  two  spaces\ttab\n\n\nthree newlines\r\nCRLF   \n trailing   
It's we're I'll they've 'quoted' don't DON'T O'Neil 's
<|endoftext|><|endoftext|> a<|endoftext|>b <|endoftext |>
1 12 123 1234567890 3.14159 ½ ² Ⅷ ٣٤ 10,000
café cafe\u0301 naïve Zoë ß ﬁ Å \u212b İı
日本語のテキスト 中文 한국어 עברית العربية ไทย हिन्दी
🐉👨‍👩‍👧‍👦🏳️‍🌈 👍🏽 \U0001f600\U0010ffff
\u00a0nbsp\u2003em\u3000ideographic\u200bzero\ufeffbom\u2028line\x85next
\x00\x01\x7f\x1b[0m control
____ ---- !!! ??? ... … “quotes” ‘single’ «guillemets»
<0x41> <0xFF> Ġ Ċ Ã© ▁under ##ing
def f(x):\n    return x**2  # comment
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"""

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """data/raw of a few stories."""
    return make_raw(tmp_path_factory.mktemp("raw"))


def make_raw(folder, stories=STORIES):
    from data import ingestion

    source = folder / "stories.jsonl"
    source.write_text("\n".join(json.dumps({"text": story}) for story in stories), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["ingestion.py", "--source", str(source), "--data-dir", str(folder / "data")]
        )
        ingestion.main()
    return folder / "data"


@pytest.fixture
def unmade(data_dir, tmp_path):
    """The same raw data, without a tokenizer."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "raw").symlink_to(data_dir / "raw")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def made(data_dir, gpt2_files):
    """kind -> the tokenizer of that kind, made by the script's own functions and read back from its file."""
    from data import train_tokenizer

    tokenizers = {}
    arguments = {"bpe": ["--vocab-size", 340], "char": [], "gpt2": ["--gpt2-files", *gpt2_files]}
    for kind, more in arguments.items():
        with pytest.MonkeyPatch.context() as patch:
            words = ["train_tokenizer.py", "--kind", kind, "--data-dir", data_dir, *more]
            patch.setattr("sys.argv", list(map(str, words)))
            train_tokenizer.main()
        tokenizer = Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
        tokenizer.encode_special_tokens = True
        tokenizers[kind] = tokenizer
    return tokenizers


KINDS = pytest.mark.parametrize("kind", ["bpe", "char", "gpt2"])


@functools.cache
def encoder_of(tokenizer):
    return Encoder(tokenizer, "uint16")


def round_trip(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.token_to_id("<|endoftext|>") not in ids
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == text
    packed = np.frombuffer(encoder_of(tokenizer)([text]), "<u2").tolist()
    assert packed == [*ids, tokenizer.token_to_id("<|endoftext|>")]


@KINDS
def test_awkward_text_comes_back(made, kind):
    round_trip(made[kind], AWKWARD)
    for line in AWKWARD.split("\n"):
        round_trip(made[kind], line)
    round_trip(made[kind], "")


@KINDS
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]))
        | st.sampled_from(
            ["<|endoftext|>", "<0x0A>", "Ġ", " ", "\n", "Once upon", "\r\n", "\ufffd", "\ufeff"]
        )
    ).map("".join)
)
def test_any_text_comes_back(made, kind, text):
    round_trip(made[kind], text)


@KINDS
def test_end_of_text_is_one_special_token(made, kind):
    tokenizer = made[kind]
    end = tokenizer.token_to_id("<|endoftext|>")
    assert end == {"bpe": 0, "char": 0, "gpt2": 50_256}[kind]
    assert (
        tokenizer.decode([end]) == ""
        and tokenizer.decode([end], skip_special_tokens=False) == "<|endoftext|>"
    )
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))


def test_sizes(made, data_dir):
    train = datasets.load_from_disk(str(data_dir / "raw" / "train"))["text"]
    assert made["bpe"].get_vocab_size() == 340
    assert made["gpt2"].get_vocab_size() == 50_257
    assert made["char"].get_vocab_size() == 257 + len(set("".join(train)))
    letters = made["char"].encode("dog").ids
    assert len(letters) == 3 and min(letters) > 256
    assert len(made["char"].encode("é").ids) == 2  # not in the stories: its two bytes


def test_bpe_learns_whole_words(made):
    assert made["bpe"].encode("Once upon a time").tokens == ["Once", "Ġupon", "Ġa", "Ġtime"]


def test_gpt2_is_tiktokens(made, gpt2_files):
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    vocab, merges = map(str, gpt2_files)
    reference = tiktoken.Encoding(
        "gpt2",
        explicit_n_vocab=50_257,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(vocab_bpe_file=merges, encoder_json_file=vocab),
        special_tokens={"<|endoftext|>": 50_256},
    )
    for text in (AWKWARD, *AWKWARD.split("\n"), *STORIES, "Once upon a time"):
        assert made["gpt2"].encode(text).ids == reference.encode(text, disallowed_special=())
    assert made["gpt2"].encode("Once upon a time").ids == [7454, 2402, 257, 640]


def test_gpt2_from_the_hub(run, unmade, gpt2_files, made, tmp_path):
    # The hub's file, as transformers writes it: the same model with a post-processor of its own.
    from tokenizers import processors

    tokenizer = Tokenizer.from_str(made["gpt2"].to_str())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    with serve_hub({"gpt2": {"tokenizer.json": tokenizer.to_str().encode()}}, tmp_path / "cache") as (env, _):
        result = run("data/train_tokenizer.py", "--kind", "gpt2", "--data-dir", unmade, env=env, check=0)
    assert "50,257" in result.stdout and result.stderr == ""
    written = (unmade / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(written) == json.loads(made["gpt2"].to_str())


def test_the_script_says_what_it_did_and_when_there_is_nothing_to_do(run, unmade):
    arguments = ("data/train_tokenizer.py", "--vocab-size", 340, "--data-dir", unmade)
    first = run(*arguments, check=0)
    assert first.stderr == "" and "340 tokens" in first.stdout and "Once|" in first.stdout
    path = unmade / "tokenizer" / "tokenizer.json"
    stories = datasets.load_from_disk(str(unmade / "raw" / "train"))["text"][:]
    tokens = sum(len(encoding.ids) for encoding in Tokenizer.from_file(str(path)).encode_batch(stories))
    ratio = sum(len(story.encode()) for story in stories) / tokens
    assert f"{ratio:.2f} bytes per token" in first.stdout and "data/prepare_data.py" in first.stdout
    content, made = path.read_bytes(), path.stat().st_mtime_ns
    assert "up to date" in run(*arguments, check=0).stdout and path.stat().st_mtime_ns == made

    path.unlink()
    assert "up to date" not in run(*arguments, check=0).stdout
    assert path.read_bytes() == content  # the same again, to the byte
    assert "up to date" not in run(*arguments, "--max-stories", 4, check=0).stdout
    assert path.read_bytes() != content
    path.write_text("{}", encoding="utf-8")
    assert "up to date" not in run(*arguments, check=0).stdout
    assert path.read_bytes() == content


def test_a_vocabulary_smaller_than_asked_for_is_explained(run, unmade):
    result = run("data/train_tokenizer.py", "--vocab-size", 60_000, "--data-dir", unmade, check=0)
    assert "(not 60,000: no more pairs occur twice in these stories)" in result.stdout


def test_new_stories_make_the_tokenizer_anew(run, tmp_path):
    data = make_raw(tmp_path)
    arguments = ("data/train_tokenizer.py", "--kind", "char", "--data-dir", data)
    run(*arguments, check=0)
    make_raw(tmp_path, [*STORIES, "Zoë"] * 2)
    assert "up to date" not in run(*arguments, check=0).stdout


def test_a_marker_within_a_story_is_text_for_a_tokenizer_taken_over(run, made, unmade, tmp_path):
    parts = json.loads(made["bpe"].to_str())
    for token in parts["added_tokens"]:
        token["special"] = False
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(parts))
    run("data/train_tokenizer.py", "--kind", tmp_path / "model", "--data-dir", unmade, check=0)
    tokenizer = read_tokenizer(unmade / "tokenizer" / "tokenizer.json")
    text = "a <|endoftext|> b"
    ids = tokenizer.encode(text).ids
    assert tokenizer.token_to_id("<|endoftext|>") not in ids and tokenizer.decode(ids) == text


def test_no_network_offers_the_files(run, unmade, tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    result = run("data/train_tokenizer.py", "--kind", "gpt2", "--data-dir", unmade, env=env)
    assert_one_line_error(result, "--gpt2-files")


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--vocab-size", "256"], ["--vocab-size", "257"]),
        (["--kind", "char", "--vocab-size", "300"], ["--vocab-size"]),
        (["--kind", "word"], ["--kind", "bpe, gpt2 or char"]),
        (["--max-stories", "-2"], ["--max-stories"]),
        (["--gpt2-files", "a", "b"], ["--kind gpt2"]),
        (["--kind", "gpt2", "--gpt2-files", "VOCAB"], ["two files"]),
        (["--kind", "gpt2", "--gpt2-files", "VOCAB", "missing.txt"], ["missing.txt"]),
        (["--kind", "gpt2", "--gpt2-files", "VOCAB", "VOCAB"], ["merges.txt"]),
        (["--kind", "gpt2", "--gpt2-files", "VOCAB", "few.txt"], ["few.txt", "not GPT-2's"]),
        (["--kind", "gpt2", "--gpt2-files", "small.json", "few.txt"], ["small.json and few.txt"]),
        (["--kind", "gpt2", "--gpt2-files", "cut.json", "MERGES"], ["cut.json"]),
        (["--kind", "gpt2", "--gpt2-files", "list.json", "MERGES"], ["one vocab.json"]),
        (["--kind", "gpt2", "--gpt2-files", "strings.json", "MERGES"], ["strings.json"]),
        (["--kind", "gpt2", "--gpt2-files", "binary", "MERGES"], ["binary"]),
        (["--kind", "gpt2", "--gpt2-files", "VOCAB", "shuffled.txt"], ["shuffled.txt", "not GPT-2's"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_wrong_settings_are_refused(refused, unmade, tmp_path, monkeypatch, gpt2_files, arguments, needles):
    vocab, merges = gpt2_files
    lines = merges.read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.txt").write_text("\n".join(lines[:50]), encoding="utf-8")
    (tmp_path / "shuffled.txt").write_text("\n".join([lines[0], *reversed(lines[1:])]), encoding="utf-8")
    (tmp_path / "small.json").write_text('{"a": 0, "b": 1, "<|endoftext|>": 2}', encoding="utf-8")
    (tmp_path / "strings.json").write_text('{"a": "b"}', encoding="utf-8")
    (tmp_path / "cut.json").write_text('{"a": 0, "b"', encoding="utf-8")
    (tmp_path / "list.json").write_text('["a"]', encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\x00\xfe")
    arguments = [{"VOCAB": str(vocab), "MERGES": str(merges)}.get(word, word) for word in arguments]
    monkeypatch.chdir(tmp_path)
    message = refused("data/train_tokenizer.py", *arguments, "--data-dir", unmade)
    assert all(needle in message for needle in needles), message
    assert not (unmade / "tokenizer").exists()
