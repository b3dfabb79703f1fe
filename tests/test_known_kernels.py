"""Tests that the ledger compiles no kernel twice that has not changed, and every kernel that has.

Kernels are compiled in a process of their own, because the interpreter is on in this one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.static import known_kernels

FILE = Path(__file__)
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def double(x):
    return x * 2.0

@triton.jit
def kernel(p_x, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_x + o, double(tl.load(p_x + o)))
"""
SCRIPT = """
import sys, torch
from unittest import mock
from types import SimpleNamespace
from bench.static import known_kernels
from voxkern.compile_only import compiling_for
from voxkern.kernels.changed import kernel

known = {key: SimpleNamespace(shared=1234, warps=4, stages=3) for key in sys.argv[2].split(",")}
with mock.patch.object(known_kernels, "SAMPLE", int(sys.argv[1])), known_kernels.skipping(known):
    with compiling_for("sm_90") as launches:
        for N in (64, 128):
            kernel[(N, 2)](torch.empty(N, device="meta"), N=N)
for launch in launches:
    print(known_kernels.key(launch.binary.hash), len(launch.binary.files) > 0, launch.binary.shared, *launch.grid)
"""


def launches(folder: Path, kernel: str, known: str = "", sample: int = 1 << 80) -> list[tuple[str, str, str, str]]:
    """Launch `kernel` for N = 64 and 128; return each launch's key, whether it was compiled, shared memory and grid.

    Args:
        folder: a folder for the kernel's file and for Triton's cache.
        kernel: the source of the kernel's module, which is imported as ``voxkern.kernels.changed``.
        known: the keys of known kernels, with commas between.
        sample: one known kernel in so many is compiled.
    """
    (folder / "changed.py").write_text(kernel)
    start = "import voxkern.kernels; voxkern.kernels.__path__.append(" + repr(str(folder)) + ")\n"
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-c", start + SCRIPT, str(sample), known]
    done = subprocess.run(command, cwd=FILE.parents[1], env=env, capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    return [(key, compiled, shared, grid) for key, compiled, shared, grid in lines]


def test_a_known_kernel_is_not_compiled_until_it_changes(tmp_path: Path) -> None:
    (first, second) = launches(tmp_path, KERNEL)
    assert first[1:] == ("True", "0", "64 2 1")
    assert second[1:] == ("True", "0", "128 2 1")
    assert len({first[0], second[0]}) == 2
    known = launches(tmp_path, "# a comment\n\n" + KERNEL, known=first[0])
    assert known == [(first[0], "False", "1234", "64 2 1"), second]  # neither the comment nor the line counts
    changed = launches(tmp_path, KERNEL.replace("2.0", "3.0"), known=f"{first[0]},{second[0]}")
    assert [compiled for _, compiled, _, _ in changed] == ["True", "True"]  # also where a function it calls changed
    sampled = launches(tmp_path, KERNEL, known=f"{first[0]},{second[0]}", sample=1)
    assert sampled == [first, second]


@pytest.mark.parametrize(("key", "sampled"), [("0" * 16, True), ("f" * 15 + "0", True), ("0" * 15 + "1", False)])
def test_one_key_in_sixteen_is_compiled_all_the_same(key: str, sampled: bool) -> None:
    assert known_kernels.is_sampled(key) == sampled
