"""Tests of generate(): the same seed gives the same sound, also in batches; speech ends; errors are clear."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import voxkern
from voxkern.engine.kv_cache import KVCache, pages_for
from voxkern.reference.noise import noise, seed_tensor

TEXTS = ["a", "hello there", "x" * 50, "yes\nno", "fünf", "six", "seven three one"]
SEEDS = [1, 2, 3, 2**64 - 1, 5, 0, 2**63]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def tts(request: pytest.FixtureRequest, tiny_folder: Path, device: torch.device) -> voxkern.TTS:
    return voxkern.load(tiny_folder, device=device, dtype=request.param, backend="torch", max_batch=5)


def test_equals_the_plain_loop(tiny_folder: Path, device: torch.device) -> None:
    """The engine, with its paged cache, generates the codes of a plain loop.

    The plain loop runs the model over the whole history for every frame.
    """
    tts = voxkern.load(tiny_folder, device=device, backend="torch")
    audio = tts.generate("seven", voice="bob", seed=11, steps=3, cfg_alpha=1.5, max_frames=12)
    model = tts.model
    tokens = torch.tensor([1, 25, *[24] * 9, 36, *(64 + b for b in b"seven"), 35, 25], device=device)
    u = model.embed_tokens(tokens)
    u[2:11] = tts.voices["bob"]
    frames: list[torch.Tensor] = []
    with torch.inference_mode():
        while len(frames) < 12:
            h = model.hidden_states(u.unsqueeze(0))[0, -1:]
            x = noise(seed_tensor([11]), torch.tensor([len(frames)]), 36).to(device)
            codes = model.acoustic_transformer(h, torch.tensor([1.5], device=device), x, 3)
            if codes[0, 0] == 1:
                break
            frames.append(codes[0])
            u = torch.cat((u, model.embed_codes(codes)))
        expected = torch.stack(frames, dim=1) - 2
        wave = model.audio_tokenizer.decode(expected.unsqueeze(0)).flatten()
    assert len(frames) > 4
    # Attention over the paged cache sums in another order. A code at a rounding edge could differ, and change every
    # later frame; with this seed no code does.
    np.testing.assert_array_equal(audio.codes, expected.cpu().numpy())
    np.testing.assert_allclose(audio.samples, wave.cpu().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_frames", [30, pytest.param(150, marks=pytest.mark.slow)])
def test_alone_equals_batched(tts: voxkern.TTS, max_frames: int) -> None:
    """A request gives the same bits alone and at any place in a batch.

    The 7 requests share 5 slots, so two requests wait, and some requests end early.
    """
    arguments = {"voice": "ada", "max_frames": max_frames}
    alone = [tts.generate(text, seed=seed, **arguments) for text, seed in zip(TEXTS, SEEDS, strict=True)]
    assert any(a.codes.shape[1] == max_frames for a in alone)
    assert any(a.ended for a in alone)
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 5, 2, 4]):
        batch = tts.generate([TEXTS[i] for i in order], seed=[SEEDS[i] for i in order], **arguments)
        for i, audio in zip(order, batch, strict=True):
            np.testing.assert_array_equal(audio.codes, alone[i].codes)
            np.testing.assert_array_equal(audio.samples, alone[i].samples)


def test_per_request_settings_in_one_batch(tts: voxkern.TTS) -> None:
    voices, alphas, frames = ["ada", "bob", "ada"], [1.2, 0.0, 2.5], [40, 7, 25]
    batch = tts.generate(["one"] * 3, voice=voices, seed=[9, 9, 9], cfg_alpha=alphas, max_frames=frames, steps=4)
    for voice, alpha, n, audio in zip(voices, alphas, frames, batch, strict=True):
        alone = tts.generate("one", voice=voice, seed=9, cfg_alpha=alpha, max_frames=n, steps=4)
        np.testing.assert_array_equal(audio.codes, alone.codes)
        assert audio.codes.shape[1] <= n


def test_solver(tts: voxkern.TTS) -> None:
    euler, ab2, again = (
        tts.generate("one", seed=9, max_frames=8, steps=4, solver=solver) for solver in ("euler", "ab2", "ab2")
    )
    np.testing.assert_array_equal(ab2.codes, again.codes)
    assert (euler.codes[:, 0] != ab2.codes[:, 0]).any()


def test_seeds(tts: voxkern.TTS) -> None:
    first = tts.generate("one two", max_frames=10)
    assert 0 <= first.seed < 2**64
    again = tts.generate("one two", seed=first.seed, max_frames=10)
    np.testing.assert_array_equal(first.codes, again.codes)
    assert first.seed != tts.generate("one two", max_frames=1).seed


def test_audio(tts: voxkern.TTS, tmp_path: Path) -> None:
    audio = tts.generate("one two", seed=4, max_frames=6)
    T = audio.codes.shape[1]
    assert audio.codes.dtype == np.int16
    assert audio.codes.shape == (37, T)
    assert audio.codes[1:].min() >= 0
    assert audio.codes[1:].max() <= 20
    assert audio.samples.dtype == np.float32
    assert len(audio.samples) == 1920 * T
    assert audio.sampling_rate == 24000
    assert audio.timings.total > 0
    for suffix, tolerance in ((".wav", 1 / 32767), (".flac", 1 / 32767), (".ogg", None)):
        samples, rate = soundfile.read(audio.save(tmp_path / f"a{suffix}"))
        assert rate == 24000
        assert len(samples) == 1920 * T
        if tolerance is not None:
            np.testing.assert_allclose(samples, audio.samples.clip(-1, 1), atol=2 * tolerance)
    with pytest.raises(ValueError, match=r"\.mp3"):
        audio.save(tmp_path / "a.mp3")


def test_an_end_at_once_is_an_empty_sound(tts: voxkern.TTS) -> None:
    """The first semantic code depends on the text, not on the seed: about one text in a hundred ends at once."""
    end = next(a for n in range(500) if not (a := tts.generate("x" * (n + 1), max_frames=1, steps=1)).codes.size)
    assert end.ended
    assert end.samples.size == 0
    assert end.real_time_factor == float("inf")


def test_on_frame_counts(tts: voxkern.TTS) -> None:
    seen: list[int] = []
    audio = tts.generate("one two three", seed=4, max_frames=9, on_frame=seen.append)
    assert seen == list(range(1, audio.codes.shape[1] + 1 + audio.ended))


@pytest.mark.only_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_long_request_is_the_same_twice_on_kernels(tiny_folder: Path, device: torch.device, dtype: str) -> None:
    tts = voxkern.load(tiny_folder, device=device, dtype=dtype, backend="triton")
    with torch.no_grad():
        tts.model.acoustic_transformer.semantic_codebook_output.weight[1] = 0  # the logit of END is never the largest
    first, second = (tts.generate("one two three", seed=4, max_frames=200) for _ in range(2))
    assert first.codes.shape[1] == 200
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.samples, second.samples)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"text": ""}, ValueError, "text is empty"),
        ({"text": ["a", " "]}, ValueError, "text is empty"),
        ({"text": 3}, TypeError, "text must be"),
        ({"text": [None]}, TypeError, "text must be"),
        ({"text": "a", "voice": "zoe"}, ValueError, "voice 'zoe' is unknown"),
        ({"text": "a", "voice": ["ada"]}, TypeError, "voice is a list"),
        ({"text": ["a", "b"], "voice": ["ada"]}, ValueError, "voice has 1 entries for 2 texts"),
        ({"text": ["a", "b"], "seed": [1, 2, 3]}, ValueError, "seed has 3 entries for 2 texts"),
        ({"text": "a", "seed": -1}, ValueError, "seed must be in"),
        ({"text": "a", "seed": 2**64}, ValueError, "seed must be in"),
        ({"text": "a", "seed": 1.5}, TypeError, "seed must be an integer"),
        ({"text": "a", "steps": 0}, ValueError, "steps must be in 1..64"),
        ({"text": "a", "steps": True}, TypeError, "steps must be an integer"),
        ({"text": "a", "solver": "heun"}, ValueError, "solver must be one of euler, ab2"),
        ({"text": "a", "cfg_alpha": float("nan")}, ValueError, "cfg_alpha must be a finite fp32 number"),
        ({"text": "a", "max_frames": 0}, ValueError, "max_frames must be at least 1"),
        ({"text": "a", "max_frames": 1014}, ValueError, "max_frames must be in 1..1013"),
        ({"text": "a" * 1014, "max_chars": None}, ValueError, "text is too long"),
    ],
)
def test_wrong_arguments(tiny_folder: Path, arguments: dict, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        voxkern.load(tiny_folder).generate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"backend": "cuda"}, ValueError, "backend must be"),
        ({"backend": "triton", "max_batch": 65}, ValueError, "max_batch must be in 1..64"),
        ({"dtype": "int8"}, ValueError, "dtype must be"),
        ({"max_batch": 0}, ValueError, "max_batch must be"),
        ({"max_batch": 2.0}, TypeError, "max_batch must be"),
    ],
)
def test_wrong_load_arguments(tiny_folder: Path, arguments: dict, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        voxkern.load(tiny_folder, **arguments)


def test_empty_list(tts: voxkern.TTS) -> None:
    assert tts.generate([]) == []


def test_pages_are_allocated_retained_and_freed(tiny_model: voxkern.reference.VoxtralTTS) -> None:
    assert [pages_for(n) for n in (1, 64, 65)] == [1, 1, 2]
    kv_cache = KVCache(tiny_model.config.backbone, 4, torch.float32, torch.device("cpu"))
    first, second = kv_cache.allocate(2), kv_cache.allocate(1)
    assert len({*first, *second}) == 3
    with pytest.raises(RuntimeError, match="1 free pages, 2 are needed"):
        kv_cache.allocate(2)
    kv_cache.retain(first[:1])
    kv_cache.free(first)
    assert kv_cache.n_free == 2
    assert kv_cache.ref_counts[first[0]] == 1
    kv_cache.free(first[:1])
    with pytest.raises(RuntimeError, match="page 0 is freed, but has no references"):
        kv_cache.free(first[:1])
    assert len(kv_cache.allocate(3)) == 3
    assert kv_cache.kv.shape == (2, 4, 2, 2, 64, 16)
