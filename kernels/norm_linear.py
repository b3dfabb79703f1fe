"""RMSNorm and the linear layer after it, in one launch, for few rows.

The activations are x [M, K]; norm [K] and the weights [N, K] are stored as in the checkpoint::

    n           = x / sqrt(mean(x^2) + eps) * norm     [M, K], never stored
    norm_linear = n @ weight.T                         [M, N]
    norm_swiglu = silu(n @ w1.T) * (n @ w3.T)          [M, N]

    a block:  y^T [BLOCK_N, BLOCK_M]  =  sum over K of  weight [BLOCK_N, BLOCK_K] @ n^T [BLOCK_K, BLOCK_M]

One kernel computes both. As in ``linear.py``, which gives the reason, the weight's rows are the first axis of a tile.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot, with_block
from .launch_config import LaunchConfigs
from .linear import expect_rows
from .operator import expect, operator
from .overlap import OFF, prefetch_rows, wait_for_launches
from .quantized import expect_same_format, expect_weight, scaled, stored, widen
from .shares import Scratch, Shares, add_parts, share_of_block

__all__ = ["norm_linear", "norm_swiglu"]

# For up to 32 rows in bf16 or fp16, a stage holds 8 to 16 KB of weights, or 4 KB for 32 rows on sm_120. All stages
# together fit into 101,376 bytes, the shared memory of a block on sm_86, sm_89 and sm_120. For N = 4096, an H100 has
# only 64 blocks on 132 multiprocessors, so each block must keep at least 32 KB in flight.
# BLOCK_K must be smaller than the number of threads in a block (32 * num_warps). Otherwise the compiled code loads
# `norm` in pieces of 2 bytes, one element per thread. Asynchronous copies move at least 4 bytes, so this load is not
# pipelined, and every step waits for it.
# On sm_120, norm_linear spills registers with BLOCK_M = 64 on four warps, and with BLOCK_M = 32 and BLOCK_K = 128.
# norm_qkv uses this table too. On sm_120, norm_qkv spills with BLOCK_M = 32 and BLOCK_N = 64 on eight warps.
# 8-bit weights have their own tiles, for the reason given in linear.py. Where fp8 would spill registers with the tiles
# of int8, fp8 has its own lines.
# On NVIDIA GPUs, fp32 products run on the ordinary FP32 units, which read their operands from registers, so larger fp32
# tiles spill.
NORM_LINEAR = LaunchConfigs(
    "norm_linear",
    """
    arch         dtype  phase    rows | SHARES  ROW_TILES  BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      prefill  *    | 0       1          16       32       64       4          1
    interpreter  *      codec    *    | 0       1          16       32       64       4          1
    interpreter  *      *        32   | 0       1          16       32       64       4          1
    interpreter  *      *        64   | 0       1          16       32       64       4          1
    interpreter  *      *        *    | 1       3          16       32       64       4          1
    gfx*         fp32   *        *    | 0       1          16       32       64       4          2
    gfx*         *      prefill  *    | 0       1          64       128      64       8          2
    gfx950       *      codec    64   | 0       1          16       32       256      4          2
    gfx950       *      codec    *    | 0       1          64       64       64       8          6
    gfx*         *      codec    64   | 0       1          16       32       256      8          2
    gfx*         *      codec    *    | 0       1          32       64       256      8          2
    gfx942       *8     *        16   | 1       1          16       32       512      4          2
    gfx950       *8     *        16   | 0       1          16       32       256      4          3
    gfx950       *      *        32   | 0       1          32       32       256      8          3
    gfx950       *      *        48   | 0       3          16       32       256      8          3
    gfx950       *      *        64   | 0       1          64       64       128      8          4
    gfx950       fp8    *        *    | 0       1          64       64       128      8          4
    gfx950       *      *        *    | 1       1          64       128      128      8          3
    gfx*         *      *        16   | 1       1          16       32       256      8          2
    gfx*         *      *        32   | 0       1          16       32       256      8          2
    gfx*         *      *        48   | 0       1          16       64       256      8          2
    gfx*         *      *        64   | 0       1          32       64       256      8          2
    gfx*         *      *        96   | 0       3          16       64       256      8          2
    gfx*         *      *        *    | 1       1          64       128      128      8          2
    sm_*         fp32   *        *    | 0       1          16       32       32       4          6
    sm_*         *      prefill  *    | 0       1          128      128      64       8          3
    sm_*         *      codec    32   | 0       1          32       32       128      8          5
    sm_*         *      codec    64   | 0       1          32       64       128      8          5
    sm_*         *      codec    128  | 0       1          64       64       64       8          5
    sm_90        *      codec    *    | 0       1          64       128      64       8          5
    sm_10?       *      codec    *    | 0       1          64       128      64       8          5
    sm_*         *      codec    *    | 0       1          64       64       64       8          5
    sm_10?       fp8    *        8    | 0       1          8        32       128      2          6
    sm_90        fp8    *        8    | 0       1          8        32       128      2          8
    sm_*         *8     *        8    | 0       1          8        32       256      2          4
    sm_*         *8     *        16   | 0       1          16       32       256      2          4
    sm_90        *8     *        32   | 1       1          32       64       64       4          6
    sm_12?       *8     *        32   | 1       1          32       64       64       4          4
    sm_*         *8     *        32   | 0       1          32       64       64       4          8
    sm_*         *8     *        48   | 1       3          16       64       64       4          6
    sm_*         *8     *        64   | 1       1          64       64       64       8          5
    sm_8?        *8     *        96   | 1       3          32       128      64       8          3
    sm_12?       *8     *        96   | 1       3          32       128      64       8          3
    sm_10?       *8     *        96   | 1       3          32       128      64       8          5
    sm_8?        *8     *        *    | 1       3          32       64       32       4          4
    sm_10?       *8     *        *    | 1       3          64       128      32       8          4
    sm_*         *      *        8    | 0       1          8        64       128      8          6
    sm_*         *      *        16   | 0       1          16       64       128      8          5
    sm_12?       *      *        32   | 0       1          32       32       64       8          8
    sm_*         *      *        32   | 0       1          32       64       64       4          8
    sm_10?       *      *        48   | 1       3          16       128      64       8          5
    sm_*         *      *        48   | 1       3          16       64       64       4          6
    sm_*         *      *        64   | 1       1          64       64       64       8          5
    sm_90        *      *        *    | 1       3          32       128      64       8          5
    sm_10?       *      *        96   | 1       3          32       128      64       8          5
    sm_10?       *      *        *    | 1       3          64       128      32       8          3
    sm_*         *      *        *    | 2       1          64       64       64       8          4
    """,
)

# Each step loads two tiles of weights, one of w1 and one of w3, and a block has two accumulators. The tiles are
# therefore smaller, or the stages fewer, than in NORM_LINEAR. The public flow head has N = 9216, which makes 144 tiles
# with 64 rows of each weight. A B200 has 148 multiprocessors, so SHARES is 0 on sm_10?. An RTX 4090 has 128
# multiprocessors. With three stages, three blocks fit on a multiprocessor, so all 288 tiles with 32 rows of each weight
# run at once. 65 to 96 rows use one tile of 3 * 32 rows, because tiles of 64 rows would pad 96 rows to 128.
NORM_SWIGLU = LaunchConfigs(
    "norm_swiglu",
    """
    arch         dtype  phase    rows | SHARES  ROW_TILES  BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      prefill  *    | 0       1          16       32       64       4          1
    interpreter  *      codec    *    | 0       1          16       32       64       4          1
    interpreter  *      *        32   | 0       1          16       32       64       4          1
    interpreter  *      *        64   | 0       1          16       32       64       4          1
    interpreter  *      *        *    | 1       3          16       32       64       4          1
    gfx*         fp32   *        *    | 0       1          16       32       32       4          2
    gfx*         *      prefill  *    | 0       1          64       64       64       8          2
    gfx950       *      codec    *    | 0       1          64       64       64       4          4
    gfx*         *      codec    32   | 0       1          16       32       128      4          2
    gfx*         *      codec    64   | 0       1          32       32       128      4          2
    gfx*         *      codec    *    | 0       1          64       64       128      8          2
    gfx942       *8     *        32   | 0       1          16       32       256      4          2
    gfx942       *8     *        64   | 0       1          32       32       128      4          2
    gfx942       fp8    *        *    | 0       1          64       64       64       8          2
    gfx942       *8     *        96   | 0       1          64       64       128      8          2
    gfx942       *8     *        *    | 1       1          64       64       64       8          2
    gfx950       *8     *        16   | 0       1          16       64       128      4          4
    gfx950       *      *        32   | 0       1          16       64       64       4          4
    gfx950       *      *        64   | 0       1          64       64       64       8          4
    gfx950       *      *        *    | 0       1          64       128      64       8          4
    gfx*         *      *        32   | 0       1          16       32       128      4          2
    gfx*         *      *        64   | 0       1          32       32       128      4          2
    gfx*         *      *        96   | 0       1          64       64       128      8          2
    gfx*         *      *        *    | 1       1          64       64       128      8          2
    sm_*         fp32   *        *    | 0       1          16       32       32       4          4
    sm_*         *      prefill  *    | 0       1          64       128      64       8          3
    sm_*         *      codec    32   | 0       1          32       32       64       4          6
    sm_*         *      codec    64   | 0       1          64       32       128      8          3
    sm_90        *      codec    128  | 0       1          64       64       64       4          3
    sm_90        *      codec    *    | 0       1          128      64       64       8          3
    sm_10?       *      codec    128  | 0       1          64       128      64       8          4
    sm_10?       *      codec    *    | 0       1          128      64       64       8          3
    sm_*         *      codec    128  | 0       1          64       32       64       4          4
    sm_*         *      codec    *    | 0       1          64       64       64       4          3
    sm_90        fp8    *        8    | 0       1          8        32       64       4          6
    sm_90        fp8    *        16   | 0       1          16       32       64       4          6
    sm_*         *8     *        8    | 0       1          8        32       128      2          4
    sm_*         *8     *        16   | 0       1          16       32       128      2          4
    sm_8?        *8     *        32   | 1       1          32       32       128      2          4
    sm_12?       *8     *        32   | 1       1          32       32       128      2          4
    sm_*         *8     *        32   | 0       1          32       32       128      2          4
    sm_10?       *8     *        64   | 0       1          64       64       64       4          6
    sm_*         *8     *        48   | 1       3          16       64       64       4          4
    sm_*         *8     *        64   | 1       1          64       64       64       4          4
    sm_*         *8     *        96   | 1       3          32       128      64       8          3
    sm_90        *8     *        *    | 1       1          64       128      64       8          4
    sm_10?       *8     *        *    | 1       1          64       128      64       8          4
    sm_*         *      *        8    | 0       1          8        32       128      8          5
    sm_90        *      *        16   | 0       1          16       32       64       4          5
    sm_*         *      *        16   | 0       1          16       32       128      8          4
    sm_8[69]     *      *        32   | 0       1          32       32       64       4          3
    sm_*         *      *        32   | 0       1          32       64       64       4          4
    sm_10?       *      *        48   | 0       3          16       64       64       4          4
    sm_8[69]     *      *        48   | 0       3          16       32       64       4          3
    sm_*         *      *        48   | 0       3          16       32       64       4          4
    sm_10?       *      *        64   | 0       1          64       64       64       8          4
    sm_8[69]     *      *        64   | 0       1          64       32       64       4          3
    sm_12?       *      *        64   | 1       1          64       32       64       4          4
    sm_*         *      *        64   | 0       1          64       32       64       4          4
    sm_90        *      *        *    | 1       3          32       64       64       8          5
    sm_10?       *      *        96   | 0       3          32       64       64       8          4
    sm_10?       *      *        *    | 0       3          64       64       64       8          4
    sm_80        *      *        96   | 1       3          32       64       64       8          4
    sm_8?        *      *        96   | 1       3          32       32       64       8          4
    sm_12?       bf16   *        96   | 1       3          32       64       64       8          4
    sm_12?       *      *        *    | 2       1          64       64       32       8          4
    sm_*         *      *        *    | 2       1          64       64       64       8          4
    """,
)


@triton.jit
def _row_scale(
    p_x, o_m, m_m, stride_x, eps,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return ``1 / sqrt(mean(x^2) + eps)`` of each row, fp32 [BLOCK_M], in a separate pass over the activations."""
    o_k = tl.arange(0, BLOCK_K)
    b_square = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        m_x = m_m[:, None] & (k + o_k < K)[None, :]
        b_x = tl.load(p_x + o_m[:, None] * stride_x + (k + o_k)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_square += b_x * b_x
    return tl.rsqrt(tl.sum(b_square, 1) / K + eps)


@triton.jit
def norm_product(
    p_x, p_norm, p_w, p_up, o_m, row_step, o_n, M, m_n, stride_x, eps, first, end,
    K: tl.constexpr, NORM_FIRST: tl.constexpr,
    ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``w (x * norm)^T`` and ``x^2`` over the columns `first` to `end`, for ROW_TILES tiles of rows.

    With NORM_FIRST, a first pass over x computes the scale ``1 / sqrt(mean(x^2) + eps)``, and x is scaled before the
    product. Without NORM_FIRST, :func:`normed` applies the scale to the finished sums, so x is read once.

    Args:
        p_x: activations [M, K].
        p_norm: [K], the weight of RMSNorm.
        p_w: [N, K].
        p_up: [N, K], a second weight, or None.
        o_m: [BLOCK_M], rows of x in the first tile.
        row_step: rows from each tile of rows to the next.
        o_n: [BLOCK_N], rows of the weights.
        M: rows of x.
        m_n: bool [BLOCK_N], which rows of the weights exist.
        stride_x: elements between rows of x.
        eps: added to the mean square.
        first: the first column.
        end: the column after the last.
        K: columns of x and of the weights.
        NORM_FIRST: whether x is scaled before the product.
        ROW_TILES: tiles of rows of x.
        BLOCK_M: rows of x in a tile.
        BLOCK_N: rows of the weights in a tile.
        BLOCK_K: columns per step.

    Returns:
        ROW_TILES fp32 arrays [BLOCK_N, BLOCK_M] for `p_w`, then as many for `p_up` if it is not None. Then ROW_TILES
        arrays [1, BLOCK_M] with the sums of x^2, which are zeros with NORM_FIRST.
    """
    o_k = tl.arange(0, BLOCK_K)
    eps = tl.full([], eps, tl.float32)  # torch.compile passes eps as fp64
    products, ups, squares, scales = (), (), (), ()
    for r in tl.static_range(ROW_TILES):
        o_r = o_m + r * row_step
        products = with_block(products, tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32))
        if p_up is not None:
            ups = with_block(ups, tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32))
        squares = with_block(squares, tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32))
        if NORM_FIRST:
            scales = with_block(scales, _row_scale(p_x, o_r, o_r < M, stride_x, eps, K, BLOCK_M, BLOCK_K))
    for k in range(first, end, BLOCK_K):
        m_k = k + o_k < K
        m_w = m_n[:, None] & m_k[None, :]
        b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :], mask=m_w, other=0)
        b_w = widen(b_w, p_x.dtype.element_ty)
        b_norm = tl.load(p_norm + k + o_k, mask=m_k, other=0.0).to(tl.float32)  # [K]
        if p_up is not None:
            b_up = tl.load(p_up + o_n[:, None] * K + (k + o_k)[None, :], mask=m_w, other=0)
            b_up = widen(b_up, p_x.dtype.element_ty)
        new_products, new_ups, new_squares = (), (), ()
        for r in tl.static_range(ROW_TILES):
            o_r = o_m + r * row_step
            m_x = (o_r < M)[:, None] & m_k[None, :]
            p_tile = p_x + o_r[:, None] * stride_x + (k + o_k)[None, :]
            b_x = tl.load(p_tile, mask=m_x, other=0.0).to(tl.float32)  # [M, K]
            if NORM_FIRST:
                b_x *= scales[r][:, None]
                new_squares = with_block(new_squares, squares[r])
            else:
                new_squares = with_block(new_squares, squares[r] + b_x * b_x)
            b_a = tl.trans(cast(b_x * b_norm[None, :], b_w.dtype))
            new_products = with_block(new_products, dot(b_w, b_a, products[r]))  # [N, M]
            if p_up is not None:
                new_ups = with_block(new_ups, dot(b_up, b_a, ups[r]))
        products, ups, squares = new_products, new_ups, new_squares
    sums = products + ups
    for r in tl.static_range(ROW_TILES):
        sums = with_block(sums, tl.sum(squares[r], 1)[None, :])
    return sums


@triton.jit
def normed(b_sum, b_square, eps, K: tl.constexpr, NORM_FIRST: tl.constexpr):
    """Return a block of :func:`norm_product`, summed over all columns, with the scale of RMSNorm."""
    if NORM_FIRST:
        return b_sum
    # the scale is one number per row, so it can be applied to the finished sums
    return b_sum * tl.rsqrt(b_square / K + tl.full([], eps, tl.float32))


@triton.jit
def _finish(
    blocks, r, p_up, p_scale, p_scale_up, p_y, o_m, o_n, M, eps,
    N: tl.constexpr, K: tl.constexpr, NORM_FIRST: tl.constexpr, ROW_TILES: tl.constexpr,
):  # fmt: skip
    """Store the result of tile `r` of rows: the product, or the gated product if there is a second weight."""
    b_y = normed(blocks[r], blocks[len(blocks) - ROW_TILES + r], eps, K, NORM_FIRST)
    b_y = scaled(b_y, p_scale, o_n, o_n < N)
    if p_up is not None:
        b_up = normed(blocks[ROW_TILES + r], blocks[2 * ROW_TILES + r], eps, K, NORM_FIRST)
        b_y = b_y * tl.sigmoid(b_y) * scaled(b_up, p_scale_up, o_n, o_n < N)
    p_tile = p_y + o_m[None, :] * N + o_n[:, None]
    tl.store(p_tile, cast(b_y, p_y.dtype.element_ty), mask=(o_m < M)[None, :] & (o_n < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def _norm_linear_kernel(
    p_x, p_norm, p_w, p_up, p_scale, p_scale_up, p_y, p_parts, p_arrived,
    M, stride_x, eps,
    N: tl.constexpr, K: tl.constexpr, NORM_FIRST: tl.constexpr, COUNT: tl.constexpr, SHARES: tl.constexpr,
    ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    # tiles of the same weights are neighbours in launch order: all but the first find the weights in the L2 cache
    o_m = tl.program_id(0).to(tl.int64) * (ROW_TILES * BLOCK_M) + tl.arange(0, BLOCK_M)
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if SHARES == 0:
        o_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        prefetch_rows(p_w, o_n, N, 0, K, OVERLAP)
        wait_for_launches(OVERLAP)
        blocks = norm_product(
            p_x, p_norm, p_w, p_up, o_m, BLOCK_M, o_n, M, o_n < N, stride_x, eps, 0, K,
            K, NORM_FIRST, ROW_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        for r in tl.static_range(ROW_TILES):
            _finish(
                blocks, r, p_up, p_scale, p_scale_up, p_y, o_m + r * BLOCK_M, o_n, M, eps, N, K, NORM_FIRST, ROW_TILES
            )
    else:
        start, stop = share_of_block(TILES * STEPS)
        o_first = start // STEPS * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        prefetch_rows(p_w, o_first, N, start % STEPS * BLOCK_K, K, OVERLAP)
        wait_for_launches(OVERLAP)
        for i_n in range(start // STEPS, tl.cdiv(stop, STEPS)):
            first, end = tl.maximum(start - i_n * STEPS, 0), tl.minimum(stop - i_n * STEPS, STEPS)
            o_n = tl.arange(0, BLOCK_N).to(tl.int64) + i_n * BLOCK_N
            blocks = norm_product(
                p_x, p_norm, p_w, p_up, o_m, BLOCK_M, o_n, M, o_n < N, stride_x, eps, first * BLOCK_K, end * BLOCK_K,
                K, NORM_FIRST, ROW_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            blocks, is_complete = add_parts(
                blocks, p_parts, p_arrived, i_n, first, end, TILES, STEPS, COUNT, BLOCK_M * BLOCK_N
            )
            if is_complete:
                for r in tl.static_range(ROW_TILES):
                    _finish(
                        blocks, r, p_up, p_scale, p_scale_up, p_y, o_m + r * BLOCK_M, o_n, M, eps,
                        N, K, NORM_FIRST, ROW_TILES,
                    )  # fmt: skip


def norm_constants(
    configs: LaunchConfigs, weight: Tensor, dtype: torch.dtype, max_rows: int, phase: str, products: int = 1
) -> dict[str, Any]:
    """Return the constants of a launch with RMSNorm of `dtype` before one or two products of the shape of `weight`.

    These are N, K, NORM_FIRST, COUNT (the blocks of :func:`norm_product`), and the constants of `configs`.
    """
    N, K = weight.shape
    constants = configs(N=N, K=K, dtype=dtype, rows=max_rows, phase=phase, weight=weight.dtype) | {"N": N, "K": K}
    constants["COUNT"] = (products + 1) * constants["ROW_TILES"]
    return constants | {"NORM_FIRST": dtype == torch.float16}  # x * norm, not yet scaled, may exceed 65,504


def _launch_norm(
    configs: LaunchConfigs, out: Tensor, x: Tensor, norm: Tensor, weight: Tensor, w_up: Tensor | None, eps: float,
    max_rows: int, phase: str, scale: Tensor | None, scale_up: Tensor | None, scratch: Scratch | None,
) -> None:  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    constants = norm_constants(configs, weight, x.dtype, max_rows, phase, 1 if w_up is None else 2)
    shares = norm_shares(constants, max_rows, triton.cdiv(N, constants["BLOCK_N"]))
    # a single row's stride is not used, but Triton would compile another binary if the stride were 1
    stride_x = x.stride(0) if M > 1 else K
    grid = shares.grid(constants, M, triton.cdiv(N, constants["BLOCK_N"]))
    parts, arrived = shares.scratch(scratch, x)
    up = None if w_up is None else stored(w_up)
    _norm_linear_kernel[grid](
        x, norm, stored(weight), up, scale, scale_up, out, parts, arrived, M, stride_x, eps, **constants
    )


def norm_shares(constants: Mapping[str, Any], max_rows: int, tiles: int) -> Shares:
    """Return how a launch with the constants of :func:`norm_constants` divides `tiles` tiles of weights."""
    return Shares.of(constants, max_rows, tiles, constants["COUNT"])


def norm_linear_shares(weight: Tensor, dtype: torch.dtype, max_rows: int, phase: str = "decode") -> Shares:
    """Return how :func:`launch_norm_linear` divides the product of `weight` and activations of `dtype`."""
    constants = norm_constants(NORM_LINEAR, weight, dtype, max_rows, phase)
    return norm_shares(constants, max_rows, triton.cdiv(len(weight), constants["BLOCK_N"]))


def norm_swiglu_shares(w1: Tensor, dtype: torch.dtype, max_rows: int, phase: str = "decode") -> Shares:
    """Return how :func:`launch_norm_swiglu` divides the products of weights like `w1` and activations of `dtype`."""
    constants = norm_constants(NORM_SWIGLU, w1, dtype, max_rows, phase, 2)
    return norm_shares(constants, max_rows, triton.cdiv(len(w1), constants["BLOCK_N"]))


def launch_norm_linear(
    out: Tensor, x: Tensor, norm: Tensor, weight: Tensor, eps: float, max_rows: int, phase: str = "decode",
    scale: Tensor | None = None, scratch: Scratch | None = None,
) -> None:  # fmt: skip
    """Run :func:`norm_linear` into `out`, contiguous [M, N], without checking the arguments.

    With `scratch` None, the launcher allocates memory for parts of tiles where it is needed.
    """
    _launch_norm(NORM_LINEAR, out, x, norm, weight, None, eps, max_rows, phase, scale, None, scratch)


@operator(launch_norm_linear)
def norm_linear(
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    eps: float,
    max_rows: int,
    phase: str = "decode",
    scale: Tensor | None = None,
) -> Tensor:
    """Compute ``RMSNorm(x) @ weight.T``, where RMSNorm is ``x / sqrt(mean(x^2) + eps) * norm`` of each row.

    Args:
        x: [M, K] fp32, bf16 or fp16; only its last dimension must be contiguous.
        norm: [K], the weight of RMSNorm.
        weight: [N, K], as a checkpoint stores it, in x's dtype or in 8 bits (int8 or e4m3).
        eps: added to the mean square.
        max_rows: the most rows that the layer is prepared for, 1..512 in decode. The launch config depends on this
            number, so a row's result depends neither on M nor on the other rows.
        phase: "decode", "prefill" or "codec", see :func:`voxkern.kernels.linear.linear`.
        scale: fp32 [N], the scale of each row of a weight in 8 bits, else None.

    Returns:
        [M, N] in x's dtype, summed in fp32 and rounded once.

    Raises:
        ValueError: M is not in 1..max_rows, max_rows is out of range, or the phase is unknown.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("norm", norm, (K,), like=x)
    N, _ = expect_weight("weight", weight, ("N", K), scale, like=x)
    expect_rows(M, max_rows, phase)
    return x.new_empty(M, N)


def launch_norm_swiglu(
    out: Tensor, x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor, eps: float, max_rows: int, phase: str = "decode",
    scale1: Tensor | None = None, scale3: Tensor | None = None, scratch: Scratch | None = None,
) -> None:  # fmt: skip
    """Run :func:`norm_swiglu` into `out`, contiguous [M, N], without checking the arguments.

    `scratch` is at least as large as :func:`norm_swiglu_shares` requires. If it is None, the launcher allocates it.
    """
    _launch_norm(NORM_SWIGLU, out, x, norm, w1, w3, eps, max_rows, phase, scale1, scale3, scratch)


@operator(launch_norm_swiglu)
def norm_swiglu(
    x: Tensor,
    norm: Tensor,
    w1: Tensor,
    w3: Tensor,
    eps: float,
    max_rows: int,
    phase: str = "decode",
    scale1: Tensor | None = None,
    scale3: Tensor | None = None,
) -> Tensor:
    """Compute ``silu(n @ w1.T) * (n @ w3.T)`` with ``n = RMSNorm(x)``.

    This is SwiGLU (arXiv 2002.05202) without its down projection, which :func:`voxkern.kernels.linear.linear` computes.

    Args:
        x: [M, K], see :func:`norm_linear`, also for `norm`, `eps`, `max_rows`, `phase` and errors.
        norm: [K].
        w1: [N, K], the weight of the gate, in x's dtype or in 8 bits (int8 or e4m3).
        w3: [N, K], the weight of the up projection, which the gate multiplies, in the dtype of `w1`.
        eps: added to the mean square.
        max_rows: the most rows that the layer is prepared for.
        phase: "decode", "prefill" or "codec".
        scale1: fp32 [N], the scale of each row of `w1` in 8 bits, else None.
        scale3: fp32 [N], the scale of each row of `w3` in 8 bits, else None.

    Returns:
        [M, N] in x's dtype, summed in fp32 and rounded once.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("norm", norm, (K,), like=x)
    N, _ = expect_weight("w1", w1, ("N", K), scale1, like=x)
    expect_weight("w3", w3, (N, K), scale3, like=x)
    expect_same_format(w1=w1, w3=w3)
    expect_rows(M, max_rows, phase)
    return x.new_empty(M, N)
