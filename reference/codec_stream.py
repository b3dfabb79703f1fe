"""The codec's decoder as codes come: each chunk is decoded once, from a state of fixed size.

What a chunk needs of the past is little: two latents, a window of keys and values a layer, one row before each
transposed convolution, six rows before the last one. The rule for a missing past touches a request's first frame only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec_decoder import CodecDecoder, convolutions
from .codec_layers import CodecTransformer, alibi_slopes
from .convolution import CausalConv1d, CausalConvTranspose1d
from .layers import upcast


@dataclass(frozen=True)
class CodecState:
    """What the decoder remembers of B requests; its size never changes.

    Attributes:
        past_frames: int64 [B], decoded so far.
        conv_state: the last rows before each convolution, in order: [B, rows, channels].
        kv_window: the last keys and values of each layer, in order: [2, B, window, H, D].
    """

    past_frames: Tensor
    conv_state: list[Tensor]
    kv_window: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Memory of it all."""
        return sum(t.nbytes for t in (self.past_frames, *self.conv_state, *self.kv_window))


@dataclass(frozen=True)
class Chunk:
    """The rows of a chunk at one rate.

    Attributes:
        fresh: bool [B, 1, 1], whether nothing was decoded before the chunk.
        past_rows: int [B], rows decoded before the chunk.
        new_rows: int [B], rows of the chunk.
    """

    fresh: Tensor
    past_rows: Tensor
    new_rows: Tensor


class CodecStream:
    """Decodes a batch of requests chunk by chunk, into the sound that decoding them whole gives.

    Weights are looked at when a stream is made: one made before a weight changed goes on with some of the old ones.

    Attributes:
        state: written in place, so its addresses stay.
        max_chunk_frames: frames to decode at once for bits that do not depend on the chunks: ``F.linear`` gives a row
            other bits among many rows than among few.
    """

    max_chunk_frames = 1

    def __init__(self, codec: CodecDecoder, batch: int = 1, weights: "FoldedWeights | None" = None) -> None:
        """Start `batch` requests; `weights` may be those that another stream has folded.

        Raises:
            ValueError: a frame has too few rows for the last convolution's padding, which would need the second frame.
        """
        self.codec, self.batch = codec, batch
        projection = codec.output_proj
        rows = codec.config.samples_per_frame // codec.config.pretransform_patch_size
        if rows <= projection.padding:
            raise ValueError(
                f"the codec cannot stream: a frame is {rows} rows, and padding its first sees {projection.padding} more"
            )
        self._weights = (FoldedWeights.of(codec) if weights is None else weights).weights
        self.state = _new_state(codec, batch)

    def restart(self, rows: Tensor) -> None:
        """Begin anew where `rows`, bool [B], is true; what was remembered there is never looked at."""
        self.state.past_frames.masked_fill_(rows, 0)

    @torch.inference_mode()
    def decode(self, codes: Tensor, new_frames: Tensor | None = None) -> Tensor:
        """The sound of the next frames.

        Args:
            codes: int64 [B, 1 + K, T] WITHOUT the +2 offset.
            new_frames: int64 [B], how many of the T frames each request has, 0..T; None: all have T. What codes hold
                after them is not looked at.

        Returns:
            wide [B, 1, samples_per_frame T]; zeros after a request's own frames.

        Raises:
            ValueError: `codes` or `new_frames` has another shape.
        """
        config, (B, T) = self.codec.config, (self.batch, codes.shape[-1])
        self.codec.check_codes(codes)
        if len(codes) != B or (new_frames is not None and list(new_frames.shape) != [B]):
            raise ValueError(f"codes and new_frames must be of {B} requests, got {len(codes)} and {new_frames}")
        if new_frames is None:
            new_frames = torch.full_like(self.state.past_frames, T)
        has = torch.arange(T, device=codes.device) < new_frames.unsqueeze(1)  # [B, T]
        x = self.codec.quantizer(codes * has.unsqueeze(1)).transpose(1, 2)  # [B, T, channels]
        conv_state, kv_window, weights, rate = (
            iter(self.state.conv_state),
            iter(self.state.kv_window),
            iter(self._weights),
            1,
        )
        for block in self.codec.decoder_blocks:
            if isinstance(block, CausalConvTranspose1d):
                x = _upsample(block, next(weights), x, next(conv_state), self._chunk(new_frames, rate))
                rate *= block.stride
            elif isinstance(block, CausalConv1d):
                x = _convolve(block, next(weights), x, next(conv_state), self._chunk(new_frames, rate))
            elif isinstance(block, CodecTransformer):
                x = _transform(block, x, kv_window, self._chunk(new_frames, rate))
        patches = _convolve(
            self.codec.output_proj, next(weights), upcast(x), next(conv_state), self._chunk(new_frames, rate)
        )
        self.state.past_frames.add_(new_frames)
        samples = patches.reshape(B, T, config.samples_per_frame) * has.unsqueeze(2)
        return samples.view(B, 1, T * config.samples_per_frame)

    def _chunk(self, new_frames: Tensor, rate: int) -> Chunk:
        past_frames = self.state.past_frames
        return Chunk((past_frames == 0).view(-1, 1, 1), past_frames * rate, new_frames * rate)


@dataclass(frozen=True)
class FoldedWeights:
    """The decoder's convolutions as products, see :func:`fold_weight_norm`: what depends on their weights alone.

    Attributes:
        sources: the weights that they were made from.
        key: what those were then.
        weights: in order; the last, which makes sound, is wide.
    """

    sources: tuple[Tensor, ...]
    key: tuple[Any, ...]
    weights: list[Tensor]

    @classmethod
    def of(cls, codec: CodecDecoder, known: "FoldedWeights | None" = None) -> "FoldedWeights":
        """Those of a codec; `known` itself where no weight is seen to have changed since.

        What is written through ``.data``, or to weights made in inference mode, leaves no trace.
        """
        sources = tuple(weight for conv in convolutions(codec) for weight in conv.parameters())
        key = tuple((w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype, w.device) for w in sources)
        # the tensors themselves, too: a new one may lie where an old one lay
        if known is None or known.key != key or any(a is not b for a, b in zip(known.sources, sources, strict=True)):
            weights = [fold_weight_norm(conv) for conv in convolutions(codec)]
            known = cls(sources, key, [*weights[:-1], upcast(weights[-1])])
        return known


@torch.no_grad()
def fold_weight_norm(conv: CausalConv1d | CausalConvTranspose1d) -> Tensor:
    """A convolution's weight, its norm folded in, as that of a product on windows of rows.

    Returns:
        [n_out, taps n_in], a tap's channels side by side, the oldest row's first. A transposed convolution of stride s
        makes s rows of each window, [s n_out, taps n_in], and its taps are those rows of x that reach them.
    """
    weight: Tensor = conv.conv.weight
    if isinstance(conv, CausalConv1d):
        return weight.transpose(1, 2).flatten(1)
    n_in, n_out, kernel = weight.shape
    weight = F.pad(weight, (0, -kernel % conv.stride)).view(n_in, n_out, -1, conv.stride)
    return weight.flip(2).permute(3, 1, 2, 0).reshape(conv.stride * n_out, -1)  # tap m is the row m before the newest


def _convolve(conv: CausalConv1d, weight: Tensor, x: Tensor, conv_state: Tensor, chunk: Chunk) -> Tensor:
    """[B, T, n_in] -> [B, T, n_out]."""
    n = conv.padding
    missing = x[:, 1 : n + 1].flip(1) if conv.pad_mode == "reflect" else x[:, :1].expand(-1, n, -1)
    rows = torch.cat((torch.where(chunk.fresh, missing, conv_state), x), dim=1)  # [B, n + T, n_in]
    conv_state.copy_(last_rows(rows, chunk.new_rows, n))
    return _product(weight, rows, n + 1)


def _upsample(conv: CausalConvTranspose1d, weight: Tensor, x: Tensor, conv_state: Tensor, chunk: Chunk) -> Tensor:
    """[B, T, n_in] -> [B, stride T, n_out]."""
    n = conv_state.shape[1]
    rows = torch.cat((torch.where(chunk.fresh, 0, conv_state), x), dim=1)  # [B, n + T, n_in]
    conv_state.copy_(last_rows(rows, chunk.new_rows, n))
    y = _product(weight, rows, n + 1)  # [B, T, stride n_out]
    return y.reshape(len(y), conv.stride * x.shape[1], -1)


def _product(weight: Tensor, rows: Tensor, taps: int) -> Tensor:
    """Each window of `taps` rows times a folded weight; torch's own convolutions are slow on a few rows."""
    return F.linear(rows.unfold(1, taps, 1).transpose(2, 3).flatten(2), weight)


def _transform(transformer: CodecTransformer, x: Tensor, kv_window: Iterator[Tensor], chunk: Chunk) -> Tensor:
    """[B, T, dim] -> [B, T, dim]."""
    for layer in transformer.layers:
        x = layer(x, partial(attend_chunk, next(kv_window), chunk))
    return x


def attend_chunk(kv_window: Tensor, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`window_attention` of a chunk's rows, [B, T, H, D] each, over the kv_window's keys and their own."""
    T, H = q.shape[1:3]
    window = kv_window.shape[2]
    i_key, i_query = torch.arange(-window, T, device=q.device), torch.arange(T, device=q.device).unsqueeze(1)
    distance = i_key - i_query  # [T, window + T], as the kv_window's last row is -1
    exists = i_key >= -chunk.past_rows.view(-1, 1, 1, 1)  # [B, 1, 1, window + T]
    seen = (distance <= 0) & (distance >= -window) & exists
    slopes = alibi_slopes(H).to(q.device).view(H, 1, 1)
    bias = torch.where(seen, slopes * distance, -torch.inf).to(q.dtype)  # [B, H, T, window + T]
    live = exists[..., :window].permute(0, 3, 1, 2)  # [B, window, 1, 1]
    keys, values = (
        torch.cat((torch.where(live, old, 0), new), dim=1) for old, new in zip(kv_window, (k, v), strict=True)
    )
    kv_window[0].copy_(last_rows(keys, chunk.new_rows, window))
    kv_window[1].copy_(last_rows(values, chunk.new_rows, window))
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, bias).transpose(1, 2)


def last_rows(rows: Tensor, new_rows: Tensor, n: int) -> Tensor:
    """The `n` rows before the end of each request, which is at n + `new_rows`: [B, n + T, ...] -> [B, n, ...]."""
    i_row = new_rows.unsqueeze(1) + torch.arange(n, device=rows.device)  # [B, n]
    return rows[torch.arange(len(rows), device=rows.device).unsqueeze(1), i_row]


def _new_state(codec: CodecDecoder, batch: int) -> CodecState:
    """Zeros; which of them are looked at depends on the frames."""
    config, weight = codec.config, codec.output_proj.conv.weight
    zeros = partial(torch.zeros, dtype=weight.dtype, device=weight.device)
    conv_state, kv_window = [], []
    for block in codec.decoder_blocks:
        if isinstance(block, CausalConvTranspose1d):
            conv_state.append(zeros(batch, block.padding, config.dim))
        elif isinstance(block, CausalConv1d):
            conv_state.append(zeros(batch, block.padding, config.latent_dim))
        elif isinstance(block, CodecTransformer):
            shape = (2, batch, block.window, config.n_heads, config.head_dim)
            kv_window += [zeros(*shape) for _ in block.layers]
    conv_state.append(upcast(zeros(batch, codec.output_proj.padding, config.dim)))
    return CodecState(torch.zeros(batch, dtype=torch.int64, device=weight.device), conv_state, kv_window)
