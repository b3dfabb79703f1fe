"""WS /v1/audio/speech/stream: text that arrives in pieces, and its sound sentence by sentence.

The messages are those of vLLM-Omni. A client sends JSON objects:

- ``session.config`` first, and again between utterances: the fields of :class:`SessionConfig`;
- ``input.text`` with a piece of text, any number of times;
- ``input.done`` at the end of an utterance;
- ``session.close`` to end the session when all is sent;
- ``cancel``, which vLLM-Omni lacks, to drop all that is not sent.

The server answers each sentence with ``audio.start``, its sound in binary messages, and ``audio.done``. At the end of
an utterance it sends ``session.done``. An ``error`` concerns this session alone.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from ..text import split_sentences
from .errors import APIError, shown
from .service import SpeechService
from .session_config import SessionConfig, read_config
from .speaker import EndOfUtterance, Sentence, Speaker, error_message
from .speech_request import read_object, wrong

POLICY_VIOLATION, TOO_LONG, FAILED, TRY_AGAIN = 1008, 1009, 1011, 1013  # close codes of RFC 6455 and its registry
CHARS_AHEAD = 16  # no message is read while more than 16 x max_chars characters are unsent
log = logging.getLogger(__name__)


async def run_session(websocket: WebSocket, service: SpeechService) -> None:
    """Accept a client's WebSocket, and run its session; refuse it if too many sessions are open."""
    if service.n_sessions >= service.settings.max_sessions:
        error = APIError(429, "too_many_sessions", f"the limit of {service.n_sessions} open sessions is reached")
        await websocket.send_denial_response(service.api_error(error, "").response())
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
        self._admission: contextlib.ExitStack | None = None  # of the open utterance
        self._opened = self._active = time.monotonic()  # begin of the open utterance, and time of the last message
        self._utterance, self._n_sentences, self._text = 0, 0, ""

    async def run(self) -> None:
        """Answer messages until the client closes the session or leaves, a time limit passes, or an error ends it."""
        receiving = asyncio.create_task(self._receive())
        try:
            while True:
                both = (receiving, self._speaker.sending)
                await asyncio.wait(both, timeout=self._settings.idle_seconds / 4, return_when=asyncio.FIRST_COMPLETED)
                if self._speaker.sending.done():
                    await self._speaker.sending  # raises the error that ended it
                if receiving.done():
                    body, receiving = receiving.result(), asyncio.create_task(self._receive())
                    if not await self._handle(body):
                        return
                elif (error := self._overdue()) is not None:
                    return await self._end(error, POLICY_VIOLATION)
        except WebSocketDisconnect:
            return
        except Exception as error:
            await self._end(self._service.api_error(error, self._id), FAILED)
        finally:
            receiving.cancel()
            await asyncio.gather(receiving, return_exceptions=True)
            await self._drop_all()

    async def _receive(self) -> bytes:
        """Return the next message, or no bytes for a binary message, which the protocol does not have.

        Raises:
            WebSocketDisconnect: the client has gone, or its message is too long.
        """
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        self._active = time.monotonic()
        body = (message.get("text") or "").encode(errors="surrogatepass")
        if len(body) > self._settings.max_body:  # uvicorn refuses it before this, Ray does not
            await self._websocket.close(TOO_LONG)
            raise WebSocketDisconnect
        return body

    def _overdue(self) -> APIError | None:
        """Return an error if an utterance is open for too long, or if nothing was sent or received for too long."""
        now = time.monotonic()
        if self._admission is not None and now - self._opened > self._settings.request_seconds:
            return APIError(504, "too_slow", f"an utterance may take {self._settings.request_seconds:g} s")
        if not self._speaker.is_busy and now - self._active > self._settings.idle_seconds:
            return APIError(408, "idle", f"the session was idle for {self._settings.idle_seconds:g} s")
        return None

    async def _handle(self, body: bytes) -> bool:
        """Handle one message; return whether the session goes on."""
        try:
            message = read_object(body)
            kind = message.get("type")
            if kind == "session.config":
                self._configure(message)
            elif self._config is None:
                raise wrong("no_config", None, f"the first message must be session.config, got {shown(kind)}")
            elif kind == "input.text":
                await self._add_text(message.get("text"), self._config)
            elif kind == "input.done":
                await self._end_utterance(self._config)
            elif kind == "cancel":
                await self._cancel()
            elif kind == "session.close":
                await self._speaker.wait_for_backlog(0)
                await self._websocket.close()
                return False
            else:
                raise wrong("unknown_message", "type", f"unknown message {shown(kind)}")
        except APIError as error:
            if error.status in (429, 503):  # the server cannot take this utterance, but completes those before it
                await self._speaker.wait_for_backlog(0)
                await self._end(self._service.api_error(error, self._id), TRY_AGAIN)
                return False
            if self._config is None:
                await self._end(self._service.api_error(error, self._id), POLICY_VIOLATION)
                return False
            await self._send(error_message(self._service.api_error(error, self._id)))
        return True

    def _configure(self, message: Mapping[str, Any]) -> None:
        if self._admission is not None:
            raise wrong("open_utterance", None, "session.config must come between utterances: send input.done first")
        config = read_config(message, self._settings)
        self._service.check_arguments(config.voice, config.arguments)
        self._config = config

    async def _add_text(self, text: Any, config: SessionConfig) -> None:
        if not isinstance(text, str):
            raise wrong("wrong_type", "text", f"text must be a string, got {type(text).__name__}")
        if not text:
            return
        most = self._settings.max_chars
        if len(self._text) + len(text) > most:
            message = f"a piece of text, with the incomplete sentence before it, may have {most} characters"
            raise wrong("input_too_long", "text", message)
        whole, half = _without_half(self._text + text)
        if self._admission is None:
            admission = contextlib.ExitStack()
            admission.enter_context(self._service.admitted())
            self._admission, self._opened = admission, time.monotonic()
        if config.by_sentence:
            sentences, whole = split_sentences(whole)
            for sentence in sentences:
                self._speak(sentence, config)
        self._text = whole + half
        await self._speaker.wait_for_backlog(CHARS_AHEAD * most)

    async def _end_utterance(self, config: SessionConfig) -> None:
        if self._text.strip():
            self._speak(self._text.strip(), config)
        self._speaker.add(self._end_of_utterance())
        self._begin_utterance()
        await self._speaker.wait_for_backlog(CHARS_AHEAD * self._settings.max_chars)

    def _end_of_utterance(self) -> EndOfUtterance:
        return EndOfUtterance(self._utterance, self._n_sentences, self._admission or contextlib.ExitStack())

    def _begin_utterance(self) -> None:
        self._admission = None
        self._utterance, self._n_sentences, self._text = self._utterance + 1, 0, ""

    def _speak(self, text: str, config: SessionConfig) -> None:
        self._speaker.add(Sentence(self._utterance, self._n_sentences, text, config))
        self._n_sentences += 1

    async def _cancel(self) -> None:
        """Drop all that is not sent, and end every utterance that is not complete."""
        dropped = await self._speaker.cancel()
        if self._admission is not None:
            dropped.append(self._end_of_utterance())
            self._admission.close()
            self._begin_utterance()
        self._speaker = Speaker(self._service, self._send, self._id)
        for end in dropped:
            await self._send(end.message(cancelled=True))

    async def _drop_all(self) -> None:
        await self._speaker.cancel()
        if self._admission is not None:
            self._admission.close()

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
        self._active = time.monotonic()

    async def _end(self, error: APIError, code: int) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            await self._send(error_message(error))
            await self._websocket.close(code)


def _without_half(text: str) -> tuple[str, str]:
    """Join surrogate pairs that arrived in two pieces; return an unpaired first half at the end separately.

    JSON writes a character beyond U+FFFF as two escapes, so a client may cut it.

    Raises:
        APIError: the text has any other unpaired surrogate.
    """
    half = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
    try:
        whole = text[: len(text) - len(half)].encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise wrong("invalid_value", "text", "text has half of a surrogate pair") from None
    return whole, half
