"""A speech recogniser: how many words of a text it recognises in a sound (pocketsphinx, with a grammar of words)."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE = 16000  # of the recogniser's acoustic model
INSERTION = 1e-3  # probability of one word more: without it pauses are heard as words
HISS = 1e-3
MARGIN = RATE * 3 // 10  # silence before and after


class Recogniser:
    """A recogniser of strings of given words."""

    def __init__(self, words: Sequence[str]) -> None:
        """Any of `words`, in any order, one or more."""
        import pocketsphinx

        with tempfile.TemporaryDirectory() as folder:
            grammar = Path(folder) / "words.gram"
            grammar.write_text(f"#JSGF V1.0;\ngrammar words;\npublic <text> = ( {' | '.join(words)} )+ ;\n")
            self._decoder: Any = pocketsphinx.Decoder(
                samprate=RATE, jsgf=str(grammar), lm=None, wip=INSERTION, loglevel="FATAL"
            )

    def recognise(self, samples: NDArray[np.float32], rate: int) -> list[str]:
        """The words in a sound, fp32 [n] at `rate`."""
        import soxr

        sound = np.pad(soxr.resample(samples, rate, RATE), MARGIN)
        sound += np.random.default_rng(0).normal(0, HISS, len(sound))  # digital silence upsets its noise estimate
        self._decoder.start_utt()
        self._decoder.process_raw((sound.clip(-1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr.split() if hypothesis else []


def words_right(said: Sequence[str], heard: Sequence[str]) -> int:
    """Words of `said` less the edits that turn `heard` into it (Levenshtein), at least 0."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return max(0, len(said) - row[-1])
