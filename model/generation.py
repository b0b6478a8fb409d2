"""Text generation: many sequences decoded in a batch, token by token."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from model import kernels
from model.decoder import Decoder, KVCache
from model.errors import first_line, warn
from model.sampling import LIKELIEST, LIKELIEST_ON_GPU, Sampling, sample
from model.settings import require_seed

# Tokens that are prefilled together: with more, the results of layers would take gigabytes
PREFILL_TOKENS = 16_384
# Positions that a CUDA graph decodes before the CPU looks at the result
UNCHECKED = 16


@functools.cache
def warm_up_stream() -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps memory for each stream that it was used on."""
    return torch.cuda.Stream()


class Batch:
    """Sequences decoded together: tensors on the decoder's device, and with CUDA graphs, steps that do not wait for it.

    A graph cannot look at more tokens where the likeliest do not suffice. Then settle() repeats its steps without it.
    """

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
        self.position = self.lengths.min()[None].clone()  # (1,), of the next tokens
        # How many of the likeliest tokens a step looks at; steps by a graph since settle(), and whether one needed more
        self.likeliest = LIKELIEST_ON_GPU if device.type == "cuda" else LIKELIEST
        self.replayed, self.short = 0, torch.zeros((), dtype=torch.bool, device=device)
        self.occurred = None
        if sampling.repetition_penalty != 1:
            self.occurred = torch.zeros(count, decoder.config.vocab_size, dtype=torch.bool, device=device)
            self.mark_occurred()
        self.cache = KVCache(decoder, count, min(decoder.config.block_size, self.total))
        self.drawn_by = None  # kernels.c's filters for write_ahead(), if it can draw the tokens
        few = min(sampling.top_k or self.likeliest, decoder.config.vocab_size)
        drawn_there = self.occurred is None and (sampling.filters or sampling.temperature == 0)
        if decoder.network and drawn_there and few <= kernels.Filters.MOST:
            self.drawn_by = sampling.for_kernels(few)

    def mark_occurred(self) -> None:
        self.occurred.zero_().scatter_(1, self.tokens[:, : int(self.position)], True)

    def sample_next(self, logits: Tensor, short: Tensor | None = None) -> None:
        """Sample each sequence's next token from logits (B, V); sequences still in their prompt keep its token."""
        if self.occurred is not None and 0 <= self.eot_id < logits.size(1):
            self.occurred[:, self.eot_id] = False  # every story starts with it, and must still be able to end
        turn = (self.position - self.lengths).clamp(0, self.uniforms.size(1) - 1)[:, None]
        uniforms = self.uniforms.gather(1, turn)[:, 0]
        new = sample(logits, self.occurred, self.sampling, uniforms, self.likeliest, short)[:, None]
        given = self.tokens.index_select(1, self.position)
        new = torch.where(self.lengths[:, None] <= self.position, new, given)
        self.tokens.index_copy_(1, self.position, new)
        if self.occurred is not None:
            self.occurred.scatter_(1, new, True)
        self.position += 1

    def prefill(self, first: int, position: int) -> None:
        """Prefill an empty cache with the tokens from `first` on, and write the next ones."""
        self.cache.clear()
        for piece in self.tokens[:, first:position].split(max(1, PREFILL_TOKENS // len(self.tokens)), dim=1):
            logits = self.decoder(piece, self.cache)
        self.sample_next(logits)

    def step(self, graph: bool = False, short: Tensor | None = None) -> None:
        """Feed the latest tokens to the model and write the next ones."""
        latest = self.tokens.index_select(1, self.position - 1)
        self.sample_next(self.decoder(latest, self.cache, graph), short)

    def advance(self, most: int) -> int:
        """One step, or up to `most` at once; returns how many.

        If the decoder allows it, a step is a single CUDA graph, to remove launch overhead.
        """
        if self.drawn_by:
            return self.write_ahead(most)
        if self.decoder.graphs and self.graph is None:
            state = [t for t in (self.position, self.cache.next, self.tokens, self.occurred) if t is not None]
            before, length = [t.clone() for t in state], self.cache.length
            try:
                self.capture(state, before, length)
            except RuntimeError as error:
                warn(f"CUDA graph capture failed, continuing without it: {first_line(error)}")
                self.decoder.graphs, self.graph = False, None
                self.restore(state, before, length)
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
            self.cache.length += 1
            self.replayed += 1
        return 1

    def write_ahead(self, most: int) -> int:
        """Up to `most` steps in one call of kernels.c, since the Python between two takes as long as a small network;
        returns how many."""
        streams = self.tokens, self.lengths, self.uniforms
        write = self.decoder.network.write
        done, logits = write(self.cache, *streams, int(self.position), most, self.drawn_by)
        self.position += done
        self.cache.extend(done)
        if logits is not None:  # to draw the next tokens takes more than the likeliest
            self.cache.extend(1)
            self.sample_next(logits)
            done += 1
        return done

    def settle(self) -> None:
        """After this, all tokens are final: repeat the latest steps if the graph looked at too few in one of them."""
        steps, self.replayed = self.replayed, 0
        if not steps or not self.short:
            return
        self.short.zero_()
        self.position -= steps
        self.cache.next -= steps
        self.cache.length -= steps
        if self.occurred is not None:
            self.mark_occurred()
        for _ in range(steps):
            self.step(graph=True)
        self.likeliest *= 8  # in the next graph
        self.graph = None

    def capture(self, state: list[Tensor], before: list[Tensor], length: int) -> None:
        """Capture a step. The first replay overwrites whatever the warm-up steps wrote."""
        side = warm_up_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step(graph=True, short=self.short)
                self.restore(state, before, length)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph):
                self.step(graph=True, short=self.short)
        finally:
            torch.cuda.set_stream(current)  # a failed capture leaves its own stream set
        self.restore(state, before, length)

    def restore(self, state: list[Tensor], before: list[Tensor], length: int) -> None:
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        self.cache.length = length

    def keep(self, rows: list[int]) -> None:
        """Keep only these sequences (ascending)."""
        self.tokens, self.uniforms, self.lengths = (
            t[rows] for t in (self.tokens, self.uniforms, self.lengths)
        )
        if self.occurred is not None:
            self.occurred = self.occurred[rows]
        self.cache.keep(rows)
        self.graph = None


def context_start(position: int, block_size: int) -> int:
    """The first position in the model's context when it predicts the token at `position`.

    Whenever the context is full, all but its last block_size // 2 tokens are dropped.
    """
    dropped = block_size + 1 - max(1, block_size // 2)
    return max(0, -(-(position - block_size) // dropped)) * dropped


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

    Yields once per position: a list with each sequence's new token, or None if it is still in its prompt or has
    ended. A sequence ends with eot_id, which is not yielded. All sequences advance through the same positions in
    one batch; longer prompts feed their own tokens while shorter ones already generate. Sequence k has its own
    random stream (seeds[k]), so it does not depend on the others. The context starts where context_start() says, for
    every sequence, even within a prompt that exceeds the context.
    """
    for seed in seeds:
        require_seed(seed)
    block_size, lengths = decoder.config.block_size, [len(prompt) for prompt in prompts]
    batch = Batch(decoder, prompts, max_tokens, eot_id, sampling, seeds)
    unchecked = UNCHECKED if decoder.graphs else 1  # positions decoded between checks
    sequences = list(range(len(prompts)))  # in each row of the batch
    ended: set[int] = set()
    position = done = min(lengths)  # positions written and yielded
    while position < batch.total:
        begin = context_start(position, block_size)
        if position == min(lengths) or begin != context_start(position - 1, block_size):
            batch.settle()
            batch.prefill(begin, position)
            position += 1
        else:  # up to where the context starts later
            position += batch.advance(min(batch.total, begin + block_size + 1) - position)
        if position - done < unchecked and position < batch.total:
            continue
        batch.settle()
        for place, tokens in enumerate(batch.tokens[:, done:position].T.tolist(), start=done):
            new: list[int | None] = [None] * len(prompts)
            for sequence, token in zip(sequences, tokens, strict=True):
                if sequence in ended or place < lengths[sequence]:
                    continue
                if token != eot_id:
                    new[sequence] = token
                if token == eot_id or place + 1 - lengths[sequence] >= max_tokens:
                    ended.add(sequence)
            yield new
            if len(ended) == len(prompts):
                return
        done = position
        going = [row for row, sequence in enumerate(sequences) if sequence not in ended]
        # dropping only a few costs more than it saves, especially if a new graph must be captured
        fewer = len(going) <= len(sequences) // 2
        if fewer or (len(going) <= 3 * len(sequences) // 4 and not decoder.graphs):
            batch.keep(going)
            sequences = [sequences[row] for row in going]


def generate_all(
    decoder: Decoder,
    prompts: list[list[int]],
    max_tokens: int,
    eot_id: int,
    sampling: Sampling,
    seeds: list[int],
) -> list[list[int]]:
    """generate(), collected: the new tokens of each sequence."""
    written: list[list[int]] = [[] for _ in prompts]
    for new in generate(decoder, prompts, max_tokens, eot_id, sampling, seeds):
        for tokens, token in zip(written, new, strict=True):
            if token is not None:
                tokens.append(token)
    return written
