"""The codec's decoder: codes to sound, whole sequences at a time."""

from torch import Tensor, nn

from .config import CodecConfig
from .convolution import CausalConv1d, CausalConvTranspose1d
from .quantizer import Quantizer


class CodecDecoder(nn.Module):
    """The codec's decoding half; :class:`voxkern.reference.codec.AudioTokenizer` makes its modules.

    Attributes:
        config: of the codec.
        quantizer: turns codes into latents.
        decoder_blocks: convolutions and transformers, in order.
        output_proj: the last convolution, whose columns are samples.
    """

    config: CodecConfig
    quantizer: Quantizer
    decoder_blocks: nn.ModuleList
    output_proj: CausalConv1d

    def decode(self, codes: Tensor) -> Tensor:
        """Sound of whole sequences of codes.

        Args:
            codes: int64 [B, 1 + K, T] WITHOUT the +2 offset.

        Returns:
            wide [B, 1, samples_per_frame T].
        """
        self.check_codes(codes)
        return self.synthesize(self.quantizer(codes))

    def synthesize(self, latents: Tensor) -> Tensor:
        """Sound of quantised latents, [B, semantic_dim + K, T] -> wide [B, 1, samples_per_frame T]."""
        x = latents
        for block in self.decoder_blocks:
            x = block(x)
        patches = self.output_proj.convolve_upcast(self.output_proj.pad(x))  # [B, patch, rows]
        return patches.transpose(1, 2).flatten(1).unsqueeze(1)

    def check_codes(self, codes: Tensor) -> None:
        """Raise unless `codes` are [B, 1 + K, T].

        Raises:
            ValueError: they are not.
        """
        n_codebooks = 1 + self.config.acoustic_dim
        if codes.ndim != 3 or codes.shape[1] != n_codebooks:
            raise ValueError(f"codes must be [B, {n_codebooks}, T], got {list(codes.shape)}")


def convolutions(codec: CodecDecoder) -> list[CausalConv1d | CausalConvTranspose1d]:
    """The decoder's, in order."""
    blocks = (*codec.decoder_blocks, codec.output_proj)
    return [block for block in blocks if isinstance(block, CausalConv1d | CausalConvTranspose1d)]
