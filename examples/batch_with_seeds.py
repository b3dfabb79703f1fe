"""Generate several texts in one call, with one seed for each, and compare the codes with those of separate calls.

Run it with ``python examples/batch_with_seeds.py``.
"""

import numpy as np

import voxkern

TEXTS = ["one", "two", "friday"]
SEEDS = [1, 2, 3]


def main() -> None:
    """Generate all texts side by side and then each text alone, and print whether the codes are the same."""
    tts = voxkern.load(max_batch=4)  # up to 4 requests run side by side; more requests wait in a queue
    batch = tts.generate(TEXTS, seed=SEEDS)
    for text, seed, audio in zip(TEXTS, SEEDS, batch, strict=True):
        alone = tts.generate(text, seed=seed)
        same = np.array_equal(audio.codes, alone.codes)
        print(f"{text}, seed {seed}: {audio.codes.shape[1]} frames, same codes alone and in the batch: {same}")
    other = tts.generate(TEXTS[0], seed=4)
    print(f"{TEXTS[0]}, seed 4: same codes as with seed {SEEDS[0]}: {np.array_equal(other.codes, batch[0].codes)}")


if __name__ == "__main__":
    main()
