"""What a recogniser hears of a voice: ``python -m bench.recognition FOLDER``, beside flite's own sound."""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

import voxkern
from bench.results import ResultRow, append, provenance, with_provenance
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
COMMAND = "python -m bench.recognition"
Request = tuple[str, str, int]  # text, voice, seed
Say = Callable[[list[Request]], list[NDArray[np.float32]]]  # fp32 [n] each, at RATE


@dataclass
class Score:
    """How much of what was said was heard."""

    words: int = 0
    words_right: int = 0
    strings: int = 0
    strings_right: int = 0

    def add(self, said: list[str], heard: list[str]) -> None:
        """Count one string."""
        self.words, self.words_right = self.words + len(said), self.words_right + words_right(said, heard)
        self.strings, self.strings_right = self.strings + 1, self.strings_right + (said == heard)

    @property
    def figures(self) -> dict[str, tuple[float, str]]:
        """Counts, and shares of what was heard right, with their units."""
        return {
            "words": (self.words, "words"), "words recognised": (100 * self.words_right / self.words, "%"),
            "strings": (self.strings, "strings"), "strings recognised": (100 * self.strings_right / self.strings, "%"),
        }  # fmt: skip

    def __str__(self) -> str:
        """Shares of words and of strings."""
        return (
            f"words {self.words_right}/{self.words} = {self.words_right / self.words:.1%}, "
            f"strings {self.strings_right}/{self.strings} = {self.strings_right / self.strings:.1%}"
        )


def digit_strings(n: int, seed: int = 20250101) -> list[str]:
    """Random strings of 1 to 6 digits."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(DIGITS, generator.integers(1, 7))) for _ in range(n)]


def sentences(n: int, seed: int = 20250102) -> list[str]:
    """Of the wider vocabulary: greetings, days, months and numbers to ninety-nine, 2 to 7 words each."""
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
    """Every text in every voice with every seed; the first `show` misheard ones are printed."""
    score = Score()
    requests = [(text, voice, seed) for text in texts for voice in VOICES for seed in seeds]
    for (text, voice, _), sound in zip(requests, say(requests), strict=True):
        said, heard = text.split(), recogniser.recognise(sound, RATE)
        score.add(said, heard)
        if said != heard and (show := show - 1) >= 0:
            print(f"    {voice}: {text!r} was heard as {' '.join(heard)!r}")
    return score


class Speaker:
    """The voice with a solver.

    Attributes:
        ended: of each request that it said, whether it ended by itself.
    """

    def __init__(self, tts: voxkern.TTS, solver: str, steps: int) -> None:
        """Nothing is said yet."""
        self._tts, self._solver, self._steps = tts, solver, steps
        self.ended: list[bool] = []
        self._said: list[tuple[str, str, int]] = []  # text, voice, frames

    def __call__(self, requests: list[Request]) -> list[NDArray[np.float32]]:
        """Say them."""
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
        """Of each request, its frames by those of the words that it learnt from, for which flite is asked."""
        return [
            n / sum(len(whole_frames(word_of_flite(word, voice))) // FRAME for word in text.split())
            for text, voice, n in self._said
        ]


word_of_flite = functools.cache(flite)


def flite_whole(requests: list[Request]) -> list[NDArray[np.float32]]:
    """flite's own sound of whole texts."""
    return [flite(text, voice) for text, voice, _ in requests]


def flite_word_by_word(requests: list[Request]) -> list[NDArray[np.float32]]:
    """flite's words one after another, which is what the voice learns."""
    return [np.concatenate([word_of_flite(word, voice) for word in text.split()]) for text, voice, _ in requests]


def rows(
    folder: str = str(DEMO),
    strings: int = 20,
    seeds: int = 1,
    solvers: tuple[str, ...] = ("euler:7", "ab2:4"),
    show: int = 0,
) -> list[ResultRow]:
    """What is heard of digits and of sentences, flite's own sound first, and how fast the voice is."""
    torch.set_num_threads(1)
    command = f"{COMMAND} --strings {strings} --seeds {seeds}"
    sets = {
        f"{strings} strings of digits": (digit_strings(strings), Recogniser(DIGITS), seeds),
        f"{2 * strings // 5} sentences": (sentences(2 * strings // 5), Recogniser(WORDS), 1),
    }
    tts, found = voxkern.load(folder, backend="torch", max_batch=16), list[ResultRow]()
    for kind, (texts, recogniser, n_seeds) in sets.items():
        for subject, own in (("flite, whole", flite_whole), ("flite, word by word", flite_word_by_word)):
            found += score_rows(subject, "flite", f"{kind}, 2 voices", "", listen(own, texts, [0], recogniser), command)
        for name in solvers:
            solver, steps = name.split(":")
            say, shape = Speaker(tts, solver, int(steps)), f"{kind}, 2 voices, {n_seeds} seeds"
            score, again = listen(say, texts, list(range(n_seeds)), recogniser, show), f"{command} --solver {name}"
            found += score_rows("demo voice", "torch", shape, name, score, again) + ends(say, shape, name, again)
    return found + speed(folder)


def score_rows(subject: str, provider: str, shape: str, steps: str, score: Score, command: str) -> list[ResultRow]:
    """A score's rows, which are printed too."""
    print(f"{subject}, {shape} {steps}: {score}", flush=True)
    return [
        ResultRow(
            "recognition",
            subject,
            name,
            value,
            unit,
            "measured",
            command,
            provider,
            shape,
            "bf16" if steps else "",
            steps,
        )
        for name, (value, unit) in score.figures.items()
    ]


def ends(speaker: Speaker, shape: str, steps: str, command: str) -> list[ResultRow]:
    """How a voice's requests ended."""
    figures = {"ended by itself": (100 * float(np.mean(speaker.ended)), "%"), "longest": (max(speaker.lengths), "1")}
    print(f"  ended by themselves: {figures['ended by itself'][0]:.1f} %, longest of the natural length: "
          f"{figures['longest'][0]:.2f}", flush=True)  # fmt: skip
    return [
        ResultRow("recognition", "demo voice", name, value, unit, "measured", command, "torch", shape, "bf16", steps)
        for name, (value, unit) in figures.items()
    ]


def speed(folder: str) -> list[ResultRow]:
    """Real-time factor, and time to the first sound, of one request at a time."""
    alone, texts = voxkern.load(folder, backend="torch"), digit_strings(9)
    alone.generate(texts[0], seed=0, max_frames=3)
    whole = [alone.generate(text, seed=0, max_frames=MAX_FRAMES) for text in texts]
    firsts = []
    for text in texts:
        start = time.perf_counter()
        stream = alone.stream(text, seed=0, max_frames=MAX_FRAMES)
        next(stream)
        firsts.append(time.perf_counter() - start)
        stream.close()
    figures = {"real-time factor": ([a.real_time_factor for a in whole], "1"), "first sound": (firsts, "s")}
    found = []
    for name, (values, unit) in figures.items():
        low, *_, high = statistics.quantiles(values, n=5)
        median = statistics.median(values)
        print(f"{name}, batch 1, median of {len(values)}: {median:.3f} {unit}", flush=True)
        row = ResultRow(
            "voice", "demo voice", name, median, unit, "measured", COMMAND, "torch", "batch 1", "bf16", "euler:7"
        )
        found.append(replace(row, low=low, high=high))
    return found


def main() -> None:
    """Print scores, ends and speed; append rows where it is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default=str(DEMO))
    parser.add_argument("--strings", type=int, default=100, help="of digits; 2 sentences for 5 of them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--solver", nargs="*", default=["euler:7"], help="such as euler:4 euler:16 ab2:4")
    parser.add_argument("--show", type=int, default=10, help="print so many misheard strings")
    parser.add_argument("--csv", action="store_true", help="append the rows to bench/results.csv")
    args = parser.parse_args()
    found = rows(args.folder, args.strings, args.seeds, tuple(args.solver), args.show)
    if args.csv:
        here = provenance()
        append(with_provenance(row, here) for row in found)


if __name__ == "__main__":
    main()
