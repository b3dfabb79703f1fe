"""RMSNorm and the gated feed-forward: what every layer of the model is made of, besides attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upcast(x: Tensor) -> Tensor:
    """`x` in the dtype that sums are made in: fp32, or fp64 for an fp64 model."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, computed wide and rounded once.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.
    """
    b_x = upcast(x)
    return (b_x * torch.rsqrt(b_x.square().mean(-1, keepdim=True) + eps) * upcast(weight)).to(x.dtype)


class RMSNorm(nn.Module):
    """:func:`rms_norm` with its weight."""

    def __init__(self, dim: int, eps: float) -> None:
        """Normalise the last dimension, of size `dim`."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        """`w1`, `w3`: dim -> hidden_dim; `w2`: back."""
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]
