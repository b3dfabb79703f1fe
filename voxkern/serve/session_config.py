"""Check the fields of a session's configuration, which a WebSocket's first message has."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import shown
from .formats import FORMATS, FileWriter, Writer
from .settings import ServeSettings
from .speech_request import ARGUMENTS, check_fields, known_fields, one_of, voice_of, wrong

FIELDS = (
    "type", "model", "voice", "speaker", "response_format", "stream_audio", "split_granularity", "task_type",
    "language", "speed", "instructions", *ARGUMENTS,
)  # fmt: skip


@dataclass(frozen=True)
class SessionConfig:
    """Holds the checked fields of a configuration. The names are those of vLLM-Omni's protocol.

    Attributes:
        voice: name of the voice; None takes the default.
        response_format: name of the sound's format.
        stream_audio: whether a sentence's sound is sent while it is generated, in several messages.
        by_sentence: whether each sentence is generated as soon as it is complete, and not the whole text at its end.
        arguments: arguments of :meth:`voxkern.TTS.stream`, not checked yet. All sentences have one seed.
    """

    voice: str | None
    response_format: str
    stream_audio: bool
    by_sentence: bool
    arguments: dict[str, Any]

    def writer(self, sampling_rate: int) -> Writer:
        """Return a writer for the sound of one sentence. A WAV file is written whole, so its header has the length."""
        if self.response_format == "wav":
            return FileWriter("WAV", "PCM_16")
        return FORMATS[self.response_format].writer(sampling_rate)


def read_config(message: Mapping[str, Any], settings: ServeSettings) -> SessionConfig:
    """Return the checked fields of a message ``session.config``.

    Raises:
        APIError: a field is unknown or wrong.
    """
    fields = known_fields(message, FIELDS)
    check_fields(fields, settings)
    one_of(fields, "task_type", ("CustomVoice",), "CustomVoice")  # vLLM-Omni's clients send these two
    one_of(fields, "language", ("Auto",), "Auto")
    stream_audio = fields.get("stream_audio", False)
    if not isinstance(stream_audio, bool):
        raise wrong("wrong_type", "stream_audio", f"stream_audio must be true or false, got {shown(stream_audio)}")
    response_format = one_of(fields, "response_format", tuple(FORMATS), "wav")
    if stream_audio and response_format != "pcm":
        wanted = f"stream_audio needs response_format pcm, got {response_format}"
        raise wrong("unsupported_value", "response_format", wanted)
    return SessionConfig(
        voice=voice_of(fields.get("voice", fields.get("speaker"))),
        response_format=response_format,
        stream_audio=stream_audio,
        by_sentence=one_of(fields, "split_granularity", ("sentence", "none"), "sentence") == "sentence",
        arguments={"seed": secrets.randbits(64)} | {name: fields[name] for name in ARGUMENTS if name in fields},
    )
