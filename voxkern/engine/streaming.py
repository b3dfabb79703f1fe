"""Deliver a request's audio in chunks while its frames are generated, also for asyncio."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
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

    Attributes:
        engine: the engine that runs the requests.
    """

    def __init__(self, engine: Engine, requests: list[Request], sizes: Iterator[int]) -> None:
        """`sizes`: frames of each chunk; the last chunk of a request may have fewer."""
        self.engine, self._requests, self._sizes = engine, deque(requests), sizes
        self._size = next(sizes)
        self._state: RequestState | None = None
        self._ended, self._closed = True, False
        self._first_sound: float | None = None

    def __iter__(self) -> Iterator[Audio]:
        return self

    def __next__(self) -> Audio:
        """Run frames until the next chunk is complete, and return it.

        If a request fails, its frames that are left are returned first. The error is raised when none is left.
        """
        while (state := self._current()) is not None:
            try:
                self.engine.wait(state, self._size)
            except BaseException:
                self.close()
                raise
            if self._closed:
                break
            if not self._is_over(state) or not self._requests:
                return self._take(state)
        raise StopIteration

    def is_ready(self) -> bool:
        """Return whether ``next`` can return or raise at once; the first call submits the stream's first request."""
        state = self._current()
        return state is None or state.finished or len(state.codes) >= self._size

    def close(self) -> None:
        """Stop the stream; any thread may call this at any time."""
        self._closed = True  # before `_state` is read: `_current` reads them in the other order
        state = self._state
        if state is not None:
            self.engine.cancel(state)

    def __del__(self) -> None:
        self.close()

    def _current(self) -> RequestState | None:
        """Return the request of the next frames, and submit it if need be; None after the last request."""
        if self._state is not None and self._is_over(self._state) and self._requests:
            self._ended, self._state = self._ended and self._state.ended, None
            self._size = next(self._sizes)  # an empty chunk that is left out counts as a chunk
        if self._state is None and self._requests and not self._closed:
            self._state = self.engine.submit(self._requests.popleft())
            if self._closed:  # another thread has closed the stream just now
                self.engine.cancel(self._state)
        return None if self._closed else self._state

    def _take(self, state: RequestState) -> Audio:
        """Return the next chunk of a request."""
        chunk = state.take(self._size)
        self._size = next(self._sizes)
        if self._is_over(state):
            self._ended, self._state = self._ended and state.ended, None
            chunk = replace(chunk, ended=not self._requests and self._ended)
        if self._first_sound is None:
            self._first_sound = chunk.timings.first_sound
        return replace(chunk, timings=replace(chunk.timings, first_sound=self._first_sound))

    def _is_over(self, state: RequestState) -> bool:
        """Return whether a request has ended without an error, and all its frames are taken."""
        return state.finished and not state.codes and state.error is None


async def iterate(stream: SpeechStream) -> AsyncGenerator[Audio, None]:
    """Iterate over a stream's chunks, which the engine's thread generates; close the stream when the iteration ends."""
    loop, thread = asyncio.get_running_loop(), stream.engine.frame_thread
    received: asyncio.Queue[Audio | BaseException | None] = asyncio.Queue()
    thread.add(stream, lambda item: loop.call_soon_threadsafe(received.put_nowait, item), stream.engine.run_until)
    try:
        while (item := await received.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        thread.remove(stream)
