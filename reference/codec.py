"""The neural codec: frames of codes to 24 kHz sound.

Causal convolutions and windowed ALiBi transformers, 12.5 Hz -> 25 -> 50 -> 100 Hz, then 240 samples a row. The encoder
mirrors the decoder; its modules exist only for checkpoints that carry its weights, which the public one does not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .config import CodecConfig
from .linear import FeedForward, RMSNorm, wide

QUERY_BLOCK = 256  # queries attended at once: bounds the score matrix for long audio


class CausalConv1d(nn.Module):
    """Weight-normed convolution that sees the past only; the missing past of the first rows is padded."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, pad_mode: str = "reflect") -> None:
        """`pad_mode`: "reflect" or "replicate"."""
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(n_in, n_out, kernel, stride, bias=False))
        self.padding, self.pad_mode = kernel - stride, pad_mode

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, T] -> [B, n_out, T / stride]."""
        return self.conv(pad_left(x, self.padding, self.pad_mode))  # type: ignore[no-any-return]


class CausalConvTranspose1d(nn.Module):
    """Weight-normed transposed convolution; the ``kernel - stride`` rows that hang over the end are cut off."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int) -> None:
        """The weight is [n_in, n_out, kernel], so its norm is per input channel."""
        super().__init__()
        self.conv = weight_norm(nn.ConvTranspose1d(n_in, n_out, kernel, stride, bias=False))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, T] -> [B, n_out, stride T]."""
        return self.conv(x)[..., : self.stride * x.shape[-1]]  # type: ignore[no-any-return]


def pad_left(x: Tensor, n: int, mode: str) -> Tensor:
    """Pad the last dimension on the left; "reflect" of a too short `x` sees zeros after its end."""
    if n == 0:
        return x
    T = x.shape[-1]
    if mode == "reflect" and n >= T:
        return F.pad(F.pad(x, (0, n + 1 - T)), (n, 0), mode)[..., : n + T]
    return F.pad(x, (n, 0), mode)


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

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        q, k, v = self.q_norm(self.wq(x)), self.k_norm(self.wk(x)), self.wv(x)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # [B, T, H, D]
        return self.wo(window_attention(q, k, v, self.window).flatten(-2))  # type: ignore[no-any-return]


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

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        x = x + self.attention_scale * self.attention(self.attention_norm(x))
        return x + self.ffn_scale * self.feed_forward(self.ffn_norm(x))  # type: ignore[no-any-return]


class CodecTransformer(nn.Module):
    """A few codec blocks at one frame rate."""

    def __init__(self, config: CodecConfig, n_layers: int, window: int) -> None:
        """All blocks share the window."""
        super().__init__()
        self.layers = nn.ModuleList(CodecBlock(config, window) for _ in range(n_layers))

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim, T] -> [B, dim, T]."""
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(1, 2)


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
        usage = wide(self.cluster_usage[codes]).clamp(min=1e-5).unsqueeze(-1)
        return (wide(self.embedding_sum[codes]) / usage).to(self.embedding_sum.dtype)


class Quantizer(nn.Module):
    """Codes to latents: one semantic vector, and one scalar of ``levels`` steps for each acoustic codebook."""

    def __init__(self, config: CodecConfig) -> None:
        """The acoustic part (finite scalar quantisation, arXiv 2309.15505) has no weights."""
        super().__init__()
        self.levels = config.acoustic_codebook_size
        self.semantic_codebook = SemanticCodebook(config.semantic_codebook_size, config.semantic_dim)

    def forward(self, codes: Tensor) -> Tensor:
        """int [B, 1 + K, T] without the offset -> [B, semantic_dim + K, T]."""
        semantic = self.semantic_codebook(codes[:, 0]).transpose(1, 2)
        acoustic = codes[:, 1:].to(wide(semantic).dtype) * (2 / (self.levels - 1)) - 1
        return torch.cat((semantic, acoustic.to(semantic.dtype)), dim=1)


class AudioTokenizer(nn.Module):
    """The codec. `encoder` is asked for when the checkpoint has the encoder's weights."""

    def __init__(self, config: CodecConfig, encoder: bool = False) -> None:
        """Names as in the checkpoint's ``audio_tokenizer``."""
        super().__init__()
        self.config = config
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

    def decode(self, codes: Tensor) -> Tensor:
        """Sound of whole sequences of codes.

        Args:
            codes: int64 [B, 1 + K, T] WITHOUT the +2 offset.

        Returns:
            wide [B, 1, samples_per_frame T]; the last product is made and kept wide, for 8 bits are not enough to hear.
        """
        n_codebooks = 1 + self.config.acoustic_dim
        if codes.ndim != 3 or codes.shape[1] != n_codebooks:
            raise ValueError(f"codes must be [B, {n_codebooks}, T], got {list(codes.shape)}")
        x = self.quantizer(codes)
        for block in self.decoder_blocks:
            x = block(x)
        projection = self.output_proj
        x = pad_left(wide(x), projection.padding, projection.pad_mode)
        patches = F.conv1d(x, wide(projection.conv.weight))  # [B, patch, rows]
        return patches.transpose(1, 2).flatten(1).unsqueeze(1)
