"""Tests of the thread that runs frames for asyncio callers: its start, its end, and what runs beside it."""

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

import voxkern
from voxkern import Audio

ARGUMENTS = {"steps": 1, "max_frames": 6}
THREAD = "voxkern frames"


def frame_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


@pytest.fixture
def tts(tiny_folder: Path) -> voxkern.TTS:
    return voxkern.load(tiny_folder, device="cpu", backend="torch", max_batch=4)


async def collect(tts: voxkern.TTS, seed: int, **arguments: int) -> Audio:
    return Audio.join([chunk async for chunk in await tts.submit("seven", seed=seed, **ARGUMENTS | arguments)])


def wait_until_no_thread_is_left() -> None:
    for thread in frame_threads():
        thread.join(10)
    assert not frame_threads()


def n_pages_of_requests(tts: voxkern.TTS) -> int:
    tts.engine.prefix_cache.clear()
    return tts.engine.runner.kv_cache.n_pages - tts.engine.runner.kv_cache.n_free


def test_two_hundred_requests_share_one_thread(tts: voxkern.TTS) -> None:
    """The thread starts with the first read, not with the call, and ends after the last chunk."""
    counts: list[int] = []

    async def listen(seed: int) -> Audio:
        chunks = []
        async for chunk in await tts.submit("seven", seed=seed, **ARGUMENTS):
            counts.append(len(frame_threads()))
            chunks.append(chunk)
        return Audio.join(chunks)

    async def run_all() -> list[Audio]:
        unread = await tts.submit("seven", seed=0, **ARGUMENTS)
        assert not frame_threads()
        del unread
        return await asyncio.gather(*map(listen, range(200)))

    before = threading.active_count()
    audios = asyncio.run(run_all())
    assert set(counts) == {1} or set(counts) == {0, 1}  # the last chunks are read when the thread has ended
    wait_until_no_thread_is_left()
    assert threading.active_count() == before
    for seed in (0, 1, 77, 199):
        assert audios[seed].samples.tobytes() == tts.generate("seven", seed=seed, **ARGUMENTS).samples.tobytes()
    assert n_pages_of_requests(tts) == 0


def test_generate_in_another_thread_runs_side_by_side(tts: voxkern.TTS) -> None:
    expected = [tts.generate("seven", seed=seed, **ARGUMENTS) for seed in range(6)]
    received: dict[int, Audio] = {}

    def generate(seed: int) -> None:
        received[seed] = tts.generate("seven", seed=seed, **ARGUMENTS)

    async def run_all() -> None:
        threads = [threading.Thread(target=generate, args=(seed,)) for seed in (0, 1, 2)]
        for thread in threads:
            thread.start()
        for seed, audio in zip(
            (3, 4, 5), await asyncio.gather(*(collect(tts, seed) for seed in (3, 4, 5))), strict=True
        ):
            received[seed] = audio
        for thread in threads:
            await asyncio.to_thread(thread.join, 60)

    asyncio.run(run_all())
    for seed, audio in enumerate(expected):
        assert received[seed].samples.tobytes() == audio.samples.tobytes()


def test_a_slow_reader_holds_up_no_other_request(tts: voxkern.TTS) -> None:
    """While one reader sleeps after its first chunk, its request and another one run to their ends."""

    async def run_both() -> tuple[Audio, Audio]:
        slow = await tts.submit("seven", seed=1, **ARGUMENTS)
        chunks = [await anext(slow)]
        quick = await collect(tts, 2)
        for _ in range(200):
            if not frame_threads():
                break
            await asyncio.sleep(0.05)
        assert not frame_threads()  # all frames are generated, though one reader has read one of them
        chunks += [chunk async for chunk in slow]
        return Audio.join(chunks), quick

    for seed, audio in enumerate(asyncio.run(run_both()), 1):
        assert audio.samples.tobytes() == tts.generate("seven", seed=seed, **ARGUMENTS).samples.tobytes()


def test_close_ends_all_requests_and_the_thread(tts: voxkern.TTS) -> None:
    """Readers receive an error at once. Afterwards the model generates the same sound as before."""
    expected = tts.generate("seven", seed=3, **ARGUMENTS).samples.tobytes()

    async def run_all() -> list[object]:
        tasks = [asyncio.create_task(collect(tts, seed, max_frames=500, steps=8)) for seed in range(6)]
        async with asyncio.timeout(30):
            while tts.engine.n_running < 4:
                await asyncio.sleep(0.01)
        engine = tts.engine
        await asyncio.to_thread(tts.close)
        assert not frame_threads()
        assert (engine.n_running, engine.n_waiting) == (0, 0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    for error in asyncio.run(run_all()):
        assert isinstance(error, RuntimeError)
        assert "the model was closed" in str(error)
    assert asyncio.run(collect(tts, 3)).samples.tobytes() == expected
    tts.close()
    tts.close()  # closing twice is no error


def test_close_frees_the_engine_at_once(tts: voxkern.TTS) -> None:
    """No cycle of references keeps the KV cache until a garbage collection."""
    asyncio.run(collect(tts, 3))
    wait_until_no_thread_is_left()
    cache = weakref.ref(tts.engine.runner.kv_cache.kv)
    gc.collect()
    gc.disable()
    try:
        tts.close()
        assert cache() is None
    finally:
        gc.enable()


def test_an_iterator_that_starts_after_close_raises(tts: voxkern.TTS) -> None:
    async def read_late() -> None:
        chunks = await tts.submit("seven", seed=3, **ARGUMENTS)
        tts.close()
        await anext(chunks)

    with pytest.raises(RuntimeError, match="the model was closed"):
        asyncio.run(read_late())


def test_a_closed_event_loop_ends_its_requests(tts: voxkern.TTS) -> None:
    """A loop is closed without cancelling its tasks. The request ends, its pages are free and no thread is left."""
    loop = asyncio.new_event_loop()

    async def first_chunk() -> object:
        chunks = await tts.submit("seven", seed=1, steps=8, max_frames=500)
        await anext(chunks)
        return chunks

    chunks = loop.run_until_complete(first_chunk())
    loop.close()
    wait_until_no_thread_is_left()
    assert n_pages_of_requests(tts) == 0
    del chunks


def test_an_error_of_all_frames_reaches_all_readers(tts: voxkern.TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine itself fails. Each reader receives the error, and the next request works."""

    def fail(*_: object) -> None:
        raise MemoryError("planted")

    async def run_all() -> list[object]:
        return await asyncio.gather(*(collect(tts, seed) for seed in range(3)), return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(tts.engine, "run_until", fail)
        errors = asyncio.run(run_all())
    assert all(isinstance(error, MemoryError) for error in errors)
    wait_until_no_thread_is_left()
    assert n_pages_of_requests(tts) == 0
    assert asyncio.run(collect(tts, 1)).codes.shape[1] > 0


FORK = """
import asyncio, os, sys
import torch
import voxkern

torch.set_num_threads(1)
tts = voxkern.load(sys.argv[1], device="cpu", backend="torch")

async def collect():
    chunks = [chunk async for chunk in await tts.submit("seven", seed=3, steps=1, max_frames=3)]
    return voxkern.Audio.join(chunks).samples.tobytes()

expected = asyncio.run(collect())
pid = os.fork()
same = asyncio.run(collect()) == expected
if not pid:
    os.write(1, b"child same, " if same else b"child differs, ")
    os._exit(0)
os.waitpid(pid, 0)
print("parent same" if same else "parent differs")
"""


def test_a_forked_process_has_a_thread_of_its_own(tiny_folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, str(tiny_folder)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "child same, parent same\n", done.stderr
