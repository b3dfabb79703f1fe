"""The streaming codec decoder, which decodes codes chunk by chunk with a state of fixed size.

The state of a request is small. In the public model, the state has the last two latents and, per transformer layer, a
window of keys and values. It also has the last input row of each transposed convolution, and the last six input rows
of the output convolution. Only the rows before a request's first frame are padded; later chunks read the state instead.
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
    """The state of B requests between two chunks; the size of the state never changes.

    Attributes:
        past_frames: int64 [B], number of frames decoded so far.
        conv_state: one tensor [B, rows, channels] per convolution, in order: the convolution's last input rows.
        kv_window: one tensor [2, B, window, H, D] per transformer layer, in order: the layer's last keys and values.
    """

    past_frames: Tensor
    conv_state: list[Tensor]
    kv_window: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Number of bytes of the whole state."""
        return sum(t.nbytes for t in (self.past_frames, *self.conv_state, *self.kv_window))


@dataclass(frozen=True)
class Chunk:
    """The row counts of a chunk at one point of the decoder. The number of rows per frame differs between points.

    Attributes:
        fresh: bool [B, 1, 1], whether the chunk is the request's first.
        past_rows: int [B], number of rows before the chunk, over all earlier chunks of the request.
        new_rows: int [B], number of rows of the chunk.
    """

    fresh: Tensor
    past_rows: Tensor
    new_rows: Tensor


class CodecStream:
    """Decodes a batch of requests chunk by chunk, to the same sound as decoding whole sequences, up to rounding.

    A stream takes the folded weights of the convolutions when the stream is created. After a weight has changed, create
    a new stream, because an old stream keeps the old convolution weights.

    Attributes:
        state: the state between chunks. It is updated in place, so the addresses of its tensors never change.
        max_chunk_frames: up to this number of frames per chunk, the sound's bits do not depend on how the frames are
            divided into chunks. Here it is 1, because the last bits of a row of ``F.linear`` depend on the number of
            rows. Larger chunks are allowed.
    """

    max_chunk_frames = 1

    def __init__(self, codec: CodecDecoder, batch: int = 1, weights: "FoldedWeights | None" = None) -> None:
        """Allocate the state of `batch` requests.

        Args:
            codec: the decoder.
            batch: number of requests B.
            weights: folded weights of `codec`; None means that they are computed here.

        Raises:
            ValueError: the last convolution's reflect padding needs more rows than a frame has.
        """
        self.codec, self.batch = codec, batch
        projection = codec.output_proj
        rows = codec.config.samples_per_frame // codec.config.pretransform_patch_size
        if rows <= projection.padding:
            raise ValueError(
                f"the codec cannot stream: a frame has {rows} rows but must have more than {projection.padding}, "
                "the number of rows that output_proj pads"
            )
        self._weights = (FoldedWeights.of(codec) if weights is None else weights).weights
        self.state = _new_state(codec, batch)

    def restart(self, rows: Tensor) -> None:
        """Start a new request in each row where `rows`, bool [B], is true; the old state of these rows is ignored."""
        self.state.past_frames.masked_fill_(rows, 0)

    @torch.inference_mode()
    def decode(self, codes: Tensor, new_frames: Tensor | None = None) -> Tensor:
        """Decode the next frames of each request.

        Args:
            codes: int64 [B, 1 + K, T] WITHOUT the +2 offset.
            new_frames: int64 [B], number of new frames of each request, 0..T; None means T for all requests. Codes of a
                request after its new frames are ignored.

        Returns:
            The sound, fp32 (fp64 in an fp64 model) [B, 1, samples_per_frame * T]; zeros after a request's new frames.

        Raises:
            ValueError: `codes` or `new_frames` has another shape.
        """
        config, (B, T) = self.codec.config, (self.batch, codes.shape[-1])
        self.codec.check_chunk(codes, new_frames, B)
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
    """The weights of the decoder's convolutions as matrices, see :func:`fold_weight_norm`.

    Attributes:
        sources: the parameters that the matrices were computed from.
        key: address, version, dtype and device of each of `sources` when the matrices were computed.
        weights: one matrix per convolution, in order. The last matrix, which produces samples, is in the upcast dtype
            (see :func:`voxkern.reference.layers.upcast`).
    """

    sources: tuple[Tensor, ...]
    key: tuple[Any, ...]
    weights: list[Tensor]

    @classmethod
    def of(cls, codec: CodecDecoder, known: "FoldedWeights | None" = None) -> "FoldedWeights":
        """Return the folded weights of a codec, or `known` if no weight has changed since `known` was computed.

        Two kinds of writes are not detected: writes through ``.data``, and writes to weights created in inference mode.
        """
        sources = tuple(weight for conv in convolutions(codec) for weight in conv.parameters())
        key = tuple((w.data_ptr(), 0 if w.is_inference() else w._version, w.dtype, w.device) for w in sources)
        # compare the tensors' identity, too, because a new tensor may have the address of a freed one
        if known is None or known.key != key or any(a is not b for a, b in zip(known.sources, sources, strict=True)):
            weights = [fold_weight_norm(conv) for conv in convolutions(codec)]
            known = cls(sources, key, [*weights[:-1], upcast(weights[-1])])
        return known


@torch.no_grad()
def fold_weight_norm(conv: CausalConv1d | CausalConvTranspose1d) -> Tensor:
    """Return a convolution's weight, with weight norm folded in, as a matrix that multiplies windows of rows.

    Returns:
        [n_out, taps * n_in]. The matrix has one tap per input row of a window, and the oldest row's tap is first. The
        channels of a tap are adjacent. A transposed convolution of stride s computes s output rows from each window,
        so the matrix is [s * n_out, taps * n_in].
    """
    weight: Tensor = conv.conv.weight
    if isinstance(conv, CausalConv1d):
        return weight.transpose(1, 2).flatten(1)
    n_in, n_out, kernel = weight.shape
    weight = F.pad(weight, (0, -kernel % conv.stride)).view(n_in, n_out, -1, conv.stride)
    # tap m multiplies the m-th row before the newest, so the flip puts the oldest row first
    return weight.flip(2).permute(3, 1, 2, 0).reshape(conv.stride * n_out, -1)


def _convolve(conv: CausalConv1d, weight: Tensor, x: Tensor, conv_state: Tensor, chunk: Chunk) -> Tensor:
    """Convolve a chunk and store its last rows, [B, T, n_in] -> [B, T, n_out]."""
    n = conv.padding
    missing = x[:, 1 : n + 1].flip(1) if conv.pad_mode == "reflect" else x[:, :1].expand(-1, n, -1)
    rows = torch.cat((torch.where(chunk.fresh, missing, conv_state), x), dim=1)  # [B, n + T, n_in]
    conv_state.copy_(last_rows(rows, chunk.new_rows, n))
    return _product(weight, rows, n + 1)


def _upsample(conv: CausalConvTranspose1d, weight: Tensor, x: Tensor, conv_state: Tensor, chunk: Chunk) -> Tensor:
    """Upsample a chunk and store its last rows, [B, T, n_in] -> [B, stride * T, n_out]."""
    n = conv_state.shape[1]
    rows = torch.cat((torch.where(chunk.fresh, 0, conv_state), x), dim=1)  # [B, n + T, n_in]
    conv_state.copy_(last_rows(rows, chunk.new_rows, n))
    y = _product(weight, rows, n + 1)  # [B, T, stride * n_out]
    return y.reshape(len(y), conv.stride * x.shape[1], -1)


def _product(weight: Tensor, rows: Tensor, taps: int) -> Tensor:
    """Multiply each window of `taps` rows by a folded weight, because ``F.conv1d`` is slow on a few rows."""
    return F.linear(rows.unfold(1, taps, 1).transpose(2, 3).flatten(2), weight)


def _transform(transformer: CodecTransformer, x: Tensor, kv_window: Iterator[Tensor], chunk: Chunk) -> Tensor:
    """Run the layers on a chunk and store its last keys and values, [B, T, dim] -> [B, T, dim]."""
    for layer in transformer.layers:
        x = layer(x, partial(attend_chunk, next(kv_window), chunk))
    return x


def attend_chunk(kv_window: Tensor, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute ALiBi attention of a chunk's rows to the stored window and the chunk, and store the new window.

    The result is that of :func:`voxkern.reference.codec_layers.window_attention` on whole sequences, up to rounding.

    Args:
        kv_window: [2, B, window, H, D], the layer's last keys and values, updated in place.
        chunk: the chunk's row counts in this layer.
        q: [B, T, H, D], the chunk's queries.
        k: [B, T, H, D], the chunk's keys.
        v: [B, T, H, D], the chunk's values.

    Returns:
        [B, T, H, D].
    """
    T, H = q.shape[1:3]
    window = kv_window.shape[2]
    i_key, i_query = torch.arange(-window, T, device=q.device), torch.arange(T, device=q.device).unsqueeze(1)
    distance = i_key - i_query  # [T, window + T]; the last row of kv_window has index -1
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
    """Return the last `n` of the first ``n + new_rows[b]`` rows of each request b, [B, n + T, ...] -> [B, n, ...]."""
    i_row = new_rows.unsqueeze(1) + torch.arange(n, device=rows.device)  # [B, n]
    return rows[torch.arange(len(rows), device=rows.device).unsqueeze(1), i_row]


def _new_state(codec: CodecDecoder, batch: int) -> CodecState:
    """Return a state of zeros; since ``past_frames`` is 0, the other tensors are not used before they are written."""
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
