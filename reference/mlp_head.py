"""The flow head with a residual MLP as its velocity network, conditioned on time and hidden state.

The MLP is the network of MAR's diffusion loss (Li et al., arXiv 2406.11838), with MAR's tensor names. The adaptive
layer norm is that of DiT (Peebles and Xie, arXiv 2212.09748). The condition is ``c = time_embed(t) + cond_embed(h)``. A
block computes ``x + gate * mlp(norm(x) * (1 + scale) + shift)``. Shift, scale and gate are projected from ``silu(c)``.

In MAR, the norm of a block has its own weights, ``in_ln``, and computes ``norm(x) * w + b``. As in DiT, the norms here
have no weights. Weights can be folded into the projection: ``w * (1 + scale)`` takes the place of ``1 + scale``, and
``b * (1 + scale) + shift`` takes the place of ``shift``. Both are again projections of ``silu(c)``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .config import AudioModelConfig, VelocityMLPConfig
from .flow_head import FlowHead, time_embedding
from .layers import upcast


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Compute ``(x - mean) / sqrt(variance + eps) * (1 + scale) + shift`` over the last dimension.

    The computation is in the upcast dtype (see :func:`voxkern.reference.layers.upcast`), and the result is rounded once
    to the dtype of `x`.

    Args:
        x: [..., D]; its variance is the population variance.
        shift: [..., D], added last.
        scale: [..., D]; zeros leave the normalised values unscaled.
        eps: constant that is added to the variance.
    """
    norm = F.layer_norm(upcast(x), x.shape[-1:], eps=eps)
    return (norm * (1 + upcast(scale)) + upcast(shift)).to(x.dtype)


class TimeEmbedding(nn.Module):
    """Embeds the flow time: `time_dim` sinusoids are the input of a small MLP, time_dim -> dim -> dim."""

    def __init__(self, dim: int, time_dim: int) -> None:
        super().__init__()
        self.time_dim = time_dim
        self.mlp = nn.Sequential(nn.Linear(time_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """Embed flow times in 0..1, [...] -> [..., dim]."""
        dtype = next(self.mlp.parameters()).dtype
        return self.mlp(time_embedding(t, self.time_dim).to(dtype))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """A block of the MLP, which computes ``x + gate * mlp(modulated_norm(x))``.

    `mlp` maps dim -> hidden_dim -> dim. `adaLN_modulation` projects the condition to shift, scale and gate.
    """

    def __init__(self, dim: int, hidden_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Run the block on `x` [B, dim] with the condition `c` [B, dim] and return [B, dim]."""
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        return x + gate * self.mlp(modulated_norm(x, shift, scale, self.norm_eps))  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    """The output layer, which computes the velocity ``linear(modulated_norm(x))`` from the last block's output x.

    `linear` maps dim -> n_out. `adaLN_modulation` projects the condition to shift and scale.
    """

    def __init__(self, dim: int, n_out: int, norm_eps: float) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.linear = nn.Linear(dim, n_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Run the layer on `x` [B, dim] with the condition `c` [B, dim] and return [B, n_out]."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale, self.norm_eps))  # type: ignore[no-any-return]


class FlowMatchingAudioMLP(FlowHead):
    """The flow head with the residual MLP as its velocity network.

    The modules are named as in MAR's ``diffloss.net``. Only ``semantic_codebook_output`` is named as in
    :class:`voxkern.reference.transformer_head.FlowMatchingAudioTransformer`.
    """

    config: VelocityMLPConfig

    def __init__(self, config: VelocityMLPConfig, audio: AudioModelConfig) -> None:
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
        """Project flow times in 0..1 to the condition's first summand, [...] -> [..., dim]."""
        return self.time_embed(t)  # type: ignore[no-any-return]

    def project_hidden(self, h: Tensor) -> Tensor:
        """Project hidden states to the condition's second summand, [B, input_dim] -> [B, dim]; zeros give the bias."""
        return self.cond_embed(h)  # type: ignore[no-any-return]

    def _velocity(self, x: Tensor, time: Tensor, hidden: Tensor) -> Tensor:
        c = time + hidden
        x = self.input_proj(x.to(hidden.dtype))
        for block in self.res_blocks:
            x = block(x, c)
        return upcast(self.final_layer(x, c))
