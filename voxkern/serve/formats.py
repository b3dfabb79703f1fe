"""The formats of a sound: two that are sent while the sound is generated, and three that need the whole sound."""

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass

from ..audio import Audio, write_sound

UNKNOWN_SIZE = 0xFFFFFFFF  # the sizes in the header of a WAV stream: its length is not known when the header is sent


class StreamWriter:
    """Converts each chunk of a sound to 16-bit integers as it arrives; a header may precede the first chunk."""

    def __init__(self, header: bytes = b"") -> None:
        self._header = header

    def add(self, chunk: Audio) -> bytes:
        """Return the bytes of a chunk; the first chunk with samples has the header."""
        if not len(chunk.samples):
            return b""
        header, self._header = self._header, b""
        return header + chunk.pcm16()

    def finish(self) -> bytes:
        """Return the bytes that end the sound: none."""
        return b""


class FileWriter:
    """Collects all chunks of a sound, and encodes them at the end."""

    def __init__(self, name: str, subtype: str) -> None:
        """`name` and `subtype`: libsndfile's names of the format."""
        self._name, self._subtype = name, subtype
        self._chunks: list[Audio] = []

    def add(self, chunk: Audio) -> bytes:
        """Keep a chunk, and return no bytes."""
        self._chunks.append(chunk)
        return b""

    def finish(self) -> bytes:
        """Return the bytes of the whole sound."""
        audio, file = Audio.join(self._chunks), io.BytesIO()
        write_sound(file, audio.samples, audio.sampling_rate, self._name, self._subtype)
        return file.getvalue()


Writer = StreamWriter | FileWriter


def wav_header(sampling_rate: int) -> bytes:
    """Return the header of a WAV stream of unknown length: one channel, 16-bit integers."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", UNKNOWN_SIZE, b"WAVE") + form + struct.pack("<4sI", b"data", UNKNOWN_SIZE)


@dataclass(frozen=True)
class SoundFormat:
    """A format of a response.

    Attributes:
        media_type: the response's media type.
        writer: function of the sampling rate that returns a writer for one sound.
    """

    media_type: str
    writer: Callable[[int], Writer]


FORMATS = {
    "mp3": SoundFormat("audio/mpeg", lambda _: FileWriter("MP3", "MPEG_LAYER_III")),
    "opus": SoundFormat("audio/ogg", lambda _: FileWriter("OGG", "OPUS")),
    "flac": SoundFormat("audio/flac", lambda _: FileWriter("FLAC", "PCM_16")),
    "wav": SoundFormat("audio/wav", lambda rate: StreamWriter(wav_header(rate))),
    "pcm": SoundFormat("audio/pcm", lambda _: StreamWriter()),
}
