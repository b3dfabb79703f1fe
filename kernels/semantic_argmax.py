"""The semantic head: the code with the largest logit of each request. The logits are never stored in memory.

h is [B, dim], and weight is [N, dim]; only the weight's first n_codes rows are codes::

    logits = h @ weight[:n_codes].T                                [B, n_codes], fp32, in registers
    key    = order << 32 | 2^31 - 1 - index                        [B, n_codes], int64, in registers
             where order is an int32 that is larger for a larger logit
    best   = max of key over a tile of BLOCK_N codes               [B, tiles], int64, in memory
    code   = the index in the max of best over tiles               [B], int64, by the block that finishes last

The largest key belongs to the largest logit, and among equal logits to the lowest index. A logit that is NaN or
infinite has the key NOT_FINITE_KEY, which is larger than the keys of all numbers, and the code is then NOT_FINITE. The
blocks store 8 bytes per request and tile: 1 KB per request for 8,194 codes in tiles of 64, instead of 32 KB of logits.
As in ``linear.py``, which gives the reason, the weight's rows are the first axis of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import END_AUDIO, NOT_FINITE, dot
from .launch_config import LaunchConfigs
from .operator import expect, expect_batch, operator
from .overlap import OFF, prefetch_rows, wait_for_launches
from .quantized import expect_weight, scaled, stored, widen

__all__ = ["semantic_argmax", "semantic_argmax_scratch"]

MASKED_KEY = tl.constexpr(-0x8000000000000000)  # the key of EMPTY and of padding rows
NOT_FINITE_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)

# 8,194 rows of weights are 129 tiles of 64 rows, one wave on the 132 multiprocessors of an H100. On NVIDIA GPUs, a
# stage has 16 KB of bf16 or fp16 weights for up to 16 requests, and 8 KB for more. Of n stages, n - 1 are in shared
# memory, which must fit into 101,376 bytes on sm_86, sm_89 and sm_120.
SEMANTIC_ARGMAX = LaunchConfigs(
    "semantic_argmax",
    """
    arch         dtype  rows | BLOCK_B  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      *    | 16       32       64       4          1
    gfx*         fp32   *    | 16       32       64       4          2
    gfx*         *      16   | 16       32       256      8          2
    gfx*         *      *    | 32       32       256      8          2
    sm_*         fp32   *    | 16       32       32       4          6
    sm_*         *8     8    | 8        32       128      2          6
    sm_*         *8     16   | 16       32       128      2          6
    sm_90        *8     *    | 32       64       128      4          4
    sm_*         *8     *    | 32       32       64       2          6
    sm_*         *      8    | 8        64       128      8          6
    sm_*         *      16   | 16       64       128      8          5
    sm_*         *      *    | 32       64       64       4          8
    """,
)


@triton.jit(do_not_specialize=["B"])
def _semantic_argmax_kernel(
    p_h, p_w, p_scale, p_best, p_arrived, p_codes,
    B, stride_h,
    N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    i_b, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_b = i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    prefetch_rows(p_w, o_n, N, 0, K, OVERLAP)
    wait_for_launches(OVERLAP)
    m_b, m_n = o_b < B, o_n < N
    b_acc = tl.zeros([BLOCK_N, BLOCK_B], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = k + o_k < K
        b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :], mask=m_n[:, None] & m_k[None, :], other=0)
        b_h = tl.load(p_h + o_b[:, None] * stride_h + (k + o_k)[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
        b_acc = dot(widen(b_w, p_h.dtype.element_ty), tl.trans(b_h), b_acc)  # [N, B]
    b_acc = scaled(b_acc, p_scale, o_n, m_n)

    # The key is one integer that is larger for a larger logit, and for a lower index among equal logits. The upper half
    # of the key has the logit's bits, with the lower 31 bits of a negative logit inverted: as integers, these bits then
    # have the order of the logits. The lower half of the key has the inverted bits of the index.
    b_acc = tl.where(b_acc == 0.0, 0.0, b_acc)  # -0 ties with 0
    b_bits = b_acc.to(tl.int32, bitcast=True)
    b_order = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits).to(tl.int64)
    b_key = (b_order << 32) | (0x7FFFFFFF - o_n)[:, None]
    b_key = tl.where(tl.abs(b_acc) < float("inf"), b_key, NOT_FINITE_KEY)  # NaN is not less than inf either
    b_key = tl.where((m_n & (o_n >= END_AUDIO))[:, None], b_key, MASKED_KEY)
    tl.store(p_best + o_b * TILES + i_n, tl.max(b_key, 0), mask=m_b)
    tl.debug_barrier()  # the stores of all threads must come before the atomic add, which one thread does
    arrived = tl.atomic_add(p_arrived + i_b, 1, sem="acq_rel", scope="gpu")
    if arrived == TILES - 1:
        tl.debug_barrier()
        b_best = tl.full([BLOCK_B], MASKED_KEY, tl.int64)
        for t in range(0, TILES, BLOCK_T):
            o_t = t + tl.arange(0, BLOCK_T)
            m_t = m_b[:, None] & (o_t < TILES)[None, :]
            # .cg bypasses the L1 cache, which may hold values from before the stores of other multiprocessors
            p_tile = p_best + o_b[:, None] * TILES + o_t[None, :]
            b_best = tl.maximum(b_best, tl.max(tl.load(p_tile, mask=m_t, other=MASKED_KEY, cache_modifier=".cg"), 1))
        b_index = 0x7FFFFFFF - (b_best & 0x7FFFFFFF)
        tl.store(p_codes + o_b, tl.where(b_best == NOT_FINITE_KEY, NOT_FINITE, b_index), mask=m_b)
        tl.store(p_arrived + i_b, 0)  # the next launch counts from zero


def _constants(weight: Tensor, dtype: torch.dtype, n_codes: int, max_batch: int) -> dict[str, Any]:
    # N is n_codes because the rows of the weight from n_codes on are padding, which is not read
    constants = SEMANTIC_ARGMAX(N=n_codes, K=weight.shape[1], dtype=dtype, rows=max_batch, weight=weight.dtype)
    tiles = triton.cdiv(n_codes, constants["BLOCK_N"])
    return constants | {"N": n_codes, "K": weight.shape[1], "TILES": tiles, "BLOCK_T": 32}


def semantic_argmax_scratch(weight: Tensor, dtype: torch.dtype, n_codes: int, max_batch: int) -> tuple[Tensor, Tensor]:
    """Allocate the memory that :func:`launch_semantic_argmax` needs for hidden states of `dtype`.

    Returns:
        int64 [max_batch, tiles], the best key of each tile. int32, the tiles that are finished, for each block of
        requests; zero before and after every launch.
    """
    constants = _constants(weight, dtype, n_codes, max_batch)
    best = weight.new_empty((max_batch, constants["TILES"]), dtype=torch.int64)
    return best, weight.new_zeros(triton.cdiv(max_batch, constants["BLOCK_B"]), dtype=torch.int32)


def launch_semantic_argmax(
    out: Tensor,
    h: Tensor,
    weight: Tensor,
    n_codes: int,
    max_batch: int,
    scale: Tensor | None = None,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Run :func:`semantic_argmax` into `out`, without checking the arguments.

    Args:
        out: int64 [B], receives the result.
        h: [B, dim], see :func:`semantic_argmax`, also for `weight` and `n_codes`.
        weight: [N, dim].
        n_codes: the number of rows of `weight` that are codes.
        max_batch: the value that `scratch` was allocated for.
        scale: fp32 [N], or None.
        scratch: from :func:`semantic_argmax_scratch`. With None the launcher allocates this memory, which is not
            allowed inside a frame.

    Raises:
        ValueError: `scratch` is for another format of the weight.
    """
    (B, K), constants = h.shape, _constants(weight, h.dtype, n_codes, max_batch)
    best, arrived = semantic_argmax_scratch(weight, h.dtype, n_codes, max_batch) if scratch is None else scratch
    if best.shape[1] != constants["TILES"]:
        raise ValueError(f"scratch is for {best.shape[1]} tiles but must be for {constants['TILES']}")
    # a single row's stride is not used, but Triton would compile another binary if the stride were 1
    stride_h = h.stride(0) if B > 1 else K
    grid = (triton.cdiv(B, constants["BLOCK_B"]), constants["TILES"])
    _semantic_argmax_kernel[grid](h, stored(weight), scale, best, arrived, out, B, stride_h, **constants)


@operator(launch_semantic_argmax)
def semantic_argmax(h: Tensor, weight: Tensor, n_codes: int, max_batch: int, scale: Tensor | None = None) -> Tensor:
    """Return the semantic code of each request: the lowest index of the largest logit in ``h @ weight.T``.

    EMPTY (0) and the rows from `n_codes` on, which are padding, are never chosen. If one of the other logits of a
    request is NaN or infinite, the request's code is NOT_FINITE (-1).

    Args:
        h: [B, dim] fp32, bf16 or fp16, the backbone's hidden state; only its last dimension must be contiguous.
        weight: [N, dim], in h's dtype or in 8 bits (int8 or e4m3).
        n_codes: the number of rows of `weight` that are codes, EMPTY and END included, 2..N.
        max_batch: the most requests that the operator is prepared for, 1..64. The launch config depends on this number,
            so a request's code depends neither on B nor on the other requests.
        scale: fp32 [N], the scale of each row of a weight in 8 bits, else None.

    Returns:
        int64 [B]. The logits are summed in fp32 and not rounded.

    Raises:
        ValueError: n_codes is not in 2..N, B is not in 1..max_batch, or max_batch is not in 1..64.
    """
    B, K = expect("h", h, ("B", "dim"), contiguous=False)
    N, _ = expect_weight("weight", weight, ("N", K), scale, like=h)
    expect_batch("h", B, 1, max_batch)
    if not 2 <= n_codes <= N:
        raise ValueError(f"n_codes is {n_codes} but must lie in 2..{N}, the rows of weight")
    return h.new_empty((B,), dtype=torch.int64)
