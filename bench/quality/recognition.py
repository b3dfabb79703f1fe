"""Word recognition of a voice: ``python -m bench recognition FOLDER``.

A speech recogniser transcribes the voice's sound, and the sound of flite, the synthesiser of the training data.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

import voxkern
from bench.command_line import parser_of
from bench.results import ResultRow, store, with_provenance
from voxkern.reference.train.data import (
    DIGITS,
    FRAME,
    MONTHS,
    RATE,
    TEENS,
    TENS,
    VOICES,
    WEEKDAYS,
    WORDS,
    flite,
    whole_frames,
)
from voxkern.reference.train.recogniser import Recogniser, words_right
from voxkern.tts import DEMO

MAX_FRAMES = 150
COMMAND = "python -m bench recognition"
Request = tuple[str, str, int]  # text, voice, seed
Say = Callable[[list[Request]], list[NDArray[np.float32]]]  # requests -> the sound of each, fp32 [n] at RATE


@dataclass
class Score:
    """Counts of the words and texts that were spoken, and of those that were recognised right.

    Attributes:
        words: number of words in all texts.
        words_right: words recognised right, see :func:`voxkern.reference.train.recogniser.words_right`.
        strings: number of texts.
        strings_right: number of texts recognised without an error.
    """

    words: int = 0
    words_right: int = 0
    strings: int = 0
    strings_right: int = 0

    def add(self, said: list[str], heard: list[str]) -> None:
        """Count one text: its words `said`, and the words `heard`, which the recogniser returned."""
        self.words, self.words_right = self.words + len(said), self.words_right + words_right(said, heard)
        self.strings, self.strings_right = self.strings + 1, self.strings_right + (said == heard)

    @property
    def figures(self) -> dict[str, tuple[float, str]]:
        """Metric -> (value, unit): the counts, and the shares recognised right."""
        return {
            "words": (self.words, "words"), "words recognised": (100 * self.words_right / self.words, "%"),
            "strings": (self.strings, "strings"), "strings recognised": (100 * self.strings_right / self.strings, "%"),
        }  # fmt: skip


def digit_strings(n: int, seed: int = 20250101) -> list[str]:
    """Return `n` random texts of 1 to 6 digits, written as words."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(DIGITS, generator.integers(1, 7))) for _ in range(n)]


def sentences(n: int, seed: int = 20250102) -> list[str]:
    """Return `n` random texts of 2 to 7 words: greetings, days, months and numbers up to ninety-nine."""
    generator = np.random.default_rng(seed)

    def one(words: tuple[str, ...]) -> str:
        return str(generator.choice(words))

    def number() -> str:
        kind = generator.integers(3)
        return one(DIGITS) if kind == 0 else one(TEENS) if kind == 1 else f"{one(TENS)} {one(DIGITS[1:])}"

    def sentence() -> str:
        greeting = one(("hello", "goodbye", "thanks", "welcome", "good morning", "good afternoon", "good evening"))
        day, month = one(("today", "tomorrow", *WEEKDAYS)), one(MONTHS)
        forms = (
            f"{greeting} {day}", f"{greeting} {day} {month} {number()}", f"{day} {month} {number()} please",
            f"{one(('yes', 'no'))} {number()} {one(('please', 'thanks'))}", f"{day} {one(WEEKDAYS)} {month} {number()}",
        )  # fmt: skip
        return one(forms)

    return [sentence() for _ in range(n)]


def listen(say: Say, texts: list[str], seeds: list[int], recogniser: Recogniser, show: int = 0) -> Score:
    """Recognise every text in every voice with every seed, and return the score.

    Args:
        say: function of requests that returns their sounds.
        texts: texts of words separated by spaces.
        seeds: the seeds for each text in each voice.
        recogniser: transcribes the sounds.
        show: print at most this many texts that were recognised wrong.
    """
    score = Score()
    requests = [(text, voice, seed) for text in texts for voice in VOICES for seed in seeds]
    for (text, voice, _), sound in zip(requests, say(requests), strict=True):
        said, heard = text.split(), recogniser.recognise(sound, RATE)
        score.add(said, heard)
        if said != heard and (show := show - 1) >= 0:
            print(f"    {voice}: {text!r} was recognised as {' '.join(heard)!r}")
    return score


class Speaker:
    """Generates requests with one solver, and records how each request ended.

    Attributes:
        ended: for each request so far, whether it ended with END rather than at the limit of frames.
    """

    def __init__(self, tts: voxkern.TTS, solver: str, steps: int) -> None:
        self._tts, self._solver, self._steps = tts, solver, steps
        self.ended: list[bool] = []
        self._said: list[tuple[str, str, int]] = []  # text, voice, frames

    def __call__(self, requests: list[Request]) -> list[NDArray[np.float32]]:
        """Generate the requests, and return their sounds, fp32 [n] each at :data:`RATE`."""
        texts, voices, seeds = (list(column) for column in zip(*requests, strict=True))
        audios = self._tts.generate(
            texts, voice=voices, seed=seeds, steps=self._steps, solver=self._solver, max_frames=MAX_FRAMES
        )
        self.ended += [audio.ended for audio in audios]
        frames = [audio.codes.shape[1] for audio in audios]
        self._said += zip(texts, voices, frames, strict=True)
        return [audio.samples for audio in audios]

    @property
    def lengths(self) -> list[float]:
        """The frames of each request / the frames of flite's sounds of these words, on which the voice was trained."""
        return [
            n / sum(len(whole_frames(word_of_flite(word, voice))) // FRAME for word in text.split())
            for text, voice, n in self._said
        ]

    @property
    def figures(self) -> dict[str, tuple[float, str]]:
        """Metric -> (value, unit): the share of requests that ended by themselves, and the greatest of the lengths."""
        return {"ended by itself": (100 * float(np.mean(self.ended)), "%"), "longest": (max(self.lengths), "1")}


word_of_flite = functools.cache(flite)


def flite_whole(requests: list[Request]) -> list[NDArray[np.float32]]:
    """Return flite's sound of each whole text."""
    return [flite(text, voice) for text, voice, _ in requests]


def flite_word_by_word(requests: list[Request]) -> list[NDArray[np.float32]]:
    """Return for each text flite's sounds of its single words, joined. The voice was trained on such sounds."""
    return [np.concatenate([word_of_flite(word, voice) for word in text.split()]) for text, voice, _ in requests]


def rows(
    folder: str = str(DEMO),
    strings: int = 20,
    seeds: int = 1,
    solvers: tuple[str, ...] = ("euler:7", "ab2:4"),
    show: int = 0,
) -> list[ResultRow]:
    """Measure the recognition of flite's and the voice's sound, and return the rows.

    Args:
        folder: the voice's checkpoint.
        strings: number of texts of digits. For every 5 of them, 2 sentences are recognised too, at least 1.
        seeds: number of seeds for each text of digits; a sentence has one seed.
        solvers: solvers with their evaluations, such as ``euler:7``.
        show: print at most this many texts that were recognised wrong, for each solver and kind of text.
    """
    torch.set_num_threads(1)
    command, n_sentences = f"{COMMAND} --strings {strings} --seeds {seeds}", max(2 * strings // 5, 1)
    sets = {
        f"{strings} strings of digits": (digit_strings(strings), Recogniser(DIGITS), seeds),
        f"{n_sentences} sentences": (sentences(n_sentences), Recogniser(WORDS), 1),
    }
    tts, found = voxkern.load(folder, backend="torch", max_batch=16), list[ResultRow]()
    for kind, (texts, recogniser, n_seeds) in sets.items():
        for subject, own in (("flite, whole", flite_whole), ("flite, word by word", flite_word_by_word)):
            figures = listen(own, texts, [0], recogniser).figures
            found += rows_of(subject, "flite", f"{kind}, 2 voices", "", figures, command)
        for name in solvers:
            solver, steps = name.split(":")
            say, shape = Speaker(tts, solver, int(steps)), f"{kind}, 2 voices, {n_seeds} seeds"
            figures = listen(say, texts, list(range(n_seeds)), recogniser, show).figures | say.figures
            found += rows_of("demo voice", "torch", shape, name, figures, f"{command} --solver {name}")
    return found


def rows_of(
    subject: str, provider: str, shape: str, steps: str, figures: dict[str, tuple[float, str]], command: str
) -> list[ResultRow]:
    """Print figures, and return their rows; `steps` is empty for flite's sound."""
    said = ", ".join(f"{name} {value:.4g}{' %' if unit == '%' else ''}" for name, (value, unit) in figures.items())
    print(f"{subject}, {shape} {steps}: {said}", flush=True)
    dtype = "bf16" if steps else ""
    return [
        ResultRow("recognition", subject, name, value, unit, "measured", command, provider, shape, dtype, steps)
        for name, (value, unit) in figures.items()
    ]


def main(arguments: Sequence[str]) -> int:
    """Print scores and ends, and append the rows if ``--csv`` is given."""
    parser = parser_of("recognition", __doc__)
    parser.add_argument("folder", nargs="?", default=str(DEMO), help="the checkpoint's folder; default: the demo voice")
    parser.add_argument("--strings", type=int, default=100, help="texts of digits; 2 sentences for each 5 of them")
    parser.add_argument("--seeds", type=int, default=3, help="speak each text with this many seeds")
    parser.add_argument("--solver", nargs="*", default=["euler:7"], help="solvers, such as euler:4 euler:16 ab2:4")
    parser.add_argument("--show", type=int, default=10, help="print at most this many texts that were recognised wrong")
    parser.add_argument("--csv", action="store_true", help="store the rows in bench/results.csv")
    args = parser.parse_args(arguments)
    if min(args.strings, args.seeds) < 1:
        parser.error("--strings and --seeds must be at least 1")
    found = rows(args.folder, args.strings, args.seeds, tuple(args.solver), args.show)
    if args.csv:
        store(with_provenance(found))
    return 0
