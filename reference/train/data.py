"""What the demo voice can say, and the speech it learns from: flite's words, each in whole frames.

Every word is spoken by itself and filled up with silence to whole frames of 80 ms, so a text's sound is its words'
sounds one after another. That keeps a word's codes nearly the same wherever it stands: a few million parameters
and an hour of one core are enough for them, as they are not for running speech.
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

RATE, FRAME = 24000, 1920
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
DIGITS_SHARE = 0.4  # of random strings are of digits alone
QUIET = 0.004  # of full scale: nothing of the word is heard below it


@dataclass(frozen=True)
class WordBank:
    """Every word's sound in every voice.

    Attributes:
        sounds: [voice][word], fp32 [n FRAME].
        first: the first label of each word; a frame's label is that + its number among the word's frames from
            the first that is heard; 0 is silence.
        n_labels: how many there are.
    """

    sounds: list[list[Tensor]]
    first: list[int]
    n_labels: int

    def speak(self, voice: int, words: list[int]) -> tuple[Tensor, Tensor]:
        """Sound [T FRAME] and labels int64 [T] of a string of words."""
        sounds = [self.sounds[voice][word] for word in words]
        return torch.cat(sounds), torch.cat([self.labels(voice, word) for word in words])

    def labels(self, voice: int, word: int) -> Tensor:
        """A word's labels, int64 [n]."""
        sound = self.sounds[voice][word]
        n_quiet = quiet_frames(sound)
        return F.pad(torch.arange(len(sound) // FRAME - n_quiet) + self.first[word], (n_quiet, 0))


def flite(text: str, voice: str) -> NDArray[np.float32]:
    """What flite makes of a text: fp32 [n] at 24 kHz."""
    import soxr

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True)
        samples, rate = soundfile.read(path, dtype="float32")
    resampled: NDArray[np.float32] = soxr.resample(samples, rate, RATE, quality="VHQ")
    return resampled


def whole_frames(sound: NDArray[np.float32]) -> Tensor:
    """Fill up with silence to whole frames."""
    return torch.from_numpy(np.pad(sound, (0, -len(sound) % FRAME)))


def quiet_frames(sound: Tensor) -> int:
    """How many frames pass before there is something to hear."""
    loud = (sound.view(-1, FRAME).abs().amax(1) > QUIET).nonzero()
    return int(loud[0])


def make_bank() -> WordBank:
    """Ask flite for every word; it takes seconds."""
    sounds = [[whole_frames(flite(word, voice)) for word in WORDS] for voice in VOICES]
    first, n = [], 1
    for i in range(len(WORDS)):
        first.append(n)
        n += max(len(of_voice[i]) // FRAME - quiet_frames(of_voice[i]) for of_voice in sounds)
    return WordBank(sounds, first, n)


def random_words(generator: np.random.Generator, n: int) -> list[int]:
    """A string of n words, or of n digits."""
    known = len(DIGITS) if generator.random() < DIGITS_SHARE else len(WORDS)
    return [int(i) for i in generator.integers(0, known, n)]
