"""WS /v1/audio/speech/stream: text that arrives in pieces, and its sound sentence by sentence.

The protocol is vLLM-Omni's. A client sends JSON messages:

- ``session.config`` first, and again between utterances: the fields of :class:`SessionConfig`;
- ``input.text`` with a piece of text, as often as it likes;
- ``input.done`` at the end of an utterance;
- ``session.close`` to end the session;
- ``cancel``, which vLLM-Omni lacks, to drop the utterance at once.

The server answers each sentence with ``audio.start``, its sound in binary messages, and ``audio.done``. At the end of
an utterance it sends ``session.done``. An ``error`` concerns this session alone.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from ..text import split_sentences
from .errors import APIError
from .service import SpeechService
from .session_config import SessionConfig, read_config
from .speaker import EndOfUtterance, Sentence, Speaker, error_message
from .speech_request import read_object, wrong

POLICY_VIOLATION, TRY_AGAIN = 1008, 1013  # close codes of RFC 6455 and of its registry
CHARS_AHEAD = 4  # a session reads no more text while this many times max_chars are not sent


async def run_session(websocket: WebSocket, service: SpeechService) -> None:
    """Accept a client's WebSocket, and run its session; refuse it if too many sessions are open."""
    if service.n_sessions >= service.settings.max_sessions:
        error = APIError(429, "too_many_sessions", f"{service.n_sessions} sessions are open, and no more may be")
        await websocket.send_denial_response(error.response())
        return
    service.n_sessions += 1
    try:
        await websocket.accept()
        await SpeechSession(websocket, service).run()
    finally:
        service.n_sessions -= 1


class SpeechSession:
    """Runs one client's session."""

    def __init__(self, websocket: WebSocket, service: SpeechService) -> None:
        self._websocket, self._service, self._settings = websocket, service, service.settings
        self._id = secrets.token_hex(8)
        self._config: SessionConfig | None = None
        self._speaker = Speaker(service, self._send, self._id)
        self._place: contextlib.ExitStack | None = None  # the open utterance's place in the server's queue
        self._utterance, self._n_sentences, self._text = 0, 0, ""

    async def run(self) -> None:
        """Answer messages until the client closes the session, leaves, or breaks the protocol before its first text."""
        receiving: asyncio.Task[bytes] | None = None
        try:
            while True:
                receiving = receiving or asyncio.create_task(self._receive())
                await asyncio.wait(
                    (receiving, self._speaker.sending),
                    timeout=self._settings.idle_seconds,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if self._speaker.sending.done():
                    return await self._speaker.sending  # raises the error that ended it
                if receiving.done():
                    message, receiving = receiving.result(), None
                    if not await self._handle(message):
                        return
                elif not self._speaker.is_busy:
                    seconds = f"{self._settings.idle_seconds:g}"
                    await self._end(APIError(408, "idle", f"no message arrived in {seconds} s"), POLICY_VIOLATION)
                    return
        except WebSocketDisconnect:
            return
        finally:
            if receiving is not None:
                receiving.cancel()
                await asyncio.gather(receiving, return_exceptions=True)
            await self._drop_utterance()

    async def _receive(self) -> bytes:
        """Return the next message, or no bytes for a binary message, which the protocol does not have.

        Raises:
            WebSocketDisconnect: the client has gone.
        """
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        return (message.get("text") or "").encode()

    async def _handle(self, body: bytes) -> bool:
        """Handle one message; return whether the session goes on."""
        try:
            message = read_object(body)
            kind = message.get("type")
            if kind == "session.config":
                self._configure(message)
            elif self._config is None:
                raise wrong("no_config", None, f"the first message must be session.config, got {kind}")
            elif kind == "input.text":
                await self._add_text(message.get("text"), self._config)
            elif kind == "input.done":
                self._end_utterance(self._config)
            elif kind == "cancel":
                await self._cancel()
            elif kind == "session.close":
                await self._websocket.close()
                return False
            else:
                raise wrong("unknown_message", "type", f"unknown message {kind!r}")
        except APIError as error:
            self._service.metrics.errors.labels(error.code).inc()
            if error.status in (429, 503):  # the server has no place for this utterance
                await self._end(error, TRY_AGAIN)
                return False
            if self._config is None:
                await self._end(error, POLICY_VIOLATION)
                return False
            await self._send(error_message(error))
        return True

    def _configure(self, message: Mapping[str, Any]) -> None:
        if self._place is not None:
            raise wrong("open_utterance", None, "session.config must come between utterances: send input.done first")
        config = read_config(message, self._settings)
        self._service.check_voice(config.voice)
        self._config = config

    async def _add_text(self, text: Any, config: SessionConfig) -> None:
        if not isinstance(text, str):
            raise wrong("wrong_type", "text", f"text must be a string, got {type(text).__name__}")
        if len(self._text) + len(text) > self._settings.max_chars:
            most = self._settings.max_chars
            raise wrong("input_too_long", "text", f"a message and a sentence may have at most {most} characters")
        if self._place is None:
            self._place = contextlib.ExitStack()
            self._place.enter_context(self._service.admitted())
        self._text += text
        if config.by_sentence:
            sentences, self._text = split_sentences(self._text)
            for sentence in sentences:
                self._speak(sentence, config)
        await self._speaker.wait_until_fewer_chars(CHARS_AHEAD * self._settings.max_chars)

    def _end_utterance(self, config: SessionConfig) -> None:
        if self._text.strip():
            self._speak(self._text.strip(), config)
        place = self._place or contextlib.ExitStack()
        self._speaker.add(EndOfUtterance(self._utterance, self._n_sentences, place))
        self._begin_utterance()

    def _begin_utterance(self) -> None:
        self._place = None
        self._utterance, self._n_sentences, self._text = self._utterance + 1, 0, ""

    def _speak(self, text: str, config: SessionConfig) -> None:
        self._speaker.add(Sentence(self._utterance, self._n_sentences, text, config))
        self._n_sentences += 1

    async def _cancel(self) -> None:
        """Drop all that is not sent, and end the open utterance."""
        await self._drop_utterance()
        done = {"type": "session.done", "utterance_index": self._utterance, "total_sentences": self._n_sentences}
        await self._send(done | {"cancelled": True})
        self._begin_utterance()
        self._speaker = Speaker(self._service, self._send, self._id)

    async def _drop_utterance(self) -> None:
        await self._speaker.cancel()
        if self._place is not None:
            self._place.close()

    async def _send(self, message: Mapping[str, Any] | bytes) -> None:
        """Send a message. A client that does not read it in time has gone.

        Raises:
            WebSocketDisconnect: the client has gone.
        """
        try:
            async with asyncio.timeout(self._settings.request_seconds):
                if isinstance(message, bytes):
                    await self._websocket.send_bytes(message)
                else:
                    await self._websocket.send_text(json.dumps(message))
        except (TimeoutError, RuntimeError) as error:  # starlette raises RuntimeError after the end of a session
            raise WebSocketDisconnect from error

    async def _end(self, error: APIError, code: int) -> None:
        await self._send(error_message(error))
        await self._websocket.close(code)
