"""Write speech to a sound file chunk by chunk, while the speech is generated.

Run it with ``python examples/stream_to_file.py [out.wav]``.
"""

import sys

import soundfile

import voxkern


def main(path: str = "out.wav") -> None:
    """Write the chunks of one text to `path`, and print each chunk's length and the time to the first sound."""
    tts = voxkern.load()
    chunks = []
    with soundfile.SoundFile(path, "w", tts.sampling_rate, channels=1) as file:
        # the first chunk has one frame (80 ms); each next chunk has twice as many frames, up to `chunk`
        for chunk in tts.stream("seven three one", seed=7, first_chunk=1, chunk=16):
            file.write(chunk.samples)
            file.flush()  # another program can read the chunk from now on
            chunks.append(chunk)
            print(f"chunk of {chunk.seconds:.2f} s")
    audio = voxkern.Audio.join(chunks)  # equals the sound of tts.generate() to the last bit
    print(f"{path}: {audio.seconds:.2f} s of sound, first sound after {audio.timings.first_sound:.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
