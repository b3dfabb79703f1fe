"""The codec's transformer layers, which have ALiBi attention over a window of keys, and layer scale."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend
from .config import CodecConfig
from .layers import FeedForward, RMSNorm

QUERY_BLOCK = 256  # queries per attention call; a limit keeps the score matrices of long audio small


def alibi_slopes(n_heads: int) -> Tensor:
    """Return the ALiBi slopes ``r^h`` with ``r = 2^(-8 / n_heads)`` and h from 0, fp64 [n_heads].

    For 8 heads, the slopes are 1, 1/2, .. 1/128, as in vLLM-Omni's implementation of the model.
    """
    return 2.0 ** (-8.0 / n_heads * torch.arange(n_heads, dtype=torch.float64, device="cpu"))


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Compute ALiBi attention, in which query i attends to the keys j with ``i - window <= j <= i`` (arXiv 2108.12409).

    The score of head h has the bias ``slope_h (j - i)``, with the slopes of :func:`alibi_slopes`.

    Args:
        q: [B, T, H, D], queries of whole sequences.
        k: [B, T, H, D], keys.
        v: [B, T, H, D], values.
        window: number of earlier positions that a query attends to, besides its own.

    Returns:
        [B, T, H, D].
    """
    T, H = q.shape[1:3]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    slopes = alibi_slopes(H).to(q.device).view(H, 1, 1)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        first, stop = max(0, start - window), min(T, start + QUERY_BLOCK)
        distance = torch.arange(first, stop, device=q.device) - torch.arange(start, stop, device=q.device).unsqueeze(1)
        seen = (distance <= 0) & (distance >= -window)
        bias = (slopes * distance).masked_fill(~seen, -torch.inf).to(q.dtype)  # [H, queries, keys]
        keys = slice(first, stop)
        blocks.append(F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], bias))
    return torch.cat(blocks, dim=2).transpose(1, 2)


class CodecAttention(nn.Module):
    """Multi-head attention over a window; queries and keys are normalised by RMSNorm over all heads together.

    Args:
        config: the codec's sizes.
        window: number of earlier positions that a query attends to, besides its own.
    """

    def __init__(self, config: CodecConfig, window: int) -> None:
        super().__init__()
        width = config.n_heads * config.head_dim
        self.head_dim, self.window = config.head_dim, window
        self.wq = nn.Linear(config.dim, width, bias=False)
        self.wk = nn.Linear(config.dim, width, bias=False)
        self.wv = nn.Linear(config.dim, width, bias=False)
        self.wo = nn.Linear(width, config.dim, bias=False)
        self.q_norm = RMSNorm(width, config.qk_norm_eps)
        self.k_norm = RMSNorm(width, config.qk_norm_eps)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """Project the rows of `x`, attend between them, and project the result, [B, T, dim] -> [B, T, dim].

        Args:
            x: [B, T, dim]; whole sequences if `attend` is None.
            attend: function of q, k and v, [B, T, H, D] each, that returns [B, T, H, D]. None means
                :func:`window_attention`.
        """
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # [B, T, H, D]
        o = window_attention(q, k, v, self.window) if attend is None else attend(q, k, v)
        return self.wo(o.flatten(-2))  # type: ignore[no-any-return]


class CodecBlock(nn.Module):
    """A pre-norm transformer layer with layer scale: a learnt vector scales the output of each residual branch.

    Each scale is initialised to the config's ``layer_scale_init``.
    """

    def __init__(self, config: CodecConfig, window: int) -> None:
        super().__init__()
        self.attention = CodecAttention(config, window)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale_init))
        self.ffn_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale_init))

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """Run the layer on `x` [B, T, dim] and return [B, T, dim]; for `attend` see :meth:`CodecAttention.forward`."""
        x = x + self.attention_scale * self.attention(self.attention_norm(x), attend)
        return x + self.ffn_scale * self.feed_forward(self.ffn_norm(x))  # type: ignore[no-any-return]


class CodecTransformer(nn.Module):
    """A stack of codec blocks that share one row rate and one attention window."""

    def __init__(self, config: CodecConfig, n_layers: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.layers = nn.ModuleList(CodecBlock(config, window) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks on whole sequences, [B, dim, T] -> [B, dim, T]."""
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(1, 2)
