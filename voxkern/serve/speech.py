"""POST /v1/audio/speech: from a request's body to its sound."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from ..audio import Audio
from ..tts import TTS
from .errors import APIError
from .limits import read_body, while_connected
from .metrics import Metrics
from .reply import Reply
from .settings import ServeSettings
from .speech_request import ARGUMENTS, SpeechRequest, read_request

CLIENT_GONE = 499  # the usual status in logs for a client that has gone; it is never sent
log = logging.getLogger(__name__)


class Speech:
    """Generates the speech of requests, side by side: the ASGI application of one route.

    Attributes:
        closing: whether the server is ending, so that new requests are refused.
    """

    def __init__(self, tts: TTS, settings: ServeSettings, metrics: Metrics) -> None:
        self._tts, self._settings, self._metrics = tts, settings, metrics
        self._n_admitted = 0
        self._encoder = ThreadPoolExecutor(1, "voxkern encoder")  # the event loop must not wait for mp3
        self.closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        reply = Reply(send)
        try:
            async with asyncio.timeout(self._settings.request_seconds):
                body = await read_body(Request(scope, receive), self._settings)
                with self._admitted():
                    await while_connected(self._respond(read_request(body, self._settings), reply), receive)
        except ClientDisconnect:
            reply.status = CLIENT_GONE
            self._metrics.errors.labels("client_gone").inc()
        except Exception as error:
            known = self._api_error(error, reply.id)
            self._metrics.errors.labels(known.code).inc()
            await reply.fail(known, scope, receive)
        self._metrics.requests.labels(str(reply.status)).inc()

    def close(self) -> None:
        """End the threads that generate and encode speech."""
        self._encoder.shutdown()
        self._tts.close()

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """Count a request while it waits or runs.

        Raises:
            APIError: the server is ending, or too many requests wait.
        """
        if self.closing:
            raise APIError(503, "closing", "the server is ending", headers={"retry-after": "5", "connection": "close"})
        if self._n_admitted >= self._tts.max_batch + self._settings.max_waiting:
            message = f"{self._settings.max_waiting} requests are waiting, and no more may wait"
            raise APIError(429, "queue_full", message, headers={"retry-after": "1"})
        self._n_admitted += 1
        try:
            yield
        finally:
            self._n_admitted -= 1

    async def _respond(self, request: SpeechRequest, reply: Reply) -> None:
        """Generate a request's speech, and send it."""
        start, metrics = time.perf_counter(), self._metrics
        seed = request.arguments.setdefault("seed", secrets.randbits(64))
        reply.as_events = request.as_events
        media_type = "text/event-stream" if request.as_events else request.sound_format.media_type
        reply.headers = {"content-type": media_type, "x-seed": str(seed)}
        writer = request.sound_format.writer(self._tts.sampling_rate)
        n_frames, seconds = 0, 0.0
        async with contextlib.aclosing(await self._chunks(request)) as chunks:
            async for chunk in chunks:
                if chunk.seconds and not seconds:
                    metrics.first_sound.observe(time.perf_counter() - start)
                n_frames, seconds = n_frames + chunk.codes.shape[1], seconds + chunk.seconds
                await reply.sound(writer.add(chunk))
        if not seconds:
            raise APIError(500, "no_sound", "the model generated END before any sound: try another seed")
        await reply.sound(await asyncio.get_running_loop().run_in_executor(self._encoder, writer.finish))
        await reply.done({"type": "speech.audio.done", "usage": self._usage(request, n_frames), "ended": chunk.ended})
        metrics.audio_seconds.inc(seconds)
        metrics.real_time_factor.observe((time.perf_counter() - start) / seconds)

    async def _chunks(self, request: SpeechRequest) -> AsyncGenerator[Audio, None]:
        """Return the chunks of a request's speech, which are generated as soon as the first is read.

        Raises:
            APIError: the voice is unknown, or an argument is wrong.
        """
        if request.voice is not None and request.voice not in self._tts.voices:
            message = f"voice is {request.voice!r}, but the model has {', '.join(self._tts.voices)}"
            raise APIError(400, "unknown_voice", message, "voice")
        try:
            return await self._tts.submit(request.text, request.voice, **request.arguments)
        except (ValueError, TypeError) as error:
            named = str(error).split(" ")[0]  # messages about an argument begin with its name
            param = {"text": "input"}.get(named, named if named in ARGUMENTS else None)
            raise APIError(400, "invalid_value", str(error), param) from None

    def _usage(self, request: SpeechRequest, n_frames: int) -> dict[str, int]:
        """Return the tokens of a request in OpenAI's form: those of its prompts, and one for each frame."""
        n_input = self._tts.count_tokens(request.text, request.voice)
        return {"input_tokens": n_input, "output_tokens": n_frames, "total_tokens": n_input + n_frames}

    def _api_error(self, error: Exception, request_id: str) -> APIError:
        """Return the error that a client receives. The log has the cause of an error that is not the client's."""
        if isinstance(error, APIError):
            return error
        if isinstance(error, TimeoutError):
            limit = self._settings.request_seconds
            return APIError(504, "too_slow", f"the speech was not complete in {limit:g} s")
        log.error("request %s failed", request_id, exc_info=error)
        return APIError(500, "failed", f"the request failed; the server's log has the cause at {request_id}")
