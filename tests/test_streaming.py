"""Tests of stream(), which gives the sound of generate() in chunks, and of long texts, which run in parts."""

import base64
import gc
import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import voxkern
from voxkern.audio import Audio, Timings
from voxkern.engine import runner
from voxkern.engine.streaming import chunk_sizes

LONG = "one two three. four five! six seven eight? nine"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tts(request: pytest.FixtureRequest, tiny_folder: Path, device: torch.device) -> voxkern.TTS:
    return voxkern.load(tiny_folder, device=device, dtype=request.param, backend="torch")


def _lengths(chunks: list[Audio]) -> list[int]:
    return [chunk.codes.shape[1] for chunk in chunks]


@pytest.mark.parametrize(("first", "most"), [(1, 25), (1, 1), (3, 3), (5, 25), (60, 60)])
def test_chunks_are_generates_sound(tts: voxkern.TTS, first: int, most: int) -> None:
    arguments = {"voice": "bob", "seed": 1, "steps": 2, "cfg_alpha": 1.4, "solver": "ab2", "max_frames": 60}
    whole = tts.generate("seven three one", **arguments)
    chunks = list(tts.stream("seven three one", **arguments, first_chunk=first, chunk=most))
    joined = Audio.join(chunks)
    assert whole.codes.shape[1] > 30
    np.testing.assert_array_equal(joined.codes, whole.codes)
    np.testing.assert_array_equal(joined.samples, whole.samples)
    assert (joined.seed, joined.ended) == (whole.seed, whole.ended)
    assert all(len(chunk.samples) == 1920 * chunk.codes.shape[1] for chunk in chunks)
    assert not any(chunk.ended for chunk in chunks[:-1])
    sizes = chunk_sizes(first, most)
    assert all(n == next(sizes) for n in _lengths(chunks[:-1]))


@pytest.mark.slow
def test_on_kernels(tiny_folder: Path, device: torch.device) -> None:
    """On kernels, the CPU reads the first frame at once, and a later frame only when the next one is launched.

    The chunks must nevertheless join to the sound of generate().
    """
    tts = voxkern.load(tiny_folder, device=device, backend="triton")
    whole = tts.generate("one", seed=4, steps=1, max_frames=4)
    chunks = list(tts.stream("one", seed=4, steps=1, max_frames=4, first_chunk=1, chunk=2))
    np.testing.assert_array_equal(Audio.join(chunks).samples, whole.samples)
    assert _lengths(chunks) == [1, 2, 1]
    assert chunks[-1].ended == whole.ended


def test_the_first_chunk_comes_after_one_frame(tts: voxkern.TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, plain = [], runner.generate_block
    monkeypatch.setattr(runner, "generate_block", lambda *args: (frames.append(1), plain(*args)))
    stream = tts.stream("one two", seed=4, max_frames=40)
    assert not frames  # nothing runs before the first chunk is requested
    assert next(stream).codes.shape[1] == 1
    assert len(frames) == 1
    assert next(stream).codes.shape[1] == 2
    assert len(frames) == 3


def test_the_first_chunk_on_kernels_comes_after_one_frame_too(tiny_folder: Path, device: torch.device) -> None:
    """The first frame's output is read at once; a later frame's output is read after the next frame's launch."""
    mine = voxkern.load(tiny_folder, device=device, backend="triton")
    # use the reference codec: the fused codec is slow here, and test_on_kernels covers it
    del mine.model.audio_tokenizer.stream
    frames: list[int] = []
    engine_runner = mine.engine.runner
    plain = engine_runner.generate_frame
    engine_runner.generate_frame = lambda: (frames.append(1), plain())[1]
    stream = mine.stream("one two", seed=4, steps=1, max_frames=6, chunk=2)
    assert next(stream).codes.shape[1] == 1
    assert len(frames) == 1
    assert next(stream).codes.shape[1] == 2
    assert len(frames) == 4
    stream.close()


def test_first_sound_includes_the_queueing_time(tts: voxkern.TTS) -> None:
    first, second = tts.generate(["one two", "three"], seed=[1, 2], steps=1, max_frames=5)
    assert first.timings.first_sound == pytest.approx(first.timings.total)
    assert second.timings.first_sound > second.timings.total + 0.5 * first.timings.total


def test_chunk_sizes_double() -> None:
    sizes = chunk_sizes(1, 25)
    assert [next(sizes) for _ in range(8)] == [1, 2, 4, 8, 16, 25, 25, 25]


def _ends_after(tts: voxkern.TTS, n: int) -> int:
    """Return a seed with which the text "x" ends after exactly `n` frames."""
    for seed in (221, 389, *range(400)):  # the first two are right for 4 frames on a CPU, in fp32 and in bf16
        audio = tts.generate("x", seed=seed, steps=1, max_frames=n + 1)
        if audio.ended and audio.codes.shape[1] == n:
            return seed
    raise AssertionError("none of 400 seeds ends after that many frames")


def test_an_end_after_a_full_chunk_is_an_empty_one(tts: voxkern.TTS) -> None:
    seed = _ends_after(tts, 4)
    chunks = list(tts.stream("x", seed=seed, steps=1, max_frames=30, first_chunk=2, chunk=2))
    assert _lengths(chunks) == [2, 2, 0]
    assert [chunk.ended for chunk in chunks] == [False, False, True]
    assert chunks[-1].samples.shape == (0,)
    assert chunks[-1].pcm16() == b""


def test_a_limit_after_a_full_chunk_makes_no_empty_one(tts: voxkern.TTS) -> None:
    chunks = list(tts.stream("seven three one", seed=7, steps=1, max_frames=4, first_chunk=2, chunk=2))
    assert _lengths(chunks) == [2, 2]
    assert not chunks[-1].ended


def test_closing_frees_everything(tts: voxkern.TTS) -> None:
    """After a stream is closed or dropped, no request is running.

    Only the cached prefixes of voices still hold pages. A stream may also be closed before it starts.
    """
    engine = tts.engine

    def n_request_pages() -> int:
        prefixes = sum(len(prefix.pages) for prefix in engine.prefix_cache.entries.values())
        return engine.runner.kv_cache.n_pages - engine.runner.kv_cache.n_free - prefixes

    stream = tts.stream("one two", seed=4, max_frames=40)
    assert not engine.n_waiting
    next(stream)
    assert (engine.n_running, n_request_pages()) == (1, 1)
    stream.close()
    assert (engine.n_running, n_request_pages()) == (0, 0)
    with pytest.raises(StopIteration):
        next(stream)
    for _ in tts.stream("one two", seed=4, max_frames=40):
        break  # dropped, not closed
    gc.collect()
    assert (engine.n_running, n_request_pages()) == (0, 0)
    tts.stream("one two").close()


def test_two_streams_at_once(tts: voxkern.TTS) -> None:
    texts, seeds = ("one two", "seven"), (4, 7)
    streams = [tts.stream(text, seed=seed, max_frames=12) for text, seed in zip(texts, seeds, strict=True)]
    chunks: list[list[Audio]] = [[], []]
    while any(found := [next(stream, None) for stream in streams]):
        for of_stream, chunk in zip(chunks, found, strict=True):
            of_stream += [chunk] if chunk is not None else []
    for text, seed, of_stream in zip(texts, seeds, chunks, strict=True):
        whole = tts.generate(text, seed=seed, max_frames=12)
        np.testing.assert_array_equal(Audio.join(of_stream).samples, whole.samples)


def test_generate_uses_changed_codec_weights(tiny_folder: Path, device: torch.device) -> None:
    """The codec keeps folded weights, which must be folded again after the original weights have changed."""
    tts = voxkern.load(tiny_folder, device=device, backend="torch")
    before = tts.generate("one", seed=4, max_frames=3)
    with torch.no_grad():
        tts.model.audio_tokenizer.output_proj.conv.parametrizations.weight.original0.mul_(2)
    after = tts.generate("one", seed=4, max_frames=3)
    np.testing.assert_allclose(after.samples, 2 * before.samples, rtol=1e-5, atol=1e-6)


def test_timings(tts: voxkern.TTS) -> None:
    start = time.perf_counter()
    chunks = []
    for chunk in tts.stream("one two", seed=4, max_frames=12, first_chunk=2, chunk=5):
        chunks.append(chunk)
        time.sleep(0.05)  # time between chunks must not count
    wall = time.perf_counter() - start
    first, *rest = (chunk.timings for chunk in chunks)
    assert len(rest) > 1
    assert first.first_sound == first.total > first.prefill > 0
    assert all(t.prefill == 0 and t.first_sound == first.first_sound and t.frames > 0 for t in rest[:-1])
    joined = Audio.join(chunks)
    assert joined.timings.total == pytest.approx(sum(chunk.timings.total for chunk in chunks))
    assert joined.timings.total < wall - 0.05 * (len(chunks) - 1)
    assert joined.real_time_factor == pytest.approx(joined.timings.total / joined.seconds)
    assert joined.timings.first_sound < joined.timings.total
    whole = tts.generate("one two", seed=4, max_frames=12)
    assert whole.timings.first_sound == whole.timings.total


def test_long_text_is_its_parts(tiny_folder: Path, device: torch.device) -> None:
    """Each part of a long text gives the sound of a separate text with the same seed.

    The sound is the same beside another text in the same call. The call has more parts than slots (3).
    """
    tts = voxkern.load(tiny_folder, device=device, backend="torch", max_batch=3)
    arguments = {"voice": "bob", "steps": 1, "max_frames": 30}
    parts = ["one two three.", "four five!", "six seven eight?", "nine"]
    spoken = [tts.generate(part, seed=5, **arguments) for part in parts]
    together, short = tts.generate([LONG, "short"], seed=[5, 6], max_chars=16, **arguments)
    np.testing.assert_array_equal(together.samples, np.concatenate([audio.samples for audio in spoken]))
    np.testing.assert_array_equal(together.codes, np.concatenate([audio.codes for audio in spoken], axis=1))
    assert together.ended == all(audio.ended for audio in spoken)
    assert together.seed == 5
    np.testing.assert_array_equal(short.codes, tts.generate("short", seed=6, **arguments).codes)
    chunks = list(tts.stream(LONG, seed=5, max_chars=16, **arguments))
    np.testing.assert_array_equal(Audio.join(chunks).samples, together.samples)
    assert chunks[-1].ended == together.ended
    whole = tts.generate(LONG, seed=5, max_chars=None, **arguments)
    assert not np.array_equal(whole.codes, together.codes)


def test_a_long_texts_drawn_seed_is_one(tts: voxkern.TTS) -> None:
    audio = tts.generate(LONG, max_chars=16, steps=1, max_frames=4)
    again = tts.generate(LONG, seed=audio.seed, max_chars=16, steps=1, max_frames=4)
    np.testing.assert_array_equal(audio.codes, again.codes)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"text": ["a"]}, TypeError, "text must be a string, got list"),
        ({"text": " "}, ValueError, "text is empty"),
        ({"text": "a", "voice": "zoe"}, ValueError, "voice 'zoe' is unknown"),
        ({"text": "a", "steps": 65}, ValueError, "steps must be in 1..64"),
        ({"text": "a", "first_chunk": 0}, ValueError, "first_chunk must be at least 1"),
        ({"text": "a", "first_chunk": 5, "chunk": 4}, ValueError, "chunk must be at least 5"),
        ({"text": "a", "chunk": 2.0}, TypeError, "chunk must be an integer"),
        ({"text": "a", "max_chars": 0}, ValueError, "max_chars must be at least 1"),
    ],
)
def test_wrong_arguments_are_errors_at_once(tts: voxkern.TTS, arguments: dict, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        tts.stream(**arguments)  # raises here, not at the first chunk


def _audio(samples: list[float], rate: int = 24000) -> Audio:
    return Audio(np.array(samples, np.float32), rate, np.zeros((37, 0), np.int16), 1, True, Timings(1, 2, 3, 4))


def test_pcm16() -> None:
    assert np.frombuffer(_audio([0, 0.5, -0.5, 1, -1, 7, -7]).pcm16(), "<i2").tolist() == [
        0, 16384, -16384, 32767, -32767, 32767, -32767,
    ]  # fmt: skip


def test_player(tts: voxkern.TTS) -> None:
    audio = tts.generate("one", seed=3, max_frames=4)
    html = audio._repr_html_()
    sound = re.search(r'<audio controls src="data:audio/wav;base64,([^"]+)">', html)
    assert sound is not None
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sound[1])))
    assert rate == 24000
    np.testing.assert_allclose(samples, audio.samples.clip(-1, 1), atol=2 / 32767)
    assert "seed 3" in html


def test_join_wants_one_rate() -> None:
    with pytest.raises(ValueError, match="must be of one sampling rate, got"):
        Audio.join([_audio([0]), _audio([0], 16000)])
    with pytest.raises(ValueError, match=r"must be of one sampling rate, got \[\]"):
        Audio.join([])
