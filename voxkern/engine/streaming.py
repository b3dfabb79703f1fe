"""Deliver a request's audio in chunks, as its frames are generated; also for asyncio."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ..audio import Audio
from .engine import Engine
from .request import Request, RequestState


def chunk_sizes(first: int, most: int) -> Iterator[int]:
    """Frames of each chunk: `first`, then twice as many each time, up to `most`.

    The first chunk is then ready early, and each next one is ready before the last has been played if a frame takes
    less than half of its own length.
    """
    while True:
        yield first
        first = min(2 * first, most)


class SpeechStream:
    """Requests run one after the other, delivered in chunks; the last chunk may be empty, and has how the whole ended.

    Nothing runs before the first chunk is requested. Closing the stream, or dropping it, ends the work and frees its
    memory.
    """

    def __init__(self, engine: Engine, requests: list[Request], sizes: Iterator[int]) -> None:
        """`sizes`: frames of each chunk; a request's last may have fewer."""
        self._engine, self._requests, self._sizes = engine, deque(requests), sizes
        self._state: RequestState | None = None
        self._ended, self._closed = True, False
        self._first_sound: float | None = None

    def __iter__(self) -> Iterator[Audio]:
        """Return the stream itself."""
        return self

    def __next__(self) -> Audio:
        """Run frames until the next chunk is complete."""
        while not self._closed and (self._state is not None or self._requests):
            state = self._state = self._state or self._engine.submit(self._requests.popleft())
            if self._closed:  # in another thread, just now
                self._engine.cancel(state)
                break
            size = next(self._sizes)
            try:
                self._engine.wait(state, size)
            except BaseException:
                self.close()
                raise
            if self._closed:
                break
            chunk = state.take(size)
            if state.finished and not state.codes:
                self._ended, self._state = self._ended and state.ended, None
                last = not self._requests
                chunk = replace(chunk, ended=last and self._ended)
                if last or chunk.codes.size:
                    return self._timed(chunk)
            else:
                return self._timed(chunk)
        raise StopIteration

    def close(self) -> None:
        """Stop the stream; from any thread, at any time."""
        self._closed, state = True, self._state
        if state is not None:
            self._engine.cancel(state)

    def __del__(self) -> None:
        """Close a stream that is dropped."""
        self.close()

    def _timed(self, chunk: Audio) -> Audio:
        if self._first_sound is None:
            self._first_sound = chunk.timings.first_sound
        return replace(chunk, timings=replace(chunk.timings, first_sound=self._first_sound))


async def iterate_in_thread(stream: SpeechStream) -> AsyncIterator[Audio]:
    """Iterate over a stream's chunks, each of which is run in a thread; what ends the iteration closes the stream.

    The thread is the stream's own: asyncio's common threads are few, and a stream that waits for one would stall.
    """
    own = ThreadPoolExecutor(1, "voxkern")
    try:
        while (chunk := await asyncio.get_running_loop().run_in_executor(own, next, stream, None)) is not None:
            yield chunk
    finally:
        stream.close()
        own.shutdown(wait=False)
