"""Tests that a model has one dtype and one device, and that voices and caches follow a model that is cast."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import with_reference_codec
from safetensors.torch import load_file, save_file

import voxkern
from voxkern.audio import Audio
from voxkern.checkpoint import read_checkpoint
from voxkern.tts import TTS

WEIGHTS = "consolidated.safetensors"
SHORT = {"seed": 3, "steps": 1, "max_frames": 2}


def _cast(folder: Path, target: Path, dtype_of: object) -> Path:
    """Copy a checkpoint, with each tensor in the dtype that `dtype_of` returns for its name."""
    shutil.copytree(folder, target)
    weights = load_file(target / WEIGHTS)
    save_file({name: w.to(dtype_of(name)).contiguous() for name, w in weights.items()}, target / WEIGHTS)  # type: ignore[operator]
    return target


def _load(folder: Path, backend: str, dtype: str | None = None) -> TTS:
    return with_reference_codec(voxkern.load(folder, device="cpu", dtype=dtype, backend=backend))


def _spoken(tts: TTS) -> Audio:
    return tts.generate("seven", "bob", **SHORT)  # type: ignore[arg-type, return-value]


def _is_same(a: Audio, b: Audio) -> bool:
    """Return whether codes are equal, and samples up to rounding.

    On a CPU, PyTorch's sums depend on the alignment of the weights in memory, and safetensors maps the file as it is.
    """
    return np.array_equal(a.codes, b.codes) and np.allclose(a.samples, b.samples, rtol=0, atol=1e-5)


def _norms(name: str) -> torch.dtype:
    return torch.float32 if "norm" in name else torch.bfloat16


def _flow_head(name: str) -> torch.dtype:
    return torch.float32 if name.startswith("acoustic_transformer") else torch.bfloat16


def _last_norm(name: str) -> torch.dtype:
    return torch.float16 if name == "norm.weight" else torch.bfloat16


@pytest.mark.parametrize(
    ("backend", "dtype_of"),
    [
        ("torch", _norms), ("torch", _flow_head), ("torch", _last_norm), ("triton", _norms),
        pytest.param("triton", _flow_head, marks=pytest.mark.slow),
        pytest.param("triton", _last_norm, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_checkpoint_of_several_dtypes_is_unified(
    tiny_folder: Path, tmp_path: Path, dtype_of: object, backend: str
) -> None:
    """The head has a third of the tiny model's values, so bfloat16 is the usual dtype in each case."""
    mixed = _cast(tiny_folder, tmp_path / "mixed", dtype_of)
    plain = _cast(mixed, tmp_path / "plain", lambda _: torch.bfloat16)
    model = read_checkpoint(mixed).model
    assert {w.dtype for w in model.state_dict().values()} == {torch.bfloat16}
    expected = _spoken(_load(plain, backend))
    assert _is_same(_spoken(_load(mixed, backend)), expected)


def test_float64_becomes_float32(tiny_folder: Path, tmp_path: Path) -> None:
    folder = _cast(tiny_folder, tmp_path / "double", lambda _: torch.float64)
    assert {w.dtype for w in read_checkpoint(folder).model.state_dict().values()} == {torch.float32}
    expected = _spoken(_load(tiny_folder, "torch"))
    assert _is_same(_spoken(_load(folder, "torch")), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_voices_and_caches_follow_a_model_that_is_cast(tiny_folder: Path, backend: str) -> None:
    tts = _load(tiny_folder, backend)
    in_fp32 = _spoken(tts)
    tts.model.bfloat16()
    expected = _spoken(_load(tiny_folder, backend, "bfloat16"))
    assert _is_same(_spoken(tts), expected)
    assert tts.voices["bob"].dtype == torch.bfloat16
    assert tts.engine.runner.kv_cache.kv.dtype == torch.bfloat16
    assert not _is_same(in_fp32, expected)
    tts.model.float()
    assert tts.generate("seven", "bob", **SHORT).samples.size > 0  # type: ignore[arg-type]
    assert tts.voices["bob"].dtype == torch.float32


def test_a_cast_voice_that_is_not_finite_is_named(tiny_folder: Path) -> None:
    tts = _load(tiny_folder, "torch")
    tts.add_voice("loud", torch.full((2, 64), 1e5))
    tts.model.half()
    with pytest.raises(ValueError, match="voice 'loud' has a value that is NaN, infinite or too large for float16"):
        tts.generate("seven", "loud")
    assert len(tts.generate("seven", "bob", **SHORT).samples)  # type: ignore[arg-type]


@pytest.mark.parametrize("used", [False, True])
def test_a_model_of_two_dtypes_is_refused(tiny_folder: Path, used: bool) -> None:
    tts = _load(tiny_folder, "torch")
    if used:
        tts.generate("seven", **SHORT)  # type: ignore[arg-type]
    tts.model.acoustic_transformer.bfloat16()
    named = (
        r"one dtype and one device, but norm.weight is torch.float32 on cpu, and acoustic_transformer\.\S+ is torch.bf"
    )
    with pytest.raises(ValueError, match=named):
        tts.generate("seven", **SHORT)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_copy_is_independent(tiny_folder: Path, backend: str) -> None:
    tts = _load(tiny_folder, backend)
    expected = _spoken(tts)
    new = copy.deepcopy(tts)
    assert new.backend == backend
    assert _is_same(_spoken(new), expected)
    new.add_voice("eve", torch.ones(3, 64))
    new.remove_voice("bob")
    with torch.no_grad():
        new.model.norm.weight.mul_(2)
    assert "eve" not in tts.voices
    assert _is_same(_spoken(tts), expected)
    assert new.generate("seven", "eve", **SHORT).samples.size > 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="voice 'bob' is unknown"):
        new.generate("seven", "bob")
