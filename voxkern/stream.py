"""Sound as it is made: codes go through the codec as they come, and what was decoded once is never decoded again.

``generate`` decodes in the same way, so that a stream's chunks, whatever their sizes, are its sound to the last bit.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .audio import Audio
from .engine import Engine, Job
from .reference import VoxtralTTS
from .reference.config import N_SPECIAL_CODES
from .slots import Request, Said, block_rows


class Decoder:
    """The codec for many requests, a frame at a time, in blocks of a fixed number of rows.

    Attributes:
        sampling_rate: of the sound.
    """

    def __init__(self, model: VoxtralTTS, n: int) -> None:
        """For `n` slots."""
        self.sampling_rate = model.config.codec.sampling_rate
        self._codec, self._n, self._rows = model.audio_tokenizer, n, block_rows(n)
        self._n_blocks = -(-n // self._rows)
        self.begin()

    def begin(self) -> None:
        """Look at the codec's weights as they are now."""
        self._streams = [self._codec.stream(self._rows) for _ in range(self._n_blocks)]

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
    """Its chunks, each worked for in a thread of its own; what ends the iteration ends the work."""
    try:
        while (chunk := await asyncio.to_thread(next, speech, None)) is not None:
            yield chunk
    finally:
        speech.close()
