"""The neural codec, which decodes frames of codes to 24 kHz sound and encodes sound to codes.

The decoder alternates causal convolutions and windowed ALiBi transformers. In the public model, the decoder's row rate
rises from 12.5 Hz to 25, 50 and 100 Hz, and the last convolution turns each row into 240 samples. The encoder has
similar stages in reverse order. The encoder's modules are created only on request, because the public checkpoint has no
weights for them.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .codec_decoder import CodecDecoder
from .codec_layers import CodecTransformer
from .codec_stream import CodecStream, FoldedWeights
from .config import CodecConfig
from .convolution import CausalConv1d, CausalConvTranspose1d
from .quantizer import Quantizer


class AudioTokenizer(CodecDecoder):
    """The codec: decoder, quantiser and optional encoder, named as in the checkpoint's ``audio_tokenizer``.

    Args:
        config: the codec's sizes.
        encoder: whether to create the encoder's modules, too. A checkpoint can then be loaded only if it has the
            encoder's weights.
    """

    def __init__(self, config: CodecConfig, encoder: bool = False) -> None:
        super().__init__()
        self.config, self.has_encoder = config, encoder
        self._folded: FoldedWeights | None = None  # used by all streams until a weight changes
        patch, window = config.pretransform_patch_size, config.attn_sliding_window_size
        if encoder:
            self.input_proj = CausalConv1d(patch, config.dim, config.patch_proj_kernel_size)
            self.encoder_blocks = nn.ModuleList()
        for i_stage, (n_layers, kernel, stride) in enumerate(config.encoder_stages):
            if encoder:
                last = i_stage == len(config.encoder_stages) - 1
                n_out = config.latent_dim if last else config.dim
                self.encoder_blocks.append(CodecTransformer(config, n_layers, window))
                if last or kernel != 1 or stride != 1:
                    self.encoder_blocks.append(CausalConv1d(config.dim, n_out, kernel, stride, "replicate"))
            if config.half_attn_window_upon_downsampling and stride == 2:
                window //= 2
        self.quantizer = Quantizer(config)
        self.decoder_blocks = nn.ModuleList()
        for i_stage, (n_layers, kernel, stride) in enumerate(config.decoder_stages):
            if i_stage == 0:
                self.decoder_blocks.append(CausalConv1d(config.latent_dim, config.dim, kernel, stride, "replicate"))
            elif kernel != 1 or stride != 1:
                self.decoder_blocks.append(CausalConvTranspose1d(config.dim, config.dim, kernel, stride))
            if config.half_attn_window_upon_downsampling and stride == 2:
                window *= 2
            self.decoder_blocks.append(CodecTransformer(config, n_layers, window))
        self.output_proj = CausalConv1d(config.dim, patch, config.patch_proj_kernel_size)

    def forward(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Encode sound and decode it again, to train the codec; gradients pass straight through the quantiser.

        Args:
            samples: [B, 1, n], see :meth:`latents`.

        Returns:
            The decoded sound, fp32 (fp64 in an fp64 model) [B, 1, n], and the codes between encoder and decoder,
            int64 [B, 1 + K, T] WITHOUT the +2 offset.
        """
        quantized, codes = self.quantizer.quantize(self.latents(samples))
        return self.synthesize(quantized)[..., : samples.shape[-1]], codes

    def encode(self, samples: Tensor) -> Tensor:
        """Encode sound to codes.

        Args:
            samples: [B, 1, n], see :meth:`latents`.

        Returns:
            The codes, int64 [B, 1 + K, T] WITHOUT the +2 offset.
        """
        return self.quantizer.encode(self.latents(samples))

    def stream(self, batch: int = 1) -> CodecStream:
        """Create a stream that decodes the codes of `batch` requests chunk by chunk."""
        return CodecStream(self, batch, self.folded_weights())

    def folded_weights(self) -> FoldedWeights:
        """Return the decoder's convolution weights with weight norm folded in, recomputed if a weight has changed."""
        self._folded = FoldedWeights.of(self, self._folded)
        return self._folded

    def latents(self, samples: Tensor) -> Tensor:
        """Run the encoder on sound and return the latents before quantisation.

        Args:
            samples: floats [B, 1, n] with n > 0, at the config's sampling rate. The end is padded with zeros to a
                multiple of ``pretransform_patch_size`` samples.

        Returns:
            [B, semantic_dim + K, T], where T is n / samples_per_frame, rounded up.

        Raises:
            ValueError: `samples` has another shape, or the codec was created without an encoder.
        """
        if not self.has_encoder:
            raise ValueError(
                "the checkpoint has no codec encoder (tensors audio_tokenizer.input_proj.*, audio_tokenizer."
                "encoder_blocks.*), which is needed to turn sound into codes; the public Voxtral-4B-TTS-2603 has none"
            )
        if samples.ndim != 3 or samples.shape[1] != 1 or not samples.shape[2]:
            raise ValueError(f"samples must be [B, 1, n] with n > 0, got {list(samples.shape)}")
        patch = self.config.pretransform_patch_size
        x = F.pad(samples, (0, -samples.shape[-1] % patch)).reshape(len(samples), -1, patch)  # [B, rows, patch]
        x = self.input_proj.convolve_upcast(self.input_proj.pad(x.transpose(1, 2)))
        x = x.to(self.input_proj.conv.weight.dtype)
        for block in self.encoder_blocks:
            x = block(x)
        return x
