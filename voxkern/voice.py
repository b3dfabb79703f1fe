"""Make a voice from a recording: read and encode the recording, and embed its codes as the backbone embeds frames."""

from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .reference import VoxtralTTS
from .reference.config import EMPTY_AUDIO, END_AUDIO, N_SPECIAL_CODES
from .weight_files import FLOATS, is_finite

SHORTEST, LONGEST = 1.0, 60.0  # seconds; the public model's own voices come from 5 to 18 s of sound
SOFTEST = 1e-4  # times full scale, -80 dB; softer samples of a 16-bit file lie in -3..3
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
        ValueError: the file is missing or is not a sound file; a sample is NaN, infinite or beyond 100 times full
            scale; the sound is silent (below 1e-4 of full scale), shorter than 1 s or longer than 60 s; or the file has
            another rate and soxr is not installed.
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
        # 9 digits, so that a sound of one sample too few or too many is not printed as exactly 1 s or 60 s
        raise ValueError(f"{path}: is {seconds:.9g} s long, but a voice needs {SHORTEST:g} to {LONGEST:g} s")
    if not (np.abs(channels) <= LOUDEST).all():  # this comparison is false for NaN too
        raise ValueError(f"{path}: has a sample that is NaN, infinite or beyond {LOUDEST:g} times full scale")
    samples = channels.mean(1)
    if np.abs(samples).max() < SOFTEST:
        raise ValueError(f"{path}: is silent: no sample is as loud as {SOFTEST:g} of full scale")
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
    with torch.autocast(sound.device.type, enabled=False):
        codes = model.audio_tokenizer.encode(sound)[0].T + N_SPECIAL_CODES  # [T, 37]
        end = F.pad(codes.new_full((1, 1), END_AUDIO), (0, codes.shape[1] - 1), value=EMPTY_AUDIO)
        return model.embed_codes(torch.cat((codes, end)))


def check_name(name: str, taken: Collection[str]) -> None:
    """Raise an error unless a new voice may have this name.

    Raises:
        ValueError: the name is empty, not in lower case, has spaces at its ends or is taken.
        TypeError: `name` is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if not name or name != name.lower().strip():
        raise ValueError(f"name must be in lower case, not empty, and without spaces at its ends, got {name!r}")
    if name in taken:
        raise ValueError(f"name is {name!r}, but a voice with this name exists already")


def check_rows(rows: Tensor, dim: int, what: str) -> Tensor:
    """Check the embeddings of a voice, and return them without gradients.

    Args:
        rows: the embeddings, which must be finite floats [N, dim].
        dim: width of the backbone.
        what: what the embeddings are, for messages.

    Raises:
        ValueError: the tensor has another shape or dtype, is not dense, or has a value that is not finite.
    """
    if rows.layout != torch.strided or rows.device.type == "meta":
        raise ValueError(f"{what} must be a dense tensor with values, got {rows.layout} on {rows.device}")
    if rows.ndim != 2 or rows.shape[1] != dim or not rows.shape[0] or rows.dtype not in FLOATS.values():
        raise ValueError(f"{what} must be floats [N, {dim}], got {rows.dtype} {list(rows.shape)}")
    if not is_finite(rows):
        raise ValueError(
            f"{what} has a value that is NaN, infinite or too large for {str(rows.dtype).removeprefix('torch.')}"
        )
    return rows.detach()


def default_first(voices: Iterable[str], configured: Iterable[str]) -> list[str]:
    """Return the names in `voices`: first those that `configured` has, in its order, then the others.

    `configured` holds the voices that ``params.json`` names. The first name of the result is the default voice.
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
