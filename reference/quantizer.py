"""The codec's quantiser, with a learnt semantic codebook and evenly spaced levels for each acoustic channel."""

import torch
from torch import Tensor, nn

from .config import CodecConfig
from .layers import upcast


class SemanticCodebook(nn.Module):
    """The vectors of the semantic codes, stored as the running sums and counts of their training.

    Sums and counts are buffers, not parameters, because the codebook is learnt by moving averages.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding_sum: Tensor
        self.cluster_usage: Tensor
        self.register_buffer("embedding_sum", torch.zeros(size, dim))
        self.register_buffer("cluster_usage", torch.ones(size))

    def forward(self, codes: Tensor) -> Tensor:
        """Return the vectors of codes, int [...] -> [..., dim]."""
        usage = upcast(self.cluster_usage[codes]).clamp(min=1e-5).unsqueeze(-1)
        return (upcast(self.embedding_sum[codes]) / usage).to(self.embedding_sum.dtype)

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """Return the code of the nearest vector, [..., dim] -> int64 [...]; of equally near ones, the lowest."""
        vectors = upcast(self(torch.arange(len(self.cluster_usage), device=x.device)))  # [size, dim]
        # |x - e|^2 without |x|^2, which is the same for all codes
        return (vectors.square().sum(1) - 2 * upcast(x) @ vectors.T).argmin(-1)


class Quantizer(nn.Module):
    """Converts latents to codes and back: a semantic vector, and a scalar of ``levels`` values per acoustic codebook.

    The acoustic part is finite scalar quantisation (arXiv 2309.15505) and has no weights.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.levels = config.acoustic_codebook_size
        self.semantic_codebook = SemanticCodebook(config.semantic_codebook_size, config.semantic_dim)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the latents of codes, int [B, 1 + K, T] WITHOUT the +2 offset -> [B, semantic_dim + K, T]."""
        semantic = self.semantic_codebook(codes[:, 0]).transpose(1, 2)
        acoustic = codes[:, 1:].to(upcast(semantic).dtype) * (2 / (self.levels - 1)) - 1
        return torch.cat((semantic, acoustic.to(semantic.dtype)), dim=1)

    def encode(self, latents: Tensor) -> Tensor:
        """Return the codes nearest to the semantic vector and to tanh of the acoustic channels; halves round to even.

        Args:
            latents: [B, semantic_dim + K, T], the encoder's output.

        Returns:
            int64 [B, 1 + K, T] WITHOUT the +2 offset.
        """
        semantic, acoustic = self._split(latents)
        levels = (upcast(acoustic).tanh() + 1) / 2 * (self.levels - 1)
        codes = self.semantic_codebook.nearest(semantic.transpose(1, 2))
        return torch.cat((codes.unsqueeze(1), levels.round().long()), dim=1)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise latents, with the gradient of latents that were not rounded (straight-through, arXiv 1308.3432).

        Args:
            latents: [B, semantic_dim + K, T].

        Returns:
            Quantised latents of the same shape, and the codes that :meth:`encode` returns. The latents' gradient passes
            unchanged to the semantic vector and to tanh of the acoustic channels.
        """
        codes = self.encode(latents)
        semantic, acoustic = self._split(latents)
        smooth = torch.cat((semantic, upcast(acoustic).tanh().to(acoustic.dtype)), dim=1)
        return self(codes) + (smooth - smooth.detach()), codes

    def _split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        dim = self.semantic_codebook.embedding_sum.shape[1]
        return latents[:, :dim], latents[:, dim:]
