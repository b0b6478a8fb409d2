"""The decoder against the model as it is trained."""

import copy

import pytest
import torch

from model import kernels
from model.config import GPTConfig
from model.decoder import Decoder, KVCache, choose_weights
from model.errors import UserError
from model.gpt import GPT

FAMILIES = ("modern", "gpt2")
CPU = torch.device("cpu")


needs_kernels = pytest.mark.skipif(
    kernels.load().library is None, reason=f"no kernels: {kernels.load().shortcoming}"
)
WEIGHTS = [
    ("float32", torch.float64),
    pytest.param("float32", torch.float32, marks=needs_kernels),
    pytest.param("int8", torch.float32, marks=needs_kernels),
]


def make_model(blocks, **changes):
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 64}
    model = GPT(GPTConfig(**{**shape, "blocks": blocks, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also the norms' weights and the biases, which begin as 1 and 0
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def token_ids(rows=3, length=32):
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("chunks", [[32], [1] * 32, [5, 1, 7, 19], [31, 1]])
@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_reading_in_pieces_gives_the_models_logits(blocks, chunks, tie_weights):
    model, ids = make_model(blocks, tie_weights=tie_weights).double(), token_ids()
    decoder = Decoder(model)
    expected, cache = model(ids), KVCache(decoder, len(ids), 32)
    for chunk in chunks:
        logits = decoder(ids[:, cache.length : cache.length + chunk], cache)
        torch.testing.assert_close(logits, expected[:, cache.length - 1], atol=1e-9, rtol=1e-9)
    assert cache.length == cache.next.item() == 32


@torch.no_grad()
def test_grouped_keys_give_the_models_logits():
    model, ids = make_model("modern", n_kv_head=2, head_size=24).double(), token_ids()
    decoder = Decoder(model)
    cache = KVCache(decoder, len(ids), 32)
    for position, expected in enumerate(model(ids).unbind(1)):
        logits = decoder(ids[:, position : position + 1], cache)
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_the_step_for_a_cuda_graph_gives_the_same_logits(blocks):
    model, ids = make_model(blocks).double(), token_ids()
    decoder = Decoder(model)
    expected, cache = model(ids), KVCache(decoder, len(ids), 32)
    for _ in range(2):  # what an earlier window left in the cache does not show
        cache.clear()
        decoder(ids[:, :5].flip(1), cache)
        cache.clear()
        decoder(ids[:, :4], cache)
        for position in range(4, 32):
            logits = decoder(ids[:, position : position + 1], cache, graph=True)
            torch.testing.assert_close(logits, expected[:, position], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("weights", "dtype"), WEIGHTS)
@torch.no_grad()
def test_sequences_that_are_dropped_leave_the_others_alone(weights, dtype):
    decoder, ids = Decoder(make_model("modern").to(dtype), weights), token_ids(rows=6)
    cache = KVCache(decoder, 6, 32)
    decoder(ids[:, :9], cache)
    cache.keep([1, 2, 5])
    logits = decoder(ids[[1, 2, 5], 9:11], cache)
    fresh = KVCache(decoder, 3, 32)
    torch.testing.assert_close(logits, decoder(ids[[1, 2, 5], :11], fresh), atol=1e-9, rtol=1e-9)


def test_more_tokens_than_there_is_room_for_are_refused():
    decoder = Decoder(make_model("modern"))
    cache = KVCache(decoder, 3, 32)
    decoder(token_ids(length=30), cache)
    with pytest.raises(ValueError, match="33 tokens exceed the context of 32"):
        decoder(token_ids(length=3), cache)


@pytest.mark.parametrize("blocks", FAMILIES)
@torch.no_grad()
def test_float16_gives_nearly_the_same_logits(blocks):
    """Within 0.5 % of their norm; a float16 has 11 bits. Such weights are for GPUs, but the operations are the same."""
    model, ids = make_model(blocks), token_ids()
    decoder, exact = Decoder(model, "float16"), copy.deepcopy(model).double()(ids)
    assert decoder.network is None
    cache = KVCache(decoder, len(ids), 32)
    decoder(ids[:, :20], cache)
    for position in range(20, 32):
        logits = decoder(ids[:, position : position + 1], cache, graph=position > 25)
        error = logits - exact[:, position]
        assert logits.dtype == torch.float32 and 0 < error.norm() / exact[:, position].norm() < 5e-3


def test_a_device_has_the_weights_it_can_read():
    assert choose_weights(torch.device("cuda"), "auto") == "float32"
    with pytest.raises(UserError, match="int8 weights are for CPUs"):
        choose_weights(torch.device("cuda"), "int8")
    with pytest.raises(UserError, match="float16 weights are for GPUs"):
        choose_weights(CPU, "float16")
