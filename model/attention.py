"""Attention from queries, keys and values: which tokens see which, and the fastest way to compute it.

Shapes: B sequences, T tokens each, H heads of size D.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Longest context for which CPU training uses plain_attention
PLAIN_UP_TO = 512


def causal_mask(T: int, device: torch.device) -> Tensor:
    """Causal mask (T, T), bool: True where the row's token may attend to the column's."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def story_mask(story_ids: Tensor, flex: bool = False) -> "Tensor | BlockMask":
    """Who may attend to whom, given each token's story (B, T): earlier tokens of the same story, and itself.

    A bool tensor (B, 1, T, T), or with `flex` the form that flex_attention takes, which skips blocks of 128 by 128 in
    which no token may attend to any other.
    """
    B, T = story_ids.shape
    if not flex:
        return causal_mask(T, story_ids.device) & (story_ids[:, None, :, None] == story_ids[:, None, None, :])
    from torch.nn.attention.flex_attention import create_block_mask

    def same(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (story_ids[b, q] == story_ids[b, k])

    return create_block_mask(same, B, None, T, T, device=story_ids.device)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Causal attention that materialises the scores, with a float32 softmax, (B, H, T, D) -> (B, H, T, D).

    On a CPU this trains faster than the fused kernel, whose backward pass is slow there. In float32, products dominate:
    queries are taken in quarters, each with the keys up to its end only. In bfloat16 that does not pay.
    """
    T = q.size(2)
    if mask is None:
        mask = causal_mask(T, q.device)
    q = q * q.size(-1) ** -0.5
    rows = -(-T // 4) if v.dtype == torch.float32 else T
    parts = []
    for start in range(0, T, rows):
        end = min(start + rows, T)
        hidden = torch.where(mask[..., start:end, :end], 0.0, -math.inf)  # float32, as then are the scores
        scores = q[:, :, start:end] @ k[:, :, :end].mT + hidden
        weights = scores.softmax(dim=-1).type_as(v)
        parts.append((F.dropout(weights, dropout) if dropout else weights) @ v[:, :, :end])
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | BlockMask | None", dropout: float, training: bool
) -> Tensor:
    """q (B, H, T, D), k and v, which may have fewer heads -> (B, H, T, D), with story_mask()'s mask or a causal one."""
    if k.size(1) < q.size(1):  # not every kernel supports grouped-query attention
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    if mask is not None and not isinstance(mask, Tensor):
        from torch.nn.attention.flex_attention import flex_attention

        # its kernel on a CPU misreads a v that is not contiguous, so no other is given one
        return flex_attention(q, k, v.contiguous(), block_mask=mask)
    if training and q.device.type == "cpu" and q.size(2) <= PLAIN_UP_TO:
        return plain_attention(q, k, v, mask, dropout)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=mask is None)
