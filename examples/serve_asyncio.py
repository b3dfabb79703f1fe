"""Stream several texts side by side with asyncio, as a server does for its clients.

Run it with ``python examples/serve_asyncio.py``.
"""

import asyncio

import voxkern

TEXTS = {"first": "one two", "second": "good evening", "third": "seven"}  # client -> text


async def serve(tts: voxkern.TTS, client: str, text: str, seed: int) -> voxkern.Audio:
    """Generate the text of one client, and print the length of each chunk as soon as the chunk is ready."""
    chunks = []
    # a request reserves memory for max_frames: 125 frames are 10 s
    async for chunk in await tts.submit(text, seed=seed, max_frames=125):
        print(f"{client}: chunk of {chunk.seconds:.2f} s")  # a server sends chunk.pcm16() to its client here
        chunks.append(chunk)
    return voxkern.Audio.join(chunks)


async def serve_all(tts: voxkern.TTS) -> list[voxkern.Audio]:
    """Serve all clients side by side, and return the audio of each client."""
    return await asyncio.gather(*(serve(tts, client, text, 7) for client, text in TEXTS.items()))


def main() -> None:
    """Serve three clients with one model, and print the length of each client's sound."""
    tts = voxkern.load(max_batch=len(TEXTS))
    for client, audio in zip(TEXTS, asyncio.run(serve_all(tts)), strict=True):
        print(f"{client}: {audio.seconds:.2f} s in total, first sound after {audio.timings.first_sound:.2f} s")


if __name__ == "__main__":
    main()
