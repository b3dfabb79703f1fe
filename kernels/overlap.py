"""Overlap launches: a kernel starts while the kernel before it still runs (programmatic dependent launch, sm_90).

In a CUDA graph, a GPU is nearly idle for about 2 us between two kernels. One kernel ends, the next kernel starts, and
waits for its first loads. With overlap, the next kernel starts earlier: when all blocks of the kernel before it have
reached their wait, and a multiprocessor has registers and shared memory left::

    without overlap   | kernel 1 |  start, first loads  | kernel 2 |
    with overlap      | kernel 1                 |
                           | start, prefetch, wait | kernel 2 |

Every kernel of this package calls :func:`wait_for_launches` before it loads, stores or returns. Before this call, it
may compute addresses and call :func:`prefetch_rows`. The wait ends when the kernel before it has ended. That kernel has
waited for its own predecessor, so all earlier stores are visible. A prefetch changes no result, whatever it reads,
because it loads into no register. It only moves weights from memory to the L2 cache, which all multiprocessors share.
``bench/static/overlap.py`` checks the rule in machine code.

A launch overlaps within :func:`voxkern.kernels.launch_config.overlapped`. Overlap has not been run on a GPU.
"""

import triton
import triton.language as tl

__all__ = ["prefetch_rows", "wait_for_launches"]

OFF = tl.constexpr(False)  # the default of every kernel's constant OVERLAP
SECTOR = tl.constexpr(32)  # bytes that one prefetch instruction moves at least
SECTORS = tl.constexpr(16)  # sectors of each row that are prefetched: 512 bytes, or 4.7 MB of 9216 rows


@triton.jit
def wait_for_launches(OVERLAP: tl.constexpr):
    """Allow the next launch to start, and wait until all launches before this one have ended."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # type: ignore[attr-defined]
        tl.extra.cuda.gdc_wait()  # type: ignore[attr-defined]


@triton.jit
def prefetch_rows(p_w, o_n, n, first, K: tl.constexpr, OVERLAP: tl.constexpr):
    """Move the first bytes of a block's weights from memory to the L2 cache, if launches overlap.

    Args:
        p_w: weights [n, K].
        o_n: int block, the block's rows.
        n: rows of the weights; rows from `n` on count as the last row.
        first: the block's first column.
        K: columns of the weights.
        OVERLAP: whether launches overlap.
    """
    if OVERLAP:
        STEP: tl.constexpr = SECTOR * 8 // p_w.dtype.element_ty.primitive_bitwidth  # elements of a sector
        o_k = tl.minimum(first + tl.arange(0, SECTORS) * STEP, K - 1)
        p_sector = p_w + tl.minimum(o_n, n - 1)[:, None] * K + o_k[None, :]
        # the instruction has no result, but inline assembly must have one
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [p_sector], dtype=tl.int32, is_pure=False, pack=1
        )
