"""One thread that runs frames for all asyncio callers of an engine."""

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Protocol

from ..audio import Audio

# What a stream's reader receives: chunks, and at the end None or the error that ended the stream.
Deliver = Callable[[Audio | BaseException | None], object]
RunUntil = Callable[[Callable[[], bool]], None]
CLOSED = "the model was closed before this speech was complete"


class ChunkStream(Protocol):
    """The part of :class:`SpeechStream` that the thread uses."""

    def __next__(self) -> Audio:
        """Return the next chunk."""

    def is_ready(self) -> bool:
        """Return whether ``next`` can return or raise at once."""

    def close(self) -> None:
        """Stop the stream."""


class FrameThread:
    """Runs an engine's frames in one thread, and delivers the chunks of all streams that were added.

    The thread starts when the first stream is added, and ends when all streams are delivered. Other threads may use the
    engine at the same time. A stream does not wait for its reader: chunks that are not read yet stay in memory.
    """

    def __init__(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._streams: dict[ChunkStream, Deliver] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, stream: ChunkStream, deliver: Deliver, run_until: RunUntil) -> None:
        """Run a stream to its end, and call `deliver` in the thread with each chunk.

        If `deliver` raises a RuntimeError, for example because the event loop is closed, the stream is closed.

        Args:
            stream: the stream.
            deliver: receives the chunks, and at the end None or an error.
            run_until: the engine's method that runs frames until its argument returns True. It is an argument, not an
                attribute, because a cycle of references would keep the engine's memory until a garbage collection.

        Raises:
            RuntimeError: the model was closed.
        """
        if self._pid != os.getpid():  # after a fork: the thread and the lock's holder exist only in the parent
            self._lock, self._pid = threading.Lock(), os.getpid()
            self._streams, self._thread = {}, None
        with self._lock:
            if self._closed:
                raise RuntimeError(CLOSED)
            if self._thread is None:
                thread = threading.Thread(target=self._run, args=(run_until,), name="voxkern frames")
                self._streams[stream] = deliver
                try:
                    thread.start()
                except BaseException:
                    del self._streams[stream]
                    raise
                self._thread = thread
            self._streams[stream] = deliver

    def remove(self, stream: ChunkStream) -> None:
        """Close a stream. Its slot and pages are free at the end of the frame in flight."""
        with self._lock:
            self._streams.pop(stream, None)
        stream.close()

    def close(self) -> None:
        """Close all streams, so that their readers receive a RuntimeError, and wait until the thread has ended."""
        with self._lock:
            self._closed, streams, thread = True, list(self._streams), self._thread
        for stream in streams:
            self._end(stream, RuntimeError(CLOSED))
        if thread is not None:
            thread.join()

    def _run(self, run_until: RunUntil) -> None:
        while streams := self._streams_or_end():
            try:
                run_until(self._any_ready)
            except BaseException as error:  # no stream can go on without frames
                for stream in streams:
                    self._end(stream, error)
            for stream, deliver in streams.items():
                self._deliver_ready(stream, deliver)

    def _streams_or_end(self) -> dict[ChunkStream, Deliver]:
        """Return the streams; if there are none, let the next call of :meth:`add` start a new thread."""
        with self._lock:
            if not self._streams:
                self._thread = None
            return dict(self._streams)

    def _any_ready(self) -> bool:
        with self._lock:
            streams = list(self._streams)
        ready = [stream.is_ready() for stream in streams]  # of every stream: the first call submits its request
        return not ready or any(ready)

    def _deliver_ready(self, stream: ChunkStream, deliver: Deliver) -> None:
        while stream in self._streams and stream.is_ready():
            try:
                chunk = next(stream)
            except StopIteration:
                self._end(stream, None)
            except BaseException as error:
                self._end(stream, error)
            else:
                try:
                    deliver(chunk)
                except RuntimeError:  # the reader's event loop is closed
                    self.remove(stream)

    def _end(self, stream: ChunkStream, last: BaseException | None) -> None:
        """Close a stream, and deliver the end of its chunks, unless another thread has removed the stream before."""
        with self._lock:
            deliver = self._streams.pop(stream, None)
        stream.close()
        if deliver is not None:
            with contextlib.suppress(RuntimeError):  # the reader's event loop is closed
                deliver(last)
