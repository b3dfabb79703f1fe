"""Generate speech for one text with the demo voice, and save it to a sound file.

Run it with ``python examples/quickstart.py [out.wav]``; the suffix may also be .flac or .ogg.
"""

import sys

import voxkern


def main(path: str = "out.wav") -> None:
    """Generate one text, save the sound to `path`, and print the sound's length and the real-time factor."""
    tts = voxkern.load()  # without arguments: the demo voice, which comes with the package
    audio = tts.generate("seven three one", seed=7)  # without a seed, each call gives another sound
    audio.save(path)
    print(f"{path}: {audio.seconds:.2f} s of sound, real-time factor {audio.real_time_factor:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
