"""What a recogniser hears of a voice: ``python -m bench.hearing FOLDER``, beside flite's own sound."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

import voxkern
from voxkern.reference.train.data import RATE, VOICES, WORDS, flite
from voxkern.reference.train.hear import Ear, words_right

MAX_FRAMES = 150
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

    def __str__(self) -> str:
        """Shares of words and of strings."""
        return (
            f"words {self.words_right}/{self.words} = {self.words_right / self.words:.1%}, "
            f"strings {self.strings_right}/{self.strings} = {self.strings_right / self.strings:.1%}"
        )


def digit_strings(n: int, seed: int = 20250101) -> list[str]:
    """Random strings of 1 to 6 digits."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, generator.integers(1, 7))) for _ in range(n)]


def listen(say: Say, texts: list[str], seeds: list[int], ear: Ear, show: int = 0) -> Score:
    """Every text in every voice with every seed; the first `show` misheard ones are printed."""
    score = Score()
    requests = [(text, voice, seed) for text in texts for voice in VOICES for seed in seeds]
    for (text, voice, _), sound in zip(requests, say(requests), strict=True):
        said, heard = text.split(), ear.hear(sound, RATE)
        score.add(said, heard)
        if said != heard and (show := show - 1) >= 0:
            print(f"    {voice}: {text!r} was heard as {' '.join(heard)!r}")
    return score


def speaker(tts: voxkern.TTS, solver: str, steps: int) -> Say:
    """The voice with a solver; what it says prints how its requests ended."""

    def say(requests: list[Request]) -> list[NDArray[np.float32]]:
        texts, voices, seeds = (list(column) for column in zip(*requests, strict=True))
        audios = tts.generate(texts, voice=voices, seed=seeds, steps=steps, solver=solver, max_frames=MAX_FRAMES)
        ended = np.mean([audio.ended for audio in audios])
        frames = [audio.codes.shape[1] / len(text.split()) for audio, text in zip(audios, texts, strict=True)]
        print(
            f"{solver}, {steps} steps: {ended:.1%} ended, frames a word {np.mean(frames):.1f}, most {max(frames):.1f}"
        )
        return [audio.samples for audio in audios]

    return say


def main() -> None:
    """Print scores, ends and speed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--strings", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--solver", nargs="*", default=["euler:7"], help="such as euler:4 euler:16 ab2:4")
    parser.add_argument("--show", type=int, default=10, help="print so many misheard strings")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ear, texts = Ear(WORDS), digit_strings(args.strings)
    print(
        "flite, whole strings:", listen(lambda asked: [flite(r[0], r[1]) for r in asked], texts, [0], ear), flush=True
    )
    apart = {(word, voice): flite(word, voice) for word in WORDS for voice in VOICES}
    joined: Say = lambda asked: [np.concatenate([apart[w, r[1]] for w in r[0].split()]) for r in asked]  # noqa: E731
    print("flite, word by word:", listen(joined, texts, [0], ear), flush=True)
    tts = voxkern.load(args.folder, max_batch=16)
    for name in args.solver:
        solver, steps = name.split(":")
        print(listen(speaker(tts, solver, int(steps)), texts, list(range(args.seeds)), ear, args.show), flush=True)
    alone = voxkern.load(args.folder)
    factors = [alone.generate(text, seed=0, max_frames=MAX_FRAMES).real_time_factor for text in texts[:5]]
    print(f"real-time factor at batch 1, median of 5: {np.median(factors):.2f}")


if __name__ == "__main__":
    main()
