"""Linear layers on few rows: bound by the bytes of their weights, so what stands around the product is fused into it.

A tile is [BLOCK_N, BLOCK_M], the weight's rows first: the matrix instructions want 16 or 64 rows on their left side and
make do with 8 columns on their right, so that six rows of activations cost eight and not sixty-four.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .operator import expect, operator
from .settings import Table

# Few rows: 8 to 16 KB of weights a stage, and as many stages as the 101,376 bytes of sm_86, 89 and 120 hold; N = 4096
# has only 64 blocks for 132 multiprocessors, so each must keep 32 KB and more under way. BLOCK_K is less than a block's
# threads: a longer tile of `norm` would be loaded one element a thread, which cannot be pipelined and stalls every
# step. 64 rows on four warps, and 32 on tiles of 128, spill on sm_120. fp32 products run on the plain units, whose
# operands live in registers: small tiles, or they spill.
NORM_LINEAR = Table(
    "norm_linear",
    """
    arch         dtype  rows | BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      *    | 16       32       64       4          1
    gfx*         fp32   *    | 16       32       64       4          2
    gfx*         *      16   | 16       64       128      4          2
    gfx*         *      *    | 64       64       64       4          2
    sm_*         fp32   *    | 16       32       32       4          6
    sm_*         *      8    | 8        64       128      8          6
    sm_*         *      16   | 16       64       128      8          5
    sm_*         *      32   | 32       64       64       4          8
    sm_*         *      *    | 64       64       64       8          4
    """,
)


@triton.jit
def _row_scale(
    p_x, o_m, m_m, stride_x, eps,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``1 / sqrt(mean(x^2) + eps)`` of each row, in a pass of its own over the activations: [M]."""
    o_k = tl.arange(0, BLOCK_K)
    b_square = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        m_x = m_m[:, None] & (k + o_k < K)[None, :]
        b_x = tl.load(p_x + o_m[:, None] * stride_x + (k + o_k)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_square += b_x * b_x
    return tl.rsqrt(tl.sum(b_square, 1) / K + eps)


@triton.jit(do_not_specialize=["M"])
def _norm_linear_kernel(
    p_x, p_norm, p_w, p_y,
    M, stride_x, eps,
    N: tl.constexpr, K: tl.constexpr, NORM_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # row tiles are neighbours in launch order, so that all but the first find the weights in the L2 cache
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < M, o_n < N
    eps = tl.full([], eps, tl.float32)  # torch.compile passes it as fp64

    if NORM_FIRST:
        b_scale = _row_scale(p_x, o_m, m_m, stride_x, eps, K, BLOCK_M, BLOCK_K)  # [M]
    b_square = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
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
    if not NORM_FIRST:
        # the scale is a row's own, so it may as well be applied to the finished sum: one pass over x
        b_acc *= tl.rsqrt(tl.sum(b_square, 1) / K + eps)[None, :]
    p_tile = p_y + o_m[None, :] * N + o_n[:, None]
    tl.store(p_tile, cast(b_acc, p_y.dtype.element_ty), mask=m_m[None, :] & m_n[:, None])


def launch_norm_linear(out: Tensor, x: Tensor, norm: Tensor, weight: Tensor, eps: float, max_rows: int) -> None:
    """Fill `out`, contiguous [M, N]; the other arguments are those of :func:`norm_linear`, unchecked."""
    (M, K), N = x.shape, weight.shape[0]
    constants = NORM_LINEAR(N=N, K=K, dtype=x.dtype, rows=max_rows)
    constants["NORM_FIRST"] = x.dtype == torch.float16  # x * norm may pass fp16's 65,504 before it is scaled
    stride_x = x.stride(0) if M > 1 else K  # a lone row may have any stride, and stride 1 would be another binary
    grid = (triton.cdiv(M, constants["BLOCK_M"]), triton.cdiv(N, constants["BLOCK_N"]))
    _norm_linear_kernel[grid](x, norm, weight, out, M, stride_x, eps, **constants)


@operator(launch_norm_linear)
def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, eps: float, max_rows: int) -> Tensor:
    """``RMSNorm(x) @ weight.T``, with x / sqrt(mean(x^2) + eps) * norm taken row by row.

    Args:
        x: [M, K] fp32, bf16 or fp16; rows may lie apart.
        norm: [K], the RMSNorm's weight.
        weight: [N, K], as a checkpoint stores it.
        eps: added to the mean square.
        max_rows: the most rows this layer is prepared for, 1..512; M may be any of 1..max_rows, and a row's result
            does not depend on the others.

    Returns:
        [M, N] in x's dtype, summed in fp32 and rounded once.

    Raises:
        TypeError: a dtype is wrong or differs from x's.
        ValueError: a shape, stride or device is wrong, or M is not in 1..max_rows.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("norm", norm, (K,), like=x)
    N, _ = expect("weight", weight, ("N", K), like=x)
    if not 1 <= max_rows <= 512:
        raise ValueError(f"max_rows is {max_rows} but must lie in 1..512")
    if not 1 <= M <= max_rows:
        raise ValueError(f"x has {M} rows but must have 1..{max_rows} (max_rows)")
    return x.new_empty(M, N)
