"""Decode the frames of all requests to samples, on the reference codec or on the fused codec.

``generate`` and ``stream`` decode in the same way. The joined chunks of a stream therefore equal the sound of
``generate`` to the last bit, for all chunk sizes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import VoxtralTTS
from .cuda_graphs import weight_addresses
from .runner import FrameOutput, block_rows


class CodecRunner:
    """Decodes one frame of all running requests at a time; each slot has one row.

    The reference codec runs in blocks of a fixed number of rows. The fused codec runs all rows in one block, because a
    row's bits from the fused codec do not depend on the number of rows.

    Attributes:
        sampling_rate: samples per second.
        is_fused: whether the codec decodes through kernels.
        streams: reference or fused streams, one per block. The list is a new object if the codec's weights changed.
    """

    def __init__(self, model: VoxtralTTS, n_slots: int) -> None:
        """Make streams for `n_slots` slots."""
        self.is_fused = "stream" in vars(model.audio_tokenizer)
        self.sampling_rate = model.config.codec.sampling_rate
        self._codec, self._n_slots = model.audio_tokenizer, n_slots
        self._rows = n_slots if self.is_fused else block_rows(n_slots)
        self.streams: list[Any] = []
        self._weights: Any = None
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Restart all streams, or rebuild the streams if the codec's weights changed.

        The engine calls this when no request is running.
        """
        folded, addresses = self._codec.folded_weights(), weight_addresses(self._codec)
        if self.streams and folded is self._weights[0] and addresses == self._weights[1]:
            every_row = torch.ones(self._rows, dtype=torch.bool, device=folded.weights[0].device)
            for stream in self.streams:
                stream.restart(every_row)
            return
        self._weights = folded, addresses
        self.streams = [self._codec.stream(self._rows) for _ in range(-(-self._n_slots // self._rows))]

    def restart(self, slot: int) -> None:
        """Reset the streaming state of a slot for a new request."""
        stream, row = self.streams[slot // self._rows], slot % self._rows
        stream.restart(torch.arange(self._rows, device=stream.state.past_frames.device) == row)

    def launch(self, codes: Tensor, valid: Tensor) -> Tensor:
        """Launch the kernels of the fused codec that decode one frame, without any PyTorch operator but views.

        Args:
            codes: int64 [n_slots, 37], contiguous, without the +2 offset.
            valid: int64 [n_slots], 1 for a row with a new frame. The state of any other row stays as it is.

        Returns:
            fp32 [n_slots, samples_per_frame], which the next frame overwrites; zeros in rows without a new frame.
        """
        samples: Tensor = self.streams[0].chunk(codes.unsqueeze(2), valid)
        return samples[:, 0]

    def decode(self, output: FrameOutput) -> Tensor:
        """Decode a frame to samples, fp32 [n_slots, samples_per_frame].

        Only the rows of ``output.slots`` are meaningful. Such a row has zeros if its ``output.valid`` is 0.
        """
        if self.is_fused:
            return self.launch(output.codes, output.valid)
        padding = len(self.streams) * self._rows - self._n_slots
        codes = F.pad(output.codes, (0, 0, 0, padding)).unsqueeze(2)  # [rows, 37, 1]
        valid = F.pad(output.valid, (0, padding))
        samples = torch.zeros(
            len(codes), self._codec.config.samples_per_frame, dtype=torch.float32, device=codes.device
        )
        for i_block in sorted({slot // self._rows for slot in output.slots}):
            rows = slice(i_block * self._rows, (i_block + 1) * self._rows)
            samples[rows] = self.streams[i_block].decode(codes[rows], valid[rows])[:, 0]
        return samples[: self._n_slots]
