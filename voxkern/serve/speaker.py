"""Generate sentences, two at a time, and send their sound in order."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..audio import Audio
from .errors import APIError
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
        chunks: its sound; None after the last chunk, or the error that ended it.
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
    """The place in the order after an utterance's last sentence.

    Attributes:
        utterance: the utterance's number in the session.
        n_sentences: number of its sentences.
        place: what the utterance holds in the server's queue, to be closed.
    """

    utterance: int
    n_sentences: int
    place: contextlib.ExitStack


class Speaker:
    """Generates and sends the sentences of one session, in order, until it is cancelled.

    Attributes:
        n_chars: characters of the sentences that are not sent yet.
        sending: the task that sends; it ends only by an error, such as a client that has gone.
    """

    def __init__(self, service: SpeechService, send: Send, session_id: str) -> None:
        """`session_id`: the session's name in the log."""
        self.n_chars = 0
        self._service, self._send, self._id = service, send, session_id
        self._order: asyncio.Queue[Sentence | EndOfUtterance] = asyncio.Queue()
        self._ahead = asyncio.Semaphore(AHEAD)
        self._sent = asyncio.Event()
        self._generating: set[asyncio.Task[None]] = set()
        self._n_open = 0  # sentences and ends that are not sent
        self.sending = asyncio.create_task(self._send_all())

    @property
    def is_busy(self) -> bool:
        """Whether a sentence, or the end of an utterance, is not sent yet."""
        return self._n_open > 0

    def add(self, item: Sentence | EndOfUtterance) -> None:
        """Append a sentence, which is generated as soon as one of two places is free, or the end of an utterance."""
        self._n_open += 1
        self._order.put_nowait(item)
        if isinstance(item, Sentence):
            self.n_chars += len(item.text)
            task = asyncio.create_task(self._generate(item))
            self._generating.add(task)
            task.add_done_callback(self._generating.discard)

    async def wait_until_fewer_chars(self, limit: int) -> None:
        """Wait until at most `limit` characters are not sent, or until sending has failed."""
        while self.n_chars > limit and not self.sending.done():
            self._sent.clear()
            sent = asyncio.create_task(self._sent.wait())
            await asyncio.wait((sent, self.sending), return_when=asyncio.FIRST_COMPLETED)
            sent.cancel()

    async def cancel(self) -> None:
        """Stop generating and sending; sentences that are not sent are dropped."""
        tasks = [self.sending, *self._generating]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while not self._order.empty():
            if isinstance(item := self._order.get_nowait(), EndOfUtterance):
                item.place.close()

    async def _generate(self, sentence: Sentence) -> None:
        await self._ahead.acquire()  # released when the sentence is sent
        config = sentence.config
        try:
            chunks = await self._service.chunks(sentence.text, config.voice, config.arguments)
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    sentence.chunks.put_nowait(chunk)
        except Exception as error:
            sentence.chunks.put_nowait(error)
        else:
            sentence.chunks.put_nowait(None)

    async def _send_all(self) -> None:
        while True:
            item = await self._order.get()
            if isinstance(item, EndOfUtterance):
                item.place.close()
                done = {"type": "session.done", "utterance_index": item.utterance, "total_sentences": item.n_sentences}
                await self._send(done)
            else:
                await self._send_sentence(item)
                self.n_chars -= len(item.text)
                self._ahead.release()
                self._sent.set()
            self._n_open -= 1

    async def _send_sentence(self, sentence: Sentence) -> None:
        rate, config, n_bytes, seconds = self._service.tts.sampling_rate, sentence.config, 0, 0.0
        writer = config.writer(rate)
        start = {"type": "audio.start", **sentence.names, "sentence_text": sentence.text}
        await self._send(start | {"format": config.response_format, "sample_rate": rate})
        sound = b""
        while isinstance(chunk := await sentence.chunks.get(), Audio):
            seconds += chunk.seconds
            sound += writer.add(chunk)
            if config.stream_audio and sound:
                await self._send(sound)
                n_bytes, sound = n_bytes + len(sound), b""
        error = chunk
        if error is None and not seconds:
            error = APIError(500, "no_sound", "the model generated END before any sound: try another seed")
        if error is not None:
            await self._send(error_message(self._service.api_error(error, self._id)) | sentence.names)
        elif sound := sound + await self._service.finish(writer):
            await self._send(sound)
            n_bytes += len(sound)
        self._service.metrics.audio_seconds.inc(seconds)
        done = {"type": "audio.done", **sentence.names, "total_bytes": n_bytes, "error": error is not None}
        await self._send(done)


def error_message(error: APIError) -> dict[str, Any]:
    """Return an error in the form of vLLM-Omni's protocol, with OpenAI's `code` and `param`."""
    return {"type": "error", "message": str(error), "code": error.code, "param": error.param}
