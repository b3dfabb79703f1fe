"""The codec's quantiser: a learnt codebook for the semantic vector, evenly spaced levels for the acoustic channels."""

import torch
from torch import Tensor, nn

from .config import CodecConfig
from .layers import upcast


class SemanticCodebook(nn.Module):
    """The vectors of the semantic codes; a code's vector is a running sum divided by a running count.

    Sums and counts are buffers, not parameters, because training updates them by moving averages.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding_sum: Tensor
        self.cluster_usage: Tensor
        self.register_buffer("embedding_sum", torch.zeros(size, dim))
        self.register_buffer("cluster_usage", torch.ones(size))

    def forward(self, codes: Tensor) -> Tensor:
        """Look up the vectors of codes, int [...] -> [..., dim]."""
        usage = upcast(self.cluster_usage[codes]).clamp(min=1e-5).unsqueeze(-1)
        return (upcast(self.embedding_sum[codes]) / usage).to(self.embedding_sum.dtype)

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """Return the code of the nearest vector, [..., dim] -> int64 [...]; the lowest code if several are as near."""
        vectors = upcast(self(torch.arange(len(self.cluster_usage), device=x.device)))  # [size, dim]
        # the squared distance |x - e|^2 without its term |x|^2, which is the same for all codes
        return (vectors.square().sum(1) - 2 * upcast(x) @ vectors.T).argmin(-1)


class Quantizer(nn.Module):
    """Converts latents to codes and back.

    A latent is a semantic vector of `semantic_dim` elements and K acoustic channels. The semantic vector gets the code
    of the nearest vector in the codebook. Each acoustic channel gets the nearest of ``levels`` evenly spaced values,
    which is finite scalar quantisation (arXiv 2309.15505) and has no weights.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.levels = config.acoustic_codebook_size
        self.semantic_codebook = SemanticCodebook(config.semantic_codebook_size, config.semantic_dim)

    def forward(self, codes: Tensor) -> Tensor:
        """Convert codes to latents, int [B, 1 + K, T] WITHOUT the +2 offset -> [B, semantic_dim + K, T]."""
        semantic = self.semantic_codebook(codes[:, 0]).transpose(1, 2)
        acoustic = codes[:, 1:].to(upcast(semantic).dtype) * (2 / (self.levels - 1)) - 1
        return torch.cat((semantic, acoustic.to(semantic.dtype)), dim=1)

    def encode(self, latents: Tensor) -> Tensor:
        """Convert latents to the codes nearest to the semantic vector and to tanh of the acoustic channels.

        An acoustic value halfway between two levels gets the even one.

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
        """Quantise latents, with a straight-through gradient (arXiv 1308.3432), as if no value had been rounded.

        Args:
            latents: [B, semantic_dim + K, T].

        Returns:
            The quantised latents, of the same shape, and the codes that :meth:`encode` returns. The gradient of the
            quantised latents passes unchanged to the semantic vector and to tanh of the acoustic channels.
        """
        codes = self.encode(latents)
        semantic, acoustic = self._split(latents)
        smooth = torch.cat((semantic, upcast(acoustic).tanh().to(acoustic.dtype)), dim=1)
        return self(codes) + (smooth - smooth.detach()), codes

    def _split(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        dim = self.semantic_codebook.embedding_sum.shape[1]
        return latents[:, :dim], latents[:, dim:]
