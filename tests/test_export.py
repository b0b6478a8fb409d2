"""Exported models in transformers and in llama.cpp itself, and taken back by train.py."""

import contextlib
import errno
import json
import shutil
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE, REPO, SMALL, assert_one_line_error
from datasets import Dataset
from fake_hub import serve_hub
from safetensors.torch import load_file, save_file
from test_tokenizer import AWKWARD
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import export
import generate
from data import train_tokenizer
from model.checkpoint import load_checkpoint, load_model, save_checkpoint
from model.config import GPTConfig
from model.decoder import Decoder
from model.errors import UserError
from model.generation import generate_all
from model.gpt import GPT
from model.huggingface import (
    from_config_json,
    load_pretrained,
    load_pretrained_model,
    load_tokenizer_json,
    to_config_json,
)
from model.packed_data import load_data
from model.run import complete_settings
from model.sampling import Sampling
from model.settings import read_settings
from model.tokenizer import token_table

torch.set_num_threads(1)

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0)
STORIES = ["Once upon a time, there was a cat.", "The dog said, \u201cYes!\u201d\nÅke ran 12 miles."]
PROMPTS = [
    "",
    "Once upon a time",
    "A dog",
    "the end. Then",
    "She was",
    "\u201cNo!\u201d he",
    "3 big",
    "Tim",
    " a",
    "x",
]
QWEN3_SIZES = {"n_kv_head": 2, "head_size": 32, "n_inner": 96, "rope_base": 1e6}


@pytest.fixture(scope="module")
def tokenizers(packed, gpt2_files):
    """kind -> tokenizer.json of that kind"""
    settings = SimpleNamespace(gpt2_files=list(map(str, gpt2_files)))
    char = train_tokenizer.collect_characters(Dataset.from_dict({"text": STORIES}), settings).to_str()
    gpt2 = train_tokenizer.load_gpt2(STORIES, settings).to_str()
    bpe = (packed / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8")
    return {"bpe": bpe, "char": char, "gpt2": gpt2}


@pytest.fixture
def make(tokenizers, tmp_path):
    """make(kind, **shape) writes a checkpoint whose every weight is far from its initial value."""

    def make(kind="bpe", blocks="modern", name="model.pt", ends_after=None, **shape):
        tokenizer = Tokenizer.from_str(tokenizers[kind])
        eot_id = tokenizer.token_to_id("<|endoftext|>")
        shape = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64, **shape}
        torch.manual_seed(1)
        model = GPT(GPTConfig(**{"vocab_size": tokenizer.get_vocab_size(), "blocks": blocks, **shape})).eval()
        with torch.no_grad():
            for weight, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in weight and weight.endswith("weight") else 0.0, 0.2)
            if ends_after:  # the head's row of the end is the state in which it shall come
                ids = [eot_id, *generate_all(Decoder(model), [[eot_id]], ends_after, eot_id, GREEDY, [0])[0]]
                state = model.hidden(torch.tensor([ids]))[0, -1]
                model.head.weight[eot_id] = (
                    state * 1.1 * (model.head_weight @ state).max() / state.square().sum()
                )
        path = tmp_path / name
        settings = {"preset": "stories-9m", "batch_tokens": 700}  # ten windows of 64 tokens
        entries = {
            "config": vars(model.config),
            "weights": model.state_dict(),
            "settings": settings,
            "step": 7,
        }
        entries |= {"tokenizer": tokenizers[kind], "eot_id": eot_id, "data": {"training stories": "0123abc"}}
        save_checkpoint(path, entries)
        return path

    return make


def run_export(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["export.py", *map(str, words)])
        export.main()
    return words[words.index("--output") + 1]


def continuations(path, length=40):
    """(prompt's ids, greedy continuation) of each of PROMPTS, as generate.py --temperature 0 has them."""
    model, tokenizer, checkpoint = load_model(path)
    eot_id = checkpoint["eot_id"]
    prompts = [[eot_id, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in PROMPTS]
    written = generate_all(Decoder(model), prompts, length, eot_id, GREEDY, [0] * len(prompts))
    return list(zip(prompts, written, strict=True))


# transformers


@pytest.mark.parametrize(
    ("kind", "blocks", "shape"),
    [
        ("bpe", "modern", {}),
        ("char", "modern", {"tie_weights": False}),
        ("bpe", "modern", QWEN3_SIZES),
        ("gpt2", "gpt2", {}),
        ("char", "gpt2", {"vocab_size": 400, "n_inner": 96}),
        ("bpe", "gpt2", {"tie_weights": False}),
    ],
    ids=str,
)
@torch.no_grad()
def test_transformers_has_the_same_model(make, tmp_path, kind, blocks, shape):
    path = make(kind, blocks, **shape)
    folder = run_export("--checkpoint", path, "--output", tmp_path / "exported")
    reference = AutoModelForCausalLM.from_pretrained(folder)
    sampling = reference.generation_config
    kept = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")}
    assert sampling.do_sample and kept == {name: getattr(Sampling(), name) for name in kept}
    assert type(reference).__name__ == {"gpt2": "GPT2LMHeadModel", "modern": "Qwen3ForCausalLM"}[blocks]
    model, tokenizer, checkpoint = load_model(path)
    ids = torch.randint(model.config.vocab_size, (3, 64), generator=torch.Generator().manual_seed(2))
    logits = model(ids)
    assert logits.std() > 0.5
    torch.testing.assert_close(reference(ids).logits, logits, atol=1e-4, rtol=0)

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (AWKWARD, *AWKWARD.split("\n"), ""):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert theirs(text, add_special_tokens=False).input_ids == expected
        assert theirs(text).input_ids == [checkpoint["eot_id"], *expected]
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    for prompt, (prompt_ids, expected) in zip(PROMPTS, continuations(path), strict=True):
        inputs = theirs(prompt, return_tensors="pt")
        assert inputs.input_ids[0].tolist() == prompt_ids
        output = reference.generate(**inputs, do_sample=False, max_new_tokens=40)[0].tolist()
        assert output[len(prompt_ids) :] in (expected, [*expected, checkpoint["eot_id"]])
    together = theirs(PROMPTS, padding=True, return_tensors="pt")
    outputs = reference.generate(**together, do_sample=False, max_new_tokens=40)
    for output, (_, expected) in zip(
        outputs[:, together.input_ids.size(1) :], continuations(path), strict=True
    ):
        assert output[: len(expected)].tolist() == expected


def test_generate_stops_at_the_end_of_the_story_or_of_the_context(make, tmp_path):
    path = make("bpe", tie_weights=False, ends_after=9)
    assert continuations(path)[0][1] == continuations(path, 9)[0][1]  # as it should: nine tokens, no more
    folder = run_export("--checkpoint", path, "--output", tmp_path / "ends")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    output = model.generate(**tokenizer("", return_tensors="pt"), do_sample=False)[0]
    assert len(output) == 1 + 9 + 1 and output[-1] == tokenizer.eos_token_id == 0
    folder = run_export("--checkpoint", make("bpe", "gpt2"), "--output", tmp_path / "goes on")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(model.generate(**tokenizer("", return_tensors="pt"), do_sample=False)[0]) == 64


def test_the_model_card_says_what_it_is(make, trained, tmp_path, capsys):
    folder = run_export("--checkpoint-dir", trained, "--output", tmp_path / "exported")
    assert "best.pt, step 2 ->" in capsys.readouterr().out
    card = (folder / "README.md").read_text(encoding="utf-8")
    row = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()][-1]
    facts = ["quickstart", "128 tokens in 2 steps", f"| {row['bits_per_byte']:.4f} |"]
    facts += load_checkpoint(trained / "best.pt")["data"].values()
    for fact in (*facts, "Both\nwere measured during training"):
        assert fact in card
    folder = run_export("--checkpoint", make(), "--output", tmp_path / "whole windows")
    assert "| 4,480 tokens in 7 steps |" in (folder / "README.md").read_text(encoding="utf-8")
    shutil.copy(trained / "best.pt", tmp_path)  # without metrics.jsonl
    folder = run_export("--checkpoint", tmp_path / "best.pt", "--output", tmp_path / "not measured")
    assert "measured" not in (folder / "README.md").read_text(encoding="utf-8")
    assert {file.name for file in folder.iterdir()} == set(export.FILES)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(make, tmp_path, dtype):
    folder = run_export("--checkpoint", make(), "--output", tmp_path / "half", "--dtype", dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


# llama.cpp


@contextlib.contextmanager
def llama_cpp(path):
    """Ask llama.cpp's own server for a model: ask("tokenize", content=...)."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = str(path), 64, 1, 0
    params.cpuparams.n_threads, params.n_gpu_layers, params.warmup, params.verbosity = 1, 0, False, -1
    # attention in half precision is its default, whatever the file holds
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def ask(what, **body):
        request = urllib.request.Request(f"{server.listening_address}/{what}", json.dumps(body).encode())
        return json.load(urllib.request.urlopen(request, timeout=PATIENCE))

    yield ask


@pytest.mark.parametrize(
    ("kind", "blocks", "shape"),
    [
        ("bpe", "modern", {}),
        ("char", "modern", {"tie_weights": False, "vocab_size": 400}),
        ("bpe", "modern", QWEN3_SIZES),
        ("gpt2", "gpt2", {}),
        ("bpe", "gpt2", {"tie_weights": False, "n_inner": 96}),
    ],
    ids=str,
)
def test_llama_cpp_has_the_same_model(make, tmp_path, kind, blocks, shape):
    path = make(kind, blocks, **shape)
    file = run_export("--checkpoint", path, "--output", tmp_path / "model.gguf", "--format", "gguf")
    _, tokenizer, checkpoint = load_model(path)
    with llama_cpp(file) as ask:
        for text in (AWKWARD, *AWKWARD.split("\n"), "Once upon a time"):
            if kind == "char":  # there llama.cpp reads its own mark of a space as one
                text = text.replace("\u2581", "_")
            tokens = ask("tokenize", content=text, add_special=True, parse_special=False)["tokens"]
            assert tokens == [checkpoint["eot_id"], *tokenizer.encode(text, add_special_tokens=False).ids]
        for prompt_ids, expected in continuations(path):
            answer = ask("completion", prompt=prompt_ids, n_predict=40, temperature=0, return_tokens=True)
            assert answer["tokens"] in (expected, [*expected, checkpoint["eot_id"]])


def test_llama_cpp_stops_at_the_end_of_the_story(make, tmp_path):
    path = make("bpe", tie_weights=False, ends_after=9)
    file = run_export("--checkpoint", path, "--output", tmp_path / "model.gguf", "--format", "gguf")
    with llama_cpp(file) as ask:
        answer = ask("completion", prompt="", n_predict=40, temperature=0, return_tokens=True)
    assert answer["stop_type"] == "eos" and answer["tokens"][:9] == continuations(path)[0][1]


@pytest.mark.parametrize(
    ("blocks", "dtype", "tolerance"),
    [
        ("modern", "float32", 1e-4),
        ("gpt2", "float32", 5e-3),  # llama.cpp looks GELU up in a table of half precision
        *((blocks, "float16", 0.02) for blocks in ("modern", "gpt2")),
        *((blocks, "bfloat16", 0.15) for blocks in ("modern", "gpt2")),
        *((blocks, "q8_0", 0.3) for blocks in ("modern", "gpt2")),
    ],
)
@torch.no_grad()
def test_each_precision(make, tmp_path, blocks, dtype, tolerance):
    path = make("bpe", blocks)
    flags = ["--format", "gguf", "--dtype", dtype]
    file = run_export("--checkpoint", path, "--output", tmp_path / "model.gguf", *flags)
    model, _, _ = load_model(path)
    ids = list(range(0, 200, 7))
    expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    with llama_cpp(file) as ask:
        answer = ask("completion", prompt=ids, n_predict=1, n_probs=5, temperature=0)
    top = answer["completion_probabilities"][0]["top_logprobs"]
    error = max(abs(entry["logprob"] - expected[entry["id"]].item()) for entry in top)
    assert error < tolerance
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2, "q8_0": 1.0625}
    assert file.stat().st_size > sizes[dtype] * model.count_parameters()
    assert file.stat().st_size < (sizes[dtype] + 0.2) * model.count_parameters() + 20_000


# The way back


@pytest.mark.parametrize(
    ("blocks", "shape"),
    [
        ("modern", {}),
        ("modern", {**QWEN3_SIZES, "tie_weights": False}),
        ("gpt2", {}),
        ("gpt2", {"tie_weights": False}),
    ],
    ids=str,
)
def test_a_round_trip_changes_no_bit(make, tmp_path, blocks, shape):
    path = make("bpe", blocks, **shape)
    folder = run_export("--checkpoint", path, "--output", tmp_path / "exported")
    checkpoint, pretrained = load_checkpoint(path), load_pretrained(str(folder))
    assert pretrained.config.blocks == blocks
    assert to_config_json(pretrained.config, 0) == to_config_json(GPTConfig(**checkpoint["config"]), 0)
    assert pretrained.weights.keys() == checkpoint["weights"].keys()
    for name, weight in checkpoint["weights"].items():
        assert torch.equal(pretrained.weights[name], weight), name
    assert token_table(pretrained.tokenizer_json) == token_table(checkpoint["tokenizer"])


def test_a_hugging_face_models_context_holds_the_longest_prompt(trained, tmp_path, monkeypatch):
    """And what is written after it; the model itself has 16 positions."""
    monkeypatch.setattr(generate, "PRETRAINED_CONTEXT", 4)
    folder = run_export("--checkpoint", trained / "best.pt", "--output", tmp_path / "exported")
    settings = read_settings(REPO / "generate.py", ["--max-tokens", "5", "--device", "cpu"])
    writer, _ = generate.load_writer(str(folder), settings, GREEDY, ["One", "One day"])
    assert writer.decoder.config.block_size == len("One day") + 1 + 5


def test_generate_reads_a_folder_too(run, trained, tmp_path):
    folder = run_export("--checkpoint", trained / "best.pt", "--output", tmp_path / "exported")
    flags = ["--max-tokens", 12, "--seed", 3, "--prompt", "One day", "--checkpoint"]
    ours, theirs = (run("generate.py", *flags, path, check=0) for path in (trained / "best.pt", folder))
    assert ours.stdout == theirs.stdout and "exported: 1" in theirs.stderr
    (folder / "model.safetensors").unlink()
    assert_one_line_error(run("generate.py", *flags, folder), "has no model.safetensors")


@pytest.mark.parametrize("blocks", ["modern", "gpt2"])
@torch.no_grad()
def test_what_transformers_saves_is_read(make, tmp_path, blocks):
    """Several files, half precision, and for GPT-2 the hub's names, those of the model without its head."""
    path = make("bpe", blocks, **(QWEN3_SIZES if blocks == "modern" else {}))
    folder = run_export("--checkpoint", path, "--output", tmp_path / "exported")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    saved = tmp_path / "saved"
    (reference.base_model if blocks == "gpt2" else reference).save_pretrained(saved, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    shards = sorted(saved.glob("*.safetensors"))
    assert len(shards) > 1
    if blocks == "gpt2":  # the hub's file holds masks, too, and its configuration leaves out what is usual
        config = json.loads((saved / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (saved / "config.json").write_text(json.dumps(config))
        mask = {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}
        save_file(load_file(shards[0]) | mask, shards[0], {"format": "pt"})
    pretrained = load_pretrained(str(saved))
    model = GPT(pretrained.config).eval()
    model.load_state_dict(pretrained.weights)
    ids = torch.arange(64)[None]
    torch.testing.assert_close(model(ids), reference.float()(ids).logits, atol=1e-4, rtol=0)


def losses_in(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


def test_training_begins_with_it_and_goes_on_without_it(run, packed, trained, tmp_path):
    folder = run_export("--checkpoint-dir", trained, "--output", tmp_path / "exported")
    places = ["--data-dir", packed, "--checkpoint-dir", tmp_path / "run", "--compile", "off"]
    flags = ["--init-from", folder, "--batch-tokens", 64, "--sample-tokens", 4, "--eval-interval", 2]
    run("train.py", *places, *flags, "--max-steps", 2, check=0)
    before, after = losses_in(tmp_path / "run")
    assert before == pytest.approx(losses_in(trained)[-1], rel=1e-3) and after != before
    checkpoint = load_checkpoint(tmp_path / "run" / "best.pt")
    assert checkpoint["config"]["n_embd"] == 16
    assert checkpoint["settings"]["learning_rate"] == pytest.approx(6e-4)
    assert checkpoint["settings"]["grow_at"] == 0
    assert checkpoint["depth"] == checkpoint["config"]["n_layer"]

    shutil.rmtree(folder)
    run("train.py", *places, "--max-steps", 3, check=0)
    assert load_checkpoint(tmp_path / "run" / "ckpt_3.pt")["settings"]["init_from"] == str(folder)

    # from the run itself, which --fresh moves aside
    last = losses_in(tmp_path / "run")[-1]
    again = ["--init-from", tmp_path / "run" / "ckpt_3.pt", "--batch-tokens", 64, "--sample-tokens", 4]
    run("train.py", *places, *again, "--fresh", "--max-steps", 1, check=0)
    assert losses_in(tmp_path / "run")[0] == pytest.approx(last, rel=1e-3)
    folder = run_export("--checkpoint-dir", tmp_path / "run", "--output", tmp_path / "tuned")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "# ckpt_3-finetuned\n" in card and "fine-tuned from ckpt_3.pt." in card
    assert str(tmp_path) not in card and "| preset |" not in card and "| fine-tuned on |" in card
    assert "the original model may have seen them" in card


def test_a_folder_of_checkpoints_is_the_best_of_them(make, tmp_path):
    (tmp_path / "run").mkdir()
    make(name="run/ckpt_9.pt")
    expected = load_pretrained(str(make(name="run/best.pt", n_embd=32)))
    found = load_pretrained(str(tmp_path / "run"))
    assert found.config == expected.config and found.config.n_embd == 32
    assert load_tokenizer_json(str(tmp_path / "run")) == expected.tokenizer_json


def test_a_model_too_small_for_its_tokenizer_is_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr("model.checkpoint.require_room", lambda *_: None)  # checkpoints have that check, too
    folder = run_export("--checkpoint", make(vocab_size=300), "--output", tmp_path / "exported")
    with pytest.raises(UserError, match="has 400 tokens, but the model only 300"):
        load_pretrained_model(str(folder), CPU, 64)


@pytest.mark.parametrize("blocks", ["modern", "gpt2"])
def test_a_long_context_takes_no_more_memory_than_needed(make, tmp_path, blocks):
    folder = run_export("--checkpoint", make("bpe", blocks), "--output", tmp_path / "exported")
    for context, expected in ((20, 20), (64, 64), (4_096, 64)):
        assert load_pretrained_model(str(folder), CPU, context)[0].config.block_size == expected


def test_a_context_that_does_not_fit_moves_no_run(run, make, packed, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    places = ["--data-dir", packed, "--checkpoint-dir", tmp_path / "run"]
    flags = ["--init-from", make("bpe", "gpt2"), "--fresh", "--block-size", 65]
    assert_one_line_error(run("train.py", *places, *flags), "--block-size 65 exceeds the 64 positions")
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]


def test_it_comes_from_the_hub_with_its_tokenizer_too(run, packed, trained, tmp_path):
    folder = run_export("--checkpoint-dir", trained, "--output", tmp_path / "exported")
    shutil.copytree(packed / "raw", tmp_path / "data" / "raw")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with serve_hub({"someone/tiny": files}, tmp_path / "cache") as (env, _):
        flags = ["--kind", "someone/tiny", "--data-dir", tmp_path / "data"]
        run("data/train_tokenizer.py", *flags, env=env, check=0)
        flags = ["--max-tokens", 3, "--prompt", "One day"]
        assert run("generate.py", "--checkpoint", "someone/tiny", *flags, env=env, check=0).stdout
    name = "tokenizer/tokenizer.json"
    assert (tmp_path / "data" / name).read_bytes() == (packed / name).read_bytes()


def test_the_hubs_models_have_the_shape_that_they_are_known_for():
    gpt2 = from_config_json(GPT2Config().to_dict())
    assert gpt2 == GPTConfig(50_257, 1_024, 12, 12, 768, blocks="gpt2")
    numbers = {"vocab_size": 151_936, "hidden_size": 1_024, "intermediate_size": 3_072, "head_dim": 128}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 28}
    old = {"model_type": "qwen3", "rope_theta": 1_000_000, "rope_scaling": None, "tie_word_embeddings": True}
    qwen3 = from_config_json({**numbers, **heads, **old, "max_position_embeddings": 40_960})
    with torch.device("meta"):
        assert GPT(qwen3).count_parameters() == 596_049_920 and qwen3.rope_base == 1e6


def test_a_shorter_context_cuts_learned_positions(make):
    pretrained = load_pretrained(str(make("bpe", "gpt2")))
    shorter = pretrained.with_context(16)
    model, cut = GPT(pretrained.config).eval(), GPT(shorter.config).eval()
    model.load_state_dict(pretrained.weights)
    cut.load_state_dict(shorter.weights)
    ids = torch.arange(16)[None]
    torch.testing.assert_close(cut(ids), model(ids))
    with pytest.raises(UserError, match="64 positions"):
        pretrained.with_context(65)


@pytest.mark.parametrize(("flags", "expected"), [([], 1_024), (["--block-size", "1500"], 1_500)])
def test_a_long_context_is_cut_unless_it_is_asked_for(make, packed, flags, expected):
    path = str(make(block_size=2_048))
    settings = read_settings(REPO / "train.py", ["--init-from", path, *flags])
    complete_settings(settings, None, load_data(packed), CPU, load_pretrained(path))
    assert settings.block_size == expected


def test_fine_tuning_is_short_and_decays_little(make, packed):
    path, data = str(make()), load_data(packed)
    for flags, length in (([], (3, None)), (["--max-minutes", "9"], (None, 9.0))):
        flags = ["--init-from", path, "--preset", "quickstart", *flags]
        settings = read_settings(REPO / "train.py", flags)
        _, recipe = complete_settings(settings, None, data, CPU, load_pretrained(path))
        epochs = length[0]
        if epochs:
            read = recipe.max_steps * recipe.tokens_per_step(settings.block_size)
            assert 0 <= read - epochs * len(data.train.tokens) < recipe.tokens_per_step(settings.block_size)
        assert (epochs or recipe.max_steps, recipe.max_minutes) == length and recipe.weight_decay == 0.1


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("bpe", ["--n-layer", "3"], "has n_layer 2, which --init-from cannot change to 3"),
        ("bpe", ["--blocks", "gpt2"], "has blocks modern"),
        ("bpe", ["--grow-at", "0.5"], "--grow-at is for new models"),
        ("char", [], "another tokenizer.*--kind"),
    ],
)
def test_training_refuses_what_does_not_fit(make, packed, kind, flags, message):
    path = make(kind)
    settings = read_settings(REPO / "train.py", ["--init-from", str(path), *flags])
    with pytest.raises(UserError, match=message):
        complete_settings(settings, None, load_data(packed), CPU, load_pretrained(str(path)))


def test_a_run_that_began_otherwise_is_not_changed(make, packed, trained):
    settings = read_settings(REPO / "train.py", ["--init-from", "model.pt"])
    with pytest.raises(UserError, match="init_from None is now model.pt.*--fresh"):
        complete_settings(settings, load_checkpoint(trained / "best.pt"), load_data(packed), CPU)


def test_weights_that_do_not_fit_their_configuration_are_refused(trained, tmp_path):
    checkpoint = load_checkpoint(trained / "best.pt")
    checkpoint["config"]["n_embd"] = 32
    save_checkpoint(tmp_path / "model.pt", checkpoint)
    with pytest.raises(UserError, match="do not fit together .*size mismatch"):
        load_pretrained(str(tmp_path / "model.pt"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: edit_config(folder, model_type="llama"), "a llama model"),
        (lambda folder: edit_config(folder, hidden_act="gelu"), "hidden_act gelu"),
        (lambda folder: edit_config(folder, rope_parameters={"rope_type": "yarn"}), "yarn"),
        (
            lambda folder: edit_config(folder, rope_parameters=None, rope_scaling={"rope_type": "yarn"}),
            "yarn",
        ),
        (lambda folder: edit_config(folder, num_hidden_layers=3), "missing tensors.* model.layers.2"),
        (lambda folder: edit_config(folder, num_hidden_layers=1), "unexpected tensors.* model.layers.1"),
        (lambda folder: edit_config(folder, intermediate_size=64), "gate_proj"),
        (lambda folder: (folder / "config.json").write_text("{"), "does not load"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"1234567890"), "does not load"),
    ],
)
def test_a_folder_that_does_not_fit_is_a_user_error(make, tmp_path, damage, message):
    folder = run_export("--checkpoint", make(), "--output", tmp_path / "exported")
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_pretrained(str(folder))


# What is refused, and what a failure leaves


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_only_an_earlier_export_is_replaced_and_only_on_request(make, tmp_path, name):
    words = ["--output", tmp_path / name, "--format", "gguf" if name == "out.gguf" else "hf"]
    run_export("--checkpoint", make(), *words)
    other, before = make(name="other.pt", n_layer=1), contents(tmp_path)
    with pytest.raises(UserError, match="--overwrite"):
        run_export("--checkpoint", other, *words)
    assert contents(tmp_path) == before
    run_export("--checkpoint", other, *words, "--overwrite")
    after = contents(tmp_path)
    assert after.keys() == before.keys() and after != before


def test_nothing_else_is_written_over(make, tmp_path, monkeypatch):
    path = make()
    folder = run_export("--checkpoint", path, "--output", tmp_path / "out")
    (folder / "diary.txt").write_text("precious")
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "README.md").write_text("precious")
    (tmp_path / "empty" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "here")
    before = contents(tmp_path)
    for output, form, message in (
        (folder, "hf", "holds diary.txt"),
        (tmp_path / "paper", "hf", "is not an export, it holds no model"),
        (Path("."), "hf", "would replace the current folder"),
        (Path(".."), "hf", "would replace the current folder"),
        (path, "hf", "is a file"),
        (path, "gguf", "ends in .gguf"),
        (path / "folder", "hf", "is a file"),
        (tmp_path / "new.gguf", "hf", "add --format gguf"),
    ):
        with pytest.raises(UserError, match=message):
            run_export("--checkpoint", path, "--output", output, "--format", form, "--overwrite")
    assert contents(tmp_path) == before and Path.cwd().is_dir()


def full_disk(*_args, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("words", [[], ["--format", "gguf"]], ids=str)
def test_a_full_disk_leaves_the_earlier_export(make, tmp_path, monkeypatch, words):
    output = tmp_path / ("model.gguf" if words else "model")
    run_export("--checkpoint", make(), "--output", output, *words)
    before = contents(tmp_path)
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", full_disk)
    monkeypatch.setattr("pathlib.Path.write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        run_export("--checkpoint", tmp_path / "model.pt", "--output", output, "--overwrite", *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("package", "words"), [("safetensors", []), ("gguf", ["--format", "gguf"])])
def test_a_missing_package_is_named_with_the_command(make, tmp_path, monkeypatch, package, words):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        run_export("--checkpoint", make(), "--output", tmp_path / ("m.gguf" if words else "m"), *words)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]


def test_what_llama_cpp_cannot_hold_is_one_line(run, make, tmp_path):
    words = ["--output", tmp_path / "m.gguf", "--format", "gguf"]
    result = run("export.py", "--checkpoint", make(n_embd=48), *words, "--dtype", "q8_0")
    assert_one_line_error(result, "n_embd 48", "32", "--dtype float16")
    with pytest.raises(UserError, match="n_inner 80"):
        run_export("--checkpoint", make(n_inner=80), *words, "--dtype", "q8_0")
    assert not (tmp_path / "m.gguf").exists()
    with pytest.raises(UserError, match="q8_0 is for --format gguf"):
        run_export("--checkpoint", make(), "--output", tmp_path / "m", "--dtype", "q8_0")


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(make, tokenizers, tmp_path):
    words = Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1}, []))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    others = [Tokenizer(models.Unigram([("a", 0.0)], 0)), Tokenizer(models.WordLevel({"a": 0}, "a"))]
    assert token_table(others[0].to_str()) != token_table(others[1].to_str())
    vocab = {token: k for k, token in enumerate(["a", "b", "ab", "ba", "aba"])}
    orders = [("a", "b"), ("ab", "a")], [("b", "a"), ("a", "ba")]
    one, other = (token_table(Tokenizer(models.BPE(vocab, merges)).to_str()) for merges in orders)
    assert one != other  # "abb" is ab b, or a b b
    checkpoint = load_checkpoint(make("char"))
    texts = [tokenizer.to_str() for tokenizer in (words, *others)]
    for text in (*texts, tokenizers["char"].replace('"c":', '"\u2581":')):
        save_checkpoint(tmp_path / "model.pt", {**checkpoint, "tokenizer": text})
        with pytest.raises(UserError, match=r"llama\.cpp"):
            run_export(
                "--checkpoint", tmp_path / "model.pt", "--output", tmp_path / "m.gguf", "--format", "gguf"
            )
    assert not (tmp_path / "m.gguf").exists()


def test_the_hub_is_asked_and_its_silence_is_one_line(run, packed, tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    places = ["--data-dir", packed, "--checkpoint-dir", tmp_path / "run"]
    result = run("train.py", *SMALL, *places, "--init-from", "someone/model", env=env)
    assert_one_line_error(result, "someone/model", "127.0.0.1:9")
    assert not (tmp_path / "run").exists()
