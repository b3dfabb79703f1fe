"""Grouped-query attention with interleaved RoPE, over keys and values in plain tensors or in a paged KV cache.

The cache of each layer is one tensor [pages, 2, Hkv, PAGE, D]. Row b of the block table lists the pages of request b in
order. Token p of request b is stored in page ``block_table[b, p // PAGE]`` at index ``p % PAGE``.
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
    """The paged KV cache that one forward pass of a batch reads and writes.

    Attributes:
        kv: [layers, pages, 2, Hkv, PAGE, D], keys at index 0 of the third dimension and values at index 1.
        block_table: int [B, max_pages], the indices of each request's pages, in order.
        lengths: int [B], number of tokens of each request, including the tokens that this pass appends; 0 marks a row
            without a request.
    """

    kv: Tensor
    block_table: Tensor
    lengths: Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of ``position * theta^(-2i / head_dim)`` (RoFormer, arXiv 2104.09864).

    The angle is computed in fp64, because an fp32 angle is off by 2e-4 rad at position 4096.

    Args:
        positions: int [...], token positions from 0.
        head_dim: head dimension D, which must be even.
        theta: base of the rotation frequencies.

    Returns:
        Two fp64 tensors [..., D / 2].
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angle = positions.to(torch.float64).unsqueeze(-1) * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the elements 2i and 2i + 1 of each head by the i-th RoPE angle, the pairing of Mistral's checkpoints.

    Args:
        x: [..., H, D], queries or keys.
        cos: [..., D / 2], from :func:`rope_table`, without a dimension for the heads.
        sin: [..., D / 2], likewise.

    Returns:
        [..., H, D] in the dtype of `x`.
    """
    even, odd = upcast(x).view(*x.shape[:-1], -1, 2).unbind(-1)  # [..., H, D / 2]
    cos, sin = cos.unsqueeze(-2).to(even.dtype), sin.unsqueeze(-2).to(even.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int = 0) -> Tensor:
    """Compute softmax attention of T queries over S keys and values, with scale ``D^-0.5``.

    Query head h uses the keys and values of head ``h // (H / Hkv)``.

    Args:
        q: [B, T, H, D], queries of the last T of the S positions.
        k: [B, S, Hkv, D], keys.
        v: [B, S, Hkv, D], values.
        causal: whether a query attends only to its own position and earlier ones.
        window: number of positions that a causal query attends to: its own and the ``window - 1`` before it. 0 means
            its own and all earlier ones.

    Returns:
        [B, T, H, D].
    """
    T, S = q.shape[1], k.shape[1]
    mask = None
    if causal and (T > 1 or window):
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if window:
            mask = mask.triu(S - T - window + 1)
    if mask is not None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H or Hkv, T or S, D]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    # Every query attends to all keys. The heads of a group then count as queries of one head, which is faster.
    B, _, H, D = q.shape
    q = q.view(B, T, k.shape[2], H // k.shape[2], D).transpose(1, 2)  # [B, Hkv, T, H / Hkv, D]
    o = F.scaled_dot_product_attention(q.flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2))
    return o.view_as(q).transpose(1, 2).flatten(2, 3)


def append(kv_cache: Tensor, k: Tensor, v: Tensor, block_table: Tensor, lengths: Tensor) -> None:
    """Round the keys and values of T new tokens to the cache's dtype, and write them into their requests' pages.

    Args:
        kv_cache: [pages, 2, Hkv, PAGE, D], one layer's cache, written in place.
        k: [B, T, Hkv, D], keys of the new tokens.
        v: [B, T, Hkv, D], values of the new tokens.
        block_table: int [B, max_pages], the indices of each request's pages, in order.
        lengths: int [B], number of tokens of each request, including the T new ones; a row with length 0 is skipped.
    """
    T, page = k.shape[1], kv_cache.shape[3]
    live = (lengths > 0).nonzero().squeeze(1)
    positions = lengths[live].unsqueeze(1).long() - T + torch.arange(T, device=k.device)  # [live, T]
    pages = block_table[live.unsqueeze(1), positions // page].long()
    kv = torch.stack((k, v), dim=2).to(kv_cache.dtype)  # [B, T, 2, Hkv, D]
    kv_cache[pages, :, :, positions % page] = kv[live]


def paged_attention(q: Tensor, kv_cache: Tensor, block_table: Tensor, lengths: Tensor, window: int = 0) -> Tensor:
    """Compute causal attention of each request's last T tokens over the keys and values in the request's pages.

    Requests are processed one at a time because their lengths differ. A request's result therefore has the same bits
    in every batch. The computation is in the cache's dtype.

    Args:
        q: [B, T, H, D], queries.
        kv_cache: [pages, 2, Hkv, PAGE, D], one layer's cache, which already holds the T tokens.
        block_table: int [B, max_pages], the indices of each request's pages, in order.
        lengths: int [B], number of tokens of each request, including the T last ones; a row with length 0 gets zeros.
        window: see :func:`attention`.

    Returns:
        [B, T, H, D] in the dtype of `q`.
    """
    page, out, q = kv_cache.shape[3], torch.zeros_like(q), q.to(kv_cache.dtype)
    for i_b, length in enumerate(lengths.tolist()):
        if length:
            pages = block_table[i_b, : -(-length // page)]
            kv = kv_cache.permute(1, 2, 0, 3, 4).index_select(2, pages).flatten(2, 3)  # [2, Hkv, pages * PAGE, D]
            k, v = kv[:, :, :length].transpose(1, 2).unsqueeze(1)  # [1, S, Hkv, D] each
            out[i_b] = attention(q[i_b : i_b + 1], k, v, causal=True, window=window)[0]
    return out


class Attention(nn.Module):
    """The four projections of grouped-query attention, without biases.

    The caller of :meth:`forward` passes a function that computes the attention, for example causal or paged attention.
    """

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, attend: Attend, n_queries: int | None = None) -> Tensor:
        """Project the tokens, attend from the first `n_queries` tokens to all T tokens, and project the result.

        Args:
            x: [B, T, dim].
            attend: function of q [B, n_queries, H, D], k [B, T, Hkv, D] and v [B, T, Hkv, D] that returns
                [B, n_queries, H, D].
            n_queries: number of leading tokens that get an output; None means all T.

        Returns:
            [B, n_queries, dim].
        """
        heads = (-1, self.head_dim)
        q = self.wq(x[:, :n_queries]).unflatten(-1, heads)  # [B, n_queries, H, D]
        k, v = self.wk(x).unflatten(-1, heads), self.wv(x).unflatten(-1, heads)  # [B, T, Hkv, D]
        return self.wo(attend(q, k, v).flatten(-2))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """A pre-norm layer of the backbone or of the transformer flow head: attention, then SwiGLU, both residual."""

    def __init__(
        self, dim: int, hidden_dim: int, n_heads: int, n_kv_heads: int, head_dim: int, norm_eps: float
    ) -> None:
        super().__init__()
        self.attention = Attention(dim, n_heads, n_kv_heads, head_dim)
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.ffn_norm = RMSNorm(dim, norm_eps)

    def forward(self, u: Tensor, attend: Attend, n_queries: int | None = None) -> Tensor:
        """Run the layer on `u` [B, T, dim] and return the output of the first `n_queries` tokens [B, n_queries, dim].

        The remaining tokens contribute only keys and values. `attend` and `n_queries` are those of
        :meth:`Attention.forward`.
        """
        u = u[:, :n_queries] + self.attention(self.attention_norm(u), attend, n_queries)
        return u + self.feed_forward(self.ffn_norm(u))  # type: ignore[no-any-return]
