"""POST /v1/audio/speech: from a request's body to its sound."""

import asyncio
import contextlib
import secrets
import time

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from .errors import no_sound
from .limits import read_body, while_connected
from .reply import Reply
from .service import SpeechService
from .speech_request import SpeechRequest, read_request

LAST_SECONDS = 5.0  # the most seconds for sending an error
CLIENT_GONE = 499  # the usual status in logs for a client that has gone; it is never sent


class Speech:
    """Answers requests for speech, side by side: the ASGI application of one route."""

    def __init__(self, service: SpeechService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        reply, service, settings = Reply(send), self._service, self._service.settings
        try:
            async with asyncio.timeout(settings.request_seconds):
                request = read_request(await read_body(Request(scope, receive), settings), settings)
                with service.admitted():
                    await while_connected(self._respond(request, reply), receive)
        except ClientDisconnect:
            reply.status = CLIENT_GONE
            service.metrics.errors.labels("client_gone").inc()
        except Exception as error:
            known = service.api_error(error, reply.id)
            with contextlib.suppress(TimeoutError):  # a client that does not read gets no error either
                async with asyncio.timeout(LAST_SECONDS):
                    await reply.fail(known, scope, receive)
        service.metrics.requests.labels(str(reply.status)).inc()

    async def _respond(self, request: SpeechRequest, reply: Reply) -> None:
        """Generate a request's speech, and send it."""
        start, service = time.perf_counter(), self._service
        seed = request.arguments.setdefault("seed", secrets.randbits(64))
        reply.as_events = request.as_events
        media_type = "text/event-stream" if request.as_events else request.sound_format.media_type
        reply.headers = {"content-type": media_type, "x-seed": str(seed)}
        writer = request.sound_format.writer(service.tts.sampling_rate)
        n_frames, seconds = 0, 0.0
        chunks = await service.chunks(request.text, request.voice, request.arguments)
        n_input = service.tts.count_tokens(request.text, request.voice) if request.as_events else 0
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                if chunk.seconds and not seconds:
                    service.metrics.first_sound.observe(time.perf_counter() - start)
                n_frames, seconds = n_frames + chunk.codes.shape[1], seconds + chunk.seconds
                await reply.sound(writer.add(chunk))
        if not seconds:
            raise no_sound()
        await reply.sound(await service.finish(writer))
        usage = {"input_tokens": n_input, "output_tokens": n_frames, "total_tokens": n_input + n_frames}
        await reply.done({"type": "speech.audio.done", "usage": usage, "ended": chunk.ended})
        service.metrics.audio_seconds.inc(seconds)
        service.metrics.real_time_factor.observe((time.perf_counter() - start) / seconds)
