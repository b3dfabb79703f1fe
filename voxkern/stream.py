"""Sound as it is made: codes go through the codec as they come, and what was decoded once is never decoded again.

``generate`` decodes in the same way, so that a stream's chunks, whatever their sizes, are its sound to the last bit.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .audio import Audio
from .engine import Engine, Job
from .graphs import Capture, addresses
from .reference import VoxtralTTS
from .reference.config import N_SPECIAL_CODES
from .slots import Request, Said, block_rows


class CapturedStream:
    """A stream of the codec on kernels, which decodes a frame by a graph of its own."""

    def __init__(self, stream: Any, capture: Capture) -> None:
        """`stream`: a :class:`voxkern.twins.codec.CodecTwinStream`, none of whose requests has begun."""
        frames = stream.state.frames
        self.state, self.restart = stream.state, stream.restart
        self._codes = frames.new_zeros(len(frames), 1 + stream.codec.config.acoustic_dim, 1)
        self._lengths = torch.zeros_like(frames)
        self._replay, self._sound = capture(lambda: stream.chunk(self._codes, self._lengths))

    def decode(self, codes: Tensor, lengths: Tensor) -> Tensor:
        """The sound of one frame, as the stream says it, in memory that the next frame writes again."""
        self._codes.copy_(codes)
        self._lengths.copy_(lengths)
        self._replay()
        sound: Tensor = self._sound
        return sound


class Decoder:
    """The codec for many requests, a frame at a time.

    On the reference in blocks of a fixed number of rows; on kernels, whose bits do not depend on rows, in one of all.

    Attributes:
        sampling_rate: of the sound.
    """

    def __init__(self, model: VoxtralTTS, n: int, capture: Capture | None = None) -> None:
        """For `n` slots; `capture` makes a frame a graph, if the codec is on kernels."""
        on_kernels = "stream" in vars(model.audio_tokenizer)
        self.sampling_rate = model.config.codec.sampling_rate
        self._codec, self._n, self._rows = model.audio_tokenizer, n, n if on_kernels else block_rows(n)
        self._n_blocks, self._capture = -(-n // self._rows), capture if on_kernels else None
        self._streams: list[Any] = []  # of the reference, or of the kernels, or captured
        self._weights: Any = None
        self.begin()

    def begin(self) -> None:
        """Look at the codec's weights as they are now; streams of the same ones begin anew."""
        folded, where = self._codec.folded(), addresses(self._codec)
        if self._streams and folded is self._weights[0] and where == self._weights[1]:
            everybody = torch.ones(self._rows, dtype=torch.bool, device=folded.weights[0].device)
            for stream in self._streams:
                stream.restart(everybody)
            return
        self._weights = folded, where
        self._streams = [self._codec.stream(self._rows) for _ in range(self._n_blocks)]
        if self._capture is not None:
            self._streams = [CapturedStream(stream, self._capture) for stream in self._streams]

    def restart(self, slot: int) -> None:
        """Another request begins in a slot."""
        stream, row = self._streams[slot // self._rows], slot % self._rows
        stream.restart(torch.arange(self._rows, device=stream.state.frames.device) == row)

    def decode(self, said: Said, slots: list[int]) -> Tensor:
        """The sound of a frame, wide [slots, samples]; zeros where nobody is, or says END."""
        padding = self._n_blocks * self._rows - self._n
        codes = F.pad(said.codes - N_SPECIAL_CODES, (0, 0, 0, padding)).unsqueeze(2)  # [rows, 37, 1]
        kept = F.pad(said.kept, (0, padding))
        samples = torch.zeros(len(codes), self._codec.config.samples_per_frame, device=codes.device)
        for i_block in sorted({slot // self._rows for slot in slots}):
            rows = slice(i_block * self._rows, (i_block + 1) * self._rows)
            samples[rows] = self._streams[i_block].decode(codes[rows], kept[rows])[:, 0]
        return samples[: self._n]


def chunk_sizes(first: int, most: int) -> Iterator[int]:
    """Frames of each chunk: `first`, then twice as many each time, up to `most`.

    So that the first is heard soon, and a next one is ready before the last is over if a frame takes less than half of
    its own length.
    """
    while True:
        yield first
        first = min(2 * first, most)


class Speech:
    """Parts spoken one after the other, in chunks; the last chunk may be empty, and says how the whole ended.

    Nothing runs before the first chunk is asked for. Closing it, or dropping it, ends the work and frees its memory.
    """

    def __init__(self, engine: Engine, parts: list[Request], sizes: Iterator[int]) -> None:
        """`sizes`: frames of each chunk; a part's last may have fewer."""
        self._engine, self._parts, self._sizes = engine, deque(parts), sizes
        self._job: Job | None = None
        self._ended, self._closed = True, False
        self._first_sound: float | None = None

    def __iter__(self) -> Iterator[Audio]:
        """Itself."""
        return self

    def __next__(self) -> Audio:
        """The next chunk, worked for until it is there."""
        while not self._closed and (self._job is not None or self._parts):
            job = self._job = self._job or self._engine.submit(self._parts.popleft())
            if self._closed:  # in another thread, just now
                job.cancel()
                break
            size = next(self._sizes)
            try:
                job.wait(size)
            except BaseException:
                self.close()
                raise
            if self._closed:
                break
            chunk = job.take(size)
            if job.over and not job.codes:
                self._ended, self._job = self._ended and job.ended, None
                last = not self._parts
                chunk = replace(chunk, ended=last and self._ended)
                if last or chunk.codes.size:
                    return self._timed(chunk)
            else:
                return self._timed(chunk)
        raise StopIteration

    def close(self) -> None:
        """Say nothing more; from any thread, at any time."""
        self._closed, job = True, self._job
        if job is not None:
            job.cancel()

    def __del__(self) -> None:
        """Dropped is closed."""
        self.close()

    def _timed(self, chunk: Audio) -> Audio:
        if self._first_sound is None:
            self._first_sound = chunk.timings.first_sound
        return replace(chunk, timings=replace(chunk.timings, first_sound=self._first_sound))


async def in_threads(speech: Speech) -> AsyncIterator[Audio]:
    """Its chunks, each worked for in a thread of its own; what ends the iteration ends the work.

    Not in asyncio's common threads: there are few of them, and who waits for one hears nothing meanwhile.
    """
    own = ThreadPoolExecutor(1, "voxkern")
    try:
        while (chunk := await asyncio.get_running_loop().run_in_executor(own, next, speech, None)) is not None:
            yield chunk
    finally:
        speech.close()
        own.shutdown(wait=False)
