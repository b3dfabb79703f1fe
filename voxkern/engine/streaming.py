"""Deliver a request's audio in chunks while its frames are generated, also for asyncio."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ..audio import Audio
from .engine import Engine
from .request import Request, RequestState


def chunk_sizes(first: int, most: int) -> Iterator[int]:
    """Yield the number of frames of each chunk: `first`, then twice as many each time, up to `most`.

    So the first chunk is ready early. Each next chunk is ready before the previous chunk has been played, if a frame of
    80 ms is generated in less than 40 ms.
    """
    while True:
        yield first
        first = min(2 * first, most)


class SpeechStream:
    """Runs requests one after the other, and returns their audio in chunks.

    The last chunk may be empty. In the last chunk, `ended` is True if the model ended every request by END; in earlier
    chunks `ended` is False. Nothing runs before the first chunk is requested. Closing or dropping the stream stops the
    work and frees the memory in use.
    """

    def __init__(self, engine: Engine, requests: list[Request], sizes: Iterator[int]) -> None:
        """`sizes`: frames of each chunk; the last chunk of a request may have fewer."""
        self._engine, self._requests, self._sizes = engine, deque(requests), sizes
        self._state: RequestState | None = None
        self._ended, self._closed = True, False
        self._first_sound: float | None = None

    def __iter__(self) -> Iterator[Audio]:
        return self

    def __next__(self) -> Audio:
        """Run frames until the next chunk is complete, and return it.

        If a request fails, its frames that are left are returned first. The error is raised when none is left.
        """
        while not self._closed and (self._state is not None or self._requests):
            state = self._state = self._state or self._engine.submit(self._requests.popleft())
            if self._closed:  # another thread has closed the stream just now
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
            if state.finished and not state.codes and state.error is None:
                self._ended, self._state = self._ended and state.ended, None
                last = not self._requests
                chunk = replace(chunk, ended=last and self._ended)
                if last or chunk.codes.size:
                    return self._timed(chunk)
            else:
                return self._timed(chunk)
        raise StopIteration

    def close(self) -> None:
        """Stop the stream; any thread may call this at any time."""
        self._closed, state = True, self._state
        if state is not None:
            self._engine.cancel(state)

    def __del__(self) -> None:
        self.close()

    def _timed(self, chunk: Audio) -> Audio:
        if self._first_sound is None:
            self._first_sound = chunk.timings.first_sound
        return replace(chunk, timings=replace(chunk.timings, first_sound=self._first_sound))


async def iterate_in_thread(stream: SpeechStream) -> AsyncIterator[Audio]:
    """Iterate over a stream's chunks, which a thread computes; close the stream when the iteration ends.

    Each stream has a separate thread. asyncio's own pool has few threads: many streams would wait for each other.
    """
    own = ThreadPoolExecutor(1, "voxkern")
    try:
        while (chunk := await asyncio.get_running_loop().run_in_executor(own, next, stream, None)) is not None:
            yield chunk
    finally:
        stream.close()
        own.shutdown(wait=False)
