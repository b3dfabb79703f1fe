"""The neural codec: frames of codes to 24 kHz sound, and back.

Causal convolutions and windowed ALiBi transformers, 12.5 Hz -> 25 -> 50 -> 100 Hz, then 240 samples a row. The encoder
mirrors the decoder; its modules exist only for checkpoints that carry its weights, which the public one does not.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend
from .config import CodecConfig
from .convolution import CausalConv1d, CausalConvTranspose1d
from .linear import FeedForward, RMSNorm
from .quantizer import Quantizer

if TYPE_CHECKING:
    from .codec_stream import CodecStream, Folded

QUERY_BLOCK = 256  # queries attended at once: bounds the score matrix for long audio


def alibi_slopes(n_heads: int) -> Tensor:
    """``r^h`` with ``r = 2^(-8 / n_heads)``, h from 0: 1, 1/2, .. 1/128 for 8 heads, as vLLM-Omni serves the model."""
    return 2.0 ** (-8.0 / n_heads * torch.arange(n_heads, dtype=torch.float64))


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention with ``i - window <= j <= i`` and the ALiBi bias ``slope_h (j - i)`` (arXiv 2108.12409).

    Args:
        q: [B, T, H, D].
        k: [B, T, H, D].
        v: [B, T, H, D].
        window: keys before the query's own.

    Returns:
        [B, T, H, D].
    """
    T, H = q.shape[1:3]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    slopes = alibi_slopes(H).to(q.device).view(H, 1, 1)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        first, stop = max(0, start - window), min(T, start + QUERY_BLOCK)
        distance = torch.arange(first, stop, device=q.device) - torch.arange(start, stop, device=q.device).unsqueeze(1)
        seen = (distance <= 0) & (distance >= -window)
        bias = (slopes * distance).masked_fill(~seen, -torch.inf).to(q.dtype)  # [H, queries, keys]
        keys = slice(first, stop)
        blocks.append(F.scaled_dot_product_attention(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], bias))
    return torch.cat(blocks, dim=2).transpose(1, 2)


class CodecAttention(nn.Module):
    """Multi-head attention with RMSNorm of q and k over their full width, before the heads are split."""

    def __init__(self, config: CodecConfig, window: int) -> None:
        """`window`: keys before the query's own."""
        super().__init__()
        width = config.n_heads * config.head_dim
        self.head_dim, self.window = config.head_dim, window
        self.wq = nn.Linear(config.dim, width, bias=False)
        self.wk = nn.Linear(config.dim, width, bias=False)
        self.wv = nn.Linear(config.dim, width, bias=False)
        self.wo = nn.Linear(width, config.dim, bias=False)
        self.q_norm = RMSNorm(width, config.qk_norm_eps)
        self.k_norm = RMSNorm(width, config.qk_norm_eps)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """[B, T, dim] -> [B, T, dim]; without `attend`, x is a whole sequence."""
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # [B, T, H, D]
        o = window_attention(q, k, v, self.window) if attend is None else attend(q, k, v)
        return self.wo(o.flatten(-2))  # type: ignore[no-any-return]


class CodecBlock(nn.Module):
    """Pre-norm block with layer scale: each branch is multiplied by a learnt vector before it is added."""

    def __init__(self, config: CodecConfig, window: int) -> None:
        """Scales start at the config's ``layer_scale_init``."""
        super().__init__()
        self.attention = CodecAttention(config, window)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale_init))
        self.ffn_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale_init))

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """[B, T, dim] -> [B, T, dim]; `attend` as in :class:`CodecAttention`."""
        x = x + self.attention_scale * self.attention(self.attention_norm(x), attend)
        return x + self.ffn_scale * self.feed_forward(self.ffn_norm(x))  # type: ignore[no-any-return]


class CodecTransformer(nn.Module):
    """A few codec blocks at one frame rate."""

    def __init__(self, config: CodecConfig, n_layers: int, window: int) -> None:
        """All blocks share the window."""
        super().__init__()
        self.window = window
        self.layers = nn.ModuleList(CodecBlock(config, window) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, T] -> [B, dim, T]."""
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(1, 2)


class AudioTokenizer(nn.Module):
    """The codec. `encoder` is asked for when the checkpoint has the encoder's weights."""

    def __init__(self, config: CodecConfig, encoder: bool = False) -> None:
        """Names as in the checkpoint's ``audio_tokenizer``."""
        super().__init__()
        self.config, self.has_encoder = config, encoder
        self._folded: Folded | None = None  # kept from one stream to the next
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
        """There and back, to train the codec: gradients go straight through the quantiser.

        Args:
            samples: [B, 1, n], see :meth:`latents`.

        Returns:
            The sound again, wide [B, 1, n], and its codes, int64 [B, 1 + K, T] without the offset.
        """
        quantized, codes = self.quantizer.quantize(self.latents(samples))
        return self.synthesize(quantized)[..., : samples.shape[-1]], codes

    def encode(self, samples: Tensor) -> Tensor:
        """Codes of sound.

        Args:
            samples: [B, 1, n], see :meth:`latents`.

        Returns:
            int64 [B, 1 + K, T] WITHOUT the +2 offset.
        """
        return self.quantizer.encode(self.latents(samples))

    def decode(self, codes: Tensor) -> Tensor:
        """Sound of whole sequences of codes.

        Args:
            codes: int64 [B, 1 + K, T] WITHOUT the +2 offset.

        Returns:
            wide [B, 1, samples_per_frame T].
        """
        self.check_codes(codes)
        return self.synthesize(self.quantizer(codes))

    def stream(self, batch: int = 1) -> "CodecStream":
        """Start `batch` requests whose codes are decoded as they come."""
        from .codec_stream import CodecStream  # which is made of this module's parts

        return CodecStream(self, batch, self.folded())

    def folded(self) -> "Folded":
        """The decoder's convolutions with their weight norm folded in, made anew where a weight has changed."""
        from .codec_stream import Folded

        self._folded = Folded.of(self, self._folded)
        return self._folded

    def latents(self, samples: Tensor) -> Tensor:
        """What the encoder makes of sound, before it is quantised.

        Args:
            samples: floats [B, 1, n] at the config's rate, n > 0; the end of the last patch is filled up with zeros.

        Returns:
            [B, semantic_dim + K, T], T = n / samples_per_frame, rounded up.

        Raises:
            ValueError: another shape, or the checkpoint has no encoder.
        """
        if not self.has_encoder:
            raise ValueError(
                "the checkpoint has no codec encoder (tensors audio_tokenizer.input_proj.*, audio_tokenizer."
                "encoder_blocks.*), which turning sound into codes needs; the public Voxtral-4B-TTS-2603 is without one"
            )
        if samples.ndim != 3 or samples.shape[1] != 1 or not samples.shape[2]:
            raise ValueError(f"samples must be [B, 1, n] with n > 0, got {list(samples.shape)}")
        patch = self.config.pretransform_patch_size
        x = F.pad(samples, (0, -samples.shape[-1] % patch)).reshape(len(samples), -1, patch)  # [B, rows, patch]
        x = self.input_proj.product_wide(self.input_proj.pad(x.transpose(1, 2)))
        x = x.to(self.input_proj.conv.weight.dtype)
        for block in self.encoder_blocks:
            x = block(x)
        return x

    def synthesize(self, latents: Tensor) -> Tensor:
        """Sound of quantised latents, [B, semantic_dim + K, T] -> wide [B, 1, samples_per_frame T]."""
        x = latents
        for block in self.decoder_blocks:
            x = block(x)
        patches = self.output_proj.product_wide(self.output_proj.pad(x))  # [B, patch, rows]
        return patches.transpose(1, 2).flatten(1).unsqueeze(1)

    def check_codes(self, codes: Tensor) -> None:
        """Raise unless `codes` are [B, 1 + K, T].

        Raises:
            ValueError: they are not.
        """
        n_codebooks = 1 + self.config.acoustic_dim
        if codes.ndim != 3 or codes.shape[1] != n_codebooks:
            raise ValueError(f"codes must be [B, {n_codebooks}, T], got {list(codes.shape)}")
