"""Make a voice from a recording: read and encode the recording, and embed the codes as the backbone embeds codes."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .reference import VoxtralTTS
from .reference.config import EMPTY_AUDIO, END_AUDIO, N_SPECIAL_CODES

SHORTEST, LONGEST = 1.0, 60.0  # seconds; the public model's own voices come from 5 to 18 s of sound
LOUDEST = 100.0  # times full scale; a file with louder samples holds unscaled integers, not sound


def read_recording(path: str | Path, sampling_rate: int) -> NDArray[np.float32]:
    """Read a sound file as one channel at a given sampling rate.

    Channels are averaged, and sound at another rate is resampled (soxr, very high quality). The loudness is kept.

    Args:
        path: a file that libsndfile reads: .wav, .flac, .ogg, .mp3 and others.
        sampling_rate: samples per second of the result.

    Returns:
        float32 [n].

    Raises:
        ValueError: the file is missing or is not a sound file; a sample is not finite or beyond 100 times full scale;
            the sound is silent, shorter than 1 s or longer than 60 s; or the file has another rate and soxr is not
            installed.
    """
    import soundfile

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        channels, rate = soundfile.read(path, dtype="float32", always_2d=True)  # [n, channels]
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be read as sound ({error})") from error
    seconds = len(channels) / rate
    if not SHORTEST <= seconds <= LONGEST:
        raise ValueError(f"{path}: is {seconds:.2f} s long, a voice needs {SHORTEST:g} to {LONGEST:g} s")
    if not (np.abs(channels) <= LOUDEST).all():  # this comparison is false for NaN too
        raise ValueError(f"{path}: holds a sample that is not finite, or beyond {LOUDEST:g} times full scale")
    samples = channels.mean(1)
    if not samples.any():
        raise ValueError(f"{path}: is silent")
    return samples if rate == sampling_rate else _resample(path, samples, rate, sampling_rate)


@torch.no_grad()
def voice_prefix(model: VoxtralTTS, samples: NDArray[np.float32]) -> Tensor:
    """Return the embeddings of a voice in a prompt: one row for each frame of the recording, then one for an END frame.

    Args:
        model: a model with the codec's encoder.
        samples: float32 [n] at the codec's sampling rate.

    Returns:
        [ceil(n / samples_per_frame) + 1, dim] in the model's dtype.

    Raises:
        ValueError: the model has no encoder.
    """
    sound = torch.from_numpy(samples).to(model.norm.weight.device).view(1, 1, -1)
    codes = model.audio_tokenizer.encode(sound)[0].T + N_SPECIAL_CODES  # [T, 37]
    end = F.pad(codes.new_full((1, 1), END_AUDIO), (0, codes.shape[1] - 1), value=EMPTY_AUDIO)
    return model.embed_codes(torch.cat((codes, end)))


def default_first(voices: Iterable[str], configured: Iterable[str]) -> list[str]:
    """Return the names in `voices`, first those in `configured`, the voices of ``params.json``, in its order.

    The first name is the default voice.
    """
    names = list(voices)
    return list(dict.fromkeys([*(name for name in configured if name in names), *names]))


def _resample(path: Path, samples: NDArray[np.float32], rate: int, wanted: int) -> NDArray[np.float32]:
    try:
        import soxr
    except ImportError:
        raise ValueError(
            f"{path}: has {rate} samples a second, not {wanted}, and soxr is not installed to resample it: "
            "pip install 'voxkern[voices]'"
        ) from None
    resampled: NDArray[np.float32] = soxr.resample(samples, rate, wanted, quality="VHQ")
    return resampled
