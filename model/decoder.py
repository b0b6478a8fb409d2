"""The network for token-by-token decoding, with a KV cache and low-precision weights.

Decoding one story is memory-bound: every token reads all weights. So weights may be stored in fewer bits than
activations, which on a CPU stay in float32. The number of operations comes next, so RMSNorm weights are folded into
the next matrix. `GPT` is the plain version.

Shapes: B sequences, T tokens each, C = n_embd, H heads of size D, V = vocab_size.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import NORM_EPS
from model.errors import UserError
from model.gpt import GPT, Block, RMSNorm

EPS = NORM_EPS["modern"]

Function = Callable[[Tensor], Tensor]


def half_on_cpu() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


def half_rows() -> int:
    """The number of rows of which float16 products need a multiple, so that each row comes out the same in any company.

    Without AVX-512, rows are computed in groups of up to six, and groups of one or two add up in another order.
    """
    return 1 if torch.cpu.get_capabilities().get("avx512_f") else 3


def choose_weights(device: torch.device, name: str) -> str:
    """float32, float16 or int8. `auto`: float16 on CPUs that use it in float32 arithmetic (x86), else float32."""
    if name == "auto":
        return "float16" if device.type == "cpu" and half_on_cpu() else "float32"
    if name == "int8" and device.type != "cpu":
        raise UserError("int8 weights are for CPUs: use --dtype float16 or float32 on a GPU")
    if name != "float32" and device.type == "cpu" and not half_on_cpu():
        raise UserError(f"{name} weights need an x86 CPU: use --dtype float32")
    return name


def matrix(weight: Tensor, bias: Tensor | None, kind: str) -> Function:
    """x (N, in) -> x @ weight.T + bias, (N, out), for a weight (out, in) stored as `kind`.

    On a CPU, float16 and int8 compute each row bit-identically, however many rows there are.
    """
    weight = weight.detach()
    if kind == "int8" and weight.size(1) % 16:  # the kernel reads 16 numbers at a time, even past the end
        kind = "float16"
    if kind == "int8":  # one scale per row; the kernel's input and output are bfloat16
        scale = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        rounded, scale = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
        multiply = torch._weight_int8pack_mm
        if bias is None:
            return lambda x: multiply(x.bfloat16(), rounded, scale).type_as(x)
        return lambda x: multiply(x.bfloat16(), rounded, scale).type_as(x) + bias
    if kind == "float16" and weight.device.type == "cpu":
        packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        multiply, rows = torch.ops.quantized.linear_dynamic_fp16.default, half_rows()
        if rows == 1:
            return lambda x: multiply(x, packed)
        return lambda x: multiply(F.pad(x, (0, 0, 0, -len(x) % rows)), packed)[: len(x)]
    columns = weight.t().contiguous()  # this layout makes single-row products twice as fast on a CPU
    if bias is None:
        return lambda x: x @ columns
    return lambda x: torch.addmm(bias, x, columns)


class UnitRMS:
    """x / rms(x) over the last dimension, (..., n) -> (..., n), up to a factor `gain`, folded into what follows."""

    def __init__(self, size: int, like: Tensor):
        self.fused = like.is_cuda  # elsewhere F.rms_norm is eight operations, this is three
        self.gain = 1.0 if self.fused else size**0.5
        self.floor = like.new_tensor((size * EPS) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        if self.fused:
            return F.rms_norm(x, x.shape[-1:], eps=EPS)
        return x / torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), self.floor)


class KVCache:
    """Keys and values of all layers for the positions so far, preallocated."""

    def __init__(self, decoder: "Decoder", batch: int, room: int):
        config, like = decoder.config, decoder.embedding
        shape = (batch, config.n_head, room, config.head_dim)
        self.k = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.v = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.room, self.length = room, 0  # positions: capacity, and stored so far
        # A CUDA graph replays tensors, not Python numbers: the next position, and all positions.
        self.next = torch.zeros(1, dtype=torch.long, device=like.device)
        self.positions = torch.arange(room, device=like.device)

    def clear(self) -> None:
        self.length = 0
        self.next.zero_()

    def keep(self, rows: list[int]) -> None:
        """Keep only these sequences (ascending), moved up in place."""
        for stored in (self.k, self.v):
            for layer, tensor in enumerate(stored):
                for new, old in enumerate(rows):
                    if new != old:
                        tensor[new, :, : self.length] = tensor[old, :, : self.length]
                stored[layer] = tensor[: len(rows)]


class Decoder:
    """A model arranged for decoding, with weights in float32 (the model's own dtype), float16 or int8.

    Called with token ids (B, T) and a cache, it returns the logits (B, V) for the next position, in float32
    (float64 for a float64 model), and extends the cache.
    """

    @torch.inference_mode()
    def __init__(self, model: GPT, weights: str = "float32", graphs: bool = False):
        """`graphs`: replay each step as a CUDA graph; only if nothing else (such as training) uses the GPU."""
        self.graphs = graphs and model.head_weight.is_cuda
        self.config, self.device, self.weights = model.config, model.head_weight.device, weights
        if weights == "float16" and self.device.type != "cpu":  # then activations are float16 too
            model = copy.deepcopy(model).half()
        self.embedding = model.token_embedding.weight.detach()
        self.modern = self.config.blocks == "modern"
        if not self.modern:
            self.position_embedding = model.position_embedding.weight.detach()
        self.unit_rms = UnitRMS(self.config.n_embd, self.embedding)
        self.unit_rms_head = UnitRMS(self.config.head_dim, self.embedding)
        self.layers = [self.arrange(block, model) for block in model.blocks]
        self.head = self.after(model.norm, model.head_weight, None)

    def after(self, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> Function:
        """x -> norm(x) @ weight.T + bias, with the weight of an RMSNorm folded into the matrix."""
        if isinstance(norm, RMSNorm):
            norm, weight = self.unit_rms, weight * norm.weight * self.unit_rms.gain
        multiply = matrix(weight, bias, self.weights)
        return lambda x: multiply(norm(x))

    def arrange(self, block: Block, model: GPT) -> tuple:
        """A block as (qkv, cos, sin, project, hidden, down), functions (N, in) -> (N, out) except cos and sin.

        For modern blocks these are rotary tables (2, 1, 1, block_size, D) for queries and keys, with the weights of
        their norms folded in; for gpt2 blocks, None.
        """
        attention, mlp, cos, sin = block.attention, block.mlp, None, None
        if self.modern:
            half = self.config.head_dim // 2
            scale = torch.stack((attention.q_norm.weight, attention.k_norm.weight)) * self.unit_rms_head.gain
            scale = scale[:, None, None, None]
            signs = torch.cat((-torch.ones(half), torch.ones(half))).to(scale)
            cos, sin = model.rotary_cos * scale, model.rotary_sin * signs * scale.roll(half, -1)
            gate_up = self.after(block.mlp_norm, mlp.gate_up.weight, None)

            def hidden(x: Tensor) -> Tensor:
                gate, up = gate_up(x).chunk(2, dim=-1)
                return F.silu(gate) * up
        else:
            up = self.after(block.mlp_norm, mlp.up.weight, mlp.up.bias)

            def hidden(x: Tensor) -> Tensor:
                return F.gelu(up(x), approximate="tanh")

        weight = attention.qkv.weight
        if self.config.kv_heads < self.config.n_head:  # repeat keys and values for each query head
            each = weight.unflatten(0, (-1, self.config.head_dim)).split(attention.heads)
            repeats = (1, *[self.config.n_head // self.config.kv_heads] * 2)
            parts = [part.repeat_interleave(n, 0) for part, n in zip(each, repeats, strict=True)]
            weight = torch.cat(parts).flatten(0, 1)
        qkv = self.after(block.attention_norm, weight, attention.qkv.bias)
        project = matrix(attention.proj.weight, attention.proj.bias, self.weights)
        return qkv, cos, sin, project, hidden, matrix(mlp.down.weight, mlp.down.bias, self.weights)

    def __call__(self, ids: Tensor, cache: KVCache, graph: bool = False) -> Tensor:
        """With `graph`: one token each, and only what a CUDA graph can replay. Attention covers the whole cache with
        a mask, and cache.next holds the position.
        """
        B, T = ids.shape
        start, end, C = cache.length, cache.length + T, self.config.n_embd
        if end > cache.room:
            raise ValueError(f"{end} tokens exceed the context of {cache.room}")
        mask, new, seen = None, slice(start, end), slice(0, end)
        if graph:
            mask, new, seen = (cache.positions <= cache.next)[None], cache.next, slice(None)
        elif start and T > 1:  # causal mask: the past, and new tokens up to itself
            mask = torch.ones(T, end, dtype=torch.bool, device=ids.device).tril(start)
        x = F.embedding(ids, self.embedding)
        if not self.modern:
            x = x + self.position_embedding[new]
        x = x.view(B * T, C)
        for layer, (qkv, cos, sin, project, hidden, down) in enumerate(self.layers):
            heads = qkv(x).view(B, T, 3, self.config.n_head, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
            qk, v = heads[:2], heads[2]
            if self.modern:
                qk = self.unit_rms_head(qk)
                turned = qk.roll(self.config.head_dim // 2, -1)
                qk = torch.addcmul(qk * cos[:, :, :, new], turned, sin[:, :, :, new])
            q, k = qk
            keys, values = cache.k[layer], cache.v[layer]
            keys[:, :, new], values[:, :, new] = k, v
            y = F.scaled_dot_product_attention(
                q, keys[:, :, seen], values[:, :, seen], attn_mask=mask, is_causal=T > 1 and mask is None
            )
            x = x + project(y.transpose(1, 2).reshape(B * T, -1))
            x = x + down(hidden(x))
        cache.length = end
        cache.next += T
        last = x if T == 1 else x.view(B, T, C)[:, -1]
        logits = self.head(last)
        return logits.float() if logits.dtype == torch.float16 else logits
