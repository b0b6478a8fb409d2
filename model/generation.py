"""Writing text: the choice of each next token, and many sequences side by side."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.decoder import Decoder, KVCache
from model.gpt import GPT
from model.runtime import warn
from model.settings import UserError, first_line, require_seed


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


def next_distribution(
    logits: Tensor, previous: Tensor | None, sampling: Sampling
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, K) of the next token after all filters, from logits (B, V), and the K tokens' ids (B, K).

    The ids are None where the K = V probabilities stand in the order of the vocabulary, otherwise the likeliest
    comes first and all others have no probability. `previous` (B, V) is True where a token has occurred;
    None: nowhere. Temperature 0 gives the likeliest token all.
    """
    if sampling.repetition_penalty != 1 and previous is not None:
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(previous, penalised, logits)
    if sampling.temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.ones_like(likeliest, dtype=logits.dtype), likeliest
    # differences first, and no divisor that float32 flushes to 0: so any temperature gives probabilities
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-30)
    everything = logits.softmax(-1)
    vocabulary = logits.size(-1)
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return everything, None
    # Sorting a whole vocabulary costs a CPU more than the model does. A few of the likeliest are nearly always enough
    # to hold all that the filters leave; a GPU sorts fast, but would have to wait for the answer.
    count = vocabulary if logits.is_cuda else sampling.top_k or 64
    while True:
        count = min(count, vocabulary)
        probabilities, ids = everything.topk(count)
        outside = torch.zeros_like(probabilities, dtype=torch.bool)
        if sampling.top_k:
            outside[:, sampling.top_k :] = True
            probabilities = probabilities.masked_fill(outside, 0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        if sampling.top_p < 1:
            # A token stays where those before it do not hold top_p yet, so the likeliest always does.
            outside |= probabilities.cumsum(-1) - probabilities >= sampling.top_p
        if sampling.min_p > 0:
            outside |= probabilities < sampling.min_p * probabilities[:, :1]
        if count == vocabulary or count == sampling.top_k or outside[:, -1].all():
            probabilities = probabilities.masked_fill(outside, 0)
            return probabilities / probabilities.sum(-1, keepdim=True), ids
        count *= 8


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Indices (B,) drawn from probabilities (B, K) by numbers in [0, 1) (B,): inverse of the distribution."""
    cumulative = probabilities.cumsum(-1)
    # scaled by the sum and kept below it, so that rounding cannot point past the last with any probability
    targets = uniforms.type_as(cumulative).clamp(max=1 - 2**-22)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0]


class Batch:
    """Sequences that are written side by side: tensors on the decoder's device, and a step that never waits for it."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        max_tokens: int,
        eot_id: int,
        sampling: Sampling,
        seeds: list[int],
    ):
        self.decoder, self.sampling, self.eot_id, self.graph = decoder, sampling, eot_id, None
        device, count = decoder.device, len(prompts)
        self.total = max(map(len, prompts)) + max_tokens
        tokens = torch.full((count, self.total), eot_id)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        streams = [torch.rand(max_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self.tokens, self.uniforms = tokens.to(device), torch.stack(streams).to(device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.position = self.lengths.min()[None].clone()  # (1,), where the next tokens will stand
        self.occurred = None
        if sampling.repetition_penalty != 1:
            self.occurred = torch.zeros(count, decoder.config.vocab_size, dtype=torch.bool, device=device)
            self.occurred.scatter_(1, self.tokens[:, : int(self.position)], True)
        self.cache = KVCache(decoder, count, min(decoder.config.block_size, self.total))

    def write(self, logits: Tensor) -> None:
        """Choose each sequence's next token from logits (B, V); those still in their prompt keep its token."""
        if self.occurred is not None and 0 <= self.eot_id < logits.size(1):
            self.occurred[:, self.eot_id] = False  # every story begins with it, and should still end
        probabilities, ids = next_distribution(logits, self.occurred, self.sampling)
        turn = (self.position - self.lengths).clamp(0, self.uniforms.size(1) - 1)[:, None]
        new = draw(probabilities, self.uniforms.gather(1, turn)[:, 0])[:, None]
        if ids is not None:
            new = ids.gather(1, new)
        given = self.tokens.index_select(1, self.position)
        new = torch.where(self.lengths[:, None] <= self.position, new, given)
        self.tokens.index_copy_(1, self.position, new)
        if self.occurred is not None:
            self.occurred.scatter_(1, new, True)
        self.position += 1

    def read_anew(self, first: int, position: int) -> None:
        """Read the tokens from `first` on into an empty cache, and write the next."""
        self.cache.clear()
        self.write(self.decoder(self.tokens[:, first:position], self.cache))

    def step(self, graph: bool = False) -> None:
        """Read the latest tokens and write the next ones."""
        latest = self.tokens.index_select(1, self.position - 1)
        self.write(self.decoder(latest, self.cache, graph))

    def advance(self) -> None:
        """step(), where the decoder allows it as one CUDA graph, so that only the GPU itself takes time."""
        if self.decoder.graphs and self.graph is None:
            state = [t for t in (self.position, self.cache.next, self.tokens, self.occurred) if t is not None]
            before, length = [t.clone() for t in state], self.cache.length
            try:
                self.capture(state, before, length)
            except RuntimeError as error:
                warn(f"a step cannot be recorded as a CUDA graph, going on without: {first_line(error)}")
                self.decoder.graphs, self.graph = False, None
                self.restore(state, before, length)
        if self.graph is None:
            return self.step()
        self.graph.replay()
        self.cache.length += 1

    def capture(self, state: list[Tensor], before: list[Tensor], length: int) -> None:
        """Record a step. Whatever its rehearsals wrote is written again by the first replay."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step(graph=True)
                self.restore(state, before, length)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step(graph=True)
        self.restore(state, before, length)

    def restore(self, state: list[Tensor], before: list[Tensor], length: int) -> None:
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        self.cache.length = length

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but these (ascending)."""
        self.tokens, self.uniforms, self.lengths = (
            t[rows] for t in (self.tokens, self.uniforms, self.lengths)
        )
        if self.occurred is not None:
            self.occurred = self.occurred[rows]
        self.cache.keep(rows)
        self.graph = None


@torch.inference_mode()
def generate(
    decoder: Decoder,
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
    block_size, lengths = decoder.config.block_size, [len(prompt) for prompt in prompts]
    batch = Batch(decoder, prompts, max_tokens, eot_id, sampling, seeds)
    ahead = 16 if decoder.graphs else 1  # positions written before anyone looks at them
    rows = list(range(len(prompts)))  # the sequence that each row of the batch holds
    ended: set[int] = set()
    begin = 0  # of the window that the model reads
    shown = min(lengths)  # positions yielded
    for position in range(shown, batch.total):
        if position - begin > block_size or position == min(lengths):
            while position - begin > block_size:
                begin += block_size + 1 - max(1, block_size // 2)
            batch.read_anew(begin, position)
        else:
            batch.advance()
        if position + 1 - shown < ahead and position + 1 < batch.total:
            continue
        for place, tokens in enumerate(batch.tokens[:, shown : position + 1].T.tolist(), start=shown):
            yielded: list[int | None] = [None] * len(prompts)
            for row, token in zip(rows, tokens, strict=True):
                if row in ended or place < lengths[row]:
                    continue
                if token != eot_id:
                    yielded[row] = token
                if token == eot_id or place + 1 - lengths[row] >= max_tokens:
                    ended.add(row)
            yield yielded
            if len(ended) == len(prompts):
                return
        shown = position + 1
        going = [k for k, row in enumerate(rows) if row not in ended]
        if len(going) <= 3 * len(rows) // 4:  # dropping a few would cost more than writing on
            batch.keep(going)
            rows = [rows[k] for k in going]


def generate_all(decoder: Decoder, prompts: list[list[int]], *arguments) -> list[list[int]]:
    """generate(), collected: the new tokens of each sequence."""
    written: list[list[int]] = [[] for _ in prompts]
    for row_tokens in generate(decoder, prompts, *arguments):
        for row, token in enumerate(row_tokens):
            if token is not None:
                written[row].append(token)
    return written


def continue_text(
    model: GPT, tokenizer: Tokenizer, eot_id: int, prompt: str, max_tokens: int, seed: int
) -> str:
    """The prompt as the beginning of a story, and how the model goes on, sampled with a seed."""
    ids = [eot_id, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    written = generate_all(Decoder(model), [ids], max_tokens, eot_id, Sampling(top_p=0.95), [seed])[0]
    return tokenizer.decode(ids[1:] + written, skip_special_tokens=False)
