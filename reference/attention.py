"""Grouped-query attention: interleaved RoPE, the plain causal form, and the paged KV cache.

A layer's part of the cache is one tensor [pages, 2, Hkv, PAGE, D]. A request owns the pages that its row of the block
table names, in order; token p of it lives in page ``block_table[b, p // PAGE]`` at slot ``p % PAGE``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FeedForward, RMSNorm, upcast

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, T, H, D], k and v [B, T, Hkv, D] -> [B, T, H, D]


@dataclass(frozen=True)
class PagedCache:
    """The paged KV cache of one batch, as a forward pass sees it.

    Attributes:
        kv: [layers, pages, 2, Hkv, PAGE, D], keys at index 0 and values at 1.
        block_table: int [B, max_pages], the pages of each request in order.
        lengths: int [B], tokens of each request once this pass has appended its own; 0 = a row that holds no request.
    """

    kv: Tensor
    block_table: Tensor
    lengths: Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``position * theta^(-2i / head_dim)`` (RoFormer, arXiv 2104.09864).

    The angle is made in fp64: in fp32 it is 2e-4 rad off at position 4096 already.

    Args:
        positions: int [...].
        head_dim: D, even.
        theta: base of the frequencies.

    Returns:
        Two fp64 tensors [..., D / 2].
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angle = positions.to(torch.float64).unsqueeze(-1) * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2i, 2i + 1) of each head, as Mistral's checkpoints lay them.

    Args:
        x: [..., H, D].
        cos: [..., D / 2], without the head dimension.
        sin: as `cos`.
    """
    even, odd = upcast(x).view(*x.shape[:-1], -1, 2).unbind(-1)  # [..., H, D / 2]
    cos, sin = cos.unsqueeze(-2).to(even.dtype), sin.unsqueeze(-2).to(even.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int = 0) -> Tensor:
    """Softmax attention over the whole sequence, scaled by ``D^-0.5``; query head h reads key head ``h // (H / Hkv)``.

    Args:
        q: [B, T, H, D], the last T of the S positions.
        k: [B, S, Hkv, D].
        v: [B, S, Hkv, D].
        causal: a query sees no position after its own.
        window: if causal, the most positions that a query sees, the last ones and its own; 0 for all.

    Returns:
        [B, T, H, D].
    """
    T, S = q.shape[1], k.shape[1]
    mask = None
    if causal and (T > 1 or window):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if window:
            mask = mask.triu(S - T - window + 1)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=True
    )
    return o.transpose(1, 2)


def append(kv_cache: Tensor, k: Tensor, v: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    """Write the keys and values of T new tokens into the pages of their requests.

    Args:
        kv_cache: [pages, 2, Hkv, PAGE, D], written in place.
        k: [B, T, Hkv, D].
        v: [B, T, Hkv, D].
        block_table: int [B, max_pages].
        lengths: int [B], counting the new tokens; rows of length 0 are left out.
    """
    T, page = k.shape[1], kv_cache.shape[3]
    live = (lengths > 0).nonzero().squeeze(1)
    positions = lengths[live].unsqueeze(1).long() - T + torch.arange(T, device=k.device)  # [live, T]
    pages = block_table[live.unsqueeze(1), positions // page].long()
    kv_cache[:, 0][pages, :, positions % page] = k[live]
    kv_cache[:, 1][pages, :, positions % page] = v[live]


def paged_attention(q: Tensor, kv_cache: Tensor, block_table: Tensor, lengths: Tensor, window: int = 0) -> Tensor:
    """Causal attention of each request's last T tokens over its own pages, one request at a time.

    One at a time because the lengths differ, and so that a request's bits do not depend on its neighbours.

    Args:
        q: [B, T, H, D].
        kv_cache: [pages, 2, Hkv, PAGE, D].
        block_table: int [B, max_pages].
        lengths: int [B]; a row of length 0 gives zeros.
        window: see :func:`attention`.

    Returns:
        [B, T, H, D].
    """
    page, out = kv_cache.shape[3], torch.zeros_like(q)
    for i_b, length in enumerate(lengths.tolist()):
        if length:
            pages = block_table[i_b, : -(-length // page)].long()
            k, v = kv_cache[pages].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length].unsqueeze(1)  # [1, S, Hkv, D] each
            out[i_b] = attention(q[i_b : i_b + 1], k, v, causal=True, window=window)[0]
    return out


class Attention(nn.Module):
    """Projections of grouped-query attention; how heads attend is handed in."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        """No biases."""
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, attend: Attend, n_queries: int | None = None) -> Tensor:
        """[B, T, dim] -> [B, n_queries, dim]: the first `n_queries` tokens ask (None: all), all T answer."""
        heads = (-1, self.head_dim)
        q = self.wq(x[:, :n_queries]).unflatten(-1, heads)  # [B, n_queries, H, D]
        k, v = self.wk(x).unflatten(-1, heads), self.wv(x).unflatten(-1, heads)  # [B, T, Hkv, D]
        return self.wo(attend(q, k, v).flatten(-2))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Pre-norm block: attention, then SwiGLU, each added to the stream."""

    def __init__(
        self, dim: int, hidden_dim: int, n_heads: int, n_kv_heads: int, head_dim: int, norm_eps: float
    ) -> None:
        """The same layer serves the backbone and the flow head."""
        super().__init__()
        self.attention = Attention(dim, n_heads, n_kv_heads, head_dim)
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.ffn_norm = RMSNorm(dim, norm_eps)

    def forward(self, u: Tensor, attend: Attend, n_queries: int | None = None) -> Tensor:
        """[B, T, dim] -> [B, n_queries, dim]; tokens past `n_queries` serve as keys and values only."""
        u = u[:, :n_queries] + self.attention(self.attention_norm(u), attend, n_queries)
        return u + self.feed_forward(self.ffn_norm(u))  # type: ignore[no-any-return]
