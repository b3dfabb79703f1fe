"""What all routes share: the model, the number of requests in it, and errors that clients may see."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..audio import Audio
from ..tts import TTS
from .errors import APIError, shown
from .formats import Writer
from .metrics import Metrics
from .settings import ServeSettings
from .speech_request import ARGUMENTS

log = logging.getLogger(__name__)


class SpeechService:
    """Generates the speech of all clients on one model.

    Attributes:
        tts: the model.
        settings: names and limits.
        metrics: counts requests.
        closing: whether the server is ending, so that new requests are refused.
        n_admitted: number of requests that wait or run; an utterance of a session counts as one.
        n_sessions: number of open WebSocket sessions.
    """

    def __init__(self, tts: TTS, settings: ServeSettings) -> None:
        self.tts, self.settings, self.metrics = tts, settings, Metrics(tts)
        self.closing, self.n_admitted, self.n_sessions = False, 0, 0
        self._encoder = ThreadPoolExecutor(1, "voxkern encoder")  # the event loop must not wait for mp3

    @property
    def most_connections(self) -> int:
        """The limit of connections: slots, waiting requests, sessions, and 64 more for short requests and errors."""
        return self.tts.max_batch + self.settings.max_waiting + self.settings.max_sessions + 64

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request while it waits or runs.

        Raises:
            APIError: the server is ending, or too many requests wait.
        """
        if self.closing:
            raise APIError(503, "closing", "the server is ending", headers={"retry-after": "5", "connection": "close"})
        if self.n_admitted >= self.tts.max_batch + self.settings.max_waiting:
            message = f"the limit of {self.settings.max_waiting} waiting requests is reached"
            raise APIError(429, "queue_full", message, headers={"retry-after": "1"})
        self.n_admitted += 1
        try:
            yield
        finally:
            self.n_admitted -= 1

    async def chunks(self, text: str, voice: str | None, arguments: Mapping[str, Any]) -> AsyncGenerator[Audio, None]:
        """Return an iterator over the chunks of a text's speech. Generation starts when the first chunk is requested.

        Raises:
            APIError: the voice is unknown, or an argument is wrong.
        """
        with self._api_errors(voice):
            return await self.tts.submit(text, voice, **arguments)

    def check_arguments(self, voice: str | None, arguments: Mapping[str, Any]) -> None:
        """Raise an APIError if the model lacks a voice, or if an argument is wrong for any text."""
        with self._api_errors(voice):
            self.tts.stream("one", voice, **arguments)  # checks all arguments, and runs nothing

    @contextlib.contextmanager
    def _api_errors(self, voice: str | None) -> Iterator[None]:
        """Raise an APIError if the model lacks `voice`, and instead of the model's error about an argument."""
        if voice is not None and voice not in self.tts.voices:
            message = f"voice is {shown(voice)}, but the model has {', '.join(self.tts.voices)}"
            raise APIError(400, "unknown_voice", message, "voice")
        try:
            yield
        except (ValueError, TypeError) as error:
            named = str(error).split(" ")[0]  # messages about an argument begin with its name
            param = {"text": "input"}.get(named, named if named in ARGUMENTS else None)
            raise APIError(400, "invalid_value", str(error), param) from None

    async def finish(self, writer: Writer) -> bytes:
        """Return the bytes that end a sound; another thread encodes a whole sound."""
        return await asyncio.get_running_loop().run_in_executor(self._encoder, writer.finish)

    def api_error(self, error: Exception, request_id: str) -> APIError:
        """Return the error that a client receives, and count it.

        The log has the cause of an unexpected error. An APIError or a timeout is not logged.
        """
        if isinstance(error, APIError):
            known = error
        elif isinstance(error, TimeoutError):
            known = APIError(504, "too_slow", f"the speech was not complete in {self.settings.request_seconds:g} s")
        else:
            log.error("request %s failed", request_id, exc_info=error)
            known = APIError(500, "failed", f"the request failed; the server's log has the cause at {request_id}")
        self.metrics.errors.labels(known.code).inc()
        return known

    def close(self) -> None:
        """End the threads that generate and encode speech."""
        self._encoder.shutdown()
        self.tts.close()
