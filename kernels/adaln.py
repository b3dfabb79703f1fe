"""Linear layers under adaptive layer norm (DiT, arXiv 2212.09748) for few rows, fused with the operations around them.

The operators compute a residual block with hidden width N, for R requests in S solver steps. Each operator has its own
weight and bias::

    adaln_modulation  = silu(c) @ weight.T + bias               [S, R, W], with c = time[s] + state[r] [S, R, K]
        columns of a layer: shift | scale | gate                K each; the final layer has no gate
    n                 = (x - mean) / sqrt(variance + eps) * (1 + scale) + shift     [M, K], never stored
    adaln_linear_silu = silu(n @ weight.T + bias)               [M, N], the first half of a block
    linear            = residual + gate * (y @ weight.T + bias) [M, K], the second half, of y [M, N], in ``linear.py``

    a block:  y^T [BLOCK_N, BLOCK_M]  =  sum over K of  weight [BLOCK_N, BLOCK_K] @ n^T [BLOCK_K, BLOCK_M]

All times are known when a frame begins, and the hidden state is the same in all steps of a frame. One launch therefore
computes the modulation of all steps and layers. The weights of the modulation, the largest part of such a network, are
thus read once per frame and not once per step.

For classifier-free guidance, each request has two branches: one with the hidden state, and one with zeros in its place.
The modulation of a step has 1 + R rows. Row 1 + i belongs to row i of the activations, a branch with a hidden state.
Row 0 belongs to the activations from row R on, the branches with zeros, which share one modulation.

As in ``linear.py``, which gives the reason, the weight's rows are the first axis of a tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .launch_config import LaunchConfigs
from .linear import expect_modulation, expect_rows
from .operator import expect, operator
from .overlap import OFF, prefetch_rows, wait_for_launches

__all__ = ["adaln_linear_silu", "adaln_modulation"]

# As in norm_linear, a tile of weights has 16 KB. A network with three blocks of width 1536 has 264 tiles, each with 64
# rows of weights. A head is prepared for 64 steps per request but mostly runs few, so BLOCK_M is chosen for few steps.
# More steps need more tiles along the activations' rows. Such tiles of the same weights are neighbours in launch order,
# so all but the first find the weights in the L2 cache.
ADALN_MODULATION = LaunchConfigs(
    "adaln_modulation",
    """
    arch         dtype  rows | BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      *    | 16       32       64       4          1
    gfx*         fp32   *    | 16       32       32       4          2
    gfx*         *      64   | 16       64       64       4          2
    gfx*         *      *    | 64       64       32       4          2
    sm_*         fp32   *    | 16       32       32       4          4
    sm_*         *      8    | 8        64       128      8          4
    sm_*         *      64   | 16       64       128      8          4
    sm_*         *      256  | 32       64       64       4          5
    sm_*         *      *    | 64       64       64       8          3
    """,
)

# For N = 1536 an H100 has only 96 blocks on 132 multiprocessors, so each block must keep many bytes in flight. A stage
# holds 8 KB of weights, and 12 KB of x, shift and scale. With num_stages = 8, seven stages are in flight, which take
# 143 KB of shared memory. The other sm_* have num_stages = 5, so four stages are in flight.
# The product is split along K among the four warps of a block, as in split_product of linear.py. The product therefore
# has three dimensions, and each warp computes one slice of the first dimension, SPLIT.
ADALN_LINEAR_SILU = LaunchConfigs(
    "adaln_linear_silu",
    """
    arch         dtype  rows | SPLIT  BLOCK_M  BLOCK_N  BLOCK_K  BLOCK_S  num_warps  num_stages
    interpreter  *      *    | 2      16       32       32       64       4          1
    gfx*         fp32   *    | 4      16       16       16       256      4          2
    gfx*         *      *    | 4      16       16       64       256      4          2
    sm_*         fp32   *    | 4      16       16       16       256      4          3
    sm_90        *      8    | 4      8        16       64       1024     4          8
    sm_10?       *      8    | 4      8        16       64       1024     4          8
    sm_*         *      8    | 4      8        16       64       1024     4          5
    sm_*         *      16   | 4      16       16       32       512      4          6
    sm_*         *      *    | 4      16       32       32       512      4          4
    """,
)


@triton.jit(do_not_specialize=["M", "R"])
def _adaln_modulation_kernel(
    p_times, p_states, p_ws, p_biases, p_y,
    M, R, stride_step, stride_row,
    N: tl.constexpr, N_LAST: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_m, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i_w = tl.minimum(i_n // TILES, len(p_ws) - 1)  # each tile belongs to one of the weights
    p_w, p_bias, n = p_ws[0], p_biases[0], tl.where(i_w == len(p_ws) - 1, N_LAST, N)
    for j in tl.static_range(1, len(p_ws)):
        p_w = tl.where(i_w == j, p_ws[j], p_w)
        p_bias = tl.where(i_w == j, p_biases[j], p_bias)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (i_n - i_w * TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < M, o_n < n
    o_step, o_row = (o_m // R).to(tl.int64), (o_m % R).to(tl.int64)  # int32: a 64-bit division calls a subroutine

    b_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = (k + o_k < K)[None, :]
        b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :], mask=m_n[:, None] & m_k, other=0.0)
        m_c = m_m[:, None] & m_k
        b_c = tl.load(p_times + o_step[:, None] * K + (k + o_k)[None, :], mask=m_c, other=0.0).to(tl.float32)
        b_c += tl.load(p_states + o_row[:, None] * K + (k + o_k)[None, :], mask=m_c, other=0.0).to(tl.float32)
        b_acc = dot(b_w, tl.trans(cast(b_c * tl.sigmoid(b_c), b_w.dtype)), b_acc)  # [N, M]
    b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    p_tile = p_y + (o_step * stride_step + o_row * stride_row)[None, :] + i_w * N + o_n[:, None]
    tl.store(p_tile, cast(b_acc, p_y.dtype.element_ty), mask=m_m[None, :] & m_n[:, None])


def launch_adaln_modulation(
    out: Tensor, times: Tensor, states: Tensor, weights: list[Tensor], biases: list[Tensor], max_rows: int
) -> None:
    """Run :func:`adaln_modulation` into `out`, [S, R, W] with any strides of S and R, without checks."""
    (S, K), R, (N, *_, N_LAST) = times.shape, len(states), [len(weight) for weight in weights]
    constants = ADALN_MODULATION(N=N, K=K, dtype=times.dtype, rows=max_rows)
    constants |= {"N": N, "N_LAST": N_LAST, "K": K}
    tiles = triton.cdiv(N, constants["BLOCK_N"]) * (len(weights) - 1) + triton.cdiv(N_LAST, constants["BLOCK_N"])
    _adaln_modulation_kernel[(triton.cdiv(S * R, constants["BLOCK_M"]), tiles)](
        times, states, tuple(weights), tuple(biases), out, S * R, R, out.stride(0), out.stride(1), **constants
    )


@operator(launch_adaln_modulation)
def adaln_modulation(
    times: Tensor, states: Tensor, weights: list[Tensor], biases: list[Tensor], max_rows: int
) -> Tensor:
    """Compute ``silu(time + state) @ weight.T + bias`` for each step, request and layer.

    Args:
        times: [S, K] fp32, bf16 or fp16, the projected time of each step.
        states: [R, K], the projected hidden state of each request.
        weights: two or more weights [N, K], one per layer; only the last layer may have another N.
        biases: the biases [N], one per layer.
        max_rows: the most rows S * R that the operator is prepared for, 1..4096. The launch config depends on this
            number, so a row's result depends neither on S * R nor on the other rows.

    Returns:
        [S, R, W] in the dtype of `times`, summed in fp32 and rounded once. The layers' columns are side by side, so W
        is the sum of all N.

    Raises:
        ValueError: S * R is not in 1..max_rows, `max_rows` is not in 1..4096, or `weights` and `biases` do not have the
            same number of tensors, two or more.
    """
    S, K = expect("times", times, ("S", "K"))
    R, _ = expect("states", states, ("R", K), like=times)
    if len(weights) < 2 or len(weights) != len(biases):
        raise ValueError(
            f"weights and biases are {len(weights)} and {len(biases)} tensors but must be the same number, 2 or more"
        )
    N, _ = expect("weights[0]", weights[0], ("N", K), like=times)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        rows, _ = expect(f"weights[{i}]", weight, (N if i + 1 < len(weights) else "N", K), like=times)
        expect(f"biases[{i}]", bias, (rows,), like=times)
    if not 1 <= max_rows <= 4096:
        raise ValueError(f"max_rows is {max_rows} but must lie in 1..4096")
    if not 1 <= S * R <= max_rows:
        raise ValueError(f"times and states make {S} x {R} rows but must make 1..{max_rows} (max_rows)")
    return times.new_empty(S, R, sum(len(weight) for weight in weights))


@triton.jit
def _moments(
    p_x, o_m, m_m, stride_x, eps,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Return the mean and ``1 / sqrt(variance + eps)`` of each row, fp32 [BLOCK_M] each.

    The variance takes a second pass over x. The mean of the squares minus the squared mean would lose digits where the
    mean is large.
    """
    o_s = tl.arange(0, BLOCK_S)
    b_sum = tl.zeros([BLOCK_M, BLOCK_S], dtype=tl.float32)
    for k in range(0, K, BLOCK_S):
        m_x = m_m[:, None] & (k + o_s < K)[None, :]
        b_sum += tl.load(p_x + o_m[:, None] * stride_x + (k + o_s)[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_mean = tl.sum(b_sum, 1) / K
    b_square = tl.zeros([BLOCK_M, BLOCK_S], dtype=tl.float32)
    for k in range(0, K, BLOCK_S):
        m_x = m_m[:, None] & (k + o_s < K)[None, :]
        b_x = tl.load(p_x + o_m[:, None] * stride_x + (k + o_s)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.where(m_x, b_x - b_mean[:, None], 0.0)
        b_square += b_x * b_x
    return b_mean, tl.rsqrt(tl.sum(b_square, 1) / K + eps)


@triton.jit(do_not_specialize=["M", "R"])
def _adaln_linear_silu_kernel(
    p_x, p_mod, p_w, p_bias, p_y,
    M, R, stride_x, stride_mod, eps,
    N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetch_rows(p_w, o_n, N, 0, K, OVERLAP)
    wait_for_launches(OVERLAP)
    o_k = tl.arange(0, SPLIT)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [SPLIT, K]
    m_m, m_n = o_m < M, o_n < N
    eps = tl.full([], eps, tl.float32)  # torch.compile passes eps as fp64
    b_mean, b_rstd = _moments(p_x, o_m, m_m, stride_x, eps, K, BLOCK_M, BLOCK_S)
    o_x = (o_m * stride_x)[None, :, None]
    o_mod = (tl.where(o_m < R, o_m + 1, 0) * stride_mod)[None, :, None]

    b_acc = tl.zeros([SPLIT, BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, K, SPLIT * BLOCK_K):
        m_k = (k + o_k < K)[:, None, :]
        m_x = m_m[None, :, None] & m_k
        b_w = tl.load(
            p_w + o_n[None, :, None] * K + (k + o_k)[:, None, :], mask=m_n[None, :, None] & m_k, other=0.0
        )  # [SPLIT, N, K]
        b_x = tl.load(p_x + o_x + (k + o_k)[:, None, :], mask=m_x, other=0.0).to(tl.float32)  # [SPLIT, M, K]
        b_shift = tl.load(p_mod + o_mod + (k + o_k)[:, None, :], mask=m_x, other=0.0).to(tl.float32)
        b_scale = tl.load(p_mod + o_mod + (K + k + o_k)[:, None, :], mask=m_x, other=0.0).to(tl.float32)
        b_x = (b_x - b_mean[None, :, None]) * b_rstd[None, :, None]
        b_a = cast(b_x * (1 + b_scale) + b_shift, b_w.dtype)
        b_acc = dot(b_w, tl.permute(b_a, (0, 2, 1)), b_acc)
    b_y = tl.sum(b_acc, 0) + tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]  # [N, M]
    b_y *= tl.sigmoid(b_y)
    tl.store(p_y + o_m[None, :] * N + o_n[:, None], cast(b_y, p_y.dtype.element_ty), mask=m_m[None, :] & m_n[:, None])


def launch_adaln_linear_silu(
    out: Tensor, x: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor, eps: float, max_rows: int
) -> None:
    """Run :func:`adaln_linear_silu` into `out`, contiguous [M, N], without checking the arguments."""
    (M, K), N, R = x.shape, len(weight), len(modulation) - 1
    constants = ADALN_LINEAR_SILU(N=N, K=K, dtype=x.dtype, rows=max_rows) | {"N": N, "K": K}
    # a single row's stride is not used, but Triton would compile another binary if the stride were 1
    stride_x = x.stride(0) if M > 1 else K
    _adaln_linear_silu_kernel[(triton.cdiv(M, constants["BLOCK_M"]), triton.cdiv(N, constants["BLOCK_N"]))](
        x, modulation, weight, bias, out, M, R, stride_x, modulation.stride(0), eps, **constants
    )


@operator(launch_adaln_linear_silu)
def adaln_linear_silu(x: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor, eps: float, max_rows: int) -> Tensor:
    """Compute ``silu(n @ weight.T + bias)`` with ``n = (x - mean) / sqrt(variance + eps) * (1 + scale) + shift``.

    Args:
        x: [M, K] fp32, bf16 or fp16; only its last dimension must be contiguous.
        modulation: [1 + R, 2K or more], shift | scale, with R in 0..M; only its last dimension must be contiguous.
            Row 1 + i belongs to row i of x, and row 0 to the rows of x from R on.
        weight: [N, K], as a checkpoint stores it.
        bias: [N].
        eps: added to the variance.
        max_rows: the most rows that the layer is prepared for, 1..512. The launch config depends on this number, so a
            row's result depends neither on M nor on the other rows.

    Returns:
        [M, N] in x's dtype, summed in fp32 and rounded once.

    Raises:
        ValueError: M is not in 1..max_rows, or `max_rows` is not in 1..512.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    N, _ = expect("weight", weight, ("N", K), like=x)
    expect("bias", bias, (N,), like=x)
    expect_modulation("modulation", modulation, 2 * K, x)
    expect_rows(M, max_rows, "decode")
    return x.new_empty(M, N)
