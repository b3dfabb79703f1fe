"""The flow head's other velocity network: a residual MLP, told the time and the hidden state by adaptive layer norm.

The network of MAR's diffusion loss (Li et al., arXiv 2406.11838), under the names of its tensors; the modulation is
DiT's (Peebles and Xie, arXiv 2212.09748). The condition is ``c = time_embed(t) + cond_embed(h)``, and a block is
``x + gate * mlp(norm(x) * (1 + scale) + shift)`` with shift, scale and gate projected from ``silu(c)``.

MAR's blocks give the norm weights of its own, ``in_ln``; here it has none, as in DiT, and nothing is lost by that: for
``norm(x) * w + b`` take ``w * (1 + scale)`` for 1 + scale and ``b * (1 + scale) + shift`` for shift, which are again
projections of ``silu(c)``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import AudioModelConfig, VelocityMLPConfig
from .flow_head import FlowHead, time_embedding
from .layers import upcast


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * (1 + scale) + shift``, computed wide and rounded once.

    Args:
        x: [..., D]; mean and variance (of the population) are over the last dimension.
        shift: of the same shape.
        scale: of the same shape.
        eps: added to the variance.
    """
    norm = F.layer_norm(upcast(x), x.shape[-1:], eps=eps)
    return (norm * (1 + upcast(scale)) + upcast(shift)).to(x.dtype)


class TimeEmbedding(nn.Module):
    """Sinusoids of the flow time through a small MLP."""

    def __init__(self, dim: int, time_dim: int) -> None:
        """`mlp`: time_dim -> dim -> dim."""
        super().__init__()
        self.time_dim = time_dim
        self.mlp = nn.Sequential(nn.Linear(time_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """[...] in 0..1 -> [..., dim]."""
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(time_embedding(t, self.time_dim).to(dtype))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """``x + gate * mlp(modulated_norm(x))``."""

    def __init__(self, dim: int, hidden_dim: int, norm_eps: float) -> None:
        """`mlp`: dim -> hidden_dim -> dim; `adaLN_modulation`: the condition to shift, scale and gate."""
        super().__init__()
        self.norm_eps = norm_eps
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B, dim] and the condition [B, dim] -> [B, dim]."""
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        return x + gate * self.mlp(modulated_norm(x, shift, scale, self.norm_eps))  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    """The velocity of what the blocks leave: ``linear(modulated_norm(x))``."""

    def __init__(self, dim: int, n_out: int, norm_eps: float) -> None:
        """`linear`: dim -> n_out; `adaLN_modulation`: the condition to shift and scale."""
        super().__init__()
        self.norm_eps = norm_eps
        self.linear = nn.Linear(dim, n_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """[B, dim] and the condition [B, dim] -> [B, n_out]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale, self.norm_eps))  # type: ignore[no-any-return]


class FlowMatchingAudioMLP(FlowHead):
    """A head whose velocity network is the MLP; what surrounds the network is :class:`FlowHead`'s."""

    config: VelocityMLPConfig

    def __init__(self, config: VelocityMLPConfig, audio: AudioModelConfig) -> None:
        """Names as in MAR's ``diffloss.net``, and the semantic head's as in the other head."""
        super().__init__()
        self.config, self.audio = config, audio
        self.time_embed = TimeEmbedding(config.dim, config.time_dim)
        self.cond_embed = nn.Linear(config.input_dim, config.dim)
        self.input_proj = nn.Linear(audio.n_acoustic_codebook, config.dim)
        self.res_blocks = nn.ModuleList(
            ResidualBlock(config.dim, config.hidden_dim, config.norm_eps) for _ in range(config.n_layers)
        )
        self.final_layer = FinalLayer(config.dim, audio.n_acoustic_codebook, config.norm_eps)
        self.semantic_codebook_output = nn.Linear(config.input_dim, audio.semantic_rows, bias=False)

    def project_time(self, t: Tensor) -> Tensor:
        """The time's part of the condition."""
        return self.time_embed(t)  # type: ignore[no-any-return]

    def project_hidden(self, h: Tensor) -> Tensor:
        """The hidden state's part of the condition; zeros give the bias."""
        return self.cond_embed(h)  # type: ignore[no-any-return]

    def _velocity(self, x: Tensor, time: Tensor, hidden: Tensor) -> Tensor:
        c = time + hidden
        x = self.input_proj(x.to(hidden.dtype))
        for block in self.res_blocks:
            x = block(x, c)
        return upcast(self.final_layer(x, c))
