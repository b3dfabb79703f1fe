"""Tests that the ledger compiles no kernel twice that has not changed, and every kernel that has.

Kernels are compiled in a process of their own, because the interpreter is on in this one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_process import run_python

from bench.static import known_kernels

ROOT = Path(__file__).resolve().parents[1]
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
# Launches each file's kernel for N = 64 and 128. Kernels of the first file are known to the other files, except for the
# second one in the second file.
SCRIPT = """
import importlib, json, sys, torch
import voxkern.kernels
from unittest import mock
from types import SimpleNamespace
from bench.static import known_kernels
from voxkern.compile_only import compiling_for

voxkern.kernels.__path__.append(sys.argv[1])
found = []
for i, sample in enumerate((1 << 80, 1 << 80, 1 << 80, 1)):
    kernel = importlib.import_module(f"voxkern.kernels.file{i}").kernel
    keys = [one[0] for one in found[0][: 1 if i == 1 else 2]] if i else []
    known = {key: SimpleNamespace(shared=1234, warps=4, stages=3) for key in keys}
    with mock.patch.object(known_kernels, "SAMPLE", sample), known_kernels.skipping(known):
        with compiling_for("sm_90") as launches:
            for N in (64, 128):
                kernel[(N, 2)](torch.empty(N, device="meta"), N=N)
    found.append([])
    for launch in launches:
        binary = launch.binary
        found[i].append([known_kernels.key(binary.hash), len(binary.files) > 0, binary.shared, *launch.grid])
print(json.dumps(found))
"""


def test_a_known_kernel_is_not_compiled_until_it_changes(tmp_path: Path) -> None:
    sources = (KERNEL, "# a comment\n\n" + KERNEL, KERNEL.replace("2.0", "3.0"), KERNEL)
    for i, source in enumerate(sources):
        (tmp_path / f"file{i}.py").write_text(source)
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    new, moved, changed, sampled = json.loads(done.stdout)
    (first, *one), (second, *other) = new
    assert one == [True, 0, 64, 2, 1]
    assert other == [True, 0, 128, 2, 1]
    assert first != second
    assert moved == [[first, False, 1234, 64, 2, 1], new[1]]  # neither the comment nor the line counts
    assert [compiled for _, compiled, *_ in changed] == [True, True]  # a function that the kernel calls has changed
    assert not {key for key, *_ in changed} & {first, second}
    assert sampled == new


@pytest.mark.parametrize(("key", "sampled"), [("0" * 16, True), ("f" * 15 + "0", True), ("0" * 15 + "1", False)])
def test_one_key_in_sixteen_is_compiled_all_the_same(key: str, sampled: bool) -> None:
    assert known_kernels.is_sampled(key) == sampled


def test_line_numbers_do_not_change_the_ledgers_keys() -> None:
    """A worker of the ledger imports the kernels itself, and must do so before their line numbers are set to 0."""
    script = """
from unittest import mock
from bench.static import ledger
with mock.patch.object(ledger, "rows_of", return_value=[]):
    ledger._of_arch("sm_90", ledger.Known({}, {}))
from voxkern.kernels import linear, quantized
print(linear.product.starting_line_number, quantized.widen.starting_line_number)
"""
    assert run_python("-c", script) == "0 0\n"
