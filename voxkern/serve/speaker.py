"""Generate the sentences of a session, two at a time, and send their sound in order."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..audio import Audio
from .errors import APIError, no_sound
from .service import SpeechService
from .session_config import SessionConfig

AHEAD = 2  # sentences that are generated and not sent yet: one is sent while the next one is generated
Send = Callable[[Mapping[str, Any] | bytes], Awaitable[None]]  # sends a JSON object or a sound


@dataclass(eq=False)
class Sentence:
    """One sentence of an utterance.

    Attributes:
        utterance, index: the utterance's number in the session, and the sentence's number in the utterance.
        text: the sentence.
        config: the session's configuration when the sentence arrived.
        chunks: its sound; after the last chunk None, or the error that ended it.
    """

    utterance: int
    index: int
    text: str
    config: SessionConfig
    chunks: "asyncio.Queue[Audio | Exception | None]" = field(default_factory=asyncio.Queue)

    @property
    def names(self) -> dict[str, int]:
        """The fields that name the sentence in messages."""
        return {"utterance_index": self.utterance, "sentence_index": self.index}


@dataclass(frozen=True)
class EndOfUtterance:
    """Follows the last sentence of an utterance.

    Attributes:
        utterance: the utterance's number in the session.
        n_sentences: number of its sentences.
        admission: counts the utterance as one request of the server until it is closed.
    """

    utterance: int
    n_sentences: int
    admission: contextlib.ExitStack

    def message(self, **more: Any) -> dict[str, Any]:
        """Return the message that ends the utterance."""
        return {"type": "session.done", "utterance_index": self.utterance, "total_sentences": self.n_sentences} | more


class Speaker:
    """Generates and sends the sentences of one session, in order, until it is cancelled.

    Attributes:
        n_chars: characters that are not sent yet; the end of an utterance counts as one more.
        sending: the task that sends messages. The task ends when it fails or is cancelled.
    """

    def __init__(self, service: SpeechService, send: Send, session_id: str) -> None:
        """`session_id`: the session's name in the log."""
        self.n_chars = 0
        self._service, self._send, self._id = service, send, session_id
        self._unsent: asyncio.Queue[Sentence | EndOfUtterance] = asyncio.Queue()
        self._not_generated: asyncio.Queue[Sentence] = asyncio.Queue()
        self._ahead = asyncio.Semaphore(AHEAD)
        self._sent = asyncio.Event()
        self._generating: set[asyncio.Task[None]] = set()
        self._starting = asyncio.create_task(self._start_all())
        self.sending = asyncio.create_task(self._send_all())

    @property
    def is_busy(self) -> bool:
        """Whether a sentence, or the end of an utterance, is not sent yet."""
        return self.n_chars > 0

    def add(self, item: Sentence | EndOfUtterance) -> None:
        """Append a sentence or the end of an utterance. At most two sentences are generated and not sent."""
        self.n_chars += _n_chars(item)
        self._unsent.put_nowait(item)
        if isinstance(item, Sentence):
            self._not_generated.put_nowait(item)

    async def wait_for_backlog(self, most: int) -> None:
        """Wait until at most `most` characters are unsent, or until sending has failed."""
        while self.n_chars > most and not self.sending.done():
            self._sent.clear()
            sent = asyncio.create_task(self._sent.wait())
            await asyncio.wait((sent, self.sending), return_when=asyncio.FIRST_COMPLETED)
            sent.cancel()

    async def cancel(self) -> list[EndOfUtterance]:
        """Stop generating and sending, drop what is not sent, and return the ends of utterances that were dropped."""
        tasks = [self.sending, self._starting, *self._generating]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        dropped = []
        while not self._unsent.empty():
            if isinstance(item := self._unsent.get_nowait(), EndOfUtterance):
                item.admission.close()
                dropped.append(item)
        return dropped

    async def _start_all(self) -> None:
        while True:
            sentence = await self._not_generated.get()
            await self._ahead.acquire()  # released when the sentence is sent
            task = asyncio.create_task(self._generate(sentence))
            self._generating.add(task)
            task.add_done_callback(self._generating.discard)

    async def _generate(self, sentence: Sentence) -> None:
        config, last = sentence.config, None
        try:
            chunks = await self._service.chunks(sentence.text, config.voice, config.arguments)
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    sentence.chunks.put_nowait(chunk)
        except Exception as error:
            last = error
        sentence.chunks.put_nowait(last)

    async def _send_all(self) -> None:
        while True:
            item = await self._unsent.get()
            if isinstance(item, EndOfUtterance):
                with item.admission:
                    await self._send(item.message())
            else:
                await self._send_sentence(item)
                self._ahead.release()
            self.n_chars -= _n_chars(item)
            self._sent.set()

    async def _send_sentence(self, sentence: Sentence) -> None:
        rate, config, n_bytes, seconds = self._service.tts.sampling_rate, sentence.config, 0, 0.0
        writer = config.writer(rate)
        start = {"type": "audio.start", **sentence.names, "sentence_text": sentence.text}
        await self._send(start | {"format": config.response_format, "sample_rate": rate})
        sound, error = b"", None
        while isinstance(chunk := await sentence.chunks.get(), Audio):
            seconds += chunk.seconds
            sound += writer.add(chunk)
            if config.stream_audio and sound:
                await self._send(sound)
                n_bytes, sound = n_bytes + len(sound), b""
        try:
            if chunk is not None:
                raise chunk
            if not seconds:
                raise no_sound()
            sound += await self._service.finish(writer)
        except Exception as raised:
            error = self._service.api_error(raised, self._id)
            await self._send(error_message(error) | sentence.names)
        else:
            if sound:
                await self._send(sound)
                n_bytes += len(sound)
        self._service.metrics.audio_seconds.inc(seconds)
        done = {"type": "audio.done", **sentence.names, "total_bytes": n_bytes, "error": error is not None}
        await self._send(done)


def error_message(error: APIError) -> dict[str, Any]:
    """Return an error in the form of vLLM-Omni's protocol, with OpenAI's `code` and `param`."""
    return {"type": "error", "message": str(error), "code": error.code, "param": error.param}


def _n_chars(item: Sentence | EndOfUtterance) -> int:
    return len(item.text) if isinstance(item, Sentence) else 1
