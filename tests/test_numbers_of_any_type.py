"""Tests that integers and reals of NumPy and PyTorch are numbers, and that tuples, arrays and tensors are lists."""

import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import voxkern
from voxkern.tts import TTS
from voxkern.validation import is_list, to_float, to_int

SHORT: dict[str, Any] = {"max_frames": 3, "steps": 1}


@pytest.fixture(scope="module")
def tts(tiny_folder: Path) -> TTS:
    return voxkern.load(tiny_folder, device="cpu", backend="torch", max_batch=np.int64(2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value", [5, np.int8(5), np.int64(5), np.uint64(5), np.array(5), torch.tensor(5), torch.tensor([5])]
)
def test_integers(value: Any) -> None:
    number = to_int("n", value, 1, 5)
    assert (number, type(number)) == (5, int)


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), 5.0, np.float32(5), "5", None, [5], np.array([5]), torch.tensor(5.0)]
)
def test_no_integers(value: Any) -> None:
    with pytest.raises(TypeError, match="n must be an integer"):
        to_int("n", value, 1, 5)


def test_integers_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"n must be in 1\.\.5, got 6"):
        to_int("n", np.int8(6), 1, 5)
    with pytest.raises(ValueError, match=r"n must be at least 1, got 0"):
        to_int("n", np.uint8(0), 1, None)
    for wrong in (lambda: to_int("n", 10**5000, 1, 5), lambda: to_float("n", 10**5000)):
        with pytest.raises(ValueError, match=r"n must be .*, got a value that is too large to print"):
            wrong()


@pytest.mark.parametrize(
    "value", [1.5, np.float16(1.5), np.float32(1.5), np.array(1.5), torch.tensor(1.5), Fraction(3, 2)]
)
def test_reals(value: Any) -> None:
    number = to_float("x", value)
    assert (number, type(number)) == (1.5, float)


@pytest.mark.parametrize(
    "value", [True, np.True_, "1.5", None, 1j, [1.5], np.complex64(1), torch.tensor(True), torch.ones(1)]
)
def test_no_reals(value: Any) -> None:
    with pytest.raises(TypeError, match="x must be a number"):
        to_float("x", value)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -np.float32("inf"), 1e39, -1e39, 10**400, Fraction(10**400)]
)
def test_reals_that_are_not_finite_in_fp32(value: Any) -> None:
    with pytest.raises(ValueError, match="x must be a finite fp32 number"):
        to_float("x", value)


def test_lists() -> None:
    for value in ([1], (1,), range(1), np.array([1]), torch.tensor([1]), np.array(["a"]), []):
        assert is_list(value)
    for value in (1, "abc", b"abc", None, np.array(1), torch.tensor(1), np.str_("abc"), 1.5):
        assert not is_list(value)


def test_generate_takes_numbers_of_numpy(tts: TTS) -> None:
    expected = tts.generate("seven", "ada", 2**64 - 1, steps=2, cfg_alpha=1.5, max_frames=3)
    for integer, real in ((np.uint64, np.float32), (np.array, np.float64), (lambda n: n, Fraction)):
        audio = tts.generate(
            np.str_("seven"),
            np.str_("ada"),
            np.uint64(2**64 - 1) if integer is np.uint64 else 2**64 - 1,
            steps=integer(2),
            cfg_alpha=real(1.5),  # type: ignore[arg-type]
            max_frames=integer(3),
            max_chars=integer(400),
        )
        assert audio.samples.tobytes() == expected.samples.tobytes()
        assert (audio.seed, type(audio.seed)) == (2**64 - 1, int)


def test_generate_takes_tuples_arrays_and_tensors(tts: TTS) -> None:
    texts, voices, seeds = ["one", "two", "six"], ["ada", "bob", "ada"], [3, 5, 7]
    expected = tts.generate(texts, voices, seeds, cfg_alpha=[1.0, 1.25, 1.5], **{**SHORT, "max_frames": [2, 3, 4]})
    kinds: list[Any] = [tuple, np.array]
    for kind in kinds:
        for seed in (kind(seeds), torch.tensor(seeds), range(3, 9, 2)):
            audios = tts.generate(
                kind(texts), kind(voices), seed, steps=1, cfg_alpha=kind([1.0, 1.25, 1.5]), max_frames=kind([2, 3, 4])
            )
            assert [a.samples.tobytes() for a in audios] == [a.samples.tobytes() for a in expected]
    alphas = torch.tensor([1.0, 1.25, 1.5])
    audios = tts.generate(texts, voices, seeds, steps=1, cfg_alpha=alphas, max_frames=torch.tensor([2, 3, 4]))
    assert [a.samples.tobytes() for a in audios] == [a.samples.tobytes() for a in expected]


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"text": ("a", "b"), "seed": np.array([1, 2, 3])}, ValueError, "seed has 3 entries for 2 texts"),
        ({"text": "a", "seed": np.array([1, 2])}, TypeError, "seed is a list but text is one string"),
        ({"text": "a", "voice": ("ada",)}, TypeError, "voice is a list but text is one string"),
        ({"text": ("a", 3)}, TypeError, "text must be a string, got int"),
        ({"text": b"a"}, TypeError, "text must be a string or a list of strings, got bytes"),
        ({"text": "a", "voice": 3}, TypeError, "voice must be a string, got int"),
        ({"text": "a", "seed": True}, TypeError, "seed must be an integer"),
        ({"text": "a", "seed": np.int64(-1)}, ValueError, "seed must be in"),
        ({"text": "a", "steps": np.float64(2)}, TypeError, "steps must be an integer"),
        ({"text": "a", "max_frames": np.int64(0)}, ValueError, "max_frames must be at least 1, got 0"),
        ({"text": "a", "cfg_alpha": np.float32("nan")}, ValueError, "cfg_alpha must be a finite fp32 number"),
        ({"text": "a", "cfg_alpha": 1e39}, ValueError, "cfg_alpha must be a finite fp32 number"),
        ({"text": "a", "cfg_alpha": True}, TypeError, "cfg_alpha must be a number"),
    ],
)
def test_wrong_arguments_are_named(tts: TTS, arguments: dict[str, Any], error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        tts.generate(**{**SHORT, **arguments})


def test_chunks_of_any_integer_type(tts: TTS) -> None:
    plain = [
        a.codes.shape[1] for a in tts.stream("seven", seed=3, **{**SHORT, "max_frames": 8}, first_chunk=1, chunk=2)
    ]
    sizes = {"first_chunk": np.int32(1), "chunk": torch.tensor(2), "max_frames": np.uint8(8)}
    audios = tts.stream("seven", seed=np.int16(3), steps=np.int64(1), **sizes)  # type: ignore[arg-type]
    assert [a.codes.shape[1] for a in audios] == plain
    with pytest.raises(TypeError, match="chunk must be an integer"):
        tts.stream("seven", chunk=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_batch", "cache_tokens"])
def test_load_takes_any_integer(tiny_folder: Path, name: str) -> None:
    good, bad = {"max_batch": (np.int32(2), True), "cache_tokens": (np.uint16(640), 640.0)}[name]
    loaded = voxkern.load(tiny_folder, device="cpu", backend="torch", **{name: good})  # type: ignore[arg-type]
    assert len(loaded.generate("one", seed=random.Random(3).getrandbits(8), **SHORT).samples) > 0
    with pytest.raises(TypeError, match=f"{name} must be an integer"):
        voxkern.load(tiny_folder, device="cpu", backend="torch", **{name: bad})  # type: ignore[arg-type]


def test_accelerate_takes_any_integer(tiny_folder: Path) -> None:
    model = voxkern.load(tiny_folder, device="cpu", backend="torch").model
    names = voxkern.accelerate(model, np.int64(2))  # type: ignore[arg-type]
    assert names == voxkern.accelerate(model, 2)
    assert type(vars(model)["hidden_states"].max_batch) is int
    with pytest.raises(TypeError, match="max_batch must be an integer"):
        voxkern.accelerate(model, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_batch must be in 1\.\.64, got 65"):
        voxkern.accelerate(model, np.int64(65))  # type: ignore[arg-type]
