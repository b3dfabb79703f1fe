"""The fused codec decoder: it decodes chunks of frames through kernels, on the codec's weights.

A transformer layer takes five launches. A chunk only launches kernels, in memory that is allocated once.

The audio of a `FusedCodec` has the same bits for chunks of any size and for streams of any number of requests. Neither
number changes the launch configs, which are chosen for `max_batch`. The attention's tiles begin at fixed positions of a
request, not of the chunk.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.codec import launch_codec_conv, launch_codec_dequantise, launch_codec_update_state
from ..kernels.codec_attention import MAX_WINDOW, launch_codec_attention
from ..kernels.linear import launch_linear
from ..kernels.norm_linear import launch_norm_swiglu
from ..kernels.operator import on_device
from ..kernels.qkv import launch_norm_qkv
from ..reference.codec import AudioTokenizer
from ..reference.codec_decoder import convolutions
from ..reference.codec_layers import CodecBlock, CodecTransformer
from ..reference.convolution import CausalConv1d, CausalConvTranspose1d
from ..reference.layers import upcast

NAME = "the accelerated codec"
MAX_BATCH = 64
MAX_CHUNK_FRAMES = 25  # the most frames of a chunk: 2 s, as long as the chunks of servers


@dataclass(frozen=True)
class FusedCodecState:
    """The streaming state of B requests, double-buffered: a chunk reads one half and writes the other half.

    Attributes:
        past_frames: int64 [B], frames decoded so far.
        parity: int32 [1], the half that the next chunk reads, 0 or 1.
        conv_state: for each convolution, its last input rows, [2, B, rows, channels]; the first index is the half.
        kv_window: for each layer, its last keys and values, [2, 2, B, window, H * D]; the first index is the half, the
            second is 0 for keys and 1 for values.
    """

    past_frames: Tensor
    parity: Tensor
    conv_state: list[Tensor]
    kv_window: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the whole state in bytes."""
        return sum(t.nbytes for t in (self.past_frames, self.parity, *self.conv_state, *self.kv_window))


@dataclass(frozen=True)
class CodecBuffers:
    """The memory that a chunk of MAX_CHUNK_FRAMES frames needs; a shorter chunk uses the first rows.

    Attributes:
        latents: [rows, latent_dim], the dequantised codes.
        streams: for each convolution but the last, its output [rows, dim], which is the residual stream of the layers
            after the convolution.
        qkv: [rows, 3 * H * D], q | k | v.
        attended: [rows, H * D], the result of the attention.
        gated: [rows, hidden], the feed-forward's hidden activations.
        sound: fp32 (fp64 in an fp64 model) [rows, patch], the samples.
    """

    latents: Tensor
    streams: list[Tensor]
    qkv: Tensor
    attended: Tensor
    gated: Tensor
    sound: Tensor


class FusedCodec:
    """Replaces a codec's ``stream`` by streams that decode through kernels.

    Attributes:
        module: the codec. Every chunk reads the weights that the module holds at that time, except the weights of the
            convolutions. A stream keeps the convolution weights of its start, with the weight norm folded in.
        max_batch: the number of requests that the launch configs are chosen for.
    """

    def __init__(self, module: AudioTokenizer, max_batch: int) -> None:
        """Prepare for a codec.

        Args:
            module: the codec.
            max_batch: the number of requests that the launch configs are chosen for. A stream may have more.

        Raises:
            ValueError: the codec has an attention window or a convolution that the kernels do not support.
        """
        self.module, self.max_batch = module, max_batch
        rows = module.config.samples_per_frame // module.config.pretransform_patch_size
        windows = [block.window for block in module.decoder_blocks if isinstance(block, CodecTransformer)]
        if not all(1 <= window <= MAX_WINDOW for window in windows):
            raise ValueError(f"the codec's windows are {windows}, kernels need 1..{MAX_WINDOW}: use the reference")
        if rows <= module.output_proj.padding or any(conv.padding < 1 for conv in convolutions(module)):
            raise ValueError(
                f"the codec has {rows} rows per frame and convolutions of sizes "
                f"{[conv.conv.kernel_size[0] for conv in convolutions(module)]}, but the kernels need more rows per "
                "frame than the last convolution pads, and convolutions longer than their stride: use the reference"
            )

    def __call__(self, batch: int = 1) -> "FusedCodecStream":
        """Start a stream of `batch` requests, 1..64."""
        return FusedCodecStream(self.module, batch, self.max_batch, self.module.folded_weights().weights)


class FusedCodecStream:
    """Decodes a batch of requests chunk by chunk; see :class:`voxkern.reference.codec_stream.CodecStream`.

    Attributes:
        state: the streaming state, which is written in place, so its addresses never change.
        max_chunk_frames: the most frames that a chunk may have. The audio's bits do not depend on the chunks' sizes.
    """

    max_chunk_frames = MAX_CHUNK_FRAMES

    def __init__(self, module: AudioTokenizer, batch: int, max_batch: int, weights: list[Tensor]) -> None:
        """Start a stream.

        Args:
            module: the codec.
            batch: number of requests, 1..64.
            max_batch: see :class:`FusedCodec`.
            weights: the convolutions' weights, see :meth:`AudioTokenizer.folded_weights`.

        Raises:
            ValueError: `batch` is not in 1..64.
        """
        if not 1 <= batch <= MAX_BATCH:
            raise ValueError(f"batch must lie in 1..{MAX_BATCH}, got {batch}")
        self.codec, self.batch, self._max_batch, self._weights = module, batch, max_batch, weights
        self.state, self._buffers = _new_state(module, batch), _new_buffers(module, batch)

    def restart(self, rows: Tensor) -> None:
        """Start a new request in each row where `rows`, bool [B], is true; the row's old state is not read again."""
        self.state.past_frames.masked_fill_(rows, 0)

    @torch.inference_mode()
    def decode(self, codes: Tensor, new_frames: Tensor | None = None) -> Tensor:
        """Decode the next 1..MAX_CHUNK_FRAMES frames, see :meth:`CodecStream.decode`.

        Returns:
            fp32 (fp64 in an fp64 model) [B, 1, samples_per_frame * T].

        Raises:
            ValueError: a shape or the number of frames is wrong.
        """
        self.codec.check_chunk(codes, new_frames, self.batch)
        T = codes.shape[2]
        if not 1 <= T <= MAX_CHUNK_FRAMES:
            raise ValueError(f"codes have {T} frames but must have 1..{MAX_CHUNK_FRAMES}")
        new_frames = torch.full_like(self.state.past_frames, T) if new_frames is None else new_frames
        return self.chunk(codes.contiguous(), new_frames).clone()

    def chunk(self, codes: Tensor, new_frames: Tensor) -> Tensor:
        """Decode the next frames like :meth:`decode`, without checks or allocations: only kernels are launched.

        Args:
            codes: int64 [B, 1 + K, T], contiguous, without the +2 offset; T in 1..MAX_CHUNK_FRAMES.
            new_frames: int64 [B], the number of frames of each request, 0..T; later codes are ignored.

        Returns:
            fp32 (fp64 in an fp64 model) [B, 1, samples_per_frame * T], which the next chunk overwrites.
        """
        module, memory, b = self.codec, self.state, self._buffers
        config, codebook, rows = module.config, module.quantizer.semantic_codebook, self.batch * codes.shape[2]
        state = (memory.past_frames, new_frames, memory.parity)
        conv_state, kv_window, weights = iter(memory.conv_state), iter(memory.kv_window), iter(self._weights)
        streams, rate, x = iter(b.streams), 1, b.latents[:rows]
        with on_device(NAME, codebook.embedding_sum):
            launch_codec_dequantise(
                x, codes, new_frames, codebook.embedding_sum, codebook.cluster_usage, module.quantizer.levels
            )
            for block in module.decoder_blocks:
                if isinstance(block, CodecTransformer):
                    self._run_layers(block, x, kv_window, state, rate)
                    continue
                stride = block.stride if isinstance(block, CausalConvTranspose1d) else 1
                y = next(streams)[: stride * rows * rate]
                pad_mode = "zero" if isinstance(block, CausalConvTranspose1d) else cast(CausalConv1d, block).pad_mode
                launch_codec_conv(y.view(rows * rate, -1), x, next(weights), next(conv_state), *state, rate, pad_mode)
                x, rate = y, rate * stride
            sound = b.sound[: rows * rate]
            launch_codec_conv(sound, x, next(weights), next(conv_state), *state, rate, module.output_proj.pad_mode)
            launch_codec_update_state(new_frames, memory.past_frames, memory.parity)
        return sound.view(self.batch, 1, codes.shape[2] * config.samples_per_frame)

    def _run_layers(
        self, transformer: CodecTransformer, x: Tensor, kv_window: Any, state: tuple[Tensor, Tensor, Tensor], rate: int
    ) -> None:
        """Run all layers of one transformer on `x` in place, five launches per layer; `x` has `rate` rows per frame."""
        b, config, M = self._buffers, self.codec.config, len(x)
        prepared = self._max_batch * rate, "codec"
        qkv, attended, gated = b.qkv[:M], b.attended[:M], b.gated[:M]
        for layer in cast(list[CodecBlock], list(transformer.layers)):
            attention, feed = layer.attention, layer.feed_forward
            launch_norm_qkv(
                qkv, x, layer.attention_norm.weight, attention.wq.weight, attention.wk.weight, attention.wv.weight,
                config.norm_eps, M, *prepared,
            )  # fmt: skip
            launch_codec_attention(
                attended, qkv, attention.q_norm.weight, attention.k_norm.weight, next(kv_window), *state, rate,
                config.qk_norm_eps, config.n_heads,
            )  # fmt: skip
            launch_linear(x, attended, attention.wo.weight, None, layer.attention_scale[None], x, *prepared)
            launch_norm_swiglu(
                gated, x, layer.ffn_norm.weight, feed.w1.weight, feed.w3.weight, config.norm_eps, *prepared
            )
            launch_linear(x, gated, feed.w2.weight, None, layer.ffn_scale[None], x, *prepared)


def _new_state(codec: AudioTokenizer, batch: int) -> FusedCodecState:
    config, like = codec.config, codec.quantizer.semantic_codebook.embedding_sum
    conv_state, kv_window = [], []
    for conv in convolutions(codec):
        channels = config.latent_dim if conv is codec.decoder_blocks[0] else config.dim
        conv_state.append(like.new_zeros(2, batch, conv.padding, channels))
    for block in codec.decoder_blocks:
        if isinstance(block, CodecTransformer):
            shape = (2, 2, batch, block.window, config.n_heads * config.head_dim)
            kv_window += [like.new_zeros(shape) for _ in block.layers]
    past_frames = like.new_zeros(batch, dtype=torch.int64)
    return FusedCodecState(past_frames, like.new_zeros(1, dtype=torch.int32), conv_state, kv_window)


def _new_buffers(codec: AudioTokenizer, batch: int) -> CodecBuffers:
    config, like = codec.config, codec.quantizer.semantic_codebook.embedding_sum
    rows, streams = batch * MAX_CHUNK_FRAMES, []
    first = rows
    for block in codec.decoder_blocks:
        rows *= block.stride if isinstance(block, CausalConvTranspose1d) else 1
        if not isinstance(block, CodecTransformer):
            streams.append(like.new_zeros(rows, config.dim))
    width = config.n_heads * config.head_dim
    return CodecBuffers(
        latents=like.new_zeros(first, config.latent_dim),
        streams=streams,
        qkv=like.new_zeros(rows, 3 * width),
        attended=like.new_zeros(rows, width),
        gated=like.new_zeros(rows, config.hidden_dim),
        sound=upcast(like.new_zeros(rows, config.pretransform_patch_size)),
    )
