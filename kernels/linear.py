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

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot, with_block
from .launch_config import LaunchConfigs
from .operator import expect, operator
from .overlap import OFF, prefetch_rows, wait_for_launches
from .quantized import expect_weight, scaled, stored, widen
from .shares import Scratch, Shares, add_parts, share_of_block

__all__ = ["linear"]

# SPLIT is the number of partial sums along K, see split_product. SHARES is the number of blocks per multiprocessor that
# divide all tiles evenly, see shares.py; 0 is one block for each tile. For more than 16 rows and N = 1536, as in an MLP
# head, tiles with 64 rows of weights would make only 24 blocks, so a tile has 32 rows of weights.
# ROW_TILES is the number of blocks of BLOCK_M rows in a tile. The flow head has 6 rows for each request. With
# ROW_TILES = 3, its 48, 96 or 192 rows for 8, 16 or 32 requests fill tiles without padding.
# On AMD GPUs, a kernel with two stages keeps the next tile in registers while it multiplies the tile in shared memory.
# The 304 compute units of an MI300X need 11 KB in flight each, so a stage has 16 to 32 KB of weights, and SHARES gives
# every unit a block. gfx950 has 160 KB of shared memory instead of 64, into which it copies asynchronously.
# If two warps use the same rows of 8-bit weights, both widen them. Most small tiles therefore have one warp for every
# 16 rows of weights. In a large tile, widening costs little beside the products with many rows of x.
# 65 to 96 rows use one tile of 3 * 32 rows, because tiles of 64 rows would pad 96 rows to 128.
# A codec launch may have more rows than `max_rows`, because a chunk may have many frames. So its SHARES is 0.
LINEAR = LaunchConfigs(
    "linear",
    """
    arch         dtype  phase    rows N    | SPLIT  SHARES  ROW_TILES  BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      prefill  *    *    | 1      0       1          16       32       64       4          1
    interpreter  *      codec    *    *    | 2      0       1          16       32       32       4          1
    interpreter  *      *        32   *    | 2      0       1          16       32       32       4          1
    interpreter  *      *        64   *    | 1      0       1          16       32       64       4          1
    interpreter  *      *        *    *    | 1      1       3          16       32       64       4          1
    gfx*         fp32   *        *    *    | 1      0       1          16       32       64       4          2
    gfx*         *      prefill  *    *    | 1      0       1          64       128      64       8          2
    gfx950       *      codec    64   *    | 1      0       1          16       32       256      4          5
    gfx950       *      codec    *    *    | 1      0       1          32       64       128      4          5
    gfx*         *      codec    *    *    | 4      0       1          16       32       128      8          2
    gfx942       *8     *        16   *    | 1      1       1          16       32       512      4          2
    gfx942       *8     *        32   *    | 1      1       1          32       32       256      4          2
    gfx942       *8     *        48   *    | 1      1       3          16       32       256      4          2
    gfx942       *8     *        64   *    | 1      1       1          64       64       128      4          2
    gfx*         *      *        32   1536 | 4      0       1          16       16       128      4          2
    gfx*         *      *        *    1536 | 1      0       1          64       64       64       4          2
    gfx950       *8     *        16   *    | 1      1       1          16       32       256      4          4
    gfx950       *      *        16   *    | 1      1       1          16       16       256      4          4
    gfx950       *8     *        32   *    | 1      1       1          32       32       128      8          3
    gfx950       *8     *        64   *    | 1      1       1          64       64       64       8          3
    gfx950       *      *        32   *    | 1      1       1          32       32       128      8          4
    gfx950       *      *        64   *    | 1      1       1          64       64       64       8          4
    gfx950       *      *        96   *    | 1      1       3          16       128      128      4          2
    gfx*         *      *        16   *    | 1      1       1          16       32       256      4          2
    gfx*         *      *        32   *    | 1      1       1          32       32       256      4          2
    gfx*         *      *        48   *    | 1      1       3          16       32       256      4          2
    gfx*         *      *        64   *    | 1      1       1          32       64       256      4          2
    gfx*         *      *        96   *    | 1      1       3          16       64       256      4          2
    gfx*         *      *        *    *    | 1      1       1          64       128      128      8          2
    sm_*         fp32   *        *    *    | 1      0       1          16       32       32       4          6
    sm_*         *      prefill  *    *    | 1      0       1          128      128      64       8          3
    sm_*         *      codec    32   *    | 4      0       1          16       16       128      4          4
    sm_90        *      codec    64   *    | 1      0       1          32       32       128      8          8
    sm_10?       *      codec    64   *    | 1      0       1          32       32       128      8          8
    sm_*         *      codec    64   *    | 4      0       1          16       32       64       4          4
    sm_90        *      codec    128  *    | 1      0       1          32       64       128      8          6
    sm_90        *      codec    *    *    | 1      0       1          64       64       128      8          5
    sm_10?       *      codec    128  *    | 1      0       1          32       64       128      8          6
    sm_10?       *      codec    *    *    | 1      0       1          64       64       128      8          5
    sm_*         *      codec    128  *    | 1      0       1          32       32       128      4          5
    sm_*         *      codec    *    *    | 1      0       1          32       64       64       4          6
    sm_*         *8     *        8    *    | 4      0       1          8        16       128      4          4
    sm_12?       *8     *        16   *    | 1      0       1          16       32       128      2          4
    sm_10?       *8     *        16   *    | 1      1       1          16       128      64       8          6
    sm_*         *8     *        16   *    | 4      0       1          16       16       64       4          6
    sm_12?       *8     *        32   *    | 1      1       1          32       64       64       4          8
    sm_10?       *8     *        32   *    | 1      1       1          32       128      64       8          5
    sm_*         *8     *        32   *    | 1      1       1          32       64       128      4          4
    sm_90        *8     *        48   *    | 1      1       3          16       64       128      4          4
    sm_10?       *8     *        48   *    | 1      1       3          16       128      64       8          5
    sm_*         *8     *        48   *    | 1      1       3          16       64       64       4          6
    sm_10?       *8     *        64   *    | 1      1       1          64       128      64       8          5
    sm_*         *8     *        64   *    | 1      1       1          64       64       64       4          6
    sm_8?        *8     *        96   *    | 1      1       3          32       128      64       8          3
    sm_12?       *8     *        96   *    | 1      1       3          32       128      64       8          3
    sm_*         *      *        8    *    | 4      0       1          8        16       64       4          8
    sm_10?       *      *        16   *    | 1      1       1          16       128      64       8          6
    sm_*         *      *        16   *    | 4      0       1          16       16       64       4          6
    sm_*         *      *        *    1536 | 4      0       1          16       32       64       4          4
    sm_10?       *      *        32   *    | 1      1       1          32       128      64       8          5
    sm_12?       *      *        32   *    | 1      1       1          32       64       64       4          8
    sm_90        *      *        32   *    | 1      0       1          32       64       128      8          5
    sm_*         *      *        32   *    | 1      0       1          32       64       64       4          8
    sm_10?       *      *        48   *    | 1      1       3          16       128      64       8          5
    sm_8[69]     *      *        48   *    | 1      0       3          16       32       64       4          5
    sm_*         *      *        48   *    | 1      1       3          16       64       64       4          6
    sm_10?       *      *        64   *    | 1      1       1          64       128      64       8          5
    sm_*         *      *        64   *    | 1      1       1          64       64       64       4          6
    sm_90        *      *        96   *    | 1      1       3          32       64       64       8          6
    sm_90        *      *        *    *    | 1      1       3          32       128      64       8          5
    sm_10?       *      *        96   *    | 1      1       3          32       128      64       8          5
    sm_10?       *      *        *    *    | 1      1       3          64       128      32       8          6
    sm_80        *      *        96   *    | 1      1       3          32       64       64       8          5
    sm_*         *      *        96   *    | 1      1       3          32       32       64       4          5
    sm_*         *      *        *    *    | 1      2       1          64       64       64       8          4
    """,
)


@triton.jit
def product(
    p_x, p_w, o_m, o_n, M, m_n, stride_x, first, end,
    K: tl.constexpr, ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute ``w x^T`` over the columns `first` to `end`: ROW_TILES blocks, each fp32 [BLOCK_N, BLOCK_M].

    Each tile of weights is loaded once for all blocks. `o_m` are the rows of the first block, and each next block has
    the next BLOCK_M rows.
    """
    o_k = tl.arange(0, BLOCK_K)
    blocks = ()
    for _ in tl.static_range(ROW_TILES):
        blocks = with_block(blocks, tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32))
    for k in range(first, end, BLOCK_K):
        m_k = (k + o_k < K)[None, :]
        b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :], mask=m_n[:, None] & m_k, other=0)
        b_w = widen(b_w, p_x.dtype.element_ty)
        added = ()
        for r in tl.static_range(ROW_TILES):
            o_r = o_m + r * BLOCK_M
            b_x = tl.load(p_x + o_r[:, None] * stride_x + (k + o_k)[None, :], mask=(o_r < M)[:, None] & m_k, other=0.0)
            added = with_block(added, dot(b_w, tl.trans(b_x), blocks[r]))
        blocks = added
    return blocks


@triton.jit
def split_product(
    p_x, p_w, o_m, o_n, M, m_n, stride_x,
    K: tl.constexpr, SPLIT: tl.constexpr, ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute :func:`product` over all columns in SPLIT partial sums along K, one per warp.

    Because each warp computes its own partial sum, a tile with only 16 rows of weights keeps four warps busy. Such
    tiles give 192 blocks for N = 3072, and an H100 has 132 multiprocessors. The partial sums are added in a fixed order
    at the end. No block needs the result of another block.
    """
    o_k = tl.arange(0, SPLIT)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]  # [SPLIT, K]
    parts = ()
    for _ in tl.static_range(ROW_TILES):
        parts = with_block(parts, tl.zeros([SPLIT, BLOCK_N, BLOCK_M], dtype=tl.float32))
    for k in range(0, K, SPLIT * BLOCK_K):
        m_k = (k + o_k < K)[:, None, :]
        b_w = tl.load(
            p_w + o_n[None, :, None] * K + (k + o_k)[:, None, :], mask=m_n[None, :, None] & m_k, other=0
        )  # [SPLIT, N, K]
        b_w = widen(b_w, p_x.dtype.element_ty)
        added = ()
        for r in tl.static_range(ROW_TILES):
            o_r = o_m + r * BLOCK_M
            p_tile = p_x + o_r[None, :, None] * stride_x + (k + o_k)[:, None, :]
            b_x = tl.load(p_tile, mask=(o_r < M)[None, :, None] & m_k, other=0.0)  # [SPLIT, M, K]
            added = with_block(added, dot(b_w, tl.permute(b_x, (0, 2, 1)), parts[r]))
        parts = added
    blocks = ()
    for r in tl.static_range(ROW_TILES):
        blocks = with_block(blocks, tl.sum(parts[r], 0))
    return blocks


@triton.jit
def _finish(
    b_y, p_scale, p_bias, p_gate, p_residual, p_y, o_m, o_n, M, R, stride_gate,
    N: tl.constexpr,
):  # fmt: skip
    """Store ``residual + gate * (b_y * scale + bias)`` for a block [N, M] of products."""
    m_n = o_n < N
    b_y = scaled(b_y, p_scale, o_n, m_n)
    m_y = (o_m < M)[None, :] & m_n[:, None]  # [N, M]
    o_y = o_m[None, :] * N + o_n[:, None]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    if p_gate is not None:
        o_gate = (tl.where(o_m < R, o_m + 1, 0) * stride_gate)[None, :] + o_n[:, None]
        b_y *= tl.load(p_gate + o_gate, mask=m_y, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_y += tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, cast(b_y, p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["M", "R"])
def _linear_kernel(
    p_x, p_w, p_scale, p_bias, p_gate, p_residual, p_y, p_parts, p_arrived,
    M, R, stride_x, stride_gate,
    N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, SHARES: tl.constexpr,
    ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    o_m = tl.program_id(0).to(tl.int64) * (ROW_TILES * BLOCK_M) + tl.arange(0, BLOCK_M)
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if SHARES == 0:
        o_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        prefetch_rows(p_w, o_n, N, 0, K, OVERLAP)
        wait_for_launches(OVERLAP)
        if SPLIT == 1:
            blocks = product(p_x, p_w, o_m, o_n, M, o_n < N, stride_x, 0, K, K, ROW_TILES, BLOCK_M, BLOCK_N, BLOCK_K)
        else:
            blocks = split_product(
                p_x, p_w, o_m, o_n, M, o_n < N, stride_x, K, SPLIT, ROW_TILES, BLOCK_M, BLOCK_N, BLOCK_K
            )
        for r in tl.static_range(ROW_TILES):
            _finish(blocks[r], p_scale, p_bias, p_gate, p_residual, p_y, o_m + r * BLOCK_M, o_n, M, R, stride_gate, N)
    else:
        start, stop = share_of_block(TILES * STEPS)
        o_first = start // STEPS * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        prefetch_rows(p_w, o_first, N, start % STEPS * BLOCK_K, K, OVERLAP)
        wait_for_launches(OVERLAP)
        for i_n in range(start // STEPS, tl.cdiv(stop, STEPS)):
            first, end = tl.maximum(start - i_n * STEPS, 0), tl.minimum(stop - i_n * STEPS, STEPS)
            o_n = tl.arange(0, BLOCK_N).to(tl.int64) + i_n * BLOCK_N
            blocks = product(
                p_x, p_w, o_m, o_n, M, o_n < N, stride_x, first * BLOCK_K, end * BLOCK_K,
                K, ROW_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            blocks, is_complete = add_parts(
                blocks, p_parts, p_arrived, i_n, first, end, TILES, STEPS, ROW_TILES, BLOCK_M * BLOCK_N
            )
            if is_complete:
                for r in tl.static_range(ROW_TILES):
                    _finish(
                        blocks[r], p_scale, p_bias, p_gate, p_residual, p_y, o_m + r * BLOCK_M, o_n,
                        M, R, stride_gate, N,
                    )  # fmt: skip


def linear_shares(weight: Tensor, dtype: torch.dtype, max_rows: int, phase: str = "decode") -> Shares:
    """Return how :func:`launch_linear` divides the product of `weight` and activations of `dtype`."""
    N, K = weight.shape
    constants = LINEAR(N=N, K=K, dtype=dtype, rows=max_rows, phase=phase, weight=weight.dtype) | {"K": K}
    return Shares.of(constants, max_rows, triton.cdiv(N, constants["BLOCK_N"]), constants["ROW_TILES"])


def launch_linear(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None,
    max_rows: int, phase: str = "decode", scale: Tensor | None = None, scratch: Scratch | None = None,
) -> None:  # fmt: skip
    """Run :func:`linear` into `out`, contiguous [M, N], without checking the arguments.

    `scratch` is at least as large as :func:`linear_shares` requires. If it is None, the launcher allocates it.
    """
    (M, K), N = x.shape, len(weight)
    R, stride_gate = (0, 0) if gate is None else (len(gate) - 1, gate.stride(0))
    constants = LINEAR(N=N, K=K, dtype=x.dtype, rows=max_rows, phase=phase, weight=weight.dtype) | {"N": N, "K": K}
    tiles = triton.cdiv(N, constants["BLOCK_N"])
    shares = Shares.of(constants, max_rows, tiles, constants["ROW_TILES"])
    # a single row's stride is not used, but Triton would compile another binary if the stride were 1
    stride_x = x.stride(0) if M > 1 else K
    grid = shares.grid(constants, M, tiles)
    parts, arrived = shares.scratch(scratch, x)
    _linear_kernel[grid](
        x, stored(weight), scale, bias, gate, residual, out, parts, arrived,
        M, R, stride_x, stride_gate, **constants,
    )  # fmt: skip


@operator(launch_linear)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    max_rows: int,
    phase: str = "decode",
    scale: Tensor | None = None,
) -> Tensor:
    """Compute ``residual + gate * (x @ weight.T + bias)``: a gated product, added to the residual stream.

    Args:
        x: [M, K] fp32, bf16 or fp16; only its last dimension must be contiguous.
        weight: [N, K], as a checkpoint stores it, in x's dtype or in 8 bits (int8 or e4m3).
        bias: [N], or None for 0.
        gate: [1 + R, N or more], with R in 0..M, or None for 1; only its last dimension must be contiguous. Row 1 + i
            belongs to row i of x, and row 0 to the rows of x from R on. A layer scale is a gate with one row.
        residual: [M, N], contiguous, or None for 0.
        max_rows: the most rows that the layer is prepared for, 1..512 in decode. The launch config depends on this
            number, so a row's result depends neither on M nor on the other rows.
        phase: "decode", "prefill" or "codec". "prefill" takes tiles for many rows whatever `max_rows` is, and "codec"
            takes tiles for the codec's small weights. In fp32 on a GPU, all three take the same tiles.
        scale: fp32 [N], the scale of each row of a weight in 8 bits, else None. The products are scaled before the bias
            is added.

    Returns:
        [M, N] in x's dtype, summed in fp32 and rounded once.

    Raises:
        ValueError: M is not in 1..max_rows, max_rows is out of range, or the phase is unknown.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    N, _ = expect_weight("weight", weight, ("N", K), scale, like=x)
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
        max_rows: 1..512 in decode, else 1 or more.
        phase: "decode", "prefill" or "codec".

    Raises:
        ValueError: a number is out of range, or the phase is unknown.
    """
    if phase not in ("decode", "prefill", "codec"):
        raise ValueError(f"phase is {phase!r} but must be 'decode', 'prefill' or 'codec'")
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
