"""Decode the frames of all requests to samples, on the reference codec or on the fused codec.

``generate`` and ``stream`` decode in the same way. The joined chunks of a stream therefore equal the sound of
``generate`` to the last bit, for all chunk sizes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import VoxtralTTS
from ..reference.config import N_SPECIAL_CODES
from .cuda_graphs import Capture, weight_addresses
from .runner import FrameOutput, block_rows


class CapturedCodecStream:
    """Decodes one frame of a fused codec stream by replaying a CUDA graph."""

    def __init__(self, stream: Any, capture: Capture) -> None:
        """`stream`: a :class:`voxkern.fused.codec.FusedCodecStream` in which no request has begun."""
        past_frames = stream.state.past_frames
        self.state, self.restart = stream.state, stream.restart
        self._codes = past_frames.new_zeros(len(past_frames), 1 + stream.codec.config.acoustic_dim, 1)
        self._new_frames = torch.zeros_like(past_frames)
        self._replay, self._samples = capture(lambda: stream.chunk(self._codes, self._new_frames))

    def decode(self, codes: Tensor, new_frames: Tensor) -> Tensor:
        """Decode one frame, as the stream does, into memory that the next frame overwrites.

        Args:
            codes: int64 [B, 37, 1] without the +2 offset.
            new_frames: int64 [B], 1 for each request with a new frame, else 0.

        Returns:
            fp32 (fp64 in an fp64 model) [B, 1, samples_per_frame].
        """
        self._codes.copy_(codes)
        self._new_frames.copy_(new_frames)
        self._replay()
        samples: Tensor = self._samples
        return samples


class CodecRunner:
    """Decodes one frame of all running requests at a time; each slot has one row.

    The reference codec runs in blocks of a fixed number of rows. The fused codec runs all rows in one block, because a
    row's bits from the fused codec do not depend on the number of rows.

    Attributes:
        sampling_rate: samples per second.
    """

    def __init__(self, model: VoxtralTTS, n_slots: int, capture: Capture | None = None) -> None:
        """Make streams for `n_slots` slots; with `capture`, the frames of a fused codec are captured as a graph."""
        is_fused = "stream" in vars(model.audio_tokenizer)
        self.sampling_rate = model.config.codec.sampling_rate
        self._codec, self._n_slots = model.audio_tokenizer, n_slots
        self._rows = n_slots if is_fused else block_rows(n_slots)
        self._n_blocks, self._capture = -(-n_slots // self._rows), capture if is_fused else None
        self._streams: list[Any] = []  # reference, fused or captured streams, one per block
        self._weights: Any = None
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Restart all streams, or rebuild the streams if the codec's weights changed.

        The engine calls this when no request is running.
        """
        folded, addresses = self._codec.folded_weights(), weight_addresses(self._codec)
        if self._streams and folded is self._weights[0] and addresses == self._weights[1]:
            every_row = torch.ones(self._rows, dtype=torch.bool, device=folded.weights[0].device)
            for stream in self._streams:
                stream.restart(every_row)
            return
        self._weights = folded, addresses
        self._streams = [self._codec.stream(self._rows) for _ in range(self._n_blocks)]
        if self._capture is not None:
            self._streams = [CapturedCodecStream(stream, self._capture) for stream in self._streams]

    def restart(self, slot: int) -> None:
        """Reset the streaming state of a slot for a new request."""
        stream, row = self._streams[slot // self._rows], slot % self._rows
        stream.restart(torch.arange(self._rows, device=stream.state.past_frames.device) == row)

    def decode(self, output: FrameOutput, slots: list[int]) -> Tensor:
        """Decode a frame to samples, fp32 [n_slots, samples_per_frame].

        Only the rows of `slots` are meaningful. A row of `slots` has zeros if its ``output.valid`` is 0.
        """
        padding = self._n_blocks * self._rows - self._n_slots
        codes = F.pad(output.codes - N_SPECIAL_CODES, (0, 0, 0, padding)).unsqueeze(2)  # [rows, 37, 1]
        valid = F.pad(output.valid, (0, padding))
        samples = torch.zeros(
            len(codes), self._codec.config.samples_per_frame, dtype=torch.float32, device=codes.device
        )
        for i_block in sorted({slot // self._rows for slot in slots}):
            rows = slice(i_block * self._rows, (i_block + 1) * self._rows)
            samples[rows] = self._streams[i_block].decode(codes[rows], valid[rows])[:, 0]
        return samples[: self._n_slots]
