"""Tests of the command line: output, files, exit codes and error messages."""

import contextlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from voxkern.cli import app

run = CliRunner().invoke


def test_say(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.wav"
    options = ["--model", str(tiny_folder), "--voice", "bob", "--seed", "3", "--max-frames", "8", "--steps", "2"]
    options += ["--backend", "torch"]
    done = run(app, ["say", "seven three one", "-o", str(out), *options])
    assert done.exit_code == 0, done.output
    samples, rate = soundfile.read(out)
    assert rate == 24000
    assert len(samples) % 1920 == 0
    assert re.search(r"s of sound in .* real-time factor \d+\.\d+, seed 3", done.stderr)
    text = tmp_path / "t.txt"
    text.write_text("seven three one\n")
    for arguments, stdin in ((["-f", str(text)], None), ([], "seven three one\n"), (["-"], "seven three one")):
        again = tmp_path / "again.wav"
        done = run(app, ["say", *arguments, "-o", str(again), *options], input=stdin)
        assert done.exit_code == 0, done.output
        assert again.read_bytes() == out.read_bytes()


def test_say_streaming(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --stream, the same file is written chunk by chunk. With --play, the same samples are played."""
    played: list[np.ndarray] = []

    class OutputStream(contextlib.nullcontext):
        def __init__(self, rate: int, channels: int, dtype: str) -> None:
            assert (rate, channels, dtype) == (24000, 1, "float32")
            super().__init__(self)

        def write(self, samples: np.ndarray) -> None:
            played.append(samples)
            if len(samples):
                # a chunk is in the file before it is played
                assert soundfile.info(streamed).frames == sum(map(len, played))

    plain, streamed = tmp_path / "plain.wav", tmp_path / "streamed.wav"
    options = ["--model", str(tiny_folder), "--seed", "3", "--max-frames", "8", "--steps", "2", "--backend", "torch"]
    assert run(app, ["say", "seven", "-o", str(plain), *options]).exit_code == 0
    done = run(app, ["say", "seven", "-o", str(streamed), "--stream", *options])
    assert done.exit_code == 0, done.output
    assert re.search(r"s of sound in \S+ s, first sound ready after \d\.\d+ s, real-time factor", done.stderr)
    assert streamed.read_bytes() == plain.read_bytes()
    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(OutputStream=OutputStream))
    done = run(app, ["say", "seven", "-o", str(streamed), "--stream", "--play", *options])
    assert done.exit_code == 0, done.output
    assert len(played) >= 2
    np.testing.assert_allclose(np.concatenate(played).clip(-1, 1), soundfile.read(plain)[0], atol=2 / 32767)
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    done = run(app, ["say", "seven", "-o", str(streamed), "--play", *options])
    assert done.exit_code == 1
    assert "pip install 'voxkern[play]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["say", ""], "text is empty"),
        (["say", "a", "--voice", "zoe"], "voice 'zoe' is unknown"),
        (["say", "a", "--model", "/none"], "/none: no such folder"),
        (["say", "a", "-o", "a.mp3"], "must end in one of .wav"),
        (["say", "a", "-o", "/none/a.wav"], "/none: no such folder"),
        (["say", "a", "-f", "b"], "not both"),
        (["say", "-f", "/none"], "/none"),
        (["say", "a", "--steps", "65"], "steps must be in 1..64"),
        (["say", "a", "--seed", "-1"], "seed must be in"),
        (["say", "a", "--device", "cuda"], "no GPU"),
        (["say", "a", "--device", "nonsense"], "nonsense"),
        (["say", "a", "--dtype", "int8"], "dtype must be"),
        (["info", "/none"], "/none: no such folder"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments: list[str], named: str) -> None:
    done = run(app, arguments)
    assert done.exit_code == 1
    assert named in done.stderr
    assert "Traceback" not in done.output
    assert "frames" not in done.output  # no progress bar before the error
    assert isinstance(done.exception, SystemExit)


def test_a_broken_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    done = run(app, ["say", "a", "--model", str(tmp_path)])
    assert done.exit_code == 1
    assert "params.json: no such file" in done.stderr


def test_info(tiny_folder: Path) -> None:
    done = run(app, ["info", str(tiny_folder), "--batch", "4", "--seconds", "80"])
    assert done.exit_code == 0
    assert "ada, bob" in done.stdout
    assert "float32" in done.stdout
    # 1000 frames and 9 tokens of a voice take 16 pages of 64 tokens, each of 2 layers x 2 x 2 heads x 16 x 4 B
    assert "2.1 MB for 4 x" in done.stdout


def test_info_describes_the_demo_voice() -> None:
    done = run(app, ["info"])
    assert done.exit_code == 0
    assert "slt, rms" in done.stdout  # the default voice first
    assert "61 words" in done.stdout
    assert "seventeen" in done.stdout


def test_an_input_is_not_overwritten(tmp_path: Path) -> None:
    for option in ("--clip", "--file"):
        file = tmp_path / "out.wav"
        file.write_text("hello")
        done = run(app, ["say", *(["a"] if option == "--clip" else []), option, str(file), "-o", str(file)])
        assert done.exit_code == 1
        assert f"is the file of {option}" in done.stderr.replace("\n", "")
        assert file.read_text() == "hello"


def test_doctor() -> None:
    done = run(app, ["doctor"])
    assert done.exit_code == 0
    for word in ("torch", "triton", "GPU", "backend"):
        assert word in done.stdout


def test_make(tmp_path: Path) -> None:
    done = run(app, ["make", str(tmp_path / "m"), "--seed", "3", "--encoder"])
    assert done.exit_code == 0
    done = run(app, ["info", str(tmp_path / "m")])
    assert done.exit_code == 0
    assert "bfloat16" in done.stdout


def test_make_with_a_velocity_mlp(tmp_path: Path) -> None:
    done = run(app, ["make", str(tmp_path / "m"), "--velocity-mlp"])
    assert done.exit_code == 0
    done = run(app, ["info", str(tmp_path / "m")])
    assert done.exit_code == 0
    assert "2 layers of 48" in done.stdout
