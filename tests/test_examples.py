"""Tests that the scripts in examples/ run on a CPU, and that the values they print and write are right."""

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

import voxkern

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NUMBER = r"(\d+\.\d+)"


def run_example(name: str, folder: Path, *arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run an example in `folder` with one thread and without a GPU, and with Triton's interpreter if `interpret`."""
    env = os.environ | {"TRITON_INTERPRET": str(int(interpret)), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def values(pattern: str, line: str) -> tuple[float, ...]:
    """Return the numbers in a printed line, which must match the whole pattern."""
    match = re.fullmatch(pattern, line)
    assert match is not None, f"{line!r} does not match {pattern!r}"
    return tuple(map(float, match.groups()))


@functools.cache
def demo_sound() -> voxkern.Audio:
    """Return the sound that quickstart.py and stream_to_file.py must write."""
    return voxkern.load(device="cpu", backend="packed").generate("seven three one", seed=7)


def assert_demo_sound(path: Path, seconds: float) -> None:
    samples, rate = soundfile.read(path)
    assert rate == 24000
    assert round(len(samples) / rate, 2) == seconds
    assert demo_sound().ended
    np.testing.assert_allclose(samples, demo_sound().samples.clip(-1, 1), atol=2 / 32767)


def check_quickstart(lines: list[str], folder: Path) -> None:
    (line,) = lines
    seconds, factor = values(rf"sound\.wav: {NUMBER} s of sound, real-time factor {NUMBER}", line)
    assert_demo_sound(folder / "sound.wav", seconds)
    assert factor > 0


def check_stream_to_file(lines: list[str], folder: Path) -> None:
    *chunks, last = lines
    lengths = [values(rf"chunk of {NUMBER} s", line)[0] for line in chunks]
    seconds, first_sound = values(rf"sound\.wav: {NUMBER} s of sound, first sound after {NUMBER} s", last)
    assert_demo_sound(folder / "sound.wav", seconds)
    assert lengths[:5] == [0.08, 0.16, 0.32, 0.64, 1.28]
    assert sum(lengths) == pytest.approx(seconds)
    assert 0 < first_sound < 60


def check_batch_with_seeds(lines: list[str], folder: Path) -> None:
    *same, other = lines
    assert len(same) == 3
    for line, text, seed in zip(same, ("one", "two", "friday"), (1, 2, 3), strict=True):
        (frames,) = values(rf"{text}, seed {seed}: (\d+) frames, same codes alone and in the batch: True", line)
        assert 5 <= frames <= 50
    assert other == "one, seed 4: same codes as with seed 1: False"


def check_serve_asyncio(lines: list[str], folder: Path) -> None:
    clients = ("first", "second", "third")
    chunks = [line.split(": chunk of ") for line in lines[:-3]]
    order = [client for client, _ in chunks]
    # the clients are served side by side: each receives its first chunk before any client receives its last
    last_chunks = [len(order) - 1 - order[::-1].index(client) for client in clients]
    assert all(order.index(client) < min(last_chunks) for client in clients)
    for client, line in zip(clients, lines[-3:], strict=True):
        total, first_sound = values(rf"{client}: {NUMBER} s in total, first sound after {NUMBER} s", line)
        lengths = [float(length.removesuffix(" s")) for name, length in chunks if name == client]
        assert lengths[:3] == [0.08, 0.16, 0.32]
        assert sum(lengths) == pytest.approx(total)
        assert 0 < first_sound < 60


def check_accelerate_module(lines: list[str], folder: Path) -> None:
    assert lines == [
        "accelerated: solve",  # packed, as on every CPU; tests/test_fused_heads.py covers the kernels
        "codes that differ after accelerate: 0 of 74",
        "restored: solve",
        "codes that differ after restore: 0 of 74",
    ]


def check_call_a_kernel(lines: list[str], folder: Path) -> None:
    shape, kernel, plain = lines
    assert shape == "result: [6, 96], torch.bfloat16"
    (kernel_error,) = values(rf"largest error of the kernel: {NUMBER}", kernel)
    (plain_error,) = values(rf"largest error of plain PyTorch: {NUMBER}", plain)
    # results of up to 4 have steps of 2^-6 in bf16, so rounding alone gives an error of up to 2^-7
    assert 1e-3 < kernel_error < 0.02
    assert kernel_error < 2 * plain_error


def check_own_microbenchmark(lines: list[str], folder: Path) -> None:
    reason, plain = lines
    assert "not timed: without a GPU" in reason
    milliseconds, bandwidth = values(rf"plain PyTorch: {NUMBER} ms, {NUMBER} GB of weights per second", plain)
    # two weights of 9216 x 3072 in bf16
    assert bandwidth == pytest.approx(2 * 9216 * 3072 * 2 / milliseconds / 1e6, abs=0.06)


# example -> its arguments, whether Triton's interpreter is on, and the check of its output. The demo voice runs
# without kernels, because two of its frames take more than three minutes in the interpreter.
CASES: dict[str, tuple[list[str], bool, Callable[[list[str], Path], None]]] = {
    "quickstart.py": (["sound.wav"], False, check_quickstart),
    "stream_to_file.py": (["sound.wav"], False, check_stream_to_file),
    "batch_with_seeds.py": ([], False, check_batch_with_seeds),
    "serve_asyncio.py": ([], False, check_serve_asyncio),
    "accelerate_module.py": ([], False, check_accelerate_module),
    "call_a_kernel.py": ([], True, check_call_a_kernel),
    "own_microbenchmark.py": ([], True, check_own_microbenchmark),
}


@pytest.mark.parametrize("name", CASES)
def test_an_example_prints_and_writes_the_right_values(name: str, tmp_path: Path) -> None:
    arguments, interpret, check = CASES[name]
    done = run_example(name, tmp_path, *arguments, interpret=interpret)
    assert done.returncode == 0, done.stderr
    check(done.stdout.splitlines(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == arguments


def test_an_example_names_the_missing_gpu_and_the_way_out(tmp_path: Path) -> None:
    done = run_example("call_a_kernel.py", tmp_path)
    assert done.returncode == 1
    assert "kernels need Triton, and a GPU or TRITON_INTERPRET=1 in the environment" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_example_is_short_described_and_tested() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert {path.name for path in files} == set(CASES)
    for path in files:
        source = path.read_text()
        assert 20 <= len(source.splitlines()) <= 50, path.name
        docstring = ast.get_docstring(ast.parse(source)) or ""
        assert f"python examples/{path.name}" in docstring, path.name
        assert docstring.splitlines()[0].endswith("."), path.name
