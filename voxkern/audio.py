"""What a request gives back."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Timings:
    """Wall seconds of a request; in a batch its neighbours' work is in them.

    Attributes:
        prefill: the prompt's pass through the backbone; on kernels, all prompts of its group.
        frames: all frames: backbone steps and flow head; on kernels it is known to eight frames.
        codec: codes to sound.
    """

    prefill: float
    frames: float
    codec: float

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
