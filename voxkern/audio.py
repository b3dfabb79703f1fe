"""What a request gives back."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Timings:
    """Wall seconds of a request; in a batch its neighbours' work is in them.

    Those of a text in parts are added up.

    Attributes:
        prefill: the prompt's pass through the backbone; its voice's part only where it was not in the cache.
        frames: all frames: backbone steps and flow head.
        codec: codes to sound.
        first_sound: until something could be heard, work for others before it began among it; all, but for a stream.
    """

    prefill: float
    frames: float
    codec: float
    first_sound: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.prefill + self.frames + self.codec


@dataclass(frozen=True)
class Audio:
    """Speech.

    Attributes:
        samples: float32 [n], nominally within -1..1.
        sampling_rate: per second.
        codes: int16 [37, T], one column a frame, without the +2 offset.
        seed: what gives the same codes again.
        ended: the model said END; False where the frame limit cut it.
        timings: where the time went.
    """

    samples: NDArray[np.float32]
    sampling_rate: int
    codes: NDArray[np.int16]
    seed: int
    ended: bool
    timings: Timings

    @property
    def seconds(self) -> float:
        """Length of the sound."""
        return len(self.samples) / self.sampling_rate

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for a second of sound; below 1 is faster than speech. Infinite for an empty sound."""
        return self.timings.total / self.seconds if len(self.samples) else float("inf")

    def pcm16(self) -> bytes:
        """The samples as 16-bit little-endian integers, for a server's answer; values beyond -1..1 are clipped."""
        return np.rint(np.clip(self.samples, -1, 1) * 32767).astype("<i2").tobytes()

    @classmethod
    def join(cls, audios: Sequence["Audio"]) -> "Audio":
        """Sounds one after the other, a stream's chunks or others, with nothing between them; work adds up.

        Raises:
            ValueError: none, or of several sampling rates.
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
        """A player, which notebooks show."""
        import soundfile

        file = io.BytesIO()
        soundfile.write(file, np.clip(self.samples, -1, 1), self.sampling_rate, format="WAV")
        sound = base64.b64encode(file.getvalue()).decode()
        return f'<audio controls src="data:audio/wav;base64,{sound}"></audio> {self.seconds:.2f} s, seed {self.seed}'

    def save(self, path: str | Path) -> Path:
        """Write a .wav (16 bit), .flac or .ogg file, as the suffix says; values beyond -1..1 are clipped.

        Raises:
            ValueError: any other suffix.
        """
        import soundfile

        path = Path(path)
        soundfile.write(path, np.clip(self.samples, -1, 1), self.sampling_rate, format=sound_format(path))
        return path


def sound_format(path: Path) -> str:
    """The format that a file's suffix asks for.

    Raises:
        ValueError: none that voxkern writes.
    """
    formats = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}
    if path.suffix.lower() not in formats:
        raise ValueError(f"path must end in one of {', '.join(formats)}, got {str(path)!r}")
    return formats[path.suffix.lower()]
