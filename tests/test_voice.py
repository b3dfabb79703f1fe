"""Tests of voices made from a recording, and of the errors for files that cannot make one."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

import voxkern
from voxkern.cli import app
from voxkern.random_checkpoint import make_checkpoint
from voxkern.voice import read_recording, voice_prefix


def _tone(seconds: float, rate: int = 24000) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def _write(path: Path, samples: np.ndarray, rate: int = 24000) -> Path:
    soundfile.write(path, samples, rate, subtype="FLOAT")
    return path


def test_the_prefix_is_the_sum_of_its_codes_embeddings(tiny_folder: Path, tmp_path: Path) -> None:
    tts = voxkern.load(tiny_folder, backend="torch")
    samples = _tone(1.5)
    tts.add_voice("eve", _write(tmp_path / "eve.wav", samples))
    prefix, model = tts.voices["eve"], tts.model
    assert prefix.shape == (19 + 1, 64)  # 1.5 s are 18.75 frames, rounded up; then the END frame
    with torch.inference_mode():
        codes = model.audio_tokenizer.encode(torch.from_numpy(samples).view(1, 1, -1))[0] + 2
    table = model.mm_audio_embeddings.audio_codebook_embeddings.embeddings.weight
    starts = [0, *(64 + 23 * j for j in range(36))]
    expected = torch.stack([sum(table[o + int(c)] for o, c in zip(starts, row, strict=True)) for row in codes.T])
    torch.testing.assert_close(prefix[:-1], expected)
    end = table[1] + sum(table[o] for o in starts[1:])
    torch.testing.assert_close(prefix[-1], end)


def test_it_speaks(tiny_folder: Path, tmp_path: Path) -> None:
    tts = voxkern.load(tiny_folder, backend="torch")
    tts.add_voice("eve", _write(tmp_path / "eve.wav", _tone(2)))
    eve, ada = (tts.generate("one", voice=voice, seed=3, max_frames=5) for voice in ("eve", "ada"))
    assert not np.array_equal(eve.codes, ada.codes)
    with pytest.raises(ValueError, match="voice 'zoe' is unknown; known voices: ada, bob, eve"):
        tts.generate("one", voice="zoe")


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_other_rates_are_resampled(tmp_path: Path, rate: int) -> None:
    samples = read_recording(_write(tmp_path / "a.wav", _tone(1.2, rate), rate), 24000)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 28800) <= 1
    inside = slice(2400, -2400)  # a filter rings where the tone begins and ends
    np.testing.assert_allclose(samples[inside], _tone(1.3)[: len(samples)][inside], atol=1e-3)


def test_stereo_is_averaged(tmp_path: Path) -> None:
    left, right = _tone(1), np.zeros(24000, np.float32)
    samples = read_recording(_write(tmp_path / "a.wav", np.stack((left, right), 1)), 24000)
    np.testing.assert_allclose(samples, left / 2, atol=1e-7)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, _tone(1.5), 24000)
    np.testing.assert_allclose(read_recording(path, 24000), _tone(1.5), atol=0.05)


@pytest.mark.parametrize(
    ("samples", "named"),
    [
        (np.zeros(0, np.float32), "is 0 s long, but a voice needs 1 to 60 s"),
        (_tone(0.5), "is 0.5 s long"),
        (_tone(60.1), "is 60.1 s long"),
        (np.zeros(48000, np.float32), "is silent"),
        (np.stack((_tone(1), -_tone(1)), 1), "is silent"),
        (np.where(np.arange(48000) == 777, np.nan, _tone(2)), "NaN, infinite"),
        (np.where(np.arange(48000) == 777, np.inf, _tone(2)), "NaN, infinite"),
        (np.stack((_tone(2), _tone(2)), 1) * 3e38, "beyond 100 times full scale"),
    ],
)
def test_bad_sound(tmp_path: Path, samples: np.ndarray, named: str) -> None:
    path = _write(tmp_path / "a.wav", samples)
    with pytest.raises(ValueError, match=f"a.wav: .*{named}"):
        read_recording(path, 24000)


def test_no_sound_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.wav: no such file"):
        read_recording(tmp_path / "none.wav", 24000)
    for name, content in (("text.wav", b"hello"), ("empty.wav", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as sound"):
            read_recording(tmp_path / name, 24000)


def test_without_soxr_only_the_right_rate_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    assert len(read_recording(_write(tmp_path / "a.wav", _tone(1)), 24000)) == 24000
    with pytest.raises(ValueError, match=r"has 16000 samples a second, not 24000.*voxkern\[voices\]"):
        read_recording(_write(tmp_path / "b.wav", _tone(1, 16000), 16000), 24000)


def test_names(tiny_folder: Path, tmp_path: Path) -> None:
    tts, clip = voxkern.load(tiny_folder, backend="torch"), _write(tmp_path / "a.wav", _tone(1))
    for name, error, named in (
        ("ada", ValueError, "a voice with this name exists already"),
        ("", ValueError, "not empty"),
        ("Eve", ValueError, "lower case"),
        (3, TypeError, "must be a string"),
    ):
        with pytest.raises(error, match=named):
            tts.add_voice(name, clip)
    assert sorted(tts.voices) == ["ada", "bob"]


def test_a_checkpoint_without_encoder_makes_no_voices(tmp_path: Path) -> None:
    tts = voxkern.load(make_checkpoint(tmp_path / "m"), backend="torch")
    with pytest.raises(ValueError, match="has no codec encoder"):
        tts.add_voice("eve", _write(tmp_path / "a.wav", _tone(1)))
    assert "eve" not in tts.voices


def test_prefix_in_bf16(tiny_folder: Path) -> None:
    prefix = voice_prefix(voxkern.load(tiny_folder, dtype="bfloat16", backend="torch").model, _tone(1))
    assert prefix.dtype == torch.bfloat16
    assert prefix.shape == (13 + 1, 64)


def test_on_the_command_line(tiny_folder: Path, tmp_path: Path) -> None:
    clip, out = _write(tmp_path / "Clip.wav", _tone(1)), tmp_path / "o.wav"
    say = ["say", "one", "-o", str(out), "--model", str(tiny_folder), "--seed", "3", "--max-frames", "4"]
    say += ["--backend", "torch"]
    run = CliRunner().invoke
    assert run(app, [*say, "--clip", str(clip)]).exit_code == 0
    with_clip = out.read_bytes()
    assert run(app, say).exit_code == 0
    assert with_clip != out.read_bytes()
    done = run(app, [*say, "--clip", str(clip), "--voice", "ada"])
    assert done.exit_code == 1
    assert "not both" in done.stderr
    done = run(app, [*say, "--clip", str(tmp_path / "none.wav")])
    assert done.exit_code == 1
    assert "none.wav: no such file" in done.stderr
