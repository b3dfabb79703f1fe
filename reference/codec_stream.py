"""The codec's decoder as codes come: each chunk is decoded once, from a state of fixed size.

What a chunk needs of the past is little: two latents, a window of keys and values a layer, one row before each
transposed convolution, six rows before the last one. The rule for a missing past touches a request's first frame only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec import AudioTokenizer, CodecBlock, CodecTransformer, alibi_slopes
from .convolution import CausalConv1d, CausalConvTranspose1d
from .linear import wide


@dataclass(frozen=True)
class CodecState:
    """What the decoder remembers of B requests; its size never changes.

    Attributes:
        frames: int64 [B], decoded so far.
        tails: the last rows before each convolution, in order: [B, rows, channels].
        rings: the last keys and values of each layer, in order: [2, B, window, H, D].
    """

    frames: Tensor
    tails: list[Tensor]
    rings: list[Tensor]

    @property
    def nbytes(self) -> int:
        """Memory of it all."""
        return sum(t.nbytes for t in (self.frames, *self.tails, *self.rings))


@dataclass(frozen=True)
class _Chunk:
    """The rows of a chunk at one rate: `fresh` [B, 1, 1], nothing before them; `past` and `valid` [B], their counts."""

    fresh: Tensor
    past: Tensor
    valid: Tensor


class CodecStream:
    """Decodes a batch of requests chunk by chunk, into the sound that decoding them whole gives.

    Weight norm is folded when a stream is made: one made before a weight changed goes on with the old one.

    Attributes:
        state: written in place, so its addresses stay.
    """

    def __init__(self, codec: AudioTokenizer, batch: int = 1) -> None:
        """Start `batch` requests.

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
        self._weights = {
            block: fold(block)
            for block in (*codec.decoder_blocks, projection)
            if isinstance(block, CausalConv1d | CausalConvTranspose1d)
        }
        self._weights[projection] = wide(self._weights[projection])
        self.state = _new_state(codec, batch)

    def restart(self, rows: Tensor) -> None:
        """Begin anew where `rows`, bool [B], is true; what was remembered there is never looked at."""
        self.state.frames.masked_fill_(rows, 0)

    @torch.inference_mode()
    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The sound of the next frames.

        Args:
            codes: int64 [B, 1 + K, T] WITHOUT the +2 offset.
            lengths: int64 [B], how many of the T frames each request has, 0..T; None: all have T. What codes hold
                after them is not looked at.

        Returns:
            wide [B, 1, samples_per_frame T]; zeros after a request's own frames.

        Raises:
            ValueError: `codes` or `lengths` has another shape.
        """
        config, (B, T) = self.codec.config, (self.batch, codes.shape[-1])
        self.codec.check_codes(codes)
        if len(codes) != B or (lengths is not None and list(lengths.shape) != [B]):
            raise ValueError(f"codes and lengths must be of {B} requests, got {len(codes)} and {lengths}")
        if lengths is None:
            lengths = torch.full_like(self.state.frames, T)
        has = torch.arange(T, device=codes.device) < lengths.unsqueeze(1)  # [B, T]
        x = self.codec.quantizer(codes * has.unsqueeze(1)).transpose(1, 2)  # [B, T, channels]
        tails, rings, rate = iter(self.state.tails), iter(self.state.rings), 1
        for block in self.codec.decoder_blocks:
            if isinstance(block, CausalConvTranspose1d):
                x = self._upsample(block, x, next(tails), self._chunk(lengths, rate))
                rate *= block.stride
            elif isinstance(block, CausalConv1d):
                x = self._convolve(block, x, next(tails), self._chunk(lengths, rate))
            elif isinstance(block, CodecTransformer):
                x = self._transform(block, x, rings, self._chunk(lengths, rate))
        patches = self._convolve(self.codec.output_proj, wide(x), next(tails), self._chunk(lengths, rate))
        self.state.frames.add_(lengths)
        samples = patches.reshape(B, T, config.samples_per_frame) * has.unsqueeze(2)
        return samples.view(B, 1, T * config.samples_per_frame)

    def _chunk(self, lengths: Tensor, rate: int) -> _Chunk:
        frames = self.state.frames
        return _Chunk((frames == 0).view(-1, 1, 1), frames * rate, lengths * rate)

    def _convolve(self, conv: CausalConv1d, x: Tensor, tail: Tensor, chunk: _Chunk) -> Tensor:
        """[B, T, n_in] -> [B, T, n_out]."""
        n = conv.padding
        missing = x[:, 1 : n + 1].flip(1) if conv.pad_mode == "reflect" else x[:, :1].expand(-1, n, -1)
        rows = torch.cat((torch.where(chunk.fresh, missing, tail), x), dim=1)  # [B, n + T, n_in]
        tail.copy_(_last(rows, chunk.valid, n))
        return self._product(conv, rows, n + 1)

    def _upsample(self, conv: CausalConvTranspose1d, x: Tensor, tail: Tensor, chunk: _Chunk) -> Tensor:
        """[B, T, n_in] -> [B, stride T, n_out]."""
        n = tail.shape[1]
        rows = torch.cat((torch.where(chunk.fresh, 0, tail), x), dim=1)  # [B, n + T, n_in]
        tail.copy_(_last(rows, chunk.valid, n))
        y = self._product(conv, rows, n + 1)  # [B, T, stride n_out]
        return y.reshape(len(y), conv.stride * x.shape[1], -1)

    def _product(self, conv: CausalConv1d | CausalConvTranspose1d, rows: Tensor, taps: int) -> Tensor:
        """Each window of `taps` rows times the folded weight; torch's own convolutions are slow on a few rows."""
        return F.linear(rows.unfold(1, taps, 1).flatten(2), self._weights[conv])

    def _transform(self, transformer: CodecTransformer, x: Tensor, rings: Iterator[Tensor], chunk: _Chunk) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        for layer in transformer.layers:
            assert isinstance(layer, CodecBlock)
            x = layer(x, partial(_attend, next(rings), chunk))
        return x


@torch.no_grad()
def fold(conv: CausalConv1d | CausalConvTranspose1d) -> Tensor:
    """A convolution's weight, its norm folded in, as that of a product on windows of rows.

    Returns:
        [n_out, n_in taps], with a row's taps side by side, the oldest first. A transposed convolution of stride s makes
        s rows of each window, [s n_out, n_in taps], and its taps are those rows of x that reach them.
    """
    weight: Tensor = conv.conv.weight
    if isinstance(conv, CausalConv1d):
        return weight.flatten(1)
    n_in, n_out, kernel = weight.shape
    weight = F.pad(weight, (0, -kernel % conv.stride)).view(n_in, n_out, -1, conv.stride)
    return weight.permute(3, 1, 0, 2).flip(-1).reshape(conv.stride * n_out, -1)  # tap m is the row m before the newest


def _attend(ring: Tensor, chunk: _Chunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """:func:`window_attention` of a chunk's rows, [B, T, H, D] each, over the ring's keys and their own."""
    T, H = q.shape[1:3]
    window = ring.shape[2]
    i_key, i_query = torch.arange(-window, T, device=q.device), torch.arange(T, device=q.device).unsqueeze(1)
    distance = i_key - i_query  # [T, window + T], as the ring's last row is -1
    exists = i_key >= -chunk.past.view(-1, 1, 1, 1)  # [B, 1, 1, window + T]
    seen = (distance <= 0) & (distance >= -window) & exists
    slopes = alibi_slopes(H).to(q.device).view(H, 1, 1)
    bias = torch.where(seen, slopes * distance, -torch.inf).to(q.dtype)  # [B, H, T, window + T]
    live = exists[..., :window].permute(0, 3, 1, 2)  # [B, window, 1, 1]
    keys, values = (torch.cat((torch.where(live, old, 0), new), dim=1) for old, new in zip(ring, (k, v), strict=True))
    ring[0].copy_(_last(keys, chunk.valid, window))
    ring[1].copy_(_last(values, chunk.valid, window))
    q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, bias).transpose(1, 2)


def _last(rows: Tensor, valid: Tensor, n: int) -> Tensor:
    """The `n` rows before the end of each request, which is at n + `valid`: [B, n + T, ...] -> [B, n, ...]."""
    i_row = valid.unsqueeze(1) + torch.arange(n, device=rows.device)  # [B, n]
    return rows[torch.arange(len(rows), device=rows.device).unsqueeze(1), i_row]


def _new_state(codec: AudioTokenizer, batch: int) -> CodecState:
    """Zeros; which of them are looked at depends on the frames."""
    config, weight = codec.config, codec.output_proj.conv.weight
    zeros = partial(torch.zeros, dtype=weight.dtype, device=weight.device)
    tails, rings = [], []
    for block in codec.decoder_blocks:
        if isinstance(block, CausalConvTranspose1d):
            kernel = block.conv.weight.shape[2]
            tails.append(zeros(batch, -(-kernel // block.stride) - 1, config.dim))
        elif isinstance(block, CausalConv1d):
            tails.append(zeros(batch, block.padding, config.latent_dim))
        elif isinstance(block, CodecTransformer):
            shape = (2, batch, block.window, config.n_heads, config.head_dim)
            rings += [zeros(*shape) for _ in block.layers]
    tails.append(wide(zeros(batch, codec.output_proj.padding, config.dim)))
    return CodecState(torch.zeros(batch, dtype=torch.int64, device=weight.device), tails, rings)
