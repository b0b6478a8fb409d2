"""Compilation, micro-batches that fit in memory, and FlexAttention."""

import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training import CPU, LARGE_VOCABULARY, assert_same_run, losses, make_run

import train as train_script
from model.attention import story_mask
from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import GPTConfig, Recipe
from model.errors import UserError, ran_out_of_memory
from model.flex import flex_may_pay, judge_flex
from model.forward import prepare_forward
from model.gpt import GPT
from model.processes import Processes
from model.runtime import Runtime


def test_compiled_and_eager_runs_agree_and_a_compiled_one_goes_on_exactly(train, tmp_path):
    flags = ["--dtype", "float32", "--dropout", 0.2, *LARGE_VOCABULARY]
    eager, _ = train("eager", *flags)
    compiled, result = train("compiled", *flags, "--compile", "on")
    assert result.err == ""
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=1e-5)
    for name, mode in (("broken", "on"), ("broken, then eager", "off")):
        folder = shutil.copytree(compiled, tmp_path / name)
        for file in ("ckpt_12.pt", "best.pt"):
            (folder / file).unlink()
        train(name, *flags, "--compile", mode)
    assert_same_run(compiled, tmp_path / "broken")
    np.testing.assert_allclose(losses(tmp_path / "broken, then eager"), losses(eager), rtol=1e-5)


def test_two_hundred_fast_steps_are_those_of_the_plain_path(train, monkeypatch):
    """Compiled bfloat16 and all that is fast, against float32, the fused attention kernel and one window at a time."""
    recipe = ["--max-steps", 200, "--weight-decay", 0.1, *LARGE_VOCABULARY]
    fast, _ = train("fast", *recipe, "--dtype", "bfloat16", "--compile", "on")
    monkeypatch.setattr("model.attention.PLAIN_UP_TO", 0)
    plain, _ = train("plain", *recipe, "--dtype", "float32", "--micro-batch", 1)
    assert losses(plain)[-1] < 0.8 * losses(plain)[0]
    np.testing.assert_allclose(losses(fast), losses(plain), rtol=0.02)


def test_where_compilation_fails_it_warns_once_and_goes_on(train, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nand a long trace")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    torch._dynamo.reset()
    _, result = train("run", "--compile", "on")
    lines = result.err.strip().splitlines()
    torch.compiler.set_stance("default")
    assert len(lines) == 1 and lines[0].startswith("warning: torch.compile does not work here"), result.err


def test_where_memory_runs_out_it_takes_half_or_says_what_to_take(train, monkeypatch):
    forward = GPT.forward

    def too_large(self, idx, targets=None, *others):
        if len(idx) > 4 and targets is not None and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, targets, *others)

    monkeypatch.setattr(GPT, "forward", too_large)
    _, result = train("run", "--max-steps", 2)
    assert "micro-batch  4 windows; 4 micro-batches per step" in result.out

    calls = []

    def sudden(self, idx, targets=None, *others):
        calls.append(1)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, idx, targets, *others)

    monkeypatch.setattr(GPT, "forward", sudden)
    with pytest.raises(UserError, match="--micro-batch 8"):
        train("other")


@pytest.mark.parametrize(("windows", "fits", "chosen"), [(64, 13, 8), (128, 14, 8), (8, 16, 8), (17, 5, 5)])
def test_micro_batches_are_equal_if_slightly_smaller_ones_are(monkeypatch, windows, fits, chosen):
    monkeypatch.setattr("model.forward.guess_micro_batch", lambda model, runtime: fits)
    model = GPT(GPTConfig(vocab_size=16, block_size=4, n_layer=1, n_head=1, n_embd=4))
    runtime = Runtime(torch.device("cpu"), torch.float32, False, "")
    recipe = Recipe(sampled_softmax=False, mask_stories=False)
    settings = SimpleNamespace(micro_batch=0)
    run = make_run(settings=settings, config=model.config, runtime=runtime, recipe=recipe)
    prepare_forward(run, model, windows)
    assert settings.micro_batch == chosen


def test_all_processes_take_the_smallest_micro_batch(monkeypatch):
    """One of them, with 36 windows to the other's 35, has memory for 6 at once, the other for 9."""
    others = iter([36, 0, 6, 6])  # windows, no FlexAttention, micro-batches

    def all_reduce(facts, op):
        other = next(others)
        facts.copy_(torch.maximum(facts, torch.tensor([-other, other])))

    monkeypatch.setattr("model.processes.dist.all_reduce", all_reduce)
    monkeypatch.setattr("model.forward.guess_micro_batch", lambda model, runtime: 9)
    tried = []
    monkeypatch.setattr("model.forward.try_out", lambda run, forward, size: tried.append(size))
    model = GPT(GPTConfig(vocab_size=16, block_size=4, n_layer=1, n_head=1, n_embd=4))
    model.flex = False
    settings, runtime = SimpleNamespace(micro_batch=0), Runtime(CPU, torch.float32, False, "")
    run = make_run(settings=settings, config=model.config, runtime=runtime, processes=Processes(world_size=2))
    prepare_forward(run, model, 35)
    assert settings.micro_batch == 6 and sorted(tried) == [5, 6, 8, 9]


@pytest.mark.parametrize(
    ("changes", "capability", "expected"),
    [
        ({}, (8, 0), True),
        ({}, (7, 5), False),
        ({"config": GPTConfig(block_size=128)}, (8, 0), False),
        ({"config": GPTConfig(block_size=129, dropout=0.1)}, (8, 0), True),
        ({"config": GPTConfig(block_size=129, dropout=0.1, blocks="gpt2")}, (8, 0), False),
        ({"recipe": Recipe(mask_stories=False)}, (8, 0), False),
        ({"runtime": Runtime(CPU, torch.bfloat16, True, "")}, (8, 0), False),
        ({"runtime": Runtime(torch.device("cuda"), torch.float16, True, "")}, (8, 0), False),
        ({"runtime": Runtime(torch.device("cuda"), torch.bfloat16, False, "")}, (8, 0), False),
    ],
)
def test_flex_attention_is_tried_where_it_may_pay(monkeypatch, changes, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    runtime = Runtime(torch.device("cuda"), torch.bfloat16, True, "")
    parts = {"config": GPTConfig(block_size=129), "recipe": Recipe(), "runtime": runtime}
    assert flex_may_pay(make_run(**{**parts, **changes})) == expected


def test_a_resumed_run_keeps_the_choice_of_flex_attention_on_the_same_hardware(train, monkeypatch):
    flags, chosen = ["--decay-fraction", "0.01", "--grow-at", 0], []
    folder, _ = train("run", "--max-steps", 1, *flags)
    prepare = train_script.prepare_forward

    def noting(run, model, windows):
        chosen.append(model.flex)
        return prepare(run, model, windows)

    monkeypatch.setattr(train_script, "prepare_forward", noting)
    for step, changes in enumerate([{}, {"device": "cuda: H100"}, {"torch": "2.0"}], 1):
        path = folder / f"ckpt_{step}.pt"
        checkpoint = load_checkpoint(path)
        assert checkpoint["flex"] is None  # not compiled
        save_checkpoint(path, {**checkpoint, "flex": True, **changes})
        train("run", "--max-steps", step + 1, *flags)
    assert chosen == [True, None, None]


@pytest.mark.parametrize("blocks", ["modern", "gpt2"])
def test_flex_attention_is_used_only_if_it_is_right_and_faster(monkeypatch, capsys, blocks):
    """On a CPU it has no gradients, so plain attention takes its place here: with the right mask, then a wrong one."""
    config = GPTConfig(vocab_size=16, block_size=64, n_layer=1, n_head=2, n_embd=16, blocks=blocks)
    run = make_run(
        config=config, runtime=Runtime(torch.device("cpu"), torch.float32, True, ""), recipe=Recipe()
    )
    assert judge_flex(run, 2) == (False, False)  # not even tried
    monkeypatch.setattr("model.flex.flex_may_pay", lambda run: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # as a CPU run sets it
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    clock = itertools.accumulate(itertools.cycle([0, 1, 0, 2]))  # flex 1 s, plain 2 s, and so on
    monkeypatch.setattr("model.flex.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    mask = {"right": lambda stories, flex: story_mask(stories)}
    mask["wrong"] = lambda stories, flex: story_mask(torch.zeros_like(stories) if flex else stories)
    for name in mask:
        monkeypatch.setattr("model.flex.story_mask", mask[name])
        assert judge_flex(run, 2) == (name == "right", name == "right")
    assert "FlexAttention does not work here (its results are wrong here)" in capsys.readouterr().err
    monkeypatch.setattr("model.flex.story_mask", mask["right"])
    clock = itertools.accumulate(itertools.cycle([0, 2, 0, 1]))
    assert judge_flex(run, 2) == (True, False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert judge_flex(run, 2) == (True, True)  # a measurement must not decide
    monkeypatch.setattr("model.flex.story_mask", story_mask)
    assert judge_flex(run, 2) == (False, False)
    assert "does not support backward on CPU" in capsys.readouterr().err


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried", "CUBLAS_STATUS_ALLOC_FAILED when calling"])
def test_memory_that_runs_out_inside_a_library_is_known_too(message):
    assert ran_out_of_memory(RuntimeError(message))
    assert not ran_out_of_memory(RuntimeError("Triton Error"))
    assert not ran_out_of_memory(torch.OutOfMemoryError("out of resource: shared memory"))
    assert not ran_out_of_memory(
        RuntimeError("g++ -O3 main.cpp\ncc1plus: out of memory allocating 65536 bytes")
    )
