"""Writing text: a key-value cache, and the choice of each next token."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT
from model.settings import UserError, require_seed


def text_tokenizer(tokenizer_json: str) -> Tokenizer:
    """The tokenizer for text: an end-of-text marker that stands in a story is text, never the token."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The steps apply in this order, as in transformers' generate."""

    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int = 0  # only the k likeliest; 0 is off
    top_p: float = 1.0  # only the likeliest that together hold this probability; 1 is off
    min_p: float = 0.0  # only tokens at least this share of the likeliest one's probability; 0 is off
    repetition_penalty: float = 1.0  # above 1 makes tokens that occurred before less likely

    def __post_init__(self):
        checks = {
            "temperature must be 0 or more": self.temperature >= 0,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must be at least 0 and below 1": 0 <= self.min_p < 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
        }
        for message, holds in checks.items():
            if not holds:
                raise UserError(f"{message}, not {getattr(self, message.split()[0])}")


class KVCache:
    """Keys and values of the positions so far, for every layer; room for block_size positions."""

    def __init__(self, config: GPTConfig, batch: int, like: Tensor):
        shape = (config.n_layer, batch, config.kv_heads, config.block_size, config.head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's (B, H, T, D) keys and values; return those of all positions so far."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but these."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


def next_distribution(logits: Tensor, previous: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities (B, V) of the next token from logits (B, V), after all filters.

    `previous` (B, V) is True where a token has occurred. Temperature 0 gives the likeliest token all.
    """
    if sampling.repetition_penalty != 1:
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(previous, penalised, logits)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.size(-1):
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays where those before it do not hold top_p yet, so the likeliest always does.
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        smallest = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < smallest, -torch.inf)
    return logits.softmax(-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids (B,) from probabilities (B, V) and numbers in [0, 1) (B,): inverse of the distribution."""
    cumulative = probabilities.double().cumsum(-1)
    # scaled by the sum, so that rounding cannot point past the last token with any probability
    return torch.searchsorted(cumulative, (uniforms.double() * cumulative[:, -1])[:, None], right=True)[:, 0]


@torch.no_grad()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_tokens: int,
    eot_id: int,
    sampling: Sampling,
    seeds: list[int],
) -> Iterator[list[int | None]]:
    """Continue each prompt (token ids, at least one) by up to max_tokens tokens.

    Yields once per position: a list with each sequence's new token, or None where it is still reading
    its prompt or has ended. A sequence ends with eot_id, which is not yielded. All sequences walk
    through the same positions in one batch, longer prompts feeding their own tokens where shorter ones
    already write. Sequence k draws from a stream of its own (seeds[k]), so it does not depend on
    the others. Whenever the context is full, only its last block_size // 2 tokens stay; that happens at the
    same positions for every sequence, also within a prompt that exceeds the context.
    """
    for seed in seeds:
        require_seed(seed)
    device, block_size = model.head_weight.device, model.config.block_size
    lengths = torch.tensor([len(p) for p in prompts])
    uniforms = torch.stack(
        [torch.rand(max_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    total = int(lengths.max()) + max_tokens
    tokens = torch.full((len(prompts), total), eot_id)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    alive = torch.arange(len(prompts))  # rows still going on
    cache = KVCache(model.config, len(prompts), model.head_weight)
    begin = 0  # of the window that the model reads
    read = 0  # tokens of the sequences that the cache has seen, or slid over
    for position in range(int(lengths.min()), total):
        if position - begin > block_size:
            while position - begin > block_size:
                begin += block_size + 1 - max(1, block_size // 2)
            cache, read = KVCache(model.config, len(alive), model.head_weight), begin
        logits = model.last_logits(tokens[alive, read:position].to(device), cache)
        read = position
        writing = lengths[alive] <= position
        previous = torch.zeros_like(logits, dtype=torch.bool)
        if sampling.repetition_penalty != 1:
            previous.scatter_(1, tokens[alive, :position].to(device), True)
            previous[:, eot_id] = False  # every story begins with it, and should still end
        turn = (position - lengths[alive]).clamp(min=0, max=max_tokens - 1)
        new = draw(next_distribution(logits, previous, sampling), uniforms[alive, turn].to(device)).cpu()
        tokens[alive, position] = torch.where(writing, new, tokens[alive, position])
        ended = writing & (new == eot_id)
        yielded: list[int | None] = [None] * len(prompts)
        for row, token, is_new in zip(alive.tolist(), new.tolist(), (writing & ~ended).tolist(), strict=True):
            if is_new:
                yielded[row] = token
        yield yielded
        ended |= position + 1 - lengths[alive] >= max_tokens
        if ended.any():
            cache.keep((~ended).nonzero()[:, 0].to(device))
            alive = alive[~ended]
            if not len(alive):
                return


def generate_all(model: GPT, prompts: list[list[int]], *arguments) -> list[list[int]]:
    """generate(), collected: the new tokens of each sequence."""
    written: list[list[int]] = [[] for _ in prompts]
    for row_tokens in generate(model, prompts, *arguments):
        for row, token in enumerate(row_tokens):
            if token is not None:
                written[row].append(token)
    return written


def continue_text(
    model: GPT, tokenizer: Tokenizer, eot_id: int, prompt: str, max_tokens: int, seed: int
) -> str:
    """The prompt as the beginning of a story, and how the model goes on, sampled with a seed."""
    ids = [eot_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    written = generate_all(model, [ids], max_tokens, eot_id, Sampling(top_p=0.95), [seed])[0]
    return tokenizer.decode(ids[1:] + written, skip_special_tokens=False)
