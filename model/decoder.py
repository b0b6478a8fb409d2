"""The network for token-by-token decoding, with a KV cache and low-precision weights.

Decoding one story is memory-bound: every token reads all weights. So weights may have fewer bits than in training; in
int8 on a CPU, activations are rounded to int8, too, and keys and values to bfloat16. The number of operations comes
next, so the weights of norms are folded into the next matrix, and on a CPU one call of kernels.c takes up to eight
steps, if this machine can compile it. `GPT` is the plain version.

Shapes: B sequences, T tokens each, N = B T, C = n_embd, H heads of size D, V = vocab_size.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import kernels
from model.config import NORM_EPS
from model.errors import UserError
from model.gpt import GPT, Block


def choose_weights(device: torch.device, name: str) -> str:
    """float32, float16 or int8. `auto`: int8 on a CPU that has the kernels for it, else float32."""
    if name == "auto":
        return "int8" if device.type == "cpu" and kernels.load().library else "float32"
    if name == "int8" and device.type != "cpu":
        raise UserError("int8 weights are for CPUs: use --dtype float16 or float32 on a GPU")
    if name == "int8" and not kernels.load().library:
        raise UserError(
            f"int8 weights need compiled kernels ({kernels.load().shortcoming}): use --dtype float32"
        )
    if name == "float16" and device.type == "cpu":
        raise UserError("float16 weights are for GPUs: use --dtype int8 or float32 on a CPU")
    return name


class CacheWindow(NamedTuple):
    """Where the new tokens of a step are: positions in the KV cache."""

    new: slice | Tensor
    seen: slice  # what attention covers
    mask: Tensor | None  # (T or 1, seen), bool or added to scores; None: each sees all up to itself


class FusedLinear:
    """x (N, in) -> residual (N, out) + prepare(x) @ weight.T + bias, for a weight (out, in).

    The residual is overwritten. `prepare` is rms_norm, layer_norm (both without weights of their own), swiglu (of 2 in
    numbers), gelu or nothing.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, prepare: str, eps: float):
        self.columns = weight.t().contiguous()  # this layout makes single-row products twice as fast on a CPU
        self.bias, self.prepare, self.eps = bias, prepare, eps

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.prepare == "rms_norm":
            x = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        elif self.prepare == "layer_norm":
            x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        elif self.prepare == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        elif self.prepare == "gelu":
            x = F.gelu(x, approximate="tanh")
        if residual is not None:
            return (residual if self.bias is None else residual.add_(self.bias)).addmm_(x, self.columns)
        return x @ self.columns if self.bias is None else torch.addmm(self.bias, x, self.columns)


def attend(
    qkv: Tensor, rotary: Tensor | None, keys: Tensor, values: Tensor, window: CacheWindow, eps: float
) -> Tensor:
    """qkv (N, 3 H D) -> (N, H D), for keys and values (B, H, capacity, D) of all positions, which are extended.

    `rotary`, a DecoderBlock's for the new positions, is applied to queries and keys after they are normalised; None:
    neither.
    """
    B, H, _, D = keys.shape
    heads = qkv.view(B, -1, 3, H, D).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
    qk, v = heads[:2], heads[2]
    if rotary is not None:
        qk = F.rms_norm(qk, (D,), eps=eps)
        cos, sin = rotary[:, :, None, None]
        qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
    q, k = qk
    keys[:, :, window.new], values[:, :, window.new] = k, v
    k, v = keys[:, :, window.seen], values[:, :, window.seen]
    causal = q.size(2) > 1 and window.mask is None
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=window.mask, is_causal=causal)
    return y.transpose(1, 2).reshape(len(qkv), -1)


class DecoderBlock(NamedTuple):
    qkv: FusedLinear | kernels.PackedLinear
    rotary: Tensor | None  # (2, 2, positions, D): rotary cosines and sines, each for queries and for keys
    project: FusedLinear | kernels.PackedLinear
    up: FusedLinear | kernels.PackedLinear
    down: FusedLinear | kernels.PackedLinear


class KVCache:
    """Keys and values of all layers for the positions so far, preallocated."""

    def __init__(self, decoder: "Decoder", batch: int, capacity: int):
        config, like = decoder.config, decoder.embedding
        places = kernels.whole(capacity, kernels.POSITIONS) if decoder.native else capacity
        shape = (2 * config.n_layer, batch, config.n_head, places, config.head_dim)
        if decoder.native:
            memory = kernels.huge_pages(math.prod(shape) * decoder.cache_dtype.itemsize)
            both = memory.view(decoder.cache_dtype).view(shape)
        else:
            both = like.new_zeros(shape, dtype=decoder.cache_dtype)
        self.k, self.v = list(both[: config.n_layer]), list(both[config.n_layer :])
        self.capacity, self.length = capacity, 0  # positions: at most, and stored so far
        # A CUDA graph replays tensors, not Python numbers: the next position, and all positions.
        self.next = torch.zeros(1, dtype=torch.long, device=like.device)
        self.positions = torch.arange(capacity, device=like.device)

    def clear(self) -> None:
        self.length = 0
        self.next.zero_()

    def extend(self, count: int) -> None:
        """Count so many more positions as stored."""
        self.length += count
        self.next += count

    def keep(self, rows: list[int]) -> None:
        """Keep only these sequences (ascending), on a CPU moved up in place."""
        used = kernels.whole(self.length, kernels.POSITIONS)  # whole blocks of keys, within the capacity
        for stored in (self.k, self.v):
            for layer, tensor in enumerate(stored):
                if tensor.device.type != "cpu":  # one copy, not one for each sequence
                    stored[layer] = tensor[rows]
                    continue
                for new, old in enumerate(rows):
                    if new != old:
                        tensor[new, :, :used] = tensor[old, :, :used]
                stored[layer] = tensor[: len(rows)]


class Decoder:
    """A model arranged for decoding, with weights in float32 (the model's own dtype), float16 or int8.

    Called with token ids (B, T) and a cache, it returns the logits (B, V) for the next position, in float32
    (float64 for a float64 model), and extends the cache.
    """

    @torch.inference_mode()
    def __init__(self, model: GPT, weights: str = "float32", graphs: bool = False):
        """`graphs`: replay each step as a CUDA graph; only if nothing else (such as training) uses the GPU."""
        like = model.head_weight
        self.graphs = graphs and like.is_cuda
        self.config, self.device, self.weights = model.config, like.device, weights
        self.dtype = torch.float16 if weights == "float16" else like.dtype  # of activations
        here = like.device.type == "cpu" and self.dtype == torch.float32
        self.native = here and kernels.load().library is not None
        if weights == "int8" and not self.native:
            raise ValueError("int8 weights need the kernels in C, which are for float32 models on a CPU")
        self.cache_dtype = torch.bfloat16 if weights == "int8" else self.dtype
        self.eps = NORM_EPS[self.config.blocks]
        self.embedding, self.position_embedding = model.token_embedding.weight.detach().to(self.dtype), None
        if self.config.blocks == "gpt2":
            self.position_embedding = model.position_embedding.weight.detach().to(self.dtype)
        self.rotary = [None] * self.config.n_layer
        if self.config.blocks == "modern":
            self.rotary = torch.stack([self.rotary_of(block, model) for block in model.blocks])
        self.blocks = [self.arrange(*parts) for parts in zip(model.blocks, self.rotary, strict=True)]
        self.head = self.linear(model.head_weight, None, model.norm)
        self.network = None
        if self.native:
            tables = self.embedding, self.position_embedding
            self.network = kernels.Network(self.blocks, self.head, self.eps, *tables)

    def linear(
        self, weight: Tensor, bias: Tensor | None, prepare: nn.Module | str = "nothing"
    ) -> FusedLinear | kernels.PackedLinear:
        """A norm as `prepare` is one whose own weight and bias are folded into the matrix."""
        if isinstance(prepare, nn.Module):
            if (shift := getattr(prepare, "bias", None)) is not None:
                bias = weight @ shift if bias is None else weight @ shift + bias
            weight = weight * prepare.weight
            prepare = "rms_norm" if self.config.blocks == "modern" else "layer_norm"
        bias = None if bias is None else bias.detach().to(self.dtype)
        if self.native:
            return kernels.PackedLinear(weight.detach(), bias, prepare, int8=self.weights == "int8")
        return FusedLinear(weight.detach().to(self.dtype), bias, prepare, self.eps)

    def rotary_of(self, block: Block, model: GPT) -> Tensor:
        """A DecoderBlock's `rotary`, with the weights of the norms of queries and keys."""
        half = self.config.head_dim // 2
        scale = torch.stack((block.attention.q_norm.weight, block.attention.k_norm.weight))[:, None]
        signs = torch.cat((-torch.ones(half), torch.ones(half))).to(scale)
        cos, sin = model.rotary_cos * scale, model.rotary_sin * signs * scale.roll(half, -1)
        return torch.stack((cos, sin)).to(self.dtype)

    def arrange(self, block: Block, rotary: Tensor | None) -> DecoderBlock:
        attention, mlp = block.attention, block.mlp
        modern = self.config.blocks == "modern"
        up, activation = (mlp.gate_up, "swiglu") if modern else (mlp.up, "gelu")
        weight = attention.qkv.weight
        if self.config.kv_heads < self.config.n_head:  # repeat keys and values for each query head
            each = weight.unflatten(0, (-1, self.config.head_dim)).split(attention.heads)
            repeats = (1, *[self.config.n_head // self.config.kv_heads] * 2)
            parts = [part.repeat_interleave(n, 0) for part, n in zip(each, repeats, strict=True)]
            weight = torch.cat(parts).flatten(0, 1)
        return DecoderBlock(
            self.linear(weight, attention.qkv.bias, block.attention_norm),
            rotary,
            self.linear(attention.proj.weight, attention.proj.bias),
            self.linear(up.weight, up.bias, block.mlp_norm),
            self.linear(mlp.down.weight, mlp.down.bias, activation),
        )

    def __call__(self, ids: Tensor, cache: KVCache, graph: bool = False) -> Tensor:
        """With `graph`: one token each, and only what a CUDA graph can replay. Attention covers the whole cache with
        a mask, and cache.next holds the position.
        """
        start, end = cache.length, cache.length + ids.size(1)
        if end > cache.capacity:
            raise ValueError(f"{end} tokens exceed the context of {cache.capacity}")
        x = F.embedding(ids, self.embedding)
        if self.position_embedding is not None:
            x = x + self.position_embedding[cache.next if graph else slice(start, end)]
        logits = self.network(x, cache) if self.network else self.plain(x, cache, graph)
        cache.extend(ids.size(1))
        return logits.float() if logits.dtype == torch.float16 else logits

    def plain(self, x: Tensor, cache: KVCache, graph: bool) -> Tensor:
        """Embeddings (B, T, C) -> logits (B, V), in PyTorch's operations."""
        (B, T, _), start, end = x.shape, cache.length, cache.length + x.size(1)
        window = CacheWindow(slice(start, end), slice(0, end), None)
        if graph:
            # Added to scores; from a bool mask, every layer would make one of these
            mask = x.new_zeros(cache.capacity).masked_fill(cache.positions > cache.next, -math.inf)
            window = CacheWindow(cache.next, slice(None), mask[None])
        elif start and T > 1:  # causal mask: the past, and new tokens up to itself
            window = window._replace(mask=torch.ones(T, end, dtype=torch.bool, device=x.device).tril(start))
        x = x.view(B * T, -1)
        tables = self.rotary  # of the new positions in all layers: for a graph, one operation
        if self.config.blocks == "modern":
            tables = tables[:, :, :, window.new]
        for (qkv, _, project, up, down), rotary, keys, values in zip(
            self.blocks, tables, cache.k, cache.v, strict=True
        ):
            x = project(attend(qkv(x), rotary, keys, values, window, self.eps), x)
            x = down(up(x), x)
        return self.head(x.view(B, T, -1)[:, -1])
