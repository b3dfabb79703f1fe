"""RMSNorm and the gated feed-forward, which are parts of every transformer layer of the model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upcast(x: Tensor) -> Tensor:
    """Return `x` in the upcast dtype, in which sums are computed: fp64 if `x` is fp64, otherwise fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    The computation is in the upcast dtype (see :func:`upcast`), and the result is rounded once to the dtype of `x`.

    Args:
        x: [..., D].
        weight: [D].
        eps: constant that is added to the mean square.
    """
    b_x = upcast(x)
    return (b_x * torch.rsqrt(b_x.square().mean(-1, keepdim=True) + eps) * upcast(weight)).to(x.dtype)


class RMSNorm(nn.Module):
    """Normalises the last dimension, which has size `dim`, by :func:`rms_norm` with a learnt weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, [..., dim] -> [..., dim]."""
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """The gated feed-forward SwiGLU without biases, ``w2(silu(w1 x) * w3 x)`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward, [..., dim] -> [..., dim]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]
