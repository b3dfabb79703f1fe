"""The demo voice's vocabulary and training speech: words spoken by flite, each padded to whole frames.

Every word is synthesised alone and padded with silence to whole frames of 80 ms. The sound of a text is the
concatenation of the sounds of its words. A word therefore has nearly the same codes at every position in a text. A few
million parameters and an hour of one core are enough to learn such codes, but not enough for running speech.
"""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

RATE, FRAME = 24000, 1920  # samples per second, and samples per frame
VOICES = ("slt", "rms")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
          "december")  # fmt: skip
GREETINGS = ("hello", "goodbye", "good", "morning", "afternoon", "evening", "night", "thanks", "please", "welcome")
SMALL = ("yes", "no", "today", "tomorrow")
WORDS = DIGITS + TEENS + TENS + WEEKDAYS + MONTHS + GREETINGS + SMALL
DIGITS_SHARE = 0.4  # share of random strings that consist of digits only
QUIET = 0.004  # a frame without a larger amplitude counts as inaudible; full scale is 1


@dataclass(frozen=True)
class WordBank:
    """The sound of every word in every voice, and the labels of its frames.

    Labels number the frames of all words: a frame's label is the word's first label plus the frame's number, counted
    from the word's first audible frame. The quiet frames before the first audible frame have label 0.

    Attributes:
        sounds: [voice][word], fp32 [n * FRAME].
        first: the first label of each word.
        n_labels: number of labels, label 0 included.
    """

    sounds: list[list[Tensor]]
    first: list[int]
    n_labels: int

    def speak(self, voice: int, words: list[int]) -> tuple[Tensor, Tensor]:
        """Return the sound, fp32 [T * FRAME], and the labels, int64 [T], of a string of words in one voice."""
        sounds = [self.sounds[voice][word] for word in words]
        return torch.cat(sounds), torch.cat([self.labels(voice, word) for word in words])

    def labels(self, voice: int, word: int) -> Tensor:
        """Return the labels of a word's frames, int64 [n]."""
        sound = self.sounds[voice][word]
        n_quiet = quiet_frames(sound)
        return F.pad(torch.arange(len(sound) // FRAME - n_quiet) + self.first[word], (n_quiet, 0))


def flite(text: str, voice: str) -> NDArray[np.float32]:
    """Synthesise a text with the program flite and return the sound, fp32 [n] at 24 kHz."""
    import soxr

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True)
        samples, rate = soundfile.read(path, dtype="float32")
    resampled: NDArray[np.float32] = soxr.resample(samples, rate, RATE, quality="VHQ")
    return resampled


def whole_frames(sound: NDArray[np.float32]) -> Tensor:
    """Pad a sound, fp32 [n], with silence at its end to a multiple of FRAME samples."""
    return torch.from_numpy(np.pad(sound, (0, -len(sound) % FRAME)))


def quiet_frames(sound: Tensor) -> int:
    """Return the number of frames before the first audible frame of a sound."""
    loud = (sound.view(-1, FRAME).abs().amax(1) > QUIET).nonzero()
    return int(loud[0])


def make_bank() -> WordBank:
    """Synthesise every word in every voice, which takes seconds, and number the labels."""
    sounds = [[whole_frames(flite(word, voice)) for word in WORDS] for voice in VOICES]
    first, n = [], 1
    for i in range(len(WORDS)):
        first.append(n)
        n += max(len(of_voice[i]) // FRAME - quiet_frames(of_voice[i]) for of_voice in sounds)
    return WordBank(sounds, first, n)


def random_words(generator: np.random.Generator, n: int) -> list[int]:
    """Return n random indices into WORDS; with probability DIGITS_SHARE, only digits are drawn."""
    known = len(DIGITS) if generator.random() < DIGITS_SHARE else len(WORDS)
    return [int(i) for i in generator.integers(0, known, n)]
