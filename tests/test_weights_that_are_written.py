"""Tests of :meth:`voxkern.TTS.reset`, for weights and voices that are written so that PyTorch does not count it."""

from pathlib import Path

import pytest
import torch
from checks import with_reference_codec

import voxkern
from voxkern.tts import TTS


def _codes(tts: TTS, voice: str = "bob") -> bytes:
    return tts.generate("seven", voice, seed=3, steps=1, max_frames=3).codes.tobytes()


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("torch", "layers.0.attention.wk.weight"),
        ("torch", "acoustic_transformer.input_projection.weight"),
        ("triton", "layers.0.attention.wk.weight"),
        pytest.param("triton", "acoustic_transformer.input_projection.weight", marks=pytest.mark.slow),
    ],
)
def test_a_weight_written_through_data(tiny_folder: Path, backend: str, name: str) -> None:
    tts = with_reference_codec(voxkern.load(tiny_folder, device="cpu", backend=backend))
    before = _codes(tts)  # also stores the voice's keys and values
    tts.model.get_parameter(name).data.mul_(-2)
    fresh = with_reference_codec(voxkern.load(tiny_folder, device="cpu", backend=backend))
    with torch.no_grad():
        fresh.model.get_parameter(name).mul_(-2)
    expected = _codes(fresh)
    tts.reset()
    assert tts.backend == backend
    assert _codes(with_reference_codec(tts)) == expected
    assert before != expected


def test_a_voice_written_through_data(tiny_folder: Path) -> None:
    tts = voxkern.load(tiny_folder, device="cpu", backend="torch")
    before = _codes(tts)
    tts.voices["bob"].data.mul_(-1)
    tts.reset()
    fresh = voxkern.load(tiny_folder, device="cpu", backend="torch")
    fresh.add_voice("eve", -fresh.voices["bob"])
    assert before != _codes(tts) == _codes(fresh, "eve")
