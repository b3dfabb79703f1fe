"""The codec's decoder, which turns whole sequences of codes into sound."""

from torch import Tensor, nn

from .config import CodecConfig
from .convolution import CausalConv1d, CausalConvTranspose1d
from .quantizer import Quantizer


class CodecDecoder(nn.Module):
    """Decodes codes to sound; the modules are created by the subclass :class:`voxkern.reference.codec.AudioTokenizer`.

    Attributes:
        config: the codec's sizes.
        quantizer: the module that turns codes into latents.
        decoder_blocks: convolutions and transformers, in the order in which they run.
        output_proj: the last convolution, which turns each row into ``pretransform_patch_size`` samples.
    """

    config: CodecConfig
    quantizer: Quantizer
    decoder_blocks: nn.ModuleList
    output_proj: CausalConv1d

    def decode(self, codes: Tensor) -> Tensor:
        """Decode whole sequences of codes to sound.

        Args:
            codes: int64 [B, 1 + K, T] WITHOUT the +2 offset.

        Returns:
            The sound, fp32 (fp64 in an fp64 model) [B, 1, samples_per_frame * T].

        Raises:
            ValueError: `codes` has another shape.
        """
        self.check_codes(codes)
        return self.synthesize(self.quantizer(codes))

    def synthesize(self, latents: Tensor) -> Tensor:
        """Decode quantised latents to sound.

        Args:
            latents: [B, semantic_dim + K, T], from :class:`voxkern.reference.quantizer.Quantizer`.

        Returns:
            The sound, fp32 (fp64 in an fp64 model) [B, 1, samples_per_frame * T].
        """
        x = latents
        for block in self.decoder_blocks:
            x = block(x)
        patches = self.output_proj.convolve_upcast(self.output_proj.pad(x))  # [B, patch, rows]
        return patches.transpose(1, 2).flatten(1).unsqueeze(1)

    def check_codes(self, codes: Tensor) -> None:
        """Check that the shape of `codes` is [B, 1 + K, T].

        Raises:
            ValueError: `codes` has another shape.
        """
        n_codebooks = 1 + self.config.acoustic_dim
        if codes.ndim != 3 or codes.shape[1] != n_codebooks:
            raise ValueError(f"codes must be [B, {n_codebooks}, T], got {list(codes.shape)}")

    def check_chunk(self, codes: Tensor, new_frames: Tensor | None, batch: int) -> None:
        """Check the shapes of a stream's next codes, [batch, 1 + K, T], and of `new_frames`, [batch] or None.

        Raises:
            ValueError: `codes` or `new_frames` has another shape.
        """
        self.check_codes(codes)
        if len(codes) != batch:
            raise ValueError(f"codes must have {batch} requests, as the stream has, got {len(codes)}")
        if new_frames is not None and list(new_frames.shape) != [batch]:
            raise ValueError(f"new_frames must be [{batch}], one number for each request, got {list(new_frames.shape)}")


def convolutions(codec: CodecDecoder) -> list[CausalConv1d | CausalConvTranspose1d]:
    """Return the decoder's convolutions in the order in which they run."""
    blocks = (*codec.decoder_blocks, codec.output_proj)
    return [block for block in blocks if isinstance(block, CausalConv1d | CausalConvTranspose1d)]
