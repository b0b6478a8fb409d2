"""The network against transformers, float64 and counting by hand."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_mask
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from model.attention import plain_attention, story_mask
from model.config import PRESETS, GPTConfig, Recipe
from model.errors import UserError
from model.gpt import GPT
from model.huggingface import to_config_json, to_huggingface

torch.set_num_threads(1)

FAMILIES = ("modern", "gpt2")
SHAPE = {"vocab_size": 97, "block_size": 32, "n_layer": 3, "n_head": 4, "n_embd": 48}


def make_model(blocks="modern", seed=0, **changes):
    """A small model whose every weight, norms and biases too, is far from its initial value."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, "blocks": blocks, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model


def token_ids(rows=3, length=SHAPE["block_size"], vocab_size=SHAPE["vocab_size"], seed=1):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference(model):
    """The same weights in transformers' own GPT-2 or Qwen3."""
    settings = to_config_json(model.config, eot_id=0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, attn_implementation="eager")
    reference = AutoModelForCausalLM.from_config(config)
    weights = to_huggingface(model.state_dict(), model.config)
    if model.config.tie_weights:
        weights["lm_head.weight"] = model.token_embedding.weight
    reference.load_state_dict(weights)  # every tensor is given, so none keeps a value of its own
    return reference.eval()


# The same function as the reference's


QWEN3_SIZES = {"n_kv_head": 2, "head_size": 16, "n_inner": 80, "rope_base": 1e6}  # unlike each preset's


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("blocks", "sizes"), [("modern", {}), ("gpt2", {}), ("modern", QWEN3_SIZES), ("gpt2", {"n_inner": 80})]
)
@torch.no_grad()
def test_logits_are_those_of_transformers(blocks, sizes, tied):
    model, ids = make_model(blocks, tie_weights=tied, **sizes), token_ids()
    expected = reference(model)(ids).logits
    logits = model(ids)
    assert logits.shape == (3, 32, 97) and logits.std() > 0.5  # so that the tolerance means something
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("blocks", FAMILIES)
def test_parameters_are_as_many_as_in_transformers(blocks):
    for tied in (True, False):
        model = make_model(blocks, tie_weights=tied)
        assert model.count_parameters() == reference(model).num_parameters()


@pytest.mark.parametrize("blocks", FAMILIES)
def test_gradients_are_those_of_transformers(blocks):
    model, ids = make_model(blocks), token_ids()
    other = reference(model)
    model(ids[:, :-1], ids[:, 1:]).backward()
    F.cross_entropy(other(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    ours, theirs = model.token_embedding.weight.grad, other.get_input_embeddings().weight.grad
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("blocks", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_training_attention_has_the_gradients_of_the_fused_kernel(blocks, dtype, tolerance, monkeypatch):
    """Relative to the norm of a float64 gradient through PyTorch's scaled_dot_product_attention."""
    ids, gradients = token_ids(), []
    for limit, model in ((512, make_model(blocks)), (0, make_model(blocks).double())):
        monkeypatch.setattr("model.attention.PLAIN_UP_TO", limit)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16 and limit > 0):
            loss = model.train()(ids[:, :-1], ids[:, 1:])
        loss.backward()
        gradients.append([parameter.grad.double() for parameter in model.parameters()])
    for fast, exact in zip(*gradients, strict=True):
        assert (fast - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("sizes", [{}, QWEN3_SIZES, {"dropout": 1e-9}])
@pytest.mark.parametrize("training", [True, False])
def test_stories_in_one_window_are_read_as_if_alone(training, sizes):
    model = make_model(**sizes).double().train(training)
    parts = [1, 2, 9, 20]
    windows = [token_ids(seed=5, length=33), token_ids(seed=6, length=33)]
    stories = torch.arange(4).repeat_interleave(torch.tensor(parts)).expand(3, 32)
    stories = torch.cat([stories, stories.flip(1)])  # the second three rows hold them the other way round
    ids = torch.cat(windows)
    loss = model(ids[:, :-1], ids[:, 1:], stories)
    whole = torch.autograd.grad(loss, list(model.parameters()))
    expected = 0.0
    for window, lengths in zip(windows, (parts, parts[::-1]), strict=True):
        first = 0
        for length in lengths:
            inputs, targets = window[:, first : first + length], window[:, first + 1 : first + length + 1]
            log_probabilities = model(inputs).log_softmax(-1)
            expected = expected - log_probabilities.gather(-1, targets[:, :, None]).sum() / (6 * 32)
            first += length
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    alone = torch.autograd.grad(expected, list(model.parameters()))
    for together, apart in zip(whole, alone, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("blocks", FAMILIES)
def test_the_loss_is_the_mean_cross_entropy(blocks):
    model, ids = make_model(blocks), token_ids()
    loss = model(ids[:, :-1], ids[:, 1:])
    log_probabilities = model.double()(ids[:, :-1]).log_softmax(-1)
    expected = -log_probabilities.gather(-1, ids[:, 1:, None]).mean()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_a_token_changes_its_own_logits_and_later_ones_only(blocks):
    model, ids = make_model(blocks).double(), token_ids(rows=1)
    for position in (0, 13, 31):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % 97
        difference = (model(changed) - model(ids)).abs().amax(-1)[0]
        assert difference[:position].sum() == 0
        assert (difference[position:] > 1e-6).all()


@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_the_order_of_earlier_tokens_matters(blocks):
    model, ids = make_model(blocks).double(), token_ids(rows=1)
    swapped = ids[:, [1, 0, *range(2, 32)]]
    assert (model(swapped) - model(ids))[0, 5].abs().max() > 1e-3


@pytest.mark.parametrize("blocks", FAMILIES)
def test_too_long_a_sequence_is_refused(blocks):
    model = make_model(blocks)
    with pytest.raises(ValueError, match="33 tokens exceed the context of 32"):
        model(token_ids(length=33))


# Initial weights, dropout, precision


@pytest.mark.parametrize("blocks", FAMILIES)
def test_initial_weights_have_gpt2s_spread(blocks):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, n_layer=4, n_head=4, n_embd=128, tie_weights=False, blocks=blocks))
    seen = set()
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(8) if kind in ("proj", "down") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 0.05 * std, name
        else:
            assert "norm" in kind or name.endswith("bias"), name
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        seen.add(kind)
    assert {"token_embedding", "head", "qkv", "proj", "down", "norm"} <= seen


@pytest.mark.parametrize("blocks", FAMILIES)
def test_a_new_model_knows_nothing(blocks):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, "blocks": blocks}))
    ids = token_ids(rows=16)
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(97), abs=0.05)


@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_dropout_acts_in_training_only(blocks):
    model, plain, ids = make_model(blocks, dropout=0.3), make_model(blocks), token_ids()
    torch.testing.assert_close(model(ids), plain(ids))
    model.train()
    torch.manual_seed(1)
    first, second = model(ids), model(ids)
    assert (first - second).abs().max() > 0.1
    torch.manual_seed(1)
    assert torch.equal(model(ids), first)  # the seed decides what is dropped


@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_dropout_acts_on_the_embeddings_and_on_both_things_that_a_block_adds(blocks):
    model, dropped = make_model(blocks, dropout=0.3).train(), Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: dropped.update([name]))
    model(token_ids())
    assert dropped == {"dropout": 1, **{f"blocks.{layer}.dropout": 2 for layer in range(3)}}


@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_dropout_acts_on_attention_in_gpt2s_blocks_only(blocks):
    model, ids = make_model(blocks, dropout=0.3), token_ids()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert ((model(ids) - model(ids)).abs().max() > 0.1) == (blocks == "gpt2")


@pytest.mark.parametrize("blocks", FAMILIES)
def test_bfloat16_stays_close_to_float32(blocks):
    """Within 3 % of the logits' spread, on average, and 1 % of the loss; a bfloat16 has 8 bits."""
    model, ids = make_model(blocks), token_ids()
    exact, loss = model(ids), model(ids[:, :-1], ids[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        rough, rough_loss = model(ids), model(ids[:, :-1], ids[:, 1:])
    assert rough.dtype == torch.bfloat16 and rough_loss.dtype == torch.float32
    error = (rough.float() - exact).pow(2).mean().sqrt() / exact.std()
    assert 0 < error < 0.03
    assert rough_loss.item() == pytest.approx(loss.item(), rel=0.01)


@pytest.mark.parametrize("blocks", FAMILIES)
def test_silent_blocks_can_be_left_out(blocks):
    model = make_model(blocks)
    ids = token_ids()
    loud = model(ids)
    model.silence(2)
    expected, flops = model(ids), model.flops_per_token()
    model.set_depth(2)
    logits = model(ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert not torch.allclose(logits, loud)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("blocks.2."), name
    two = GPT(dataclasses.replace(model.config, n_layer=2))
    assert model.flops_per_token() == two.flops_per_token() < flops
    model.set_depth(3)
    assert model.flops_per_token() == flops


def test_weights_have_stable_names():
    """They are in every checkpoint: renaming one breaks those that people have."""
    names = set(make_model("gpt2", n_layer=1, tie_weights=False).state_dict())
    parts = ["token_embedding", "position_embedding", "norm", "head"]
    parts += [
        f"blocks.0.{part}"
        for part in "attention_norm attention.qkv attention.proj mlp_norm mlp.up mlp.down".split()
    ]
    biases = {f"{part}.bias" for part in parts if "embedding" not in part and part != "head"}
    assert names == {f"{part}.weight" for part in parts} | biases
    names = set(make_model("modern", n_layer=1).state_dict())
    parts = "attention_norm attention.qkv attention.proj attention.q_norm attention.k_norm".split()
    parts += "mlp_norm mlp.gate_up mlp.down".split()
    assert names == {"token_embedding.weight", "norm.weight"} | {f"blocks.0.{p}.weight" for p in parts}


# Sizes


def count_by_formula(c):
    """Weights and biases, written out matrix by matrix."""
    V, T, L, C = c.vocab_size, c.block_size, c.n_layer, c.n_embd
    head = 0 if c.tie_weights else V * C
    if c.blocks == "gpt2":
        attention = C * 3 * C + 3 * C + C * C + C
        mlp = C * 4 * C + 4 * C + 4 * C * C + C
        return V * C + T * C + L * (attention + mlp + 2 * 2 * C) + 2 * C + head
    hidden = math.ceil(8 * C / 3 / 64) * 64
    head_norms = 2 * (C // c.n_head)
    return V * C + L * (4 * C * C + head_norms + 3 * C * hidden + 2 * C) + C + head


def count(config):
    with torch.device("meta"):  # shapes without memory
        return GPT(config).count_parameters()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_size_that_the_formula_says(name):
    assert count(PRESETS[name].config) == count_by_formula(PRESETS[name].config)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # GPT-2 small and medium as OpenAI released them
        (GPTConfig(50_257, 1_024, 12, 12, 768, blocks="gpt2"), 124_439_808),
        (GPTConfig(50_257, 1_024, 24, 16, 1_024, blocks="gpt2"), 354_823_168),
        # the small language model of 6 layers, 6 heads, width 384 and context 128
        (PRESETS["slm-30m"].config, 29_995_392),
        # llama2.c's, which lack Qwen3's norms of queries and keys (2 x 48 a layer, 2 x 64 a layer)
        (PRESETS["stories-15m"].config, 15_191_712 + 6 * 2 * 48),
        (PRESETS["stories-110m"].config, 109_529_856 + 12 * 2 * 64),
    ],
)
def test_published_sizes(config, published):
    assert count(config) == published


def test_presets_are_the_size_that_their_name_says():
    sizes = {name: count(preset.config) / 1e6 for name, preset in PRESETS.items()}
    head = 10_000 * 256  # which stories-9m has on top of its 9 million, to begin with bigrams
    sizes["stories-9m"] -= head / 1e6
    for name, millions in sizes.items():
        if name.endswith("m"):
            assert millions == pytest.approx(int(name.split("-")[-1][:-1]), rel=0.1), name
    assert sizes["quickstart"] < 3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("blocks", "sizes"), [("modern", {}), ("gpt2", {}), ("modern", QWEN3_SIZES)])
def test_flops_are_those_that_torch_counts(blocks, sizes, tied):
    model, ids = make_model(blocks, tie_weights=tied, **sizes), token_ids(rows=2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids).backward()
    assert model.flops_per_token() * ids.numel() == counter.get_total_flops()


# GPTConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 100, "n_head": 8}, "n_embd 100 is not divisible by n_head 8"),
        ({"n_embd": 24, "n_head": 8}, "even head size"),
        ({"blocks": "llama"}, "modern or gpt2, not 'llama'"),
        ({"n_kv_head": 3}, "n_head 8 is not divisible by n_kv_head 3"),
        ({"n_kv_head": 0}, "n_kv_head must be at least 1"),
        ({"n_inner": 0}, "n_inner must be at least 1"),
        ({"blocks": "gpt2", "head_size": 16}, "modern blocks"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": math.nan}, "dropout"),
        *(({name: 0}, f"{name} must be at least 1 and at most \\d+, not 0") for name in SHAPE),
    ],
)
def test_a_shape_that_cannot_be_is_a_user_error(changes, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**changes)


@pytest.mark.parametrize("length", [64, 300])
def test_a_story_mask_in_blocks_is_the_same_mask(length):
    torch.manual_seed(0)
    stories = (torch.rand(3, length) < 0.05).cumsum(1)
    seen = story_mask(stories, flex=True).mask_mod
    assert torch.equal(create_mask(seen, 3, 1, length, length, device="cpu"), story_mask(stories))


@torch.no_grad()
def test_compiled_flex_attention_gives_the_same_logits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, block_size=160, n_layer=1, n_head=2, n_embd=32)).eval()
    for parameter in model.parameters():  # so that what a token sees matters
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(64, (2, 160))
    stories = (ids < 2).cumsum(1)
    plain, across = model(ids, None, stories), model(ids)
    model.flex = True
    found = torch.compile(model, dynamic=False)(ids, None, stories)
    assert (found - plain).abs().max() < 1e-4 < 0.1 < (across - plain).abs().max()


def test_odd_heads_do_for_gpt2():
    ids = token_ids()
    assert make_model("gpt2", n_embd=12, n_head=4)(ids).shape == (3, 32, 97)


def test_a_cpu_takes_smaller_steps_the_smaller_the_shorter_the_run_and_grows():
    preset = PRESETS["stories-9m"]
    steps = {minutes: preset.recipe_on("cpu", 10**9, max_minutes=minutes) for minutes in (None, 30, 1)}
    assert [r.batch_tokens for r in steps.values()] == [4_096, 4_096, 2_048]
    assert len({r.batch_tokens * r.eval_interval for r in steps.values()}) == 1
    assert [r.grow_at for r in (preset.recipe, steps[1], steps[30])] == [0.0, 0.8, 0.8]
    assert preset.recipe_on("cuda", 10**9, max_minutes=1) == dataclasses.replace(preset.recipe, max_minutes=1)
    assert [steps[30].depth(progress, 5) for progress in (0.0, 0.79, 0.8, 1.0)] == [3, 3, 5, 5]
    assert preset.recipe.depth(0.0, 5) == 5
    published = PRESETS["slm-30m"]
    for minutes in (None, 1):
        own = dataclasses.replace(published.recipe, max_minutes=minutes)
        assert published.recipe_on("cpu", 1_000, max_minutes=minutes) == own


@pytest.mark.parametrize(("grow_at", "expected"), [(0.0, 0.4), (0.3, 0.3), (0.8, 0.4)])
def test_a_longer_run_differs_from_the_decay_or_from_growth_on(grow_at, expected):
    assert Recipe(decay_fraction=0.6, grow_at=grow_at).turning_point == pytest.approx(expected)


@pytest.mark.parametrize("length", [1, 2, 5, 8, 37])
@pytest.mark.parametrize("masked", [True, False])
def test_plain_attention_is_the_fused_one(length, masked):
    """Output and gradients, also where the quarters of the queries are uneven or empty."""
    torch.manual_seed(0)
    inputs = torch.randn(3, 2, 3, length, 4).requires_grad_()
    seen = story_mask((torch.rand(2, length) < 0.2).cumsum(1)) if masked else None
    plain = plain_attention(*inputs.unbind(), seen)
    fused = F.scaled_dot_product_attention(*inputs.unbind(), seen, is_causal=not masked)
    torch.testing.assert_close(plain, fused, atol=1e-6, rtol=1e-5)
    upstream = torch.randn_like(plain)
    gradients = [torch.autograd.grad(y, inputs, upstream)[0] for y in (plain, fused)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_plain_attention_drops_its_weights_and_scales_the_rest():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 8, 4).unbind()
    exact = plain_attention(q, k, v, None)
    draws = [plain_attention(q, k, v, None, dropout=0.5) for _ in range(3_000)]
    torch.testing.assert_close(torch.stack(draws).mean(0), exact, atol=0.1, rtol=0)
    # the first token sees itself alone: all of it, doubled, or nothing
    first = torch.stack(draws)[:, 0, 0, 0]
    assert 0.45 < (first == 0).all(-1).float().mean() < 0.55


def test_an_output_matrix_multiplied_in_parts_gives_the_same_loss_and_gradients(monkeypatch):
    """As on MPS, where sums over more than MPS_TERMS numbers are wrong."""
    results = []
    for in_parts in (False, True):
        model, ids = make_model(), token_ids()
        monkeypatch.setattr("model.loss.MPS_TERMS", 10)
        monkeypatch.setattr(torch.Tensor, "is_mps", in_parts, raising=False)
        assert model.head_weight.is_mps == in_parts
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append((loss.item(), model.head_weight.grad, model.blocks[0].attention.qkv.weight.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for one, other in zip(results[0][1:], results[1][1:], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
