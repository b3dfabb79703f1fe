"""Tests that requests in a batch give the same audio as alone, with the real model runners of both backends."""

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import voxkern
from voxkern.audio import Audio
from voxkern.engine.engine import Engine
from voxkern.engine.kv_cache import PrefixKey
from voxkern.engine.request import Request, RequestState
from voxkern.engine.runner import TorchRunner
from voxkern.generation_params import GenerationParams

ARGUMENTS = {"steps": 2, "max_frames": 24}
WORDS = ["one two", "three", "x" * 40, "yes", "five six", "seven", "no", "nine ten"]
VOICES = ["ada", "bob"] * 4


@pytest.fixture(scope="module")
def tts(tiny_folder: Path, device: torch.device) -> voxkern.TTS:
    return voxkern.load(tiny_folder, device=device, backend="torch", max_batch=8)


@pytest.fixture(scope="module")
def alone(tts: voxkern.TTS) -> list[Audio]:
    return [
        tts.generate(text, voice, i, **ARGUMENTS) for i, (text, voice) in enumerate(zip(WORDS, VOICES, strict=True))
    ]


def each_alone(tts: voxkern.TTS) -> list[Audio]:
    spoken = zip(WORDS, VOICES, range(8), strict=True)
    return [tts.generate(text, voice, seed, **ARGUMENTS) for text, voice, seed in spoken]


def requests_of(tts: voxkern.TTS, steps: int = 2, max_frames: int = 24) -> list[Request]:
    return [
        tts._make_requests(text, GenerationParams(voice, i, 1.2, max_frames, steps, "euler", None))[0]
        for i, (text, voice) in enumerate(zip(WORDS, VOICES, strict=True))
    ]


def n_request_pages(engine: Engine) -> int:
    """Return the number of pages in use, without the pages of cached prefixes."""
    kv_cache = engine.runner.kv_cache
    return (
        kv_cache.n_pages - kv_cache.n_free - sum(len(prefix.pages) for prefix in engine.prefix_cache.entries.values())
    )


def assert_same_audio(one: Audio, other: Audio) -> None:
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.samples, other.samples)
    assert one.ended == other.ended


def test_each_running_request_gets_one_frame_per_engine_frame(tts: voxkern.TTS, alone: list[Audio]) -> None:
    """After every frame of the engine, each request has one more frame or is finished."""
    states = [tts.engine.submit(request) for request in requests_of(tts)]
    seen: list[list[int]] = []
    tts.engine.run_until(
        lambda: all(state.finished for state in states), lambda: seen.append([state.n_frames for state in states])
    )
    for n, frames in enumerate(seen, 1):
        assert all(k == n or (state.finished and k == state.n_frames) for k, state in zip(frames, states, strict=True))
    assert max(seen[-1]) == 24
    for state, audio in zip(states, alone, strict=True):
        assert_same_audio(state.take(), audio)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_does_not_depend_on_the_other_requests(tiny_folder: Path, device: torch.device, dtype: str) -> None:
    """Audio stays the same while requests with other steps and solvers join and leave, with too few pages for all."""
    tts = voxkern.load(tiny_folder, device=device, dtype=dtype, backend="torch", max_batch=3, cache_tokens=4 * 64)
    expected = each_alone(tts)
    requests = requests_of(tts)
    kinds = ((1, "euler"), (2, "ab2"), (3, "ab2"), (1, "ab2"))
    others = [replace(requests[i], steps=kinds[i][0], solver=kinds[i][1], max_frames=7, seed=99) for i in range(4)]
    states: list[RequestState] = []
    for i, request in enumerate(requests):
        states.append(tts.engine.submit(request))
        other = tts.engine.submit(others[i % 4])
        if i % 3 == 0:
            tts.engine.run_until(lambda other=other: other.finished or other.n_frames > 2)
            tts.engine.cancel(other)
    tts.engine.run_until(lambda: all(state.finished for state in states))
    for state, audio in zip(states, expected, strict=True):
        assert_same_audio(state.take(), audio)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_output_is_the_same_with_and_without_shared_prefixes(
    tiny_folder: Path, device: torch.device, backend: str
) -> None:
    """A voice of 70 rows makes a prefix of 72 tokens. Requests share its full page and copy its partly filled page."""
    tts = voxkern.load(tiny_folder, device=device, backend=backend, max_batch=2)
    vars(tts.model.audio_tokenizer).pop("stream", None)  # without the fused codec, the reference codec is used
    tts.add_voice("eve", torch.cat([tts.voices["bob"], tts.voices["ada"]] * 8)[:70])
    n = 30 if backend == "torch" else 3
    first, second = (
        tts._make_requests(text, GenerationParams("eve", 5, 1.2, n, 1, "euler", None))[0]
        for text in ("one", "two three")
    )
    assert first.prefix is not None
    assert first.prefix.n_tokens == 72
    prefills: list[int] = []
    plain = tts.engine.runner.prefill

    def prefill(embeddings: torch.Tensor, pages: list[int], n_past: int) -> torch.Tensor:
        prefills.append(len(embeddings))
        return plain(embeddings, pages, n_past)

    tts.engine.runner.prefill = prefill
    states = [tts.engine.submit(request) for request in (first, second)]
    tts.engine.run_until(lambda: any(state.n_frames for state in states))
    assert prefills == [72, len(first.prompt) - 72, len(second.prompt) - 72]
    assert states[0].pages[0] == states[1].pages[0]
    assert states[0].pages[1] != states[1].pages[1]
    tts.engine.run_until(lambda: all(state.finished for state in states))
    tts.engine.prefix_cache.clear()
    for state, request in zip(states, (first, second), strict=True):
        own = PrefixKey(torch.empty(0), 0, "other weights", 72)  # no weights have this version: nothing is shared
        again = tts.engine.submit(replace(request, prefix=own))
        tts.engine.run_until(lambda again=again: again.finished)
        assert_same_audio(again.take(), state.take())
    assert not tts.engine.prefix_cache.entries


def test_new_weights_and_new_voices_share_nothing_old(tiny_folder: Path, device: torch.device) -> None:
    tts, fresh = (voxkern.load(tiny_folder, device=device, backend="torch") for _ in range(2))
    before = tts.generate("one", "ada", 3, **ARGUMENTS)
    for one in (tts, fresh):
        with torch.no_grad():
            one.model.layers[0].attention.wv.weight.mul_(1.5)
    after = tts.generate("one", "ada", 3, **ARGUMENTS)
    assert not np.array_equal(after.codes, before.codes)
    assert_same_audio(after, fresh.generate("one", "ada", 3, **ARGUMENTS))
    for one in (tts, fresh):
        one.voices["ada"].add_(0.25)
    assert_same_audio(tts.generate("one", "ada", 3, **ARGUMENTS), fresh.generate("one", "ada", 3, **ARGUMENTS))


def test_a_request_that_fails_hurts_no_other(tts: voxkern.TTS, alone: list[Audio]) -> None:
    engine, requests = tts.engine, requests_of(tts)
    bad = replace(requests[0], prompt=requests[0].prompt[:, :-1])  # one column too few
    states = [engine.submit(request) for request in (*requests[:4], bad, *requests[4:])]
    failed = states.pop(4)
    engine.run_until(lambda: failed.finished)
    with pytest.raises((RuntimeError, ValueError)):
        engine.wait(failed, 1)
    assert not failed.pages
    engine.run_until(lambda: all(state.finished for state in states))
    for state, audio in zip(states, alone, strict=True):
        assert_same_audio(state.take(), audio)
    assert n_request_pages(engine) == 0


def test_generate_raises_the_error_of_any_of_its_texts(tts: voxkern.TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = TorchRunner.add, []

    def add(*args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory")
        plain(*args)

    monkeypatch.setattr(TorchRunner, "add", add)
    with pytest.raises(MemoryError, match="no memory"):
        tts.generate(["a", "b", "c"], **ARGUMENTS)
    assert (tts.engine.n_running, tts.engine.n_waiting, n_request_pages(tts.engine)) == (0, 0, 0)


def test_an_interrupt_leaves_nothing_behind(tts: voxkern.TTS, alone: list[Audio]) -> None:
    def interrupt(n: int) -> None:
        if n == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tts.generate(WORDS, on_frame=interrupt, **ARGUMENTS)
    assert (tts.engine.n_running, tts.engine.n_waiting, n_request_pages(tts.engine)) == (0, 0, 0)
    assert_same_audio(tts.generate(WORDS[0], VOICES[0], 0, **ARGUMENTS), alone[0])


def test_requests_from_several_threads_equal_those_run_alone(tts: voxkern.TTS, alone: list[Audio]) -> None:
    """Twelve threads share 8 slots: 4 stream, 4 call generate(), and 4 drop a stream after its first chunk."""
    received: dict[int, Audio] = {}

    def stream(i: int) -> None:
        chunks = list(tts.stream(WORDS[i], VOICES[i], i, chunk=5, **ARGUMENTS))
        received[i] = Audio.join(chunks)

    def generate(i: int) -> None:
        received[i] = tts.generate(WORDS[i], VOICES[i], i, **ARGUMENTS)

    def drop(i: int) -> None:
        next(tts.stream(WORDS[i % 8], VOICES[i % 8], i, **ARGUMENTS))

    threads = [threading.Thread(target=(stream, generate)[i % 2], args=(i,)) for i in range(8)]
    threads += [threading.Thread(target=drop, args=(i,)) for i in range(8, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for i, audio in enumerate(alone):
        assert_same_audio(received[i], audio)
    assert (tts.engine.n_running, tts.engine.n_waiting, n_request_pages(tts.engine)) == (0, 0, 0)


def test_async(tts: voxkern.TTS, alone: list[Audio]) -> None:
    """Ten requests share 8 slots. One is cancelled, and the caller of another leaves the loop after one chunk."""

    async def listen(i: int) -> Audio:
        chunks = await tts.submit(WORDS[i], VOICES[i], i, chunk=3, **ARGUMENTS)
        return Audio.join([chunk async for chunk in chunks])

    async def close_early() -> None:
        async for chunk in await tts.submit("two", **ARGUMENTS):
            assert chunk.codes.shape[1] == 1
            return

    async def run_all() -> list[Audio]:
        doomed = asyncio.create_task(listen(0))
        tasks = [asyncio.create_task(listen(i)) for i in range(8)]
        await asyncio.sleep(0.05)
        doomed.cancel()
        await close_early()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        return await asyncio.gather(*tasks)

    for audio, expected in zip(asyncio.run(run_all()), alone, strict=True):
        assert_same_audio(audio, expected)
    assert (tts.engine.n_running, tts.engine.n_waiting, n_request_pages(tts.engine)) == (0, 0, 0)


def test_async_requests_do_not_wait_for_each_others_threads(tts: voxkern.TTS) -> None:
    """Each of eight requests gets its first chunk early, although asyncio's default executor has only one thread."""
    received: list[int] = []

    async def listen(i: int) -> None:
        async for _ in await tts.submit(WORDS[i], VOICES[i], i, first_chunk=1, chunk=8, **ARGUMENTS):
            received.append(i)

    async def run_all() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        await asyncio.gather(*(listen(i) for i in range(8)))

    asyncio.run(run_all())
    assert len(received) > 32
    assert all(received.index(i) < 16 for i in range(8))  # the first chunk of each is among the first 2 x 8 chunks


def test_what_never_comes_is_not_waited_for(tts: voxkern.TTS) -> None:
    with pytest.raises(RuntimeError, match="no request is queued or running"):
        tts.engine.run_until(lambda: False)


def test_async_errors_come_before_anything_runs(tts: voxkern.TTS) -> None:
    async def ask() -> object:
        return await tts.submit("two", steps=0)

    with pytest.raises(ValueError, match="steps must be in"):
        asyncio.run(ask())


def test_on_kernels(tiny_folder: Path, device: torch.device) -> None:
    """While one request runs, a request with other steps takes the slot of a cancelled request.

    Each request gives the same audio as alone.
    """
    tts = voxkern.load(tiny_folder, device=device, backend="triton", max_batch=2)
    del tts.model.audio_tokenizer.stream  # without the fused codec, the reference codec is used
    arguments = {"voice": "ada", "max_frames": 4}
    expected = [tts.generate(text, seed=i, steps=1 + i % 2, **arguments) for i, text in enumerate(WORDS[:3])]
    requests = [
        tts._make_requests(text, GenerationParams("ada", i, 1.2, 4, 1 + i % 2, "euler", None))[0]
        for i, text in enumerate(WORDS[:3])
    ]
    engine = tts.engine
    first, doomed = engine.submit(requests[0]), engine.submit(replace(requests[2], seed=77))
    engine.run_until(lambda: first.finished or first.n_frames == 2)
    engine.cancel(doomed)
    assert n_request_pages(engine) == 1
    others = [engine.submit(request) for request in requests[1:]]
    engine.run_until(lambda: all(state.finished for state in (first, *others)))
    for state, audio in zip((first, *others), expected, strict=True):
        assert_same_audio(state.take(), audio)
    assert n_request_pages(engine) == 0


@pytest.mark.only_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_is_the_same_alone_and_in_a_batch_of_32(tiny_folder: Path, device: torch.device, dtype: str) -> None:
    tts = voxkern.load(tiny_folder, device=device, dtype=dtype, backend="triton", max_batch=32)
    texts, voices = [f"{word} {i}" for i in range(4) for word in WORDS], VOICES * 4
    together = tts.generate(texts, voices, list(range(32)), max_frames=24)
    assert any(audio.codes.shape[1] == 24 for audio in together)
    for i, (text, voice, audio) in enumerate(zip(texts, voices, together, strict=True)):
        assert_same_audio(tts.generate(text, voice, i, max_frames=24), audio)


@pytest.mark.only_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_requests_on_kernels_are_the_same_alone(tiny_folder: Path, device: torch.device, dtype: str) -> None:
    """64 requests with random arguments share 8 slots."""
    tts = voxkern.load(tiny_folder, device=device, dtype=dtype, backend="triton", max_batch=8)
    draw = random.Random(0)

    def request(seed: int) -> Request:
        voice, cfg_alpha, solver = draw.choice(VOICES), draw.uniform(0, 3), draw.choice(["euler", "ab2"])
        params = GenerationParams(voice, seed, cfg_alpha, draw.randint(1, 40), draw.choice([1, 2, 4, 7]), solver, None)
        return tts._make_requests(draw.choice(WORDS) * draw.randint(1, 4), params)[0]

    requests = [request(seed) for seed in range(64)]
    for one, audio in zip(requests, tts.engine.generate(requests), strict=True):
        assert_same_audio(tts.engine.generate([one])[0], audio)


@pytest.mark.only_gpu
def test_no_kernel_is_compiled_in_a_second_pass_over_all_batch_sizes(tiny_folder: Path, device: torch.device) -> None:
    """The second pass has prompts of other lengths, one of them with 16 tokens after the prefix, and other steps."""
    from triton import knobs

    # fp16, because no other test runs this model in fp16: otherwise the first pass might find all kernels loaded
    tts = voxkern.load(tiny_folder, device=device, dtype="float16", backend="triton", max_batch=8, graphs=False)
    loaded: list[str] = []

    def note(module: Any, function: Any, name: str, *_: Any) -> None:
        loaded.append(name)

    def pass_over_all_sizes(texts: list[str], **arguments: Any) -> None:
        for n in range(1, 9):
            tts.generate(texts[:n], seed=list(range(n)), max_frames=3, **arguments)

    knobs.runtime.kernel_load_start_hook.add(note)
    try:
        pass_over_all_sizes(WORDS, steps=2)
        assert loaded
        loaded.clear()
        pass_over_all_sizes(["y" * 13, *WORDS[::-1]], steps=3, solver="ab2", voice="bob", cfg_alpha=2.0)
    finally:
        knobs.runtime.kernel_load_start_hook.remove(note)
    assert loaded == []


def test_memory_is_flat(tts: voxkern.TTS) -> None:
    """Finished requests leave no tensors behind: the number of live tensors is the same after 3 and after 23 calls."""
    import gc

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    def speak(n: int) -> int:
        for i in range(n):
            tts.generate(["a", "b"], seed=[i, i + 1], steps=1, max_frames=2)
        return tensors()

    assert speak(3) == speak(20)


@pytest.mark.parametrize("source", ["tiny", "demo voice"])
def test_requests_without_limits_run_side_by_side(tiny_folder: Path, device: torch.device, source: str) -> None:
    """Each request reserves pages for the model's longest sequence, and all of them fit.

    The prefix cache also holds the last, partly filled page of the voice's prefix.
    """
    tts = voxkern.load(tiny_folder if source == "tiny" else None, device=device, backend="torch", max_batch=3)
    running: list[int] = []
    tts.generate(["one", "two", "three"], steps=1, seed=1, on_frame=lambda n: running.append(tts.engine.n_running))
    assert running[0] == 3


@pytest.mark.parametrize("tokens", [64, 128])
def test_a_small_cache_limits_a_request(tiny_folder: Path, device: torch.device, tokens: int) -> None:
    tts = voxkern.load(tiny_folder, device=device, backend="torch", cache_tokens=tokens)
    with pytest.raises(ValueError, match=r"max_frames must be in 1..\d+, got 200"):
        tts.generate("one", max_frames=200)
    assert tts.generate("one", seed=1, steps=1).codes.shape[1] <= tokens
    with pytest.raises(ValueError, match="cache_tokens must be at least 64, got 63"):
        voxkern.load(tiny_folder, cache_tokens=63)
