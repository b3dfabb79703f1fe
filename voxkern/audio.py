"""The result of a request: sound, codes and timings."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .output_file import replacing


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of a request's work.

    Requests that run side by side share frames, and the seconds of a shared frame count in full for each request. For a
    text that is split into parts, the seconds of the parts are added.

    Attributes:
        prefill: seconds of the prompt's pass through the backbone. The voice's part of the prompt counts only if it was
            not in the KV cache.
        frames: seconds of the backbone and the flow head for all frames. On kernels, these include the codec.
        codec: seconds of decoding codes to sound; 0 on kernels, where a frame and its decoding are one step.
        first_sound: seconds until the first chunk of a stream was ready, or the whole sound if there was no stream. The
            time in the queue is included.
    """

    prefill: float
    frames: float
    codec: float
    first_sound: float

    @property
    def total(self) -> float:
        """Sum of `prefill`, `frames` and `codec`."""
        return self.prefill + self.frames + self.codec


@dataclass(frozen=True)
class Audio:
    """Holds generated speech: its samples, and the codes and the seed that they come from.

    Attributes:
        samples: float32 [n], nominally within -1..1.
        sampling_rate: samples per second.
        codes: int16 [37, T], one column per frame, without the +2 offset that the model's codes have.
        seed: the seed that generates the same codes again.
        ended: True if the model generated END, False if the frame limit cut the speech off.
        timings: seconds of each part of the work.
    """

    samples: NDArray[np.float32]
    sampling_rate: int
    codes: NDArray[np.int16]
    seed: int
    ended: bool
    timings: Timings

    @property
    def seconds(self) -> float:
        """Length of the sound in seconds."""
        return len(self.samples) / self.sampling_rate

    @property
    def real_time_factor(self) -> float:
        """Seconds of work per second of sound. A value below 1 is faster than speech; an empty sound has infinity."""
        return self.timings.total / self.seconds if len(self.samples) else float("inf")

    def pcm16(self) -> bytes:
        """Return the samples as 16-bit little-endian integers, a common format of servers.

        Values beyond -1..1 are clipped. A .wav or .flac file of :meth:`save` has the same integers.
        """
        return to_int16(self.samples).tobytes()

    @classmethod
    def join(cls, audios: Sequence["Audio"]) -> "Audio":
        """Join sounds, such as the chunks of a stream, one after the other without a pause.

        The result has the `seed` and `first_sound` of the first sound, and the `ended` of the last sound. The other
        timings are added.

        Raises:
            ValueError: `audios` is empty, or has several sampling rates.
        """
        rates = {audio.sampling_rate for audio in audios}
        if len(rates) != 1:
            raise ValueError(f"audios must be of one sampling rate, got {sorted(rates)}")
        first, last, times = audios[0], audios[-1], [audio.timings for audio in audios]
        return cls(
            samples=np.concatenate([audio.samples for audio in audios]),
            sampling_rate=first.sampling_rate,
            codes=np.concatenate([audio.codes for audio in audios], axis=1),
            seed=first.seed,
            ended=last.ended,
            timings=Timings(
                prefill=sum(t.prefill for t in times),
                frames=sum(t.frames for t in times),
                codec=sum(t.codec for t in times),
                first_sound=times[0].first_sound,
            ),
        )

    def _repr_html_(self) -> str:
        """Return an HTML player, which notebooks show."""
        file = io.BytesIO()
        write_sound(file, self.samples, self.sampling_rate, "WAV")
        sound = base64.b64encode(file.getvalue()).decode()
        return f'<audio controls src="data:audio/wav;base64,{sound}"></audio> {self.seconds:.2f} s, seed {self.seed}'

    def save(self, path: str | Path) -> Path:
        """Write the sound to a .wav (16 bit), .flac (16 bit) or .ogg file, and return its path.

        The suffix decides the format. Values beyond -1..1 are clipped. The file is written beside `path` and renamed,
        so an error leaves an old file as it was. If the sound is empty, a .flac has one sample of silence, because a
        .flac without samples cannot be read.

        Raises:
            ValueError: `path` has another suffix than .wav, .flac or .ogg, or cannot be written.
        """
        path = Path(path)
        file_format = sound_format(path)
        with replacing(path) as new:
            write_sound(new, self.samples, self.sampling_rate, file_format)
        return path


def join_parts(parts: list[Audio]) -> Audio:
    """Join the parts of a text into one Audio.

    No part is returned before all are done. So ``first_sound`` is the first part's time in the queue, plus the work of
    all parts. The seconds of a frame that several parts share are added once for each part, as in the other timings.
    """
    joined, first = Audio.join(parts), parts[0].timings
    waited = first.first_sound - first.total  # seconds in the queue before the first part was admitted
    timings = replace(joined.timings, first_sound=waited + joined.timings.total)
    return replace(joined, ended=all(part.ended for part in parts), timings=timings)


def to_int16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Return samples as little-endian integers: -1..1 becomes -32767..32767, and values beyond are clipped."""
    return np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2")


def least_sound(samples: NDArray[np.float32], file_format: str) -> NDArray[np.float32]:
    """Return the samples, or one sample of silence for a FLAC file without samples, which could not be read."""
    return samples if len(samples) or file_format != "FLAC" else np.zeros(1, np.float32)


def sound_format(path: Path) -> str:
    """Return soundfile's name for the format of a file's suffix: "WAV", "FLAC" or "OGG".

    Raises:
        ValueError: `path` has another suffix than .wav, .flac or .ogg.
    """
    formats = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}
    if path.suffix.lower() not in formats:
        raise ValueError(f"path must end in one of {', '.join(formats)}, got {str(path)!r}")
    return formats[path.suffix.lower()]


def write_sound(
    file: Path | io.BytesIO,
    samples: NDArray[np.float32],
    sampling_rate: int,
    file_format: str,
    subtype: str | None = None,
) -> None:
    """Write samples to a file; `file_format` and `subtype` are soundfile's names, such as "FLAC" and "PCM_16"."""
    import soundfile

    soundfile.write(file, to_int16(least_sound(samples, file_format)), sampling_rate, subtype, format=file_format)
