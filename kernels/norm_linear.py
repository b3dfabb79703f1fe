"""RMSNorm and the linear layer after it, in one launch, for few rows.

The activations are x [M, K]; norm [K] and the weights [N, K] are stored as in the checkpoint::

    n           = x / sqrt(mean(x^2) + eps) * norm     [M, K], never stored
    norm_linear = n @ weight.T                         [M, N]
    norm_swiglu = silu(n @ w1.T) * (n @ w3.T)          [M, N]

    a block:  y^T [BLOCK_N, BLOCK_M]  =  sum over K of  weight [BLOCK_N, BLOCK_K] @ n^T [BLOCK_K, BLOCK_M]

One kernel computes both. As in ``linear.py``, which gives the reason, the weight's rows are the first axis of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .launch_config import LaunchConfigs
from .linear import expect_rows
from .operator import expect, operator

__all__ = ["norm_linear", "norm_swiglu"]

# For up to 32 rows in bf16 or fp16, a stage holds 8 to 16 KB of weights, or 4 KB for 32 rows on sm_120. All stages
# together fit into 101,376 bytes, the shared memory of a block on sm_86, sm_89 and sm_120. For N = 4096, an H100 has
# only 64 blocks on 132 multiprocessors, so each block must keep at least 32 KB in flight.
# BLOCK_K must be smaller than the number of threads in a block (32 * num_warps). Otherwise the compiled code loads
# `norm` in pieces of 2 bytes, one element per thread. Asynchronous copies move at least 4 bytes, so this load is not
# pipelined, and every step waits for it.
# On sm_120, norm_linear spills registers with BLOCK_M = 64 on four warps, and with BLOCK_M = 32 and BLOCK_K = 128.
# kernels/qkv.py uses this table too. There, BLOCK_M = 32 with BLOCK_N = 64 spills on sm_120: norm_qkv_append spills
# on four warps, and norm_qkv on eight.
# On NVIDIA GPUs, fp32 products run on the ordinary FP32 units, which read their operands from registers, so larger fp32
# tiles spill.
NORM_LINEAR = LaunchConfigs(
    "norm_linear",
    """
    arch         dtype  phase    rows | BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      *        *    | 16       32       64       4          1
    gfx*         fp32   *        *    | 16       32       64       4          2
    gfx*         *      prefill  *    | 64       128      64       8          2
    gfx*         *      *        16   | 16       64       128      4          2
    gfx*         *      *        *    | 64       64       64       4          2
    sm_*         fp32   *        *    | 16       32       32       4          6
    sm_*         *      prefill  *    | 128      128      64       8          3
    sm_*         *      *        8    | 8        64       128      8          6
    sm_*         *      *        16   | 16       64       128      8          5
    sm_12?       *      *        32   | 32       32       64       8          8
    sm_*         *      *        32   | 32       64       64       4          8
    sm_*         *      *        *    | 64       64       64       8          4
    """,
)

# Each step loads two tiles of weights, one of w1 and one of w3, and a block has two accumulators. The tiles are
# therefore smaller, or the stages fewer, than in NORM_LINEAR.
NORM_SWIGLU = LaunchConfigs(
    "norm_swiglu",
    """
    arch         dtype  phase    rows | BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      *        *    | 16       32       64       4          1
    gfx*         fp32   *        *    | 16       32       32       4          2
    gfx*         *      prefill  *    | 64       64       64       8          2
    gfx*         *      *        16   | 16       64       64       4          2
    gfx*         *      *        *    | 64       64       32       4          2
    sm_*         fp32   *        *    | 16       32       32       4          4
    sm_*         *      prefill  *    | 64       128      64       8          3
    sm_*         *      *        8    | 8        32       128      8          5
    sm_*         *      *        16   | 16       32       128      8          4
    sm_*         *      *        32   | 32       64       64       4          4
    sm_*         *      *        *    | 64       64       64       8          3
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
    p_x, p_norm, p_w, p_up, o_m, o_n, m_m, m_n, stride_x, eps,
    K: tl.constexpr, NORM_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``w RMSNorm(x)^T`` of one tile, for the weight `p_w` and for a second weight `p_up`.

    With NORM_FIRST, a first pass over x computes the scale ``1 / sqrt(mean(x^2) + eps)``, and x is scaled before the
    product. Without NORM_FIRST, the scale is applied to the finished sums, so x is read once.

    Args:
        p_x: activations [M, K].
        p_norm: [K], the weight of RMSNorm.
        p_w: [N, K].
        p_up: [N, K], or None.
        o_m: [BLOCK_M], rows of x.
        o_n: [BLOCK_N], rows of the weights.
        m_m: bool [BLOCK_M], which rows of x exist.
        m_n: bool [BLOCK_N], which rows of the weights exist.
        stride_x: elements between rows of x.
        eps: added to the mean square.
        K: columns of x and of the weights.
        NORM_FIRST: whether x is scaled before the product.
        BLOCK_M: rows of x in a tile.
        BLOCK_N: rows of the weights in a tile.
        BLOCK_K: columns per step.

    Returns:
        Two fp32 blocks [BLOCK_N, BLOCK_M], of `p_w` and of `p_up`. The second is zero where `p_up` is None.
    """
    o_k = tl.arange(0, BLOCK_K)
    eps = tl.full([], eps, tl.float32)  # torch.compile passes eps as fp64
    if NORM_FIRST:
        b_scale = _row_scale(p_x, o_m, m_m, stride_x, eps, K, BLOCK_M, BLOCK_K)  # [M]
    b_square = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    b_up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = k + o_k < K
        b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(
            p_x + o_m[:, None] * stride_x + (k + o_k)[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0
        ).to(tl.float32)  # [M, K]
        b_norm = tl.load(p_norm + k + o_k, mask=m_k, other=0.0).to(tl.float32)  # [K]
        if NORM_FIRST:
            b_x *= b_scale[:, None]
        else:
            b_square += b_x * b_x
        b_a = cast(b_x * b_norm[None, :], b_w.dtype)
        b_acc = dot(b_w, tl.trans(b_a), b_acc)  # [N, M]
        if p_up is not None:
            p_tile_up = p_up + o_n[:, None] * K + (k + o_k)[None, :]
            b_up = dot(tl.load(p_tile_up, mask=m_n[:, None] & m_k[None, :], other=0.0), tl.trans(b_a), b_up)
    if not NORM_FIRST:
        # the scale is one number per row, so it can be applied to the finished sums: one pass over x is enough
        b_scale = tl.rsqrt(tl.sum(b_square, 1) / K + eps)
        b_acc, b_up = b_acc * b_scale[None, :], b_up * b_scale[None, :]
    return b_acc, b_up


@triton.jit(do_not_specialize=["M"])
def _norm_linear_kernel(
    p_x, p_norm, p_w, p_up, p_y,
    M, stride_x, eps,
    N: tl.constexpr, K: tl.constexpr, NORM_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # tiles of the same weights are neighbours in launch order: all but the first find the weights in the L2 cache
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    b_acc, b_up = norm_product(
        p_x, p_norm, p_w, p_up, o_m, o_n, m_m, m_n, stride_x, eps, K, NORM_FIRST, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if p_up is not None:
        b_acc = b_acc * tl.sigmoid(b_acc) * b_up
    p_tile = p_y + o_m[None, :] * N + o_n[:, None]
    tl.store(p_tile, cast(b_acc, p_y.dtype.element_ty), mask=m_m[None, :] & m_n[:, None])


def norm_constants(configs: LaunchConfigs, x: Tensor, weight: Tensor, max_rows: int, phase: str) -> dict[str, Any]:
    """Return the constants of a launch with RMSNorm before the product: N, K, NORM_FIRST, and those of `configs`."""
    N, K = weight.shape
    constants = configs(N=N, K=K, dtype=x.dtype, rows=max_rows, phase=phase) | {"N": N, "K": K}
    return constants | {"NORM_FIRST": x.dtype == torch.float16}  # x * norm, not yet scaled, may exceed fp16's 65,504


def _launch_norm(
    configs: LaunchConfigs, out: Tensor, x: Tensor, norm: Tensor, weight: Tensor, w_up: Tensor | None, eps: float,
    max_rows: int, phase: str,
) -> None:  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    constants = norm_constants(configs, x, weight, max_rows, phase)
    # a single row's stride is not used, but Triton would compile another binary if the stride were 1
    stride_x = x.stride(0) if M > 1 else K
    grid = (triton.cdiv(M, constants["BLOCK_M"]), triton.cdiv(N, constants["BLOCK_N"]))
    _norm_linear_kernel[grid](x, norm, weight, w_up, out, M, stride_x, eps, **constants)


def launch_norm_linear(
    out: Tensor, x: Tensor, norm: Tensor, weight: Tensor, eps: float, max_rows: int, phase: str = "decode"
) -> None:
    """Run :func:`norm_linear` into `out`, contiguous [M, N], without checking the arguments."""
    _launch_norm(NORM_LINEAR, out, x, norm, weight, None, eps, max_rows, phase)


@operator(launch_norm_linear)
def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, eps: float, max_rows: int, phase: str = "decode") -> Tensor:
    """Compute ``RMSNorm(x) @ weight.T``, where RMSNorm is ``x / sqrt(mean(x^2) + eps) * norm`` of each row.

    Args:
        x: [M, K] fp32, bf16 or fp16; only its last dimension must be contiguous.
        norm: [K], the weight of RMSNorm.
        weight: [N, K], as a checkpoint stores it.
        eps: added to the mean square.
        max_rows: the most rows that the layer is prepared for, 1..512 in decode. The launch config depends on this
            number, so a row's result depends neither on M nor on the other rows.
        phase: "decode", or "prefill", which takes tiles for many rows whatever `max_rows` is. In fp32 on a GPU,
            both take the same tiles.

    Returns:
        [M, N] in x's dtype, summed in fp32 and rounded once.

    Raises:
        ValueError: M is not in 1..max_rows, max_rows is out of range, or the phase is unknown.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("norm", norm, (K,), like=x)
    N, _ = expect("weight", weight, ("N", K), like=x)
    expect_rows(M, max_rows, phase)
    return x.new_empty(M, N)


def launch_norm_swiglu(
    out: Tensor, x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor, eps: float, max_rows: int, phase: str = "decode"
) -> None:
    """Run :func:`norm_swiglu` into `out`, contiguous [M, N], without checking the arguments."""
    _launch_norm(NORM_SWIGLU, out, x, norm, w1, w3, eps, max_rows, phase)


@operator(launch_norm_swiglu)
def norm_swiglu(
    x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor, eps: float, max_rows: int, phase: str = "decode"
) -> Tensor:
    """Compute ``silu(n @ w1.T) * (n @ w3.T)`` with ``n = RMSNorm(x)``.

    This is SwiGLU (arXiv 2002.05202) without its down projection, which :func:`voxkern.kernels.linear.linear` computes.

    Args:
        x: [M, K], see :func:`norm_linear`, also for `norm`, `eps`, `max_rows`, `phase` and errors.
        norm: [K].
        w1: [N, K], the weight of the gate.
        w3: [N, K], the weight of the up projection, which the gate multiplies.
        eps: added to the mean square.
        max_rows: the most rows that the layer is prepared for.
        phase: "decode" or "prefill".

    Returns:
        [M, N] in x's dtype, summed in fp32 and rounded once.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("norm", norm, (K,), like=x)
    N, _ = expect("w1", w1, ("N", K), like=x)
    expect("w3", w3, (N, K), like=x)
    expect_rows(M, max_rows, phase)
    return x.new_empty(M, N)
