"""Tests that PyTorch's global settings of dtype, device, autocast and determinism do not change what is generated."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from checks import with_reference_codec

import voxkern
from voxkern.random_checkpoint import make_checkpoint


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


SETTINGS = {
    "float64 by default": lambda: _default_dtype(torch.float64),
    "float16 by default": lambda: _default_dtype(torch.float16),
    "meta by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: _deterministic(True),
    "not deterministic": lambda: _deterministic(False),
    "inference mode": torch.inference_mode,
    "gradients": torch.enable_grad,
}


FEW = ("float64 by default", "meta by default", "autocast")  # those that changed the sound once
CASES: list[Any] = [("transformer", "torch", setting) for setting in SETTINGS]
CASES += [("mlp", "torch", setting) for setting in FEW] + [("transformer", "triton", "autocast")]
CASES += [pytest.param("transformer", "triton", setting, marks=pytest.mark.slow) for setting in FEW[:2]]
CASES += [pytest.param("transformer", "triton and fused codec", setting, marks=pytest.mark.slow) for setting in FEW]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "a.wav"
    soundfile.write(path, 0.5 * np.sin(np.arange(24000) / 20), 24000)
    return path


def _speak(folder: Path, clip: Path | None, backend: str) -> list[bytes]:
    """Return the codes and samples of all ways to generate, with a model loaded now."""
    tts = voxkern.load(folder, device="cpu", backend=backend.split()[0], max_batch=2)
    if "codec" not in backend:
        with_reference_codec(tts)
    voice = "ada"
    if clip is not None:
        voice = "eve"
        tts.add_voice(voice, clip)
    audios = tts.generate(["seven", "one two"], ["bob", voice], [3, 5], steps=1, max_frames=[1, 2])
    audios += list(tts.stream("six", voice, seed=7, steps=2, solver="ab2", max_frames=2))
    return [part for audio in audios for part in (audio.codes.tobytes(), audio.samples.tobytes())]


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, mlp_folder: Path, clip: Path) -> dict[str, tuple[Path, Path | None]]:
    """Return the checkpoint of each kind of flow head, and a recording if the checkpoint has the codec's encoder."""
    return {"transformer": (tiny_folder, clip), "mlp": (mlp_folder, None)}


@pytest.fixture(scope="module")
def speak_plainly(folders: dict[str, tuple[Path, Path | None]]) -> Callable[[str, str], list[bytes]]:
    """Return the function that speaks with PyTorch's own settings, once for each head and backend."""
    return functools.cache(lambda head, backend: _speak(*folders[head], backend))


@pytest.mark.parametrize(("head", "backend", "setting"), CASES)
def test_speech(folders: dict, speak_plainly: Callable, head: str, backend: str, setting: str) -> None:
    expected = speak_plainly(head, backend)
    with SETTINGS[setting]():
        spoken = _speak(*folders[head], backend)
    assert spoken == expected


@pytest.mark.parametrize("setting", ["float64 by default", "meta by default"])
def test_a_random_checkpoint(tmp_path: Path, setting: str) -> None:
    plain = make_checkpoint(tmp_path / "plain", dtype=torch.float32)
    with SETTINGS[setting]():
        other = make_checkpoint(tmp_path / "other", dtype=torch.float32)
    name = "consolidated.safetensors"
    assert (plain / name).read_bytes() == (other / name).read_bytes()
