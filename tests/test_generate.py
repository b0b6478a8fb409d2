"""generate.py as its users run it, with a model that has learnt next to nothing."""

import contextlib
import errno
import importlib.util
import json
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, REPO, assert_one_line_error
from test_decoder import needs_kernels
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model.candidates import MAX_TOKENS
from model.sampling import Sampling
from model.settings import read_constants, read_settings
from model.story_quality import read_written


@pytest.fixture
def generate(run, trained):
    return lambda *flags, **options: run("generate.py", "--checkpoint-dir", trained, *flags, **options)


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_its_defaults_are_those_of_stories_in_training_evaluation_and_exports():
    values = {constant.name: constant.value for constant in read_constants(REPO / "generate.py")}
    assert Sampling(**{name: values[name] for name in vars(Sampling())}) == Sampling()
    assert values["max_tokens"] == MAX_TOKENS


def test_a_seed_makes_a_story_repeatable(generate):
    one, same, other = (generate("--seed", seed, "--max-tokens", 20, check=0).stdout for seed in (1, 1, 2))
    assert one == same != other


def test_without_a_seed_each_story_is_new_and_its_seed_is_said(generate):
    first, second = generate("--max-tokens", 20, check=0), generate("--max-tokens", 20, check=0)
    assert first.stdout != second.stdout
    remark = first.stderr.splitlines()[0]
    assert "best.pt: step 2" in remark
    seed = remark.rpartition("seed ")[2]
    assert generate("--max-tokens", 20, "--seed", seed, check=0).stdout == first.stdout


def test_stories_go_to_a_file_one_json_object_a_line(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("Once\n\nThe big dog \n")
    flags = ["--prompt", "One day", "--prompts-file", tmp_path / "prompts.txt", "--num-samples", 2]
    output = ["--output", tmp_path / "stories.jsonl"]
    result = generate(*flags, "--max-tokens", 9, "--seed", 5, *output, check=0)
    rows = read_rows(tmp_path / "stories.jsonl")
    assert [row["prompt"] for row in rows] == [
        p for p in ("One day", "Once", "The big dog") for _ in range(2)
    ]
    assert [row["seed"] for row in rows] == [5, 6, 7, 8, 9, 10]
    for row in rows:
        assert row["finish_reason"] == ("length" if row["tokens"] == 9 else "end_of_story")
        assert row["tokens"] <= 9 and isinstance(row["story"], str)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    assert cut and result.stderr.endswith(f"; {cut} cut at --max-tokens\n")


def test_the_readmes_python_works(trained, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "load_model" in block]
    assert "checkpoints/best.pt" in code
    exec(code.replace("checkpoints/best.pt", str(trained / "best.pt")), {})
    assert capsys.readouterr().out.strip()


def test_a_prompt_may_be_a_files_text(generate, refused, trained, tmp_path):
    (tmp_path / "beginning.txt").write_text("One day,\n\na cat\n")
    output = tmp_path / "stories.jsonl"
    generate("--prompt", f"FILE:{tmp_path / 'beginning.txt'}", "--max-tokens", 5, "--output", output, check=0)
    assert [row["prompt"] for row in read_rows(output)] == ["One day,\n\na cat"]
    flags = ["--prompt", f"FILE:{output}", "--output", output]
    assert "would replace a file that is in use" in refused(
        "generate.py", "--checkpoint-dir", trained, *flags
    )


def test_a_line_is_a_story_whatever_it_holds(generate, run, tmp_path):
    """Also characters at which Python's splitlines() would part it."""
    path = tmp_path / "stories.jsonl"
    generate("--prompt", "One\u2028day\x85", "--max-tokens", 5, "--output", path, check=0)
    text = path.read_text(encoding="utf-8")
    assert "\u2028" in text and read_written(str(path))[0].text.startswith("One\u2028day\x85")


@pytest.mark.parametrize(
    ("flags", "needles"),
    [
        (["--output", "."], ["--output . is a folder: name a file in it"]),
        (["--output", ""], ["--output takes a name, not an empty one"]),
        (["--checkpoint", ""], ["--checkpoint takes a name, not an empty one"]),
        (["--prompts-file", os.devnull], [f"{os.devnull} holds no prompts"]),
        (["--prompt", "-x"], ["--prompt needs a value", "--prompt=-value"]),
        (["--output", "/dev/null"], ["/dev/null is not a regular file"]),
        (["--interactive", "--output", "x.jsonl", "--prompt", "A"], ["leave out --output and --prompt"]),
        (["--seed", -1], ["seed must be 0 or more"]),
        (["--seed", 2**63 - 1, "--num-samples", 2], [f"--seed {2**63 - 1} is too large for 2 stories"]),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(refused, trained, flags, needles):
    message = refused("generate.py", "--checkpoint-dir", trained, *flags)
    assert all(needle in message for needle in needles), message


def test_what_is_read_is_not_written_over(refused, trained, tmp_path):
    (tmp_path / "beginnings.txt").write_text("Once")
    shutil.copy(trained / "best.pt", tmp_path / "model.pt")
    for name in ("beginnings.txt", "model.pt"):
        before = (tmp_path / name).read_bytes()
        flags = ["--prompts-file", tmp_path / "beginnings.txt", "--checkpoint", tmp_path / "model.pt"]
        message = refused("generate.py", *flags, "--output", tmp_path / name)
        assert "would replace a file that is in use" in message
        assert (tmp_path / name).read_bytes() == before
    assert "would replace" in refused(
        "generate.py", "--checkpoint-dir", trained, "--output", trained / "ckpt_2.pt"
    )


def test_a_sample_is_the_story_that_its_seed_gives_alone(generate, tmp_path):
    flags = ["--prompt", "One day", "--max-tokens", 12]
    three = [*flags, "--num-samples", 3, "--seed", 7]
    generate(*three, "--output", tmp_path / "three.jsonl", check=0)
    rows = read_rows(tmp_path / "three.jsonl")
    # what is printed is read back in text mode
    stories = ["One day" + re.sub("\r\n?", "\n", row["story"]) for row in rows]
    assert generate(*flags, "--seed", 9, check=0).stdout == stories[2] + "\n"
    assert generate(*three, check=0).stdout == "\n---\n".join(stories) + "\n"


def test_a_checkpoint_file_is_all_it_needs(run, trained, tmp_path):
    shutil.copy(trained / "best.pt", tmp_path / "alone.pt")
    result = run("generate.py", "--checkpoint", "alone.pt", "--max-tokens", 5, cwd=tmp_path, check=0)
    assert "alone.pt: step 2" in result.stderr
    (tmp_path / "runs").mkdir()
    shutil.copy(trained / "ckpt_2.pt", tmp_path / "runs")
    for name in ("runs/ckpt_2", "runs/2"):
        run("generate.py", "--checkpoint", name, "--max-tokens", 5, cwd=tmp_path, check=0)
    result = run("generate.py", "--checkpoint", "runs/3", cwd=tmp_path)
    assert_one_line_error(result, "there is no checkpoint 'runs/3'")


def test_interactive_continues_each_line_until_the_end_of_input(trained):
    command = [sys.executable, REPO / "generate.py", "--checkpoint-dir", trained, "--interactive"]
    command += ["--max-tokens", 8, "--seed", 1]
    lines = "A cat\nTwo dogs\nA cat\n"
    result = subprocess.run(
        list(map(str, command)), input=lines, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0 and "Ctrl-D or Ctrl-C quits" in result.stderr
    assert result.stdout.startswith("A cat") and "\nTwo dogs" in result.stdout
    _, one, other = result.stdout.split("A cat")
    assert one.split("\nTwo dogs")[0] != other.removesuffix("\n")
    assert "\x1b[" not in result.stdout  # nothing meant for a terminal


def test_a_beginning_beyond_the_context_is_noted_and_continued(generate):
    result = generate("--prompt", "a big dog " * 30, "--max-tokens", 5, "--seed", 1, check=0)
    assert "only its end is used" in result.stderr and result.stdout.startswith("a big dog a big dog")


def test_a_note_is_not_in_the_middle_of_a_story(trained):
    command = [sys.executable, REPO / "generate.py", "--checkpoint-dir", trained, "--max-tokens", 5]
    command += ["--prompt", "a big dog " * 30, "--seed", 1]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    lines = subprocess.run(list(map(str, command)), text=True, timeout=PATIENCE, **both).stdout.splitlines()
    assert lines[1].startswith("note: a prompt of") and lines[2].startswith("a big dog a big dog")


def test_a_beginning_ends_with_a_word(trained):
    """After its space, the model would have to go on within a word."""
    command = [sys.executable, REPO / "generate.py", "--checkpoint-dir", trained, "--max-tokens", 5]
    command += ["--temperature", 0]

    def say(*flags, **options):
        return subprocess.run(
            list(map(str, [*command, *flags])), capture_output=True, text=True, **options
        ).stdout

    said = say("--interactive", input="A cat\nA cat \r\n")
    assert said[: len(said) // 2] == said[len(said) // 2 :] == say("--prompt", "A cat ")


def test_interactive_in_a_terminal(trained):
    """A beginning, its story, the next prompt; then Ctrl-C leaves without an error."""
    command = [sys.executable, REPO / "generate.py", "--checkpoint-dir", trained, "--interactive"]
    terminal, other_side = pty.openpty()
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), other_side)
    words = [*map(str, command), "--max-tokens", "5", "--seed", "1"]
    process = subprocess.Popen(words, **pipes, env={**os.environ, "TERM": "dumb", "INPUTRC": os.devnull})
    os.close(other_side)
    try:
        shown = read_until(terminal, b"> ")
        assert b"Ctrl-D or Ctrl-C quits" in shown and b"Traceback" not in shown
        os.write(terminal, b"A cat\n")
        story = read_until(terminal, b"\n> ")
        assert story.count(b"A cat") == 2  # as typed, and as the story's beginning
        assert b"(cut at 5 tokens: --max-tokens)" in story
        if importlib.util.find_spec("readline"):
            os.write(terminal, b"A fgg\x08\x08ox\n")  # deletes two characters
            assert b"\nA fox" in read_until(terminal, b"\n> ").replace(b"\r", b"")
        for _ in range(5):  # one that comes just before it waits for a key waits with it, in Python's input()
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        rest = read_until(terminal, None)
    finally:
        process.kill()
        os.close(terminal)
    assert process.returncode == 0 and b"Traceback" not in rest
    assert b"\x1b" not in shown + story + rest


def read_until(terminal, end):
    """What the terminal shows, up to `end`, or to the end of the program; in a minute at most."""
    shown = b""
    while end is None or end not in shown:
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, f"nothing more came after {shown!r}"
        try:
            more = os.read(terminal, 1_000)
        except OSError:  # how Linux says that the other side has closed
            more = b""
        if not more:
            return shown
        shown += more
    return shown


def test_an_empty_prompt_starts_a_new_story(generate):
    flags = ["--max-tokens", 8, "--seed", 4]
    assert generate("--prompt", "", *flags, check=0).stdout == generate(*flags, check=0).stdout != ""


def test_a_prompt_that_is_not_utf8_is_read_as_well_as_can_be(generate):
    result = generate("--prompt", os.fsdecode(b"caf\xe9"), "--max-tokens", 3, "--seed", 1, check=0)
    assert result.stdout.startswith("caf\ufffd")


def test_a_terminal_that_lacks_a_character_shows_the_others(generate):
    flags = ["--prompt", "caf\u00e9 \U0001f409", "--max-tokens", 3, "--seed", 1]
    result = generate(*flags, env={"PYTHONIOENCODING": "ascii"}, check=0)
    assert result.stdout.startswith("caf? ?")


def test_closed_streams_are_no_defect(trained, tmp_path):
    words = [sys.executable, REPO / "generate.py", "--checkpoint-dir", trained, "--max-tokens", 3]
    command = shlex.join(map(str, words))
    for closed in (">&-", "2>&-", "--output stories.jsonl --num-samples 2 2>&-"):
        result = subprocess.run(
            ["bash", "-c", f"{command} {closed}"], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 0, result
    result = subprocess.run(["bash", "-c", f"{command} --interactive <&-"], capture_output=True, text=True)
    assert result.returncode == 2 and "standard input is closed" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("kind", ["char", "spaced", "bpe"])
def test_what_is_streamed_is_the_story(kind, monkeypatch, capsys):
    """Even where a model writes bytes that are not UTF-8, which may change the text of bytes before them."""
    import generate as script

    if kind == "char":
        vocab = {
            token: k
            for k, token in enumerate(["<|e|>", *(f"<0x{b:02X}>" for b in range(256)), *"abc \u00e9"])
        }
        tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    elif kind == "spaced":  # as Llama's, which mark a word's space in its first token
        vocab = {
            token: k
            for k, token in enumerate(["<|e|>", *(f"<0x{b:02X}>" for b in range(256)), *"\u2581abc\u00e9"])
        }
        tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        marks = [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        tokenizer.decoder = decoders.Sequence(marks)
    else:
        vocab = {token: k for k, token in enumerate(["<|e|>", *pre_tokenizers.ByteLevel.alphabet()])}
        tokenizer = Tokenizer(models.BPE(vocab, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    decoder = SimpleNamespace(config=SimpleNamespace(block_size=1_000))
    writer = script.Writer(decoder, tokenizer, 0, None, 1_000)
    dragon = tokenizer.encode("a\U0001f409c").ids
    rng = random.Random(1)
    for prompt in ("", "abc", "caf\ufffd", "b\U0001f409", "\u4e2d\u4e2d\u4e2d"):
        for _ in range(50):
            written = [rng.randrange(1, len(vocab)) for _ in range(rng.randrange(40))] + dragon
            written += rng.choice([[], dragon[:3]])
            monkeypatch.setattr(
                script, "generate", lambda *_, written=written: ([token] for token in written)
            )
            row = writer.stream(prompt, 0)
            assert capsys.readouterr().out == prompt + row["story"] + "\n"
            assert prompt or row["story"] == tokenizer.decode(written)


def test_stories_beyond_the_memory_for_one_batch_wait_for_the_next(trained, monkeypatch):
    import generate as script
    from model.checkpoint import find_checkpoint, load_model
    from model.decoder import Decoder
    from model.sampling import Sampling

    model, tokenizer, checkpoint = load_model(find_checkpoint(trained, "best", "best"))
    writer = script.Writer(Decoder(model.double()), tokenizer, checkpoint["eot_id"], Sampling(), 12)
    together, in_parts = {}, {}
    writer.write(["A cat", "Two", "", "One day"], 3, together)
    monkeypatch.setattr(
        script, "CACHE_BYTES", 3 * 2 * 8 * 16 * 16
    )  # keys and values of float64, one layer of 16, context 16: three stories
    writer.write(["A cat", "Two", "", "One day"], 3, in_parts)
    assert len(in_parts) == 4 and in_parts == together
    sizes, decode = [], script.generate

    def watched(decoder, prompts, *others):
        sizes.append(len(prompts))
        return decode(decoder, prompts, *others)

    monkeypatch.setattr(script, "generate", watched)
    for writer.max_tokens in (
        7,
        15,
        100,
    ):  # an empty prompt is one token: stories of 8, 16 and 16 tokens at once
        writer.write([""] * 6, 3, {})
    assert sizes == [6, 3, 3, 3, 3]


def test_prompts_of_similar_length_are_continued_together(trained, monkeypatch):
    """And each gives the same story in any company."""
    import generate as script
    from model.checkpoint import find_checkpoint, load_model
    from model.decoder import Decoder
    from model.sampling import Sampling

    model, tokenizer, checkpoint = load_model(find_checkpoint(trained, "best", "best"))
    writer = script.Writer(Decoder(model.double()), tokenizer, checkpoint["eot_id"], Sampling(), 6)
    lengths = [70, 1, 900, 66, 200, 3, 67, 202]
    batches = list(writer.batches([[0] * length for length in lengths]))
    assert [[lengths[place] for place in part] for part in batches] == [
        [1, 3, 66],
        [67, 70],
        [200, 202],
        [900],
    ]
    monkeypatch.setattr(script, "SIMILAR", 2)
    prompts = ["A dog ran to the big tree. " * 9, "Once", "A dog ran to the big tree", "One day"]
    together, alone = {}, {}
    writer.write(prompts, 3, together)
    for place, prompt in enumerate(prompts):
        one = {}
        writer.write([prompt], 3 + place, one)
        alone[place] = one[0]
    assert together == alone


def test_stories_that_have_ended_survive_ctrl_c(trained, tmp_path, monkeypatch, capsys):
    import generate as script

    def interrupted(*_):
        yield from ([5, 5, 5], [None, 5, None])
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "generate", interrupted)
    output = tmp_path / "stories.jsonl"
    flags = ["--checkpoint", trained / "best.pt", "--num-samples", 3, "--seed", 1, "--output", output]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 130
    assert "stopped: 2 of 3 stories are complete" in capsys.readouterr().err
    assert [(row["seed"], row["tokens"]) for row in read_rows(output)] == [(1, 1), (3, 1)]


def test_stories_that_cannot_be_written_are_printed(trained, tmp_path, monkeypatch, capsys):
    import generate as script

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "write_text", full)
    flags = ["--checkpoint", trained / "best.pt", "--num-samples", 2, "--max-tokens", 3, "--seed", 1]
    flags += ["--output", tmp_path / "stories.jsonl"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, flags)])
    with pytest.raises(OSError, match="No space left"):
        script.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    assert all(1 <= row["tokens"] <= 3 and row["story"] for row in rows)


@needs_kernels
@pytest.mark.parametrize(("flags", "dtype"), [([], "int8"), (["--dtype", "float32"], "float32")])
def test_a_cpu_writes_in_int8_unless_asked_otherwise(trained, flags, dtype):
    import generate as script

    settings = read_settings(REPO / "generate.py", flags)
    writer, about = script.load_writer(trained / "best.pt", settings, Sampling(), [""])
    assert f"parameters in {dtype}" in about
    weights, *_ = writer.decoder.network.head.tensors
    assert weights.dtype == getattr(torch, dtype)
