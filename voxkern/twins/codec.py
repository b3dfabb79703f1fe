"""The codec decoder's twin: a chunk of frames in five launches a layer, on the host's own weights.

Settings depend on nothing that varies, and attention's tiles lie where the request's rows do, so that a sound is the
same to the last bit in chunks of any size; a chunk's work is launches on memory that is made once.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels.codec import launch_codec_advance, launch_codec_conv, launch_codec_dequantise
from ..kernels.codec_attention import MAX_WINDOW, launch_codec_attention
from ..kernels.linear import launch_linear, launch_norm_swiglu
from ..kernels.operator import on_device
from ..kernels.qkv import launch_norm_qkv
from ..reference.codec import AudioTokenizer, CodecBlock, CodecTransformer
from ..reference.codec_stream import convolutions
from ..reference.convolution import CausalConv1d, CausalConvTranspose1d
from ..reference.linear import wide

NAME = "the accelerated codec"
MAX_BATCH = 64
UNIT = 25  # frames a chunk, at most: 2 s, as servers send them
TILE_ROWS = 32  # the linear family's settings: a chunk has 1 to 200 rows, and few are the common case


@dataclass(frozen=True)
class Memory:
    """What a chunk needs of the past, twice: see :mod:`voxkern.kernels.codec`.

    Attributes:
        frames: int64 [B], decoded so far.
        turn: int32 [1].
        tails: of each convolution, [2, B, rows, channels].
        rings: of each layer, [2, 2, B, window, H D].
    """

    frames: Tensor
    turn: Tensor
    tails: list[Tensor]
    rings: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Memory of it all."""
        return sum(t.nbytes for t in (self.frames, self.turn, *self.tails, *self.rings))


@dataclass(frozen=True)
class Buffers:
    """Memory of a chunk of UNIT frames; a shorter one uses the first rows.

    Attributes:
        latents: [rows, latent_dim].
        streams: of each transformer, [rows, dim], what the convolution before it makes.
        qkv: [rows, 3 dim].
        attended: [rows, dim].
        gated: [rows, hidden].
        sound: wide [rows, patch].
    """

    latents: Tensor
    streams: list[Tensor]
    qkv: Tensor
    attended: Tensor
    gated: Tensor
    sound: Tensor


class CodecTwin:
    """Stands in for a host's ``stream``: what it starts decodes through kernels.

    Attributes:
        host: whose weights it reads, anew in every chunk, but for the folded ones, which a stream takes as it starts.
    """

    def __init__(self, host: AudioTokenizer) -> None:
        """Prepare for a codec.

        Raises:
            ValueError: a window or kernel that the kernels do not do.
        """
        self.host = host
        rows = host.config.samples_per_frame // host.config.pretransform_patch_size
        windows = [block.window for block in host.decoder_blocks if isinstance(block, CodecTransformer)]
        if not all(1 <= window <= MAX_WINDOW for window in windows):
            raise ValueError(f"the codec's windows are {windows}, kernels do 1..{MAX_WINDOW}: use the reference")
        if rows <= host.output_proj.padding or any(conv.padding < 1 for conv in convolutions(host)):
            raise ValueError(
                f"the codec makes {rows} rows a frame from kernels of "
                f"{[conv.conv.kernel_size[0] for conv in convolutions(host)]}: kernels need more rows than the last "
                "one pads, and no kernel shorter than two strides: use the reference"
            )

    def __call__(self, batch: int = 1) -> "CodecTwinStream":
        """Start `batch` requests, 1..64, whose codes are decoded as they come."""
        return CodecTwinStream(self.host, batch, self.host.folded().weights)


class CodecTwinStream:
    """Decodes a batch of requests chunk by chunk; see :class:`voxkern.reference.codec_stream.CodecStream`.

    Attributes:
        state: written in place, so its addresses stay.
        unit: the most frames of a chunk; bits do not depend on how many it has.
    """

    unit = UNIT

    def __init__(self, host: AudioTokenizer, batch: int, weights: list[Tensor]) -> None:
        """Start `batch` requests on folded weights.

        Raises:
            ValueError: `batch` is not in 1..64.
        """
        if not 1 <= batch <= MAX_BATCH:
            raise ValueError(f"batch must lie in 1..{MAX_BATCH}, got {batch}")
        self.codec, self.batch, self._weights = host, batch, weights
        self.state, self._buffers = _new_memory(host, batch), _new_buffers(host, batch)

    def restart(self, rows: Tensor) -> None:
        """Begin anew where `rows`, bool [B], is true; what was remembered there is never looked at."""
        self.state.frames.masked_fill_(rows, 0)

    @torch.inference_mode()
    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The sound of the next frames, as :meth:`CodecStream.decode` says it; at most UNIT of them.

        Raises:
            ValueError: a shape is wrong, or there are more frames than UNIT.
        """
        self.codec.check_codes(codes)
        B, T = len(codes), codes.shape[2]
        if self.batch != B or (lengths is not None and list(lengths.shape) != [B]):
            raise ValueError(f"codes and lengths must be of {self.batch} requests, got {B} and {lengths}")
        if not 1 <= T <= UNIT:
            raise ValueError(f"codes have {T} frames but must have 1..{UNIT}")
        lengths = torch.full_like(self.state.frames, T) if lengths is None else lengths
        return self.chunk(codes.contiguous(), lengths).clone()

    def chunk(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """The same in launches and nothing else: `codes` contiguous, of 1..UNIT frames, `lengths` int64 [B].

        Returns:
            wide [B, 1, samples_per_frame T], in memory that the next chunk writes again.
        """
        host, memory, b = self.codec, self.state, self._buffers
        config, codebook, rows = host.config, host.quantizer.semantic_codebook, self.batch * codes.shape[2]
        state = (memory.frames, lengths, memory.turn)
        tails, rings, weights = iter(memory.tails), iter(memory.rings), iter(self._weights)
        streams, rate, x = iter(b.streams), 1, b.latents[:rows]
        with on_device(NAME, codebook.embedding_sum):
            launch_codec_dequantise(
                x, codes, lengths, codebook.embedding_sum, codebook.cluster_usage, host.quantizer.levels
            )
            for block in host.decoder_blocks:
                if isinstance(block, CodecTransformer):
                    self._layers(block, x, rings, state, rate)
                    continue
                stride = block.stride if isinstance(block, CausalConvTranspose1d) else 1
                y = next(streams)[: stride * rows * rate]
                rule = "zero" if isinstance(block, CausalConvTranspose1d) else cast(CausalConv1d, block).pad_mode
                launch_codec_conv(y.view(rows * rate, -1), x, next(weights), next(tails), *state, rate, rule)
                x, rate = y, rate * stride
            sound = b.sound[: rows * rate]
            launch_codec_conv(sound, x, next(weights), next(tails), *state, rate, host.output_proj.pad_mode)
            launch_codec_advance(lengths, memory.frames, memory.turn)
        return sound.view(self.batch, 1, codes.shape[2] * config.samples_per_frame)

    def _layers(
        self, transformer: CodecTransformer, x: Tensor, rings: Any, state: tuple[Tensor, Tensor, Tensor], rate: int
    ) -> None:
        """All layers of one rate, into `x`: 5 launches each."""
        b, config, M = self._buffers, self.codec.config, len(x)
        qkv, attended, gated = b.qkv[:M], b.attended[:M], b.gated[:M]
        for layer in cast(list[CodecBlock], list(transformer.layers)):
            attention, feed = layer.attention, layer.feed_forward
            launch_norm_qkv(
                qkv, x, layer.attention_norm.weight, attention.wq.weight, attention.wk.weight, attention.wv.weight,
                config.norm_eps, M, TILE_ROWS,
            )  # fmt: skip
            launch_codec_attention(
                attended, qkv, attention.q_norm.weight, attention.k_norm.weight, next(rings), *state, rate,
                config.qk_norm_eps, config.n_heads,
            )  # fmt: skip
            launch_linear(x, attended, attention.wo.weight, layer.attention_scale, x, TILE_ROWS)
            launch_norm_swiglu(
                gated, x, layer.ffn_norm.weight, feed.w1.weight, feed.w3.weight, config.norm_eps, TILE_ROWS
            )
            launch_linear(x, gated, feed.w2.weight, layer.ffn_scale, x, TILE_ROWS)


def _new_memory(codec: AudioTokenizer, batch: int) -> Memory:
    config, like = codec.config, codec.quantizer.semantic_codebook.embedding_sum
    tails, rings = [], []
    for conv in convolutions(codec):
        channels = config.latent_dim if conv is codec.decoder_blocks[0] else config.dim
        tails.append(like.new_zeros(2, batch, conv.padding, channels))
    for block in codec.decoder_blocks:
        if isinstance(block, CodecTransformer):
            shape = (2, 2, batch, block.window, config.n_heads * config.head_dim)
            rings += [like.new_zeros(shape) for _ in block.layers]
    frames = like.new_zeros(batch, dtype=torch.int64)
    return Memory(frames, like.new_zeros(1, dtype=torch.int32), tails, rings)


def _new_buffers(codec: AudioTokenizer, batch: int) -> Buffers:
    config, like = codec.config, codec.quantizer.semantic_codebook.embedding_sum
    rows, streams = batch * UNIT, []
    first = rows
    for block in codec.decoder_blocks:
        rows *= block.stride if isinstance(block, CausalConvTranspose1d) else 1
        if not isinstance(block, CodecTransformer):
            streams.append(like.new_zeros(rows, config.dim))
    width = config.n_heads * config.head_dim
    return Buffers(
        latents=like.new_zeros(first, config.latent_dim),
        streams=streams,
        qkv=like.new_zeros(rows, 3 * width),
        attended=like.new_zeros(rows, width),
        gated=like.new_zeros(rows, config.hidden_dim),
        sound=wide(like.new_zeros(rows, config.pretransform_patch_size)),
    )
