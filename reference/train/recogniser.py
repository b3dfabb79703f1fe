"""A speech recogniser for strings of given words (pocketsphinx with a word grammar), and a count of right words."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE = 16000  # samples per second of the sound that pocketsphinx's acoustic model needs
INSERTION = 1e-3  # word insertion probability; without it, pauses are recognised as words
HISS = 1e-3  # standard deviation of the added noise; full scale is 1
MARGIN = RATE * 3 // 10  # samples of silence that are added before and after the sound


class Recogniser:
    """Recognises strings of one or more of the given words, in any order."""

    def __init__(self, words: Sequence[str]) -> None:
        import pocketsphinx

        with tempfile.TemporaryDirectory() as folder:
            grammar = Path(folder) / "words.gram"
            grammar.write_text(f"#JSGF V1.0;\ngrammar words;\npublic <text> = ( {' | '.join(words)} )+ ;\n")
            self._decoder: Any = pocketsphinx.Decoder(
                samprate=RATE, jsgf=str(grammar), lm=None, wip=INSERTION, loglevel="FATAL"
            )

    def recognise(self, samples: NDArray[np.float32], rate: int) -> list[str]:
        """Return the words that are recognised in a sound, fp32 [n] at `rate` samples per second."""
        import soxr

        sound = np.pad(soxr.resample(samples, rate, RATE), MARGIN)
        sound += np.random.default_rng(0).normal(0, HISS, len(sound))  # exact zeros spoil the noise estimate
        self._decoder.start_utt()
        self._decoder.process_raw((sound.clip(-1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr.split() if hypothesis else []


def words_right(said: Sequence[str], heard: Sequence[str]) -> int:
    """Return the number of words of `said` minus the Levenshtein distance in words of `heard`, but at least 0."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return max(0, len(said) - row[-1])
