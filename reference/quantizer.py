"""The codec's quantiser: a learnt semantic codebook, and evenly spaced levels for each acoustic channel."""

import torch
from torch import Tensor, nn

from .config import CodecConfig
from .layers import upcast


class SemanticCodebook(nn.Module):
    """Vectors of the semantic codes, stored as the running sums and counts they were learnt with."""

    def __init__(self, size: int, dim: int) -> None:
        """Buffers, not parameters: the codebook is learnt by moving averages."""
        super().__init__()
        self.embedding_sum: Tensor
        self.cluster_usage: Tensor
        self.register_buffer("embedding_sum", torch.zeros(size, dim))
        self.register_buffer("cluster_usage", torch.ones(size))

    def forward(self, codes: Tensor) -> Tensor:
        """int [...] -> [..., dim]."""
        usage = upcast(self.cluster_usage[codes]).clamp(min=1e-5).unsqueeze(-1)
        return (upcast(self.embedding_sum[codes]) / usage).to(self.embedding_sum.dtype)

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """[..., dim] -> int64 [...]: the code whose vector is nearest; the lower one of two that are as near."""
        vectors = upcast(self(torch.arange(len(self.cluster_usage), device=x.device)))  # [size, dim]
        # |x - e|^2 without its part that is the same for all codes
        return (vectors.square().sum(1) - 2 * upcast(x) @ vectors.T).argmin(-1)


class Quantizer(nn.Module):
    """Latents to codes and back: one semantic vector, and one scalar of ``levels`` steps for each acoustic codebook."""

    def __init__(self, config: CodecConfig) -> None:
        """The acoustic part (finite scalar quantisation, arXiv 2309.15505) has no weights."""
        super().__init__()
        self.levels = config.acoustic_codebook_size
        self.semantic_codebook = SemanticCodebook(config.semantic_codebook_size, config.semantic_dim)

    def forward(self, codes: Tensor) -> Tensor:
        """int [B, 1 + K, T] without the offset -> [B, semantic_dim + K, T]."""
        semantic = self.semantic_codebook(codes[:, 0]).transpose(1, 2)
        acoustic = codes[:, 1:].to(upcast(semantic).dtype) * (2 / (self.levels - 1)) - 1
        return torch.cat((semantic, acoustic.to(semantic.dtype)), dim=1)

    def encode(self, latents: Tensor) -> Tensor:
        """The nearest codes: of the semantic vector, and of tanh of the acoustic channels, halves to even.

        Args:
            latents: [B, semantic_dim + K, T], as the encoder makes them.

        Returns:
            int64 [B, 1 + K, T] without the offset.
        """
        semantic, acoustic = self._split(latents)
        levels = (upcast(acoustic).tanh() + 1) / 2 * (self.levels - 1)
        codes = self.semantic_codebook.nearest(semantic.transpose(1, 2))
        return torch.cat((codes.unsqueeze(1), levels.round().long()), dim=1)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents as their codes say them, with gradients as if they had not been rounded (arXiv 1308.3432).

        Args:
            latents: [B, semantic_dim + K, T].

        Returns:
            Quantised latents, of the same shape, whose gradient goes straight through to the semantic vector and to
            tanh of the acoustic channels; and the codes, as :meth:`encode` gives them.
        """
        codes = self.encode(latents)
        semantic, acoustic = self._split(latents)
        smooth = torch.cat((semantic, upcast(acoustic).tanh().to(acoustic.dtype)), dim=1)
        return self(codes) + (smooth - smooth.detach()), codes

    def _split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        dim = self.semantic_codebook.embedding_sum.shape[1]
        return latents[:, :dim], latents[:, dim:]
