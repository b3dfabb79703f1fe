"""Tests of the voices of a loaded model: adding and removing them, and voices that cannot be used."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import voxkern
from voxkern.tts import TTS

SHORT: dict[str, Any] = {"seed": 3, "steps": 1, "max_frames": 3}


@pytest.fixture
def tts(tiny_folder: Path) -> TTS:
    return voxkern.load(tiny_folder, device="cpu", backend="torch")


def test_the_mapping_is_read_only(tts: TTS) -> None:
    assert sorted(tts.voices) == ["ada", "bob"]
    with pytest.raises(TypeError):
        tts.voices["eve"] = torch.ones(3, 64)  # type: ignore[index]
    with pytest.raises(TypeError):
        del tts.voices["bob"]  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        tts.voices = {}  # type: ignore[misc]


def test_a_voice_from_embeddings(tts: TTS) -> None:
    rows = tts.voices["bob"].double()
    tts.add_voice("eve", rows)
    rows.zero_()  # the voice is a copy
    assert tts.voices["eve"].dtype == torch.float32
    expected = tts.generate("seven", "bob", **SHORT)
    assert tts.generate("seven", "eve", **SHORT).samples.tobytes() == expected.samples.tobytes()


def test_a_voice_that_is_removed(tts: TTS) -> None:
    stream = tts.stream("seven", "bob", seed=3, steps=1, max_frames=6, chunk=1)
    expected = tts.generate("seven", "bob", seed=3, steps=1, max_frames=6)
    chunks = [next(stream)]
    tts.remove_voice("bob")
    chunks += list(stream)  # a request that has started keeps the voice
    assert b"".join(chunk.samples.tobytes() for chunk in chunks) == expected.samples.tobytes()
    with pytest.raises(ValueError, match="voice 'bob' is unknown; known voices: ada"):
        tts.generate("seven", "bob")
    with pytest.raises(ValueError, match="name is 'bob', but no voice has this name"):
        tts.remove_voice("bob")
    tts.add_voice("bob", torch.ones(4, 64))  # the name is free again
    assert tts.generate("seven", "bob", **SHORT).samples.size > 0


@pytest.mark.parametrize("recording", [np.ones((3, 64), np.float32), [1.0], None, 3])
def test_what_is_neither_a_path_nor_a_tensor_is_no_voice(tts: TTS, recording: object) -> None:
    with pytest.raises(TypeError, match="recording must be the path of a sound file or a tensor of embeddings, got"):
        tts.add_voice("eve", recording)  # type: ignore[arg-type]


def test_the_default_voice_may_be_removed(tts: TTS) -> None:
    expected = tts.generate("seven", "bob", **SHORT).samples.tobytes()
    tts.remove_voice("ada")
    assert tts.generate("seven", **SHORT).samples.tobytes() == expected
    tts.remove_voice("bob")
    with pytest.raises(ValueError, match="the model has no voices"):
        tts.generate("seven")


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (torch.ones(3, 63), r"voice 'eve' must be floats \[N, 64\], got torch.float32 \[3, 63\]"),
        (torch.ones(64), r"must be floats \[N, 64\]"),
        (torch.ones(0, 64), r"must be floats \[N, 64\]"),
        (torch.ones(3, 64, dtype=torch.int64), r"must be floats \[N, 64\], got torch.int64"),
        (torch.ones(3, 64).to_sparse(), "must be a dense tensor"),
        (torch.ones(3, 64, device="meta"), "must be a dense tensor"),
        (torch.full((3, 64), torch.nan), "has a value that is NaN, infinite or too large for float32"),
        (torch.full((3, 64), 1e60, dtype=torch.float64), "has a value that is NaN, infinite or too large for float32"),
    ],
)
def test_wrong_embeddings_are_named(tts: TTS, rows: torch.Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tts.add_voice("eve", rows)
    assert sorted(tts.voices) == ["ada", "bob"]
    with pytest.raises(ValueError, match="voice 'eve' is unknown"):
        tts.generate("seven", "eve")


def test_a_voice_without_room_for_text_is_the_cause(tts: TTS) -> None:
    positions = tts.model.config.backbone.max_seq_len
    tts.add_voice("long", torch.zeros(positions - 6, 64))
    with pytest.raises(
        ValueError, match=rf"voice 'long' leaves no tokens for a text: it has {positions - 6} embeddings"
    ):
        tts.generate("a", "long")
    tts.add_voice("shorter", torch.zeros(positions - 7, 64))
    assert tts.generate("a", "shorter", seed=3, steps=1).codes.shape[1] <= 1
    with pytest.raises(ValueError, match=f"text is too long: its prompt has {positions} tokens"):
        tts.generate("aa", "shorter")
    short = voxkern.load(None, device="cpu", backend="torch", cache_tokens=64)
    short.add_voice("long", torch.zeros(58, short.model.config.backbone.dim))
    with pytest.raises(
        ValueError, match=r"voice 'long' leaves no tokens for a text.* may have 64 tokens .*cache_tokens"
    ):
        short.generate("one", "long")


def _sound(path: Path, samples: np.ndarray, rate: int = 24000) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


@pytest.mark.parametrize(("peak", "silent"), [(0.0, True), (1e-30, True), (0.9e-4, True), (1.1e-4, False)])
def test_a_clip_that_is_nearly_silent(tts: TTS, tmp_path: Path, peak: float, silent: bool) -> None:
    clip = _sound(tmp_path / "a.wav", peak * np.sin(np.arange(24000) / 9))
    if silent:
        with pytest.raises(ValueError, match=r"a\.wav: is silent"):
            tts.add_voice("eve", clip)
    else:
        tts.add_voice("eve", clip)
        assert "eve" in tts.voices


@pytest.mark.parametrize(
    ("n", "rate", "seconds"),
    [
        (23_999, 24000, "0.999958333"),
        (44_099, 44100, "0.999977324"),
        (1_440_001, 24000, "60.0000417"),
        (12, 24000, "0.0005"),
    ],
)
def test_a_length_in_a_message_is_outside_the_range(tts: TTS, tmp_path: Path, n: int, rate: int, seconds: str) -> None:
    clip = _sound(tmp_path / "a.wav", np.sin(np.arange(n) / 9), rate)
    with pytest.raises(ValueError, match=rf"a\.wav: is {seconds} s long, but a voice needs 1 to 60 s"):
        tts.add_voice("eve", clip)


def test_a_folder_of_voices_is_not_needed(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "m")
    shutil.rmtree(folder / "voice_embedding")
    tts = voxkern.load(folder, device="cpu", backend="torch")
    tts.add_voice("eve", torch.ones(3, 64))
    assert tts.generate("seven", **SHORT).samples.size > 0


def test_the_default_voice_is_the_first() -> None:
    tts = voxkern.load(device="cpu", backend="torch")  # the files of voices are read in the order rms, slt
    assert list(tts.voices) == ["slt", "rms"]
    rows = tts.voices["slt"]
    tts.remove_voice("slt")
    tts.add_voice("ann", rows)
    tts.add_voice("slt", rows)
    assert list(tts.voices) == ["slt", "rms", "ann"]
