"""Tests that the command line prints a known error as one sentence, and leaves the traceback of an unknown one."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import voxkern
from voxkern.cli import app
from voxkern.validation import resolve_device

run = CliRunner().invoke
find_spec = importlib.util.find_spec


def _without_triton(name: str, package: str | None = None) -> Any:
    return None if name == "triton" else find_spec(name, package)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["say", "a", "--device", "mps"], "device must be 'cpu' or 'cuda', optionally with an index, got 'mps'"),
        (["say", "a", "--device", "meta"], "device must be 'cpu' or 'cuda'"),
        (["say", "a", "--device", "xpu:0"], "device must be 'cpu' or 'cuda'"),
        (["say", "a", "--device", "cuda:3"], "device is 'cuda:3', but torch finds no GPU"),
        (["say", "a", "--device", ""], "device is ''"),
        (["say", "a", "--device", "gpu"], "device is 'gpu'"),
        (["say", "a", "--cfg", "nan"], "cfg_alpha must be a finite fp32 number"),
        (["say", "a", "--cfg", "1e39"], "cfg_alpha must be a finite fp32 number"),
        (["info", "--seconds", "nan"], "seconds must be more than 0 and at most 10^9, got nan"),
        (["info", "--seconds", "inf"], "seconds must be more than 0 and at most 10^9, got inf"),
        (["info", "--seconds", "1e300"], "seconds must be more than 0"),
        (["info", "--batch", "0"], "batch must be in 1..1000000, got 0"),
        (["info", "--batch", str(10**400)], "batch must be in 1..1000000"),
        (["warmup", "--arch", "sm_90"], "unset TRITON_INTERPRET"),
        (["make", "/dev/null"], "/dev/null: is not a folder"),
        (["make", "/dev/null/x"], "/dev/null"),
    ],
)
def test_wrong_arguments(arguments: list[str], named: str, tmp_path: Path) -> None:
    done = run(app, [*arguments, *(["-o", str(tmp_path / "a.wav")] if arguments[0] == "say" else [])])
    assert done.exit_code == 1, done.exception
    assert named in done.stderr.replace("\n", "")
    assert done.stderr.count("voxkern: ") == 1
    assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("content", [b"\xff\xfes\0", b"caf\xe9", b"\x80"])
def test_text_that_is_not_utf8_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    out = ["-o", str(tmp_path / "a.wav")]
    for done, name in (
        (run(app, ["say", "--file", str(tmp_path / "t.txt"), *out]), "t.txt"),
        (run(app, ["say", *out], input=content), "standard input"),
    ):
        assert done.exit_code == 1
        assert f"{name}: is not UTF-8 text" in done.stderr.replace("\n", "")


@pytest.mark.parametrize("arguments", [["warmup", "--arch", "sm_90"], ["say", "a", "--backend", "triton"]])
def test_without_triton(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", _without_triton)
    monkeypatch.delenv("TRITON_INTERPRET") if arguments[0] == "warmup" else None
    done = run(app, [*arguments, *(["-o", str(tmp_path / "a.wav")] if arguments[0] == "say" else [])])
    assert done.exit_code == 1, done.exception
    assert "the kernels need triton, which is not installed: pip install triton" in done.stderr.replace("\n", "")


def test_without_a_sound_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PortAudioError(Exception):
        pass

    def no_device(*_: object, **__: object) -> None:
        raise PortAudioError("Error querying device -1")

    sounddevice = SimpleNamespace(OutputStream=no_device, PortAudioError=PortAudioError)
    monkeypatch.setitem(__import__("sys").modules, "sounddevice", sounddevice)
    done = run(app, ["say", "one", "--play", "-o", str(tmp_path / "a.wav"), "--max-frames", "1", "--steps", "1"])
    assert done.exit_code == 1
    assert "--play found no sound device that it can use (Error querying device -1)" in done.stderr.replace("\n", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (OSError("disk"), True),
        (MemoryError("memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (ModuleNotFoundError("no package"), True),
        (ValueError("raised by another package"), False),
        (TypeError("a fault"), False),
        (RuntimeError("a fault"), False),
        (KeyError("a fault"), False),
        (AssertionError("a fault"), False),
    ],
)
def test_only_known_errors_lose_their_traceback(error: Exception, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr("voxkern.cli.read_params", fail)
    done = run(app, ["info"])
    assert done.exit_code == 1
    assert (done.exception is error) is not known
    assert (str(error) in done.stderr) is known


@pytest.mark.parametrize(
    ("device", "error", "named"),
    [
        ("mps", ValueError, "device must be 'cpu' or 'cuda'"),
        (torch.device("meta"), ValueError, "device must be 'cpu' or 'cuda'"),
        (0, ValueError, r"device is 'cuda:0', but torch finds no GPU"),
        (-1, ValueError, r"device must be in 0\.\.127, got -1"),
        ("cuda:1", ValueError, r"device is 'cuda:1', but torch finds no GPU"),
        ("", ValueError, "device is ''"),
        (True, TypeError, "device must be an integer"),
        (1.5, TypeError, "device must be an integer"),
    ],
)
def test_load_names_a_wrong_device(device: Any, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        voxkern.load(device=device)


def test_devices_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device(None) == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device(1) == resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device(0) == torch.device("cuda", 0)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device is 'cuda:2', but torch finds 2 GPU\(s\)"):
        resolve_device(2)
