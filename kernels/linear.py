"""Linear layers for few rows, fused with the operations after the product.

The activations are x [M, K]; the weight [N, K] and the bias [N] are stored as in the checkpoint::

    linear = residual + gate * (x @ weight.T + bias)     [M, N]
    gate     [1 + R, N]: gate row 1 + i belongs to row i of x, and gate row 0 to all rows of x from row R on

    a block:  y^T [BLOCK_N, BLOCK_M]  =  sum over K of  weight [BLOCK_N, BLOCK_K] @ x^T [BLOCK_K, BLOCK_M]

With few rows, reading the weights takes nearly all of a layer's time. The operations around the product are therefore
fused into the launch that reads the weights.

The weight's rows are the first axis of a tile. On NVIDIA GPUs, a matrix instruction takes 16 or 64 rows on its left
side, but as few as 8 columns on its right side. The six rows of one request in the public flow head are then padded to
8, not to 16 or 64. A prefill has many rows, so a prefill's tiles are large enough to keep the matrix units busy.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .launch_config import LaunchConfigs
from .operator import expect, operator

__all__ = ["linear"]

# SPLIT is the number of partial sums along K, see split_product. For more than 16 rows and N = 1536, as in an MLP head,
# tiles with 64 rows of weights would make only 24 blocks, so a tile has 32 rows of weights.
LINEAR = LaunchConfigs(
    "linear",
    """
    arch         dtype  phase    rows N    | SPLIT  BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      prefill  *    *    | 1      16       32       64       4          1
    interpreter  *      *        32   *    | 2      16       32       32       4          1
    interpreter  *      *        *    *    | 1      16       32       64       4          1
    gfx*         fp32   *        *    *    | 1      16       32       64       4          2
    gfx*         *      prefill  *    *    | 1      64       128      64       8          2
    gfx*         *      *        16   *    | 4      16       16       64       4          2
    gfx*         *      *        *    *    | 1      64       64       64       4          2
    sm_*         fp32   *        *    *    | 1      16       32       32       4          6
    sm_*         *      prefill  *    *    | 1      128      128      64       8          3
    sm_*         *      *        8    *    | 4      8        16       64       4          8
    sm_*         *      *        16   *    | 4      16       16       64       4          6
    sm_*         *      *        *    1536 | 4      16       32       64       4          4
    sm_*         *      *        32   *    | 1      32       64       64       4          8
    sm_*         *      *        *    *    | 1      64       64       64       8          4
    """,
)


@triton.jit
def product(
    p_x, p_w, o_m, o_n, m_m, m_n, stride_x,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``w x^T`` of a tile, fp32 [BLOCK_N, BLOCK_M], in one sum along K."""
    o_k = tl.arange(0, BLOCK_K)
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = (k + o_k < K)[None, :]
        b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :], mask=m_n[:, None] & m_k, other=0.0)
        b_x = tl.load(p_x + o_m[:, None] * stride_x + (k + o_k)[None, :], mask=m_m[:, None] & m_k, other=0.0)
        b_acc = dot(b_w, tl.trans(b_x), b_acc)
    return b_acc


@triton.jit
def split_product(
    p_x, p_w, o_m, o_n, m_m, m_n, stride_x,
    K: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``w x^T`` of a tile, fp32 [BLOCK_N, BLOCK_M], in SPLIT partial sums along K, one per warp.

    Because each warp computes its own partial sum, a tile with only 16 rows of weights keeps four warps busy. Such
    tiles give 192 blocks for N = 3072, and an H100 has 132 multiprocessors. The partial sums are added in a fixed order
    at the end. No block needs the result of another block.
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


@triton.jit(do_not_specialize=["M", "R"])
def _linear_kernel(
    p_x, p_w, p_bias, p_gate, p_residual, p_y,
    M, R, stride_x, stride_gate,
    N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    if SPLIT == 1:
        b_y = product(p_x, p_w, o_m, o_n, m_m, m_n, stride_x, K, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        b_y = split_product(p_x, p_w, o_m, o_n, m_m, m_n, stride_x, K, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K)
    m_y = m_m[None, :] & m_n[:, None]  # [N, M]
    o_y = o_m[None, :] * N + o_n[:, None]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    if p_gate is not None:
        o_gate = (tl.where(o_m < R, o_m + 1, 0) * stride_gate)[None, :] + o_n[:, None]
        b_y *= tl.load(p_gate + o_gate, mask=m_y, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_y += tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, cast(b_y, p_y.dtype.element_ty), mask=m_y)


def launch_linear(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None,
    max_rows: int, phase: str = "decode",
) -> None:  # fmt: skip
    """Run :func:`linear` into `out`, contiguous [M, N], without checking the arguments."""
    (M, K), N = x.shape, len(weight)
    R, stride_gate = (0, 0) if gate is None else (len(gate) - 1, gate.stride(0))
    constants = LINEAR(N=N, K=K, dtype=x.dtype, rows=max_rows, phase=phase) | {"N": N, "K": K}
    # a single row's stride is not used, but Triton would compile another binary if the stride were 1
    stride_x = x.stride(0) if M > 1 else K
    grid = (triton.cdiv(M, constants["BLOCK_M"]), triton.cdiv(N, constants["BLOCK_N"]))
    _linear_kernel[grid](x, weight, bias, gate, residual, out, M, R, stride_x, stride_gate, **constants)


@operator(launch_linear)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    max_rows: int,
    phase: str = "decode",
) -> Tensor:
    """Compute ``residual + gate * (x @ weight.T + bias)``: a gated product, added to the residual stream.

    Args:
        x: [M, K] fp32, bf16 or fp16; only its last dimension must be contiguous.
        weight: [N, K], as a checkpoint stores it.
        bias: [N], or None for 0.
        gate: [1 + R, N or more], with R in 0..M, or None for 1; only its last dimension must be contiguous. Row 1 + i
            belongs to row i of x, and row 0 to the rows of x from R on. A layer scale is a gate with one row.
        residual: [M, N], contiguous, or None for 0.
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
    N, _ = expect("weight", weight, ("N", K), like=x)
    if bias is not None:
        expect("bias", bias, (N,), like=x)
    if gate is not None:
        expect_modulation("gate", gate, N, x)
    if residual is not None:
        expect("residual", residual, (M, N), like=x)
    expect_rows(M, max_rows, phase)
    return x.new_empty(M, N)


def expect_rows(M: int, max_rows: int, phase: str) -> None:
    """Check M, `max_rows` and `phase`, which the operators for linear layers share.

    Args:
        M: rows of x, 1..max_rows.
        max_rows: 1..512 in decode, 1 or more in prefill.
        phase: "decode" or "prefill".

    Raises:
        ValueError: a number is out of range, or the phase is unknown.
    """
    if phase not in ("decode", "prefill"):
        raise ValueError(f"phase is {phase!r} but must be 'decode' or 'prefill'")
    if max_rows < 1 or (phase == "decode" and max_rows > 512):
        raise ValueError(
            f"max_rows is {max_rows} but must " + ("lie in 1..512 in decode" if max_rows > 512 else "be 1 or more")
        )
    if not 1 <= M <= max_rows:
        raise ValueError(f"x has {M} rows but must have 1..{max_rows} (max_rows)")


def expect_modulation(name: str, modulation: Tensor, columns: int, x: Tensor) -> None:
    """Check that `modulation` has `columns` columns or more, and from 1 to 1 + M rows, where `x` has M rows."""
    rows, found = expect(name, modulation, ("1 + R", "columns"), like=x, contiguous=False)
    if found < columns or not 1 <= rows <= 1 + len(x):
        raise ValueError(f"{name} is [{rows}, {found}] but must have 1..{1 + len(x)} rows of {columns} columns or more")
