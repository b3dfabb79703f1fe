"""Linear layers on few rows: bound by the bytes of their weights, so what stands around the product is fused into it.

A tile is [BLOCK_N, BLOCK_M], the weight's rows first: the matrix instructions want 16 or 64 rows on their left side and
make do with 8 columns on their right, so that six rows of activations cost eight and not sixty-four.

Two kernels: after RMSNorm (``norm_linear``, ``norm_swiglu``), and into the residual stream (``linear``). In a prefill
there are many rows, and tiles as large as the matrix units want them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .launch_config import LaunchConfigs
from .operator import expect, operator

__all__ = ["linear", "norm_linear", "norm_swiglu"]

# Few rows: 8 to 16 KB of weights a stage, and as many stages as the 101,376 bytes of sm_86, 89 and 120 hold; N = 4096
# has only 64 blocks for 132 multiprocessors, so each must keep 32 KB and more under way. BLOCK_K is less than a block's
# threads: a longer tile of `norm` would be loaded one element a thread, which cannot be pipelined and stalls every
# step. 64 rows on four warps and 32 on tiles of 128 spill on sm_120, and so do 32 on tiles of 64: with a rotation on
# four warps, with three weights on eight. fp32 products
# run on the plain units, whose operands live in registers: small tiles, or they spill.
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


# Two tiles of weights a step, the gate's and what it gates, and two accumulators.

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

LINEAR = LaunchConfigs(
    "linear",
    """
    arch         dtype  phase    rows | SPLIT  BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      prefill  *    | 1      16       32       64       4          1
    interpreter  *      *        32   | 2      16       32       32       4          1
    interpreter  *      *        *    | 1      16       32       64       4          1
    gfx*         fp32   *        *    | 1      16       32       64       4          2
    gfx*         *      prefill  *    | 1      64       128      64       8          2
    gfx*         *      *        16   | 4      16       16       64       4          2
    gfx*         *      *        *    | 1      64       64       64       4          2
    sm_*         fp32   *        *    | 1      16       32       32       4          6
    sm_*         *      prefill  *    | 1      128      128      64       8          3
    sm_*         *      *        8    | 4      8        16       64       4          8
    sm_*         *      *        16   | 4      16       16       64       4          6
    sm_*         *      *        32   | 1      32       64       64       4          8
    sm_*         *      *        *    | 1      64       64       64       8          4
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


@triton.jit
def norm_product(
    p_x, p_norm, p_w, p_up, o_m, o_n, m_m, m_n, stride_x, eps,
    K: tl.constexpr, NORM_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``w RMSNorm(x)^T`` of a tile, fp32 [N, M], and the same of a second weight, `p_up`; zeros where that is None."""
    o_k = tl.arange(0, BLOCK_K)
    eps = tl.full([], eps, tl.float32)  # torch.compile passes it as fp64
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
        # the scale is a row's own, so it may as well be applied to the finished sum: one pass over x
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
    # row tiles are neighbours in launch order, so that all but the first find the weights in the L2 cache
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
    """The constants of a product after RMSNorm."""
    constants = configs(N=weight.shape[0], K=weight.shape[1], dtype=x.dtype, rows=max_rows, phase=phase)
    return constants | {"NORM_FIRST": x.dtype == torch.float16}  # x * norm may pass fp16's 65,504 before it is scaled


def _launch_norm(
    configs: LaunchConfigs, out: Tensor, x: Tensor, norm: Tensor, weight: Tensor, w_up: Tensor | None, eps: float,
    max_rows: int, phase: str,
) -> None:  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    constants = norm_constants(configs, x, weight, max_rows, phase)
    stride_x = x.stride(0) if M > 1 else K  # a lone row may have any stride, and stride 1 would be another binary
    grid = (triton.cdiv(M, constants["BLOCK_M"]), triton.cdiv(N, constants["BLOCK_N"]))
    _norm_linear_kernel[grid](x, norm, weight, w_up, out, M, stride_x, eps, **constants)


def launch_norm_linear(
    out: Tensor, x: Tensor, norm: Tensor, weight: Tensor, eps: float, max_rows: int, phase: str = "decode"
) -> None:
    """Fill `out`, contiguous [M, N]; the other arguments are those of :func:`norm_linear`, unchecked."""
    _launch_norm(NORM_LINEAR, out, x, norm, weight, None, eps, max_rows, phase)


@operator(launch_norm_linear)
def norm_linear(x: Tensor, norm: Tensor, weight: Tensor, eps: float, max_rows: int, phase: str = "decode") -> Tensor:
    """``RMSNorm(x) @ weight.T``, with x / sqrt(mean(x^2) + eps) * norm taken row by row.

    Args:
        x: [M, K] fp32, bf16 or fp16; rows may lie apart.
        norm: [K], the RMSNorm's weight.
        weight: [N, K], as a checkpoint stores it.
        eps: added to the mean square.
        max_rows: the most rows this layer is prepared for, 1..512 in decode; M may be any of 1..max_rows, and a row's
            result does not depend on the others.
        phase: "decode", or "prefill", whose tiles are for many rows whatever `max_rows` is.

    Returns:
        [M, N] in x's dtype, summed in fp32 and rounded once.

    Raises:
        TypeError: a dtype is wrong or differs from x's.
        ValueError: a shape, stride or device is wrong, M is not in 1..max_rows, or the phase is unknown.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("norm", norm, (K,), like=x)
    N, _ = expect("weight", weight, ("N", K), like=x)
    expect_rows(M, max_rows, phase)
    return x.new_empty(M, N)


def launch_norm_swiglu(
    out: Tensor, x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor, eps: float, max_rows: int, phase: str = "decode"
) -> None:
    """Fill `out`, contiguous [M, N]; the other arguments are those of :func:`norm_swiglu`, unchecked."""
    _launch_norm(NORM_SWIGLU, out, x, norm, w1, w3, eps, max_rows, phase)


@operator(launch_norm_swiglu)
def norm_swiglu(
    x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor, eps: float, max_rows: int, phase: str = "decode"
) -> Tensor:
    """``silu(n @ w1.T) * (n @ w3.T)`` with ``n = RMSNorm(x)``: all of SwiGLU (arXiv 2002.05202) but its way down.

    Args:
        x: [M, K], see :func:`norm_linear`, also for `norm`, `eps`, `max_rows` and `phase`.
        norm: [K].
        w1: [N, K], the gate.
        w3: [N, K], what it gates.
        eps: added to the mean square.
        max_rows: prepared for.
        phase: "decode" or "prefill".

    Returns:
        [M, N] in x's dtype, rounded once.

    Raises:
        TypeError: a dtype is wrong or differs from x's.
        ValueError: a shape, stride or device is wrong, or M is not in 1..max_rows.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("norm", norm, (K,), like=x)
    N, _ = expect("w1", w1, ("N", K), like=x)
    expect("w3", w3, (N, K), like=x)
    expect_rows(M, max_rows, phase)
    return x.new_empty(M, N)


@triton.jit
def _product(
    p_x, p_w, o_m, o_n, m_m, m_n, stride_x,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``w x^T`` of a tile, [N, M], in one chain of sums."""
    o_k = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = (k + o_k < K)[None, :]
        b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :], mask=m_n[:, None] & m_k, other=0.0)
        b_x = tl.load(p_x + o_m[:, None] * stride_x + (k + o_k)[None, :], mask=m_m[:, None] & m_k, other=0.0)
        b_acc = dot(b_w, tl.trans(b_x), b_acc)
    return b_acc


@triton.jit
def _split_product(
    p_x, p_w, o_m, o_n, m_m, m_n, stride_x,
    K: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same in SPLIT chains, a warp each, added in a fixed order at the end.

    So a tile may be 16 rows of weights high and still keep four warps at work: N = 3072 then fills a machine of 132
    multiprocessors with 192 blocks, and nothing has to be passed from one block to another.
    """
    o_k = tl.arange(0, SPLIT)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [SPLIT, K]
    b_acc = tl.zeros([SPLIT, BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, K, SPLIT * BLOCK_K):
        m_k = (k + o_k < K)[:, None, :]
        b_w = tl.load(
            p_w + o_n[None, :, None] * K + (k + o_k)[:, None, :], mask=m_n[None, :, None] & m_k, other=0.0
        )  # [SPLIT, N, K]
        b_x = tl.load(
            p_x + o_m[None, :, None] * stride_x + (k + o_k)[:, None, :], mask=m_m[None, :, None] & m_k, other=0.0
        )  # [SPLIT, M, K]
        b_acc = dot(b_w, tl.permute(b_x, (0, 2, 1)), b_acc)
    return tl.sum(b_acc, 0)


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    p_x, p_w, p_scale, p_residual, p_y,
    M, stride_x,
    N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    if SPLIT == 1:
        b_acc = _product(p_x, p_w, o_m, o_n, m_m, m_n, stride_x, K, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        b_acc = _split_product(p_x, p_w, o_m, o_n, m_m, m_n, stride_x, K, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K)
    m_y = m_m[None, :] & m_n[:, None]
    o_y = o_m[None, :] * N + o_n[:, None]
    if p_scale is not None:
        b_acc *= tl.load(p_scale + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    if p_residual is not None:
        b_acc += tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, cast(b_acc, p_y.dtype.element_ty), mask=m_y)


def launch_linear(
    out: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor | None, max_rows: int,
    phase: str = "decode",
) -> None:  # fmt: skip
    """Fill `out`, contiguous [M, N]; the other arguments are those of :func:`linear`, unchecked."""
    (M, K), N = x.shape, weight.shape[0]
    constants = LINEAR(N=N, K=K, dtype=x.dtype, rows=max_rows, phase=phase)
    stride_x = x.stride(0) if M > 1 else K
    grid = (triton.cdiv(M, constants["BLOCK_M"]), triton.cdiv(N, constants["BLOCK_N"]))
    _linear_kernel[grid](x, weight, scale, residual, out, M, stride_x, **constants)


@operator(launch_linear)
def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
    max_rows: int,
    phase: str = "decode",
) -> Tensor:
    """``residual + scale * (x @ weight.T)``: the way back into the residual stream.

    Args:
        x: [M, K] fp32, bf16 or fp16; rows may lie apart.
        weight: [N, K], as a checkpoint stores it.
        scale: [N], a layer scale, or None for 1.
        residual: [M, N], contiguous, or None for 0.
        max_rows: the most rows this layer is prepared for, see :func:`norm_linear`, also for `phase`.
        phase: "decode" or "prefill".

    Returns:
        [M, N] in x's dtype, summed in fp32 and rounded once.

    Raises:
        TypeError: a dtype is wrong or differs from x's.
        ValueError: a shape, stride or device is wrong, or M is not in 1..max_rows.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    N, _ = expect("weight", weight, ("N", K), like=x)
    if scale is not None:
        expect("scale", scale, (N,), like=x)
    if residual is not None:
        expect("residual", residual, (M, N), like=x)
    expect_rows(M, max_rows, phase)
    return x.new_empty(M, N)


def expect_rows(M: int, max_rows: int, phase: str) -> None:
    """Raise unless `M` rows are what a layer prepared for `max_rows` can take."""
    if phase not in ("decode", "prefill"):
        raise ValueError(f"phase is {phase!r} but must be 'decode' or 'prefill'")
    if max_rows < 1 or (phase == "decode" and max_rows > 512):
        raise ValueError(f"max_rows is {max_rows} but must lie in 1..512" + (" in decode" if max_rows > 512 else ""))
    if not 1 <= M <= max_rows:
        raise ValueError(f"x has {M} rows but must have 1..{max_rows} (max_rows)")
