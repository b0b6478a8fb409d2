"""The network: a decoder-only transformer with two block families.

`modern` is Qwen3's dense architecture: RMSNorm, rotary positions, RMS-normalised queries and keys,
SwiGLU, no biases. `gpt2` is GPT-2's: LayerNorm, learned positions, GELU, biases. With the same
weights, the logits equal those of transformers' Qwen3ForCausalLM and GPT2LMHeadModel.

Shapes: B sequences, T tokens each, C = n_embd, H heads of size D, V = vocab_size.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attend, story_mask
from model.config import NORM_EPS, GPTConfig
from model.loss import CrossEntropy, Shortlist

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def rotary_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021), each (block_size, D)."""
    frequencies = config.rope_base ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angles = torch.outer(torch.arange(config.block_size).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[d], x[d + D/2]) of a (B, H, T, D) tensor by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019); under CUDA autocast in float32."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), eps=NORM_EPS["modern"])


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, C) -> (B, T, C), with a mask of story_mask(), or a causal one."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        bias = config.blocks == "gpt2"
        self.config = config
        self.heads = (config.n_head, config.kv_heads, config.kv_heads)  # of q, k and v
        self.qkv = nn.Linear(config.n_embd, sum(self.heads) * config.head_dim, bias=bias)
        self.proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=bias)
        if config.blocks == "modern":
            self.q_norm = RMSNorm(config.head_dim)
            self.k_norm = RMSNorm(config.head_dim)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: "Tensor | BlockMask | None" = None
    ) -> Tensor:
        B, T, _ = x.shape
        # q is (B, H, T, D); k and v may have fewer heads
        q, k, v = self.qkv(x).view(B, T, -1, self.config.head_dim).transpose(1, 2).split(self.heads, dim=1)
        if rotary is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, *rotary).type_as(v), rotate(k, *rotary).type_as(v)
        dropout = self.config.attention_dropout if self.training else 0.0
        y = attend(q, k, v, mask, dropout, self.training)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


class GELUMLP(nn.Module):
    """down(gelu(up(x))), (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_hidden)
        self.down = nn.Linear(config.n_hidden, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), (B, T, C) -> (B, T, C), Shazeer 2020; gate and up are one matrix."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.n_hidden, bias=False)
        self.down = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def make_norm(config: GPTConfig) -> nn.Module:
    if config.blocks == "gpt2":
        return nn.LayerNorm(config.n_embd, eps=NORM_EPS["gpt2"])
    return RMSNorm(config.n_embd)


class Block(nn.Module):
    """Attention, then an MLP, each normalised before and added to the residual stream, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = GELUMLP(config) if config.blocks == "gpt2" else SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, mask: "Tensor | BlockMask | None" = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.blocks == "gpt2":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        else:
            cos, sin = rotary_tables(config)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.depth = config.n_layer  # blocks in use: see set_depth()
        # whether compiled code masks stories by flex_attention: chosen in model/forward.py
        self.flex: bool | None = None
        self.norm = make_norm(config)
        if not config.tie_weights:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.cross_entropy = CrossEntropy()
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """GPT-2's initialisation: std 0.02, times 1/sqrt(2 L) for matrices that write to the residual stream."""
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def silence(self, first: int) -> None:
        """Zero the output of all blocks from index `first` on, so that they leave the residual stream as it is."""
        for block in self.blocks[first:]:
            for layer in (block.attention.proj, block.mlp.down):
                for parameter in layer.parameters():
                    nn.init.zeros_(parameter)

    def set_depth(self, depth: int) -> None:
        """Use and train the first `depth` blocks only. While the others are silent, this changes no logits."""
        self.depth = depth
        for i, block in enumerate(self.blocks):
            block.requires_grad_(i < depth)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, (V, C)."""
        return self.token_embedding.weight if self.config.tie_weights else self.head.weight

    def hidden(self, idx: Tensor, story_ids: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> hidden states after the final norm (B, T, C)."""
        T = idx.shape[1]
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens exceed the context of {self.config.block_size}")
        x = self.token_embedding(idx)
        rotary = None
        if self.config.blocks == "gpt2":
            x = x + self.position_embedding.weight[:T]
        else:
            rotary = self.rotary_cos[:T], self.rotary_sin[:T]
        mask = None
        if story_ids is not None:
            mask = story_mask(story_ids, flex=self.flex and torch.compiler.is_compiling())
        x = self.dropout(x)
        for block in self.blocks[: self.depth]:
            x = block(x, rotary, mask)
        return self.norm(x)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        story_ids: Tensor | None = None,
        shortlist: Shortlist | None = None,
    ) -> Tensor:
        """Logits (B, T, V), or with targets (B, T) their mean cross-entropy in nats per token (float32).

        With `story_ids` (B, T), the index of each token's story, a token attends only within its own story. With a
        `shortlist`, which must contain all targets, the cross-entropy is an estimate from these tokens alone.
        """
        states = self.hidden(idx, story_ids)
        if targets is None:
            return F.linear(states, self.head_weight)
        return self.cross_entropy(states, self.head_weight, targets, shortlist)

    def count_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, depth: int | None = None, vocabulary: int | None = None) -> float:
        """Floating-point operations to train on one token: 6 per weight in a matrix product, plus attention.

        The formula of PaLM's appendix B (Chowdhery et al. 2022), which counts the output head but not the
        embedding look-up, and attention in full, although half of it is masked. `depth` blocks are counted (default:
        those in use) and a softmax over `vocabulary` tokens (default: all).
        """
        depth = self.depth if depth is None else depth
        matrices = sum(p.numel() for block in self.blocks[:depth] for p in block.parameters() if p.dim() == 2)
        matrices += (vocabulary or self.config.vocab_size) * self.config.n_embd
        heads = self.config.n_head * self.config.head_dim
        return 6 * matrices + 12 * depth * heads * self.config.block_size
