"""evaluate.py as its users run it: splits, files, Hugging Face models, tables, the report."""

import dataclasses
import errno
import hashlib
import html.parser
import json
import math
import os
import random
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import REPO, assert_one_line_error
from test_model import reference as as_transformers
from test_scoring import EOT, STORIES, InMemory, make_model, make_tokenizer, score
from tokenizers import Tokenizer, normalizers, pre_tokenizers

import evaluate as script
from model.candidates import TransformersModel
from model.checkpoint import save_checkpoint
from model.decoder import choose_weights
from model.errors import UserError
from model.packed_data import load_data, real_stories
from model.report import (
    COLOURS,
    NOT_HTML,
    SCORE_COLUMNS,
    cells,
    draw,
    draw_curves,
    draw_positions,
    format_figure,
    headline,
    quality_table,
    transposed,
)
from model.sampling import Sampling
from model.scoring import compare, score_stories
from model.tokenizer import text_tokenizer

TRAIN = [f"Cat {k} sat on the mat and saw a dog." for k in range(10)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, tokenizer):
    """A packed data folder, written by hand."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "processed").mkdir()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    sha256 = hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    meta = {"dtype": "uint16", "vocab_size": 300, "eot_id": EOT, "tokenizer_sha256": sha256, "splits": {}}
    for split, stories in (("train", TRAIN), ("validation", STORIES)):
        encoded = [tokenizer.encode(story, add_special_tokens=False).ids for story in stories]
        tokens = np.array([token for ids in encoded for token in (*ids, EOT)], dtype="<u2")
        (folder / "processed" / f"{split}.bin").write_bytes(tokens.tobytes())
        size = sum(len(story.encode()) for story in stories)
        facts = {"tokens": len(tokens), "stories": len(stories), "bytes": size, "sha256": "-"}
        meta["splits"][split] = facts
    (folder / "processed" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def read(data_dir, split, max_samples=0):
    settings = SimpleNamespace(data_dir=data_dir, split=split, max_samples=max_samples)
    return script.read_stories(settings, script.load_data(data_dir), [])[0]


def test_stories_come_back_from_the_packed_tokens(data_dir):
    assert read(data_dir, "validation") == sorted(STORIES)
    assert read(data_dir, "train") == sorted(TRAIN)
    assert read(data_dir, "all") == sorted(TRAIN + STORIES)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, range(10)), (99, range(10)), (0, range(10))],
)
def test_a_sample_is_spread_evenly_over_the_split(data_dir, count, expected):
    assert read(data_dir, "train", count) == [TRAIN[k] for k in expected]


# The script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """A folder with two different models and the metrics of a run."""
    folder = tmp_path_factory.mktemp("run")
    for name, blocks, step in (("ckpt_40.pt", "modern", 40), ("best.pt", "gpt2", 30)):
        model = make_model(blocks)
        content = {"config": vars(model.config), "settings": {"seed": 1}, "weights": model.state_dict()}
        content |= {"tokenizer": tokenizer.to_str(), "eot_id": EOT, "data": {}, "step": step}
        save_checkpoint(folder / name, content)
    rows = [{"step": k, "bits_per_byte": 5 / k, "tokens": 64 * k} for k in (20, 30, 40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def evaluate(monkeypatch, tmp_path, checkpoint, data_dir):
    """evaluate(flags...) runs the script's main in tmp_path and returns what --output wrote."""
    monkeypatch.chdir(tmp_path)

    def evaluate(*flags):
        output = tmp_path / "scores.json"
        places = ["--checkpoint-dir", checkpoint, "--device", "cpu", "--output", output]
        if "--data-dir" not in flags:
            places += ["--data-dir", data_dir]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, [*places, *flags])])
        script.main()
        return json.loads(output.read_text(encoding="utf-8"))

    return evaluate


def test_the_script_prints_and_writes_the_scores(run, tmp_path, checkpoint, data_dir, tokenizer):
    places = ["--checkpoint-dir", checkpoint, "--data-dir", data_dir, "--device", "cpu"]
    env = {"PYTHONPROFILEIMPORTTIME": "1"}
    result = run("evaluate.py", *places, "--output", "scores.json", cwd=tmp_path, env=env, check=0)
    assert (
        "torch._inductor" not in result.stderr and "torch._dynamo" not in result.stderr
    )  # seconds for nothing
    expected = score(make_model("modern"), tokenizer).summary()
    written = json.loads((tmp_path / "scores.json").read_text())
    (row,) = written["results"]
    assert row["step"] == 40 and row["checkpoint"].endswith("ckpt_40.pt")
    assert row["parameters"] == make_model("modern").count_parameters()
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    low, high = row["bits_per_byte_interval"]
    assert low < row["bits_per_byte"] < high
    assert re.search(rf"^95 % interval +{low:.4f} to {high:.4f}$", result.stdout, re.MULTILINE)
    assert written["command"].startswith("python ") and "--output scores.json" in written["command"]
    assert written["versions"]["torch"] == torch.__version__
    assert row["sha256"] == hashlib.sha256((checkpoint / "ckpt_40.pt").read_bytes()).hexdigest()


def test_several_checkpoints_are_columns_of_a_table(evaluate, capsys):
    written = evaluate("--checkpoint", "40", "best", "40", "--prompt", "Once upon")
    lines = capsys.readouterr().out.splitlines()
    header = next(k for k, line in enumerate(lines) if line.split()[:1] == ["checkpoint"])
    names = [name.rpartition("/")[2] for name in lines[header].split()[1:]]
    assert names == ["ckpt_40.pt", "best.pt", "ckpt_40.pt"]
    assert lines[header - 1].startswith("8 validation stories")
    assert sum(": Once upon" in line for line in lines) == len(written["written"][0]["stories"]) == 2
    first, other, same = written["results"]
    assert "difference" not in first and same["verdict"] == "no clear difference"
    assert same["difference_interval"] == [same["difference"], 0] == [0, 0]
    assert other["difference"] == other["bits_per_byte"] - first["bits_per_byte"]
    assert other["difference_interval"][0] < other["difference"] < other["difference_interval"][1]
    verdicts = next(line for line in lines if line.startswith("verdict"))
    assert re.split("  +", verdicts) == ["verdict", other["verdict"], "no clear difference"]


@pytest.mark.parametrize(
    ("stories", "difference", "verdict"),
    [
        (100, -0.01, "better"),
        (100, 0.01, "worse"),
        (100, 1e-8, "no clear difference"),  # as rounding makes it, of one model in two formats
        (5, -0.01, "no clear difference"),
        (6, -0.01, "better"),
    ],
)
def test_a_verdict_needs_more_than_rounding_and_a_few_stories(stories, difference, verdict):
    results = [
        {"bits_per_byte": 1.0, "stories": stories},
        {"bits_per_byte": 1 + difference, "stories": stories},
    ]
    resampled = np.ones((2, 1000)) + [[0.0], [difference]] + 1e-9 * np.random.default_rng(0).random(1000)
    compare(results, resampled)
    assert results[1]["verdict"] == verdict


def test_what_is_rounded_to_zero_has_no_minus():
    figures = [format_figure(value, "+.4f") for value in (-1e-9, 1e-9, -0.5)]
    assert figures == ["+0.0000", "+0.0000", "-0.5000"]
    assert [format_figure(value, ".1%") for value in (-1e-9, -0.5)] == ["0.0%", "-50.0%"]


def test_each_figure_is_in_its_column():
    row = {
        "checkpoint": "a.pt",
        "step": 0,
        "parameters": 1_234_567,
        "bits_per_byte": 0.51,
        "difference": -0.04,
    }
    row |= {"bits_per_byte_interval": [0.5, 0.52], "difference_interval": [-0.05, 0.03], "verdict": "better"}
    row |= {"loss": 1.5, "perplexity": 4.48, "accuracy": 0.6, "stories_written_in": "int8"}
    assert transposed(cells(SCORE_COLUMNS, [row])) == [
        ["checkpoint", "a.pt"],
        ["step", "0"],
        ["parameters", "1,234,567"],
        ["bits/byte", "0.5100"],
        ["95 % interval", "0.5000 to 0.5200"],
        ["against the first", "-0.0400"],
        ["95 % interval", "-0.0500 to +0.0300"],
        ["verdict", "better"],
        ["loss", "1.5000"],
        ["perplexity", "4.480"],
        ["accuracy", "60.00%"],
        ["wrote stories in", "int8"],
    ]
    row = {
        "stories": 1_000,
        "ended": 0.9,
        "words": 150.4,
        "distinct_1": 0.1,
        "distinct_2": 0.2,
        "distinct_3": 0.3,
    }
    row |= {"repeated_4grams": 0.04, "unseen_words": 0.0, "copied_8grams": 0.5, "mean_longest_copy": 12.5}
    row |= {"copied_8grams_beyond_real": 0.06, "mean_longest_copy_beyond_real": -1.5, "longest_copy": 77}
    assert quality_table({"a.pt": row}) == [
        ["story quality", "a.pt"],
        ["stories", "1,000"],
        ["ended by themselves", "90.0%"],
        ["words per story", "150"],
        ["distinct-1", "0.100"],
        ["distinct-2", "0.200"],
        ["distinct-3", "0.300"],
        ["4-grams repeated within a story", "4.0%"],
        ["words in no training story", "0.00%"],
        ["8-grams found in training", "50.0%"],
        ["  beyond real stories", "+6.0%"],
        ["mean longest copied span, tokens", "12.5"],
        ["  beyond real stories", "-1.5"],
        ["longest copied span overall", "77"],
    ]


def test_the_legend_names_each_line_beside_its_colour():
    page = draw(["one", "other"], [([1, 2], [1, 2], {}), ([1, 2], [2, 1], {})], "", "")
    legend = re.findall(rf"{COLOURS[0]}|{COLOURS[1]}|>one<|>other<", page)[-4:]
    assert legend == [COLOURS[0], ">one<", COLOURS[1], ">other<"]


def test_neither_order_nor_batch_size_changes_a_figure(evaluate, tmp_path):
    stories = [story for story in STORIES if story and "endoftext" not in story]
    stories += [f"There were {k} cats and a dog{'s' * k}." for k in range(9)]
    results = []
    for seed, batch_size in ((0, 0), (1, 1), (2, 5)):
        random.Random(seed).shuffle(stories)
        (tmp_path / "own.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
        flags = ["--text", "own.txt", "--batch-size", batch_size, "--checkpoint", "best", "40"]
        results.append(evaluate(*flags)["results"])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            for key in ("loss", "perplexity", "bits_per_byte", "accuracy", "stories", "tokens", "bytes"):
                assert same[key] == pytest.approx(one[key], rel=1e-6)
            assert same["bits_per_byte_interval"] == pytest.approx(one["bits_per_byte_interval"], rel=1e-6)


def test_stories_of_ones_own_need_no_packed_data(run, checkpoint, tmp_path, tokenizer):
    """Unless a folder for it is named. The script is run in a copy of the repository, which has no data."""
    (tmp_path / "own.jsonl").write_text('{"text": " The cat. "}\n{"text": ""}\n{"text": "A dog sat."}\n')
    for name in ("model", "data"):
        shutil.copytree(
            REPO / name, tmp_path / name, ignore=lambda _, names: {"raw", "processed"} & set(names)
        )
    shutil.copy(REPO / "evaluate.py", tmp_path)
    flags = ["--checkpoint-dir", checkpoint, "--text", "own.jsonl", "--output", "scores.json"]
    run(tmp_path / "evaluate.py", *flags, cwd=tmp_path, check=0)
    (row,) = json.loads((tmp_path / "scores.json").read_text())["results"]
    expected = score(make_model("modern"), tokenizer, ["The cat.", "A dog sat."]).summary()
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_line_ends_of_ones_own_stories_cost_nothing(evaluate, tmp_path):
    """They are read as step 1 reads them, from whichever column."""
    scores = set()
    for name, end in (("unix", "\n"), ("windows", "\r\n")):
        text = f'story{end}"The cat sat.{end}{end}A dog sat."{end}"A dog saw."{end}'
        (tmp_path / f"{name}.csv").write_bytes(text.encode())
        (row,) = evaluate("--text", f"{name}.csv", "--text-column", "story")["results"]
        assert row["stories"] == 2
        scores.add(row["bits_per_byte"])
    assert len(scores) == 1


def test_a_model_trained_on_other_stories_is_remarked_on(evaluate, checkpoint, data_dir, tmp_path, capsys):
    content = torch.load(checkpoint / "best.pt", weights_only=True)
    here = script.fingerprints(script.load_data(data_dir))
    (tmp_path / "own.txt").write_text("The cat sat.")
    for name, changes in {"same.pt": {}, "other.pt": {"training stories": "0"}}.items():
        save_checkpoint(tmp_path / name, {**content, "data": here | changes})
        remark = f"{name} was trained on other stories than those in"
        for flags, rest in (
            ([], "may be among its own"),
            (["--text", "own.txt", "--num-stories", 1], "what it copies is looked up in those"),
        ):
            evaluate("--checkpoint", name, "--max-samples", 1, *flags)
            said = capsys.readouterr().err
            assert ((remark in said) == (rest in said) == bool(changes)) and "one story alone" in said
        evaluate("--checkpoint", name, "--text", "own.txt")  # which needs no training stories
        assert remark not in capsys.readouterr().err
    save_checkpoint(tmp_path / "tuned.pt", {**content, "data": here, "settings": {"init_from": "a/b"}})
    report = evaluate("--checkpoint", "tuned.pt", "--max-samples", 2, "--report", "r.html")
    (remark,) = report["notes"]
    assert (
        remark.startswith("tuned.pt was fine-tuned from a/b, which may have seen")
        and remark in capsys.readouterr().err
    )
    assert remark in "".join(Page((tmp_path / "r.html").read_text(encoding="utf-8")).words)


def test_a_text_that_is_named_twice_counts_once(evaluate, tmp_path):
    (tmp_path / "own.txt").write_text("The cat sat.\n\nA dog ran.\n\nThe end.")
    flags = ["--text", "own.txt", "./own.txt", ".", "--checkpoint", "best"]
    (row,) = evaluate(*flags)["results"]
    assert row["stories"] == 3
    (row,) = evaluate("--text", "own.txt", "--max-samples", 2)["results"]
    assert row["stories"] == 2


def test_written_stories_are_judged_beside_real_ones(evaluate, tmp_path, capsys):
    rows = [
        {"prompt": "Cat 3 sat", "story": " on the mat and saw a dragon.", "finish_reason": "end_of_story"}
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows * 2)))
    written = evaluate("--stories", "s.jsonl")
    assert written["results"] == []  # without a model, unless what is asked for needs one
    assert len(evaluate("--stories", "s.jsonl", "--num-stories", 1)["results"]) == 1
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, rows * 3)))
    quality = evaluate("--stories", "s.jsonl", "more.jsonl")["quality"]
    assert [figures["stories"] for figures in quality.values()] == [3, 2, 3]  # as many real ones as the most
    real, judged = written["quality"]["real stories"], written["quality"]["s.jsonl"]
    assert judged["stories"] == real["stories"] == 2 and judged["ended"] == 1
    assert judged["unseen_examples"] == ["dragon"]
    assert judged["longest_copy_text"].startswith("Cat 3 sat on the mat and saw a d")
    assert judged["copied_8grams_beyond_real"] == judged["copied_8grams"] - real["copied_8grams"] > 0
    assert "8-grams found in training" in capsys.readouterr().out


def test_stories_of_a_checkpoint_are_the_same_each_time(evaluate):
    one, same, other = (evaluate("--num-stories", 12, "--seed", seed) for seed in (1, 1, 2))
    assert one["written"] == same["written"] != other["written"]
    assert one["quality"] == same["quality"]
    rows = [report["results"][0] for report in (one, same, other)]
    first, again, differs = (row["bits_per_byte_interval"] for row in rows)
    assert first == again != differs
    assert {row["stories_written_in"] for row in rows} == {choose_weights(CPU, "auto")}
    (name,) = set(one["quality"]) - {"real stories"}
    assert one["quality"][name]["stories"] == 12
    assert [row["prompt"] for row in one["written"]] == script.PROMPT
    assert all(story.startswith(row["prompt"]) for row in one["written"] for story in row["stories"].values())


def test_the_files_are_written_even_if_nobody_reads_what_is_printed(evaluate, monkeypatch, tmp_path):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        evaluate("--max-samples", 2, "--report", tmp_path / "report.html")
    assert (tmp_path / "scores.json").exists() and (tmp_path / "report.html").exists()


def test_a_checkpoint_writes_the_stories_that_generate_writes(
    evaluate, run, checkpoint, tmp_path, monkeypatch
):
    """Of which some are cut."""
    monkeypatch.setattr("model.candidates.WRITTEN_AT_ONCE", 2)
    monkeypatch.setattr("model.candidates.MAX_TOKENS", 120)
    prompts, flags = [*script.PROMPT, "caf\udce9"], ["--seed", 7, "--device", "cpu"]  # one is not UTF-8
    flags += [word for prompt in prompts for word in ("--prompt", prompt)]
    path = checkpoint / "ckpt_40.pt"
    cut = ["--max-tokens", 120, "--output", tmp_path / "s.jsonl"]
    run("generate.py", "--checkpoint", path, *flags, *cut, check=0)
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    report = evaluate("--checkpoint", path, *flags)
    judged = [story for row in report["written"] for story in row["stories"].values()]
    assert judged == [row["prompt"] + row["story"] for row in rows]
    (name,) = set(report["quality"]) - {"real stories"}
    ended = np.mean([row["finish_reason"] == "end_of_story" for row in rows])
    assert 0 < report["quality"][name]["ended"] == ended < 1


# Hugging Face models


def save_transformers(folder, model, tokenizer, **special):
    model.save_pretrained(folder)
    special = special or {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.save_pretrained(folder)
    return folder


def random_transformer(kind, context=400, vocab_size=300):
    torch.manual_seed(1)
    shape = {"vocab_size": vocab_size, "bos_token_id": EOT, "eos_token_id": EOT}
    if kind == "neo":
        config = transformers.GPTNeoConfig(
            **shape, max_position_embeddings=context, hidden_size=16, num_layers=2, num_heads=2,
            attention_types=[[["global", "local"], 1]], window_size=8,
        )  # fmt: skip
    elif kind == "gpt2":
        config = transformers.GPT2Config(**shape, n_positions=context, n_embd=16, n_layer=2, n_head=2)
    else:
        config = transformers.LlamaConfig(
            **shape, max_position_embeddings=context, hidden_size=16, intermediate_size=32,
            num_hidden_layers=2, num_attention_heads=2,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def own_loss(model, tokenizer, stories):
    """Summed loss of the stories as transformers counts it."""
    total = 0.0
    for story in stories:
        ids = torch.tensor([[EOT, *tokenizer.encode(story, add_special_tokens=False).ids, EOT]])
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    return total


@pytest.mark.parametrize("kind", ["neo", "gpt2", "llama"])
def test_a_transformers_model_gets_the_loss_that_it_counts_itself(tmp_path, tokenizer, kind, evaluate):
    model = random_transformer(kind)
    folder = save_transformers(tmp_path / kind, model, tokenizer)
    (row,) = evaluate("--checkpoint", folder, "--num-stories", 3)["results"]
    size = sum(len(story.encode()) for story in STORIES)
    assert (row["stories"], row["bytes"]) == (len(STORIES), size)
    expected = own_loss(model, tokenizer, STORIES) / math.log(2) / size
    assert row["bits_per_byte"] == pytest.approx(expected, abs=1e-4)
    assert row["parameters"] == model.num_parameters()


@pytest.mark.parametrize("blocks", ["modern", "gpt2"])
def test_an_exported_model_scores_as_before(tmp_path, tokenizer, blocks):
    """Beyond its context too, so windows slide alike."""
    model = make_model(blocks)
    folder = save_transformers(tmp_path, as_transformers(model), tokenizer)
    exported = TransformersModel(str(folder), CPU)
    exported.adapt_to(STORIES)
    assert exported.block_size == 16
    runtime = SimpleNamespace(device=CPU, autocast=torch.no_grad)
    scores = score_stories(exported, STORIES, runtime)
    np.testing.assert_allclose(scores.loss, score(model, tokenizer).loss, rtol=1e-4)


@pytest.mark.parametrize("blocks", ["modern", "gpt2"])
def test_our_scores_are_the_losses_of_the_exported_model(tokenizer, blocks):
    model = make_model(blocks, block_size=400)
    size = sum(len(story.encode()) for story in STORIES)
    expected = own_loss(as_transformers(model), tokenizer, STORIES) / math.log(2) / size
    assert score(model, tokenizer).summary()["bits_per_byte"] == pytest.approx(expected, abs=1e-4)


def test_the_end_token_is_the_one_that_the_model_expects(tmp_path, tokenizer):
    """Of a tokenizer with two: a model that was trained as llama2.c's expects the next beginning."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).backend_tokenizer
    tokenizer.add_special_tokens(["</s>"])  # 300
    for expected in (EOT, tokenizer.token_to_id("</s>")):
        shape = {"vocab_size": 301, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 64}
        config = transformers.LlamaConfig(**shape, num_hidden_layers=1, num_attention_heads=1)
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.weight[expected] = 1.0
            model.model.norm.weight.fill_(1.0)
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.fill_(1.0)
        names = {"bos_token": "<|endoftext|>", "eos_token": "</s>"}
        folder = save_transformers(tmp_path / str(expected), model, tokenizer, **names)
        candidate = TransformersModel(str(folder), CPU)
        candidate.adapt_to(["The cat sat.", "A dog."])
        assert (candidate.start_id, candidate.end_id) == (EOT, expected)


def test_a_tokenizer_that_changes_stories_is_refused_or_warned_of(tmp_path, tokenizer, evaluate, capsys):
    other, model = Tokenizer.from_str(tokenizer.to_str()), random_transformer("gpt2")
    other.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="does not reproduce stories"):
        evaluate("--checkpoint", save_transformers(tmp_path / "lower", model, other))
    other.normalizer = normalizers.Replace("Zoë", "Zoe")
    evaluate("--checkpoint", save_transformers(tmp_path / "plain", model, other))
    warning = "alters 1 of 8 stories, so its bits per byte are not exact"
    assert warning in capsys.readouterr().err


def test_so_is_that_of_a_checkpoint(tokenizer):
    """--kind may have taken it from anywhere. One that puts a space before each story loses nothing."""
    other, model = Tokenizer.from_str(tokenizer.to_str()), make_model("modern")
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    InMemory(model, other).adapt_to(STORIES)
    other.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="the tokenizer of a model does not reproduce stories"):
        InMemory(model, other).adapt_to(STORIES)


def test_stories_are_scored_without_the_space_that_a_tokenizer_puts_before_them(data_dir, tokenizer):
    data, other = load_data(data_dir), text_tokenizer(tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    ids = [token for story in STORIES for token in [*other.encode(story, add_special_tokens=False).ids, EOT]]
    split = dataclasses.replace(data.validation, tokens=np.array(ids, np.uint16))
    packed = dataclasses.replace(data, tokenizer_json=other.to_str())
    assert real_stories([split], packed, 0) == STORIES


def test_the_context_of_a_model_that_calls_it_otherwise(tmp_path, tokenizer):
    config = transformers.MptConfig(d_model=16, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=300)
    model = transformers.AutoModelForCausalLM.from_config(config)
    folder = save_transformers(tmp_path / "mpt", model, tokenizer)
    assert TransformersModel(str(folder), CPU).block_size == 64


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_transformers_model_writes_the_same_in_company(tmp_path, tokenizer, monkeypatch, kind):
    """Shorter prompts are padded on the left, which it must not see."""
    monkeypatch.setattr(Sampling, "for_transformers", lambda self: {"do_sample": False})
    monkeypatch.setattr("model.candidates.MAX_TOKENS", 12)
    folder = save_transformers(tmp_path / kind, random_transformer(kind), tokenizer)
    candidate, prompts = TransformersModel(str(folder), CPU), [[EOT, 5], [EOT, *range(7, 20)]]
    alone = [candidate.continue_ids([prompt], [0])[0] for prompt in prompts]
    assert candidate.continue_ids(prompts, [0, 1]) == alone


def test_a_transformers_model_cuts_stories_at_their_end_and_prompts_at_the_context(tmp_path, tokenizer):
    folder = save_transformers(tmp_path / "gpt2", random_transformer("gpt2", context=16), tokenizer)
    candidate, prompt = TransformersModel(str(folder), CPU), [EOT, 5]
    candidate.end_id = 299  # rarely drawn
    one, same, other = (candidate.continue_ids([prompt, prompt], [seed, 0]) for seed in (1, 1, 2))
    assert one == same != other
    whole, _ = one[0]
    candidate.end_id = whole[7]
    assert candidate.continue_ids([prompt, prompt], [1, 0])[0] == (whole[: whole.index(whole[7])], True)
    long = [EOT, *range(7, 40)]
    assert candidate.continue_ids([long], [1]) == candidate.continue_ids([long[-15:]], [1])


def break_folder(folder, damage):
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(b"nothing")
    elif damage == "tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "no tokenizer":  # transformers then makes up an empty one
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "kind":
        (folder / "config.json").write_text('{"model_type": "vit"}')
    elif damage == "end":
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    elif damage == "missing":
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["transformer.h.1.mlp.c_fc.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "needle"),
    [
        ("weights", "does not load"),
        ("tokenizer", "does not load"),
        ("no tokenizer", "has no tokenizer: copy its files"),
        ("config", "does not load"),
        ("kind", "does not load"),
        ("end", "has no end-of-text token"),
        ("missing", "lacks 1 of its weights, including transformer.h.1.mlp.c_fc.weight"),
        ("context", "has a context of 1 token"),
        ("vocabulary", "the tokenizer of .* has 293 tokens, but the model only 200"),
    ],
)
def test_a_broken_hugging_face_folder_is_one_line(tmp_path, tokenizer, evaluate, damage, needle):
    shape = {"context": {"context": 1}, "vocabulary": {"vocab_size": 200}}.get(damage, {})
    model = random_transformer("gpt2", **shape)
    folder = save_transformers(tmp_path / "model", model, tokenizer)
    break_folder(folder, damage)
    with pytest.raises(UserError, match=needle):
        evaluate("--checkpoint", folder)


# The report


class Page(html.parser.HTMLParser):
    """Every tag is closed in order; what the page would load, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.words, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_one_page_with_everything(evaluate, tmp_path):
    prompt = '<script>alert("x")</script> & the cat'
    flags = ["--report", "r.html", "--checkpoint", "best", "40", "--num-stories", 2]
    written = evaluate(*flags, "--prompt", prompt, "</style><b>")
    text = (tmp_path / "r.html").read_bytes().decode()  # as it is, line ends too
    page = Page(text)
    assert page.loads == [] and "url(http" not in text and "@import" not in text
    assert "script" not in page.tags and page.tags.count("svg") == 2
    said = "".join(page.words)
    for result in written["results"]:
        assert f"{result['bits_per_byte']:.4f}" in said
    for row in written["written"]:
        for story in row["stories"].values():
            assert NOT_HTML.sub("\ufffd", story.removeprefix(row["prompt"]).strip("\n")) in said
    assert prompt in said and written["command"] in said and written["results"][1]["verdict"] in said
    assert "n_layer" in said and "prefers-color-scheme: dark" in text


def test_a_name_with_dollars_is_not_a_formula(evaluate, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "REPORT_STORIES", 2)
    name = "_$x^$.pt"
    shutil.copy(checkpoint / "best.pt", tmp_path / name)
    assert evaluate("--report", "r.html", "--checkpoint", name)["quality"][name]["stories"] == 2
    words = Page((tmp_path / "r.html").read_text(encoding="utf-8")).words
    assert (
        sum(word.strip() == name for word in words) >= 2
    )  # in the table, and in the legend of loss by position


@pytest.mark.parametrize(
    ("others", "end"),
    [
        ([], "a: 0.5000 bits per byte"),
        ([(0.6, "worse")], ", better than the other"),
        ([(0.6, "worse"), (0.6, "worse")], ", better than all others"),
        ([(0.6, "worse"), (0.51, "no clear difference")], ", though not clearly better"),
        ([(0.49, "no clear difference")], ", though not clearly better"),
        ([(0.4, "better")], "b: 0.4000 bits per byte, better than a"),
    ],
)
def test_the_headline_says_no_more_than_the_verdicts(others, end):
    rows = [{"checkpoint": "a", "bits_per_byte": 0.5}]
    rows += [{"checkpoint": "b", "bits_per_byte": bits, "verdict": verdict} for bits, verdict in others]
    assert headline(rows).endswith(end)


def test_charts_show_bits_per_byte_by_bytes_and_by_tokens(monkeypatch):
    """Of three bytes a token here; a point of fewer than 20 tokens is left out."""
    drawn = []
    monkeypatch.setattr("model.report.draw", lambda labels, lines, *_, **__: drawn.append(lines))
    ranges = [(0, 1, 20, math.log(2)), (1, 5, 40, 2 * math.log(2)), (5, 9, 19, 9)]
    by_position = [dict(zip(("first", "end", "tokens", "loss"), r, strict=True)) for r in ranges]
    curve = [{"step": k, "tokens": 1_000_000 * k, "bits_per_byte": 1 / k} for k in (1, 2, 4)]
    row = {"checkpoint": "a", "bytes": 300, "tokens": 100, "by_position": by_position}
    row |= {"curve": curve, "step": 2}
    draw_positions([row])
    draw_curves([row])
    assert drawn[0] == [([1.5, 9.0], pytest.approx([1 / 3, 2 / 3]), {})]
    assert drawn[1] == [([1.0, 2.0, 4.0], [1.0, 0.5, 0.25], {"marker": "o", "markevery": [1]})]


def test_a_report_of_stories_alone(evaluate, tmp_path):
    (tmp_path / "s.jsonl").write_text(r'{"prompt": "The", "story": " \u001bcat sat."}' + "\n")
    evaluate("--stories", "s.jsonl", "--report", "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "svg" not in page.tags and "s.jsonl" in "".join(page.words)
    assert not re.search(r"[^\S ]", text.replace("\n", "")) and "\x1b" not in text


def test_names_that_are_not_utf8_spoil_neither_results_nor_report(evaluate, checkpoint, tmp_path, recwarn):
    """Nor do characters that matplotlib's fonts lack."""
    name, text = os.fsdecode(b"caf\xe9 \xf0\x9f\x98\x80.pt"), os.fsdecode(b"caf\xe9.txt")
    shutil.copy(checkpoint / "best.pt", tmp_path / name)
    (tmp_path / text).write_text("The cat sat.")
    written = evaluate("--report", "r.html", "--checkpoint", name, "--text", text)
    assert written["results"][0]["checkpoint"] == "caf\ufffd \U0001f600.pt"
    assert "caf\ufffd.txt" in (tmp_path / "r.html").read_text(encoding="utf-8") and not recwarn.list


# What the user got wrong


@pytest.mark.parametrize(
    ("flags", "needle"),
    [
        (["--split", "test"], "--split takes train, validation or all, not 'test'"),
        (["--max-samples", "-1"], "--max-samples must be at least 0"),
        (["--num-stories", "-1"], "--num-stories must be at least 0"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--seed", 2**63 - 9, "--num-stories", 10], "is too large for 10 stories"),
        (["--checkpoint", "best", "41"], r"there is no checkpoint '41' \(.* has .*40, best\)"),
        (["--checkpoint", "gpt2"], "on the Hugging Face hub is named owner/name"),
        (["--text", "none.txt"], "there is no file or folder none.txt"),
        (["--text", "none"], "there is no file or folder none"),
        (["--text", "empty.txt"], "empty.txt holds no stories"),
        (["--text", "empty.txt", "--split", "all"], "--text and --split: give one of the two"),
        (["--stories", "none.jsonl"], "there is no file none.jsonl"),
        (["--report", "."], "--report . is a folder"),
        (["--report", ""], "--report takes a name, not an empty one"),
        (["--output", "a.html", "--report", "./a.html"], "--output and --report name the same file"),
        (["--checkpoint", ""], "--checkpoint takes a name, not an empty one"),
        (["--checkpoint", "folder"], "folder holds neither checkpoints nor a Hugging Face model"),
        (["--text-column", "story"], "--text-column: only for files of --text"),
        (
            ["--text", "empty.txt", "--data-dir", "nothing"],
            r"run python .*data/ingestion\.py --data-dir nothing",
        ),
        (["--data-dir", "nothing"], r"run python .*data/ingestion\.py --data-dir nothing"),
        (["--checkpoint", "short.pt"], "short.pt has a context of 1 token"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(evaluate, tmp_path, tokenizer, flags, needle):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "folder").mkdir()
    model = make_model("modern", block_size=1)
    content = {"config": vars(model.config), "settings": {}, "weights": model.state_dict(), "step": 1}
    save_checkpoint(
        tmp_path / "short.pt", content | {"tokenizer": tokenizer.to_str(), "eot_id": 0, "data": {}}
    )
    with pytest.raises(UserError, match=needle):
        evaluate(*flags)


def test_an_error_ends_the_script_with_status_two(run, tmp_path, checkpoint, data_dir):
    places = ["--checkpoint-dir", checkpoint, "--data-dir", data_dir]
    result = run("evaluate.py", *places, "--checkpoint", "who/what", cwd=tmp_path)
    assert_one_line_error(result, "there is no such checkpoint here", "who/what does not load")


@pytest.mark.parametrize("facts", [None, {"tokens": 0, "stories": 0, "bytes": 0, "sha256": "-"}])
def test_a_split_that_is_missing_is_named(evaluate, data_dir, tmp_path, facts):
    shutil.copytree(data_dir, tmp_path / "data")
    path = tmp_path / "data" / "processed" / "meta.json"
    meta = json.loads(path.read_text())
    meta["splits"] = {"train": meta["splits"]["train"]} | ({"validation": facts} if facts else {})
    path.write_text(json.dumps(meta))
    with pytest.raises(
        UserError, match=r"has no validation stories: run python .*prepare_data\.py --data-dir data"
    ):
        evaluate("--data-dir", tmp_path / "data")


def test_what_is_read_is_not_written_over(run, refused, packed, trained, tmp_path):
    shutil.copy(trained / "best.pt", tmp_path)
    before = (tmp_path / "best.pt").read_bytes()
    flags = ["--data-dir", packed, "--checkpoint-dir", tmp_path, "--checkpoint", "best"]
    result = run("evaluate.py", *flags, "--output", tmp_path / "best.pt")
    assert_one_line_error(result, "would replace a file that is in use")
    assert (tmp_path / "best.pt").read_bytes() == before
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.txt").write_text("Once upon a time.")
    (tmp_path / "metrics.jsonl").write_text("")
    for path in (tmp_path / "metrics.jsonl", packed / "processed" / "validation.bin"):
        before = path.read_bytes()
        assert "would replace" in refused("evaluate.py", *flags, "--report", path)
        assert path.read_bytes() == before
    flags += ["--text", tmp_path / "own", "--output", tmp_path / "own" / "a.txt"]
    assert_one_line_error(run("evaluate.py", *flags), "would replace a file that is in use")
    assert (tmp_path / "own" / "a.txt").read_text() == "Once upon a time."


def test_results_are_printed_even_if_they_cannot_be_written(packed, trained, monkeypatch, capsys):
    def fail(path, value):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("evaluate.write_json", fail)
    flags = ["--data-dir", packed, "--checkpoint-dir", trained, "--max-samples", 2]
    flags += ["--output", trained / "s.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(OSError, match="No space left"):
        script.main()
    assert "\nbits/byte " in capsys.readouterr().out
