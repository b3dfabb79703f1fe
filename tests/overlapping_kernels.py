"""Kernels that break the rule of overlap: ``python tests/overlapping_kernels.py`` compiles them and prints the faults.

The script runs in a process of its own, because the tests run in Triton's interpreter, which compiles nothing.
"""

import json

import torch
import triton
import triton.language as tl

from bench.static.overlap import faults_of
from voxkern.compile_only import compiling_for
from voxkern.kernels.overlap import prefetch_rows, wait_for_launches


@triton.jit
def _right(p_x, p_y, n, OVERLAP: tl.constexpr):
    i = tl.program_id(0)
    prefetch_rows(p_x, i * 4 + tl.arange(0, 4), n, 0, 64, OVERLAP)
    wait_for_launches(OVERLAP)
    if i < n:
        tl.store(p_y + i, tl.load(p_x + i))


@triton.jit
def _loads_early(p_x, p_y, n, OVERLAP: tl.constexpr):
    i = tl.program_id(0)
    x = tl.load(p_x + i)
    wait_for_launches(OVERLAP)
    tl.store(p_y + i, x)


@triton.jit
def _stores_early(p_x, p_y, n, OVERLAP: tl.constexpr):
    i = tl.program_id(0)
    tl.store(p_y + i, n)
    wait_for_launches(OVERLAP)
    tl.atomic_add(p_y + i, tl.load(p_x + i))


@triton.jit
def _ends_early(p_x, p_y, n, OVERLAP: tl.constexpr):
    i = tl.program_id(0)
    if i >= n:
        return
    wait_for_launches(OVERLAP)
    tl.store(p_y + i, tl.load(p_x + i))


@triton.jit
def _waits_in_some_blocks(p_x, p_y, n, OVERLAP: tl.constexpr):
    i = tl.program_id(0)
    if i < n:
        wait_for_launches(OVERLAP)
    tl.store(p_y + i, tl.load(p_x + i))


@triton.jit
def _never_waits(p_x, p_y, n, OVERLAP: tl.constexpr):
    i = tl.program_id(0)
    tl.store(p_y + i, tl.load(p_x + i))


def main() -> None:
    """Print a JSON object: the kernel's name -> its faults."""
    x = torch.empty(64, dtype=torch.float32, device="meta")
    kernels = (_right, _loads_early, _stores_early, _ends_early, _waits_in_some_blocks, _never_waits)
    with compiling_for("sm_90") as launches:
        for kernel in kernels:
            kernel[(8,)](x, x, 7, OVERLAP=True, launch_pdl=True)
    print(json.dumps({launch.binary.kernel: faults_of(launch.binary) for launch in launches}))


if __name__ == "__main__":
    main()
