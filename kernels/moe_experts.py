"""The experts of a mixture: SwiGLU, down projection and sum, on pairs that ``kernels/moe_routing.py`` sorts by expert.

A pair is a token and one of the token's P experts. For pair = m * P + j, where e is the expert at place j of token m::

    n                = x / sqrt(mean(x^2) + eps) * norm             [M, K], never stored
    moe_experts_up   = silu(n[m] @ w1[e].T) * (n[m] @ w3[e].T)      [M * P, N], w1[e] and w3[e] [N, K]
    moe_experts_down = weights[pair] * (up[pair] @ w2[e].T)         fp32 [M * P, K], w2[e] [K, N]
    moe_combine:       stream[m] += sum over j of down[m * P + j]   [M, K], in place

    a block:  y^T [BLOCK_N, tile]  =  sum over K of  w[e] [BLOCK_N, BLOCK_K] @ n[tile]^T [BLOCK_K, tile]

Each expert's weights are separate tensors, as in a checkpoint. A kernel reads the addresses and row strides of these
tensors from a table, so no weight is packed or copied.

All pairs of a tile have the same expert, and a block multiplies the tile by BLOCK_N rows of the expert's weights. At
decode, one tile holds all tokens of an expert (up to 64; 16 in fp32), so each weight that is needed is read once. As in
``linear.py``, which gives the reason, the weight's rows are the first axis of a tile.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .launch_config import LaunchConfigs
from .norm_linear import norm_product, normed
from .operator import expect, operator
from .overlap import OFF, wait_for_launches
from .quantized import expect_same_format, expect_weight, scaled, widen

__all__ = ["PointerTable", "moe_combine", "moe_experts_down", "moe_experts_up", "pointer_table"]

# `rows` is the number of pairs in a tile. Each step loads two tiles of weights, one of w1 and one of w3. On sm_*, tiles
# and stages are those of NORM_SWIGLU in linear.py.
MOE_EXPERTS_UP = LaunchConfigs(
    "moe_experts_up",
    """
    arch         dtype  rows | BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      *    | 32       64       4          1
    gfx*         fp32   *    | 16       32       4          2
    gfx*         *      16   | 64       64       4          2
    gfx*         *      *    | 64       32       4          2
    sm_*         fp32   *    | 32       32       4          4
    sm_*         *8     16   | 32       128      2          4
    sm_*         *8     32   | 32       128      2          4
    sm_*         *8     *    | 64       64       4          3
    sm_*         *      8    | 32       128      8          5
    sm_*         *      16   | 32       128      8          4
    sm_*         *      32   | 64       64       4          4
    sm_*         *      *    | 64       64       8          3
    """,
)

MOE_EXPERTS_DOWN = LaunchConfigs(
    "moe_experts_down",
    """
    arch         dtype  rows | BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      *    | 32       64       4          1
    gfx*         fp32   *    | 16       32       4          2
    gfx*         *      16   | 64       128      4          2
    gfx*         *      *    | 64       64       4          2
    sm_*         fp32   *    | 32       32       4          6
    sm_*         *8     16   | 32       128      2          6
    sm_*         *8     32   | 32       64       2          6
    sm_*         *8     *    | 64       64       4          4
    sm_*         *      8    | 64       128      8          6
    sm_*         *      16   | 64       128      8          5
    sm_*         *      32   | 64       64       4          8
    sm_*         *      *    | 64       64       8          4
    """,
)

MOE_COMBINE = LaunchConfigs(
    "moe_combine",
    """
    arch         | BLOCK_N  num_warps  num_stages
    interpreter  | 64       4          1
    *            | 1024     4          1
    """,
)


@dataclass(frozen=True)
class PointerTable:
    """Holds the addresses of E tensors [N, K] of one dtype, for a kernel to read, but does not keep the tensors alive.

    Attributes:
        table: int64 [E, 3], each tensor's address, its row stride in elements, and the address of its scales or 0.
        aligned: whether every row of every tensor begins at a multiple of 16 bytes.
        rows: N, the number of rows of each tensor.
        dtype: dtype of the tensors. Tensors in int8 or e4m3 have scales.
    """

    table: Tensor
    aligned: bool
    rows: int
    dtype: torch.dtype


def pointer_table(weights: Sequence[Tensor], scales: Sequence[Tensor] = ()) -> PointerTable:
    """Return the table of `weights`, [N, K] each; equal addresses and strides give the same table, from a cache.

    Args:
        weights: the weights of the experts.
        scales: fp32 [N], the scales of each weight in 8 bits, else nothing.
    """
    scale_addresses = [scale.data_ptr() for scale in scales] or [0] * len(weights)
    found = tuple(
        (weight.data_ptr(), weight.stride(0), address) for weight, address in zip(weights, scale_addresses, strict=True)
    )
    return _pointer_table(found, len(weights[0]), weights[0].dtype, weights[0].device)


@functools.lru_cache(maxsize=4096)
def _pointer_table(
    found: tuple[tuple[int, int, int], ...], N: int, dtype: torch.dtype, device: torch.device
) -> PointerTable:
    aligned = all(address % 16 == 0 and stride * dtype.itemsize % 16 == 0 for address, stride, _ in found)
    return PointerTable(torch.tensor(found, dtype=torch.int64, device="cpu").to(device), aligned, N, dtype)


# dtype of an expert's weight -> the constant FORMAT of the kernels; 0 is the dtype of the activations
FORMATS = {torch.int8: 1, torch.float8_e4m3fn: 2}


@triton.jit
def _expert(p_table, expert, p_like, FORMAT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return the pointer to an expert's weight, with the dtype of `p_like` if FORMAT is 0, and its row stride."""
    address = tl.load(p_table + 3 * expert)
    stride = tl.load(p_table + 3 * expert + 1)
    p_w = address.to(p_like.dtype if FORMAT == 0 else tl.pointer_type(tl.int8 if FORMAT == 1 else tl.uint8))
    if ALIGNED:  # without these hints the compiler cannot assume alignment, and loads 8 bytes at a time
        p_w = tl.multiple_of(p_w, 16)
        stride = tl.multiple_of(stride, 128 // p_w.dtype.element_ty.primitive_bitwidth)
    return p_w, stride


@triton.jit
def _scaled(b_sum, p_table, expert, o_n, m_n, FORMAT: tl.constexpr):
    """Multiply the sums [N, M] by the scales of an expert's weight, if it has 8 bits."""
    if FORMAT != 0:
        p_scale = tl.load(p_table + 3 * expert + 2).to(tl.pointer_type(tl.float32))
        b_sum = scaled(b_sum, p_scale, o_n, m_n)
    return b_sum


@triton.jit
def _moe_experts_up_kernel(
    p_x, p_norm, p_w1, p_w3, p_pairs, p_tiles, p_y,
    stride_x, eps,
    E: tl.constexpr, P: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr,
    FORMAT: tl.constexpr, NORM_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    # tiles are neighbours in launch order: all but the first tile of an expert find the weights in the L2 cache
    i_t, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    expert = tl.load(p_tiles + 3 * i_t)
    if (expert < 0) | (expert >= E):
        return
    o_pair = tl.load(p_tiles + 3 * i_t + 1) + tl.arange(0, BLOCK_M)
    m_m = o_pair < tl.load(p_tiles + 3 * i_t + 2)
    b_pair = tl.load(p_pairs + o_pair, mask=m_m, other=0).to(tl.int64)  # [M]
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    p_w, _ = _expert(p_w1, expert, p_x, FORMAT, ALIGNED)
    p_up, _ = _expert(p_w3, expert, p_x, FORMAT, ALIGNED)
    b_row = tl.where(m_m, b_pair // P, 1 << 31)  # beyond all rows of x, so it is not read
    b_gate, b_up, b_square = norm_product(
        p_x, p_norm, p_w, p_up, b_row, BLOCK_M, o_n, 1 << 31, m_n, stride_x, eps, 0, K,
        K, NORM_FIRST, 1, BLOCK_M, BLOCK_N, BLOCK_K,  # type: ignore[arg-type]
    )  # fmt: skip
    b_gate = _scaled(normed(b_gate, b_square, eps, K, NORM_FIRST), p_w1, expert, o_n, m_n, FORMAT)
    b_up = _scaled(normed(b_up, b_square, eps, K, NORM_FIRST), p_w3, expert, o_n, m_n, FORMAT)
    b_y = b_gate * tl.sigmoid(b_gate) * b_up
    tl.store(
        p_y + b_pair[None, :] * N + o_n[:, None], cast(b_y, p_y.dtype.element_ty), mask=m_m[None, :] & m_n[:, None]
    )


def launch_moe_experts_up(
    out: Tensor,
    x: Tensor,
    norm: Tensor,
    w1: Sequence[Tensor] | PointerTable,
    w3: Sequence[Tensor] | PointerTable,
    pairs: Tensor,
    tiles: Tensor,
    eps: float,
    tile_rows: int,
    scale1: Tensor | None = None,
    scale3: Tensor | None = None,
) -> None:
    """Run :func:`moe_experts_up` into `out`, contiguous [M * P, N], without checking the arguments.

    `w1` and `w3` may be pointer tables instead of lists. A frame passes tables, because making a table takes CPU time.
    A table has the scales too.
    """
    gate, up = _as_pointer_table(w1, scale1, tiles), _as_pointer_table(w3, scale3, tiles)
    (M, K), N = x.shape, gate.rows
    constants = MOE_EXPERTS_UP(N=N, K=K, dtype=x.dtype, rows=tile_rows, weight=gate.dtype) | {"N": N, "K": K}
    constants["NORM_FIRST"] = x.dtype == torch.float16  # x * norm, not yet scaled, may exceed fp16's 65,504
    constants |= {
        "E": len(gate.table),
        "P": len(pairs) // M,
        "ALIGNED": gate.aligned and up.aligned,
        "FORMAT": FORMATS.get(gate.dtype, 0),
        "BLOCK_M": tile_rows,
    }
    # a single row's stride is not used, but Triton would compile another binary if the stride were 1
    stride_x = x.stride(0) if M > 1 else K
    grid = (len(tiles), triton.cdiv(N, constants["BLOCK_N"]))
    _moe_experts_up_kernel[grid](x, norm, gate.table, up.table, pairs, tiles, out, stride_x, eps, **constants)


@operator(launch_moe_experts_up)
def moe_experts_up(
    x: Tensor,
    norm: Tensor,
    w1: list[Tensor],
    w3: list[Tensor],
    pairs: Tensor,
    tiles: Tensor,
    eps: float,
    tile_rows: int,
    scale1: Tensor | None = None,
    scale3: Tensor | None = None,
) -> Tensor:
    """Compute ``silu(n @ w1[e].T) * (n @ w3[e].T)`` with ``n = RMSNorm(x)``, for every pair of a token and an expert e.

    Args:
        x: [M, K] fp32, bf16 or fp16; only its last dimension must be contiguous.
        norm: [K], the weight of RMSNorm.
        w1: the weights of the gates, contiguous [N, K], one per expert; the shared experts come last. They are in x's
            dtype or in 8 bits (int8 or e4m3).
        w3: the weights of the up projections, which the gates multiply, contiguous [N, K], in the order and dtype of
            `w1`.
        pairs: int32 [M * P], from :func:`voxkern.kernels.moe_routing.moe_route`.
        tiles: int32 [T, 3], from the same call.
        eps: added to the mean square.
        tile_rows: the `tile_rows` of that call.
        scale1: fp32 [E, N], the scale of each row of `w1` in 8 bits, else None.
        scale3: fp32 [E, N], the scale of each row of `w3` in 8 bits, else None.

    Returns:
        [M * P, N] in x's dtype; row m * P + j is for token m and the token's expert at place j.

    Raises:
        ValueError: on the CPU, a tile has an expert that does not exist. On a GPU this check would wait for the device,
            so the kernel skips such a tile instead, and the tile's results stay uninitialised.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("norm", norm, (K,), like=x)
    N = _expect_experts("w1", w1, scale1, K, x, contiguous=True)
    if len(w3) != len(w1) or _expect_experts("w3", w3, scale3, K, x, contiguous=True) != N:
        raise ValueError(f"w3 must be {len(w1)} experts of [{N}, {K}], like w1")
    expect_same_format(w1=w1[0], w3=w3[0])
    _expect_pairs(M, pairs, tiles, x)
    return x.new_empty(len(pairs), N)


@triton.jit
def _moe_experts_down_kernel(
    p_x, p_w2, p_weights, p_pairs, p_tiles, p_y,
    E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_t, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    expert = tl.load(p_tiles + 3 * i_t)
    if (expert < 0) | (expert >= E):
        return
    o_pair = tl.load(p_tiles + 3 * i_t + 1) + tl.arange(0, BLOCK_M)
    m_m = o_pair < tl.load(p_tiles + 3 * i_t + 2)
    b_pair = tl.load(p_pairs + o_pair, mask=m_m, other=0).to(tl.int64)  # [M]
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < N
    p_w, stride_w = _expert(p_w2, expert, p_x, FORMAT, ALIGNED)
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = (k + o_k < K)[None, :]
        b_w = tl.load(p_w + o_n[:, None] * stride_w + (k + o_k)[None, :], mask=m_n[:, None] & m_k, other=0)
        b_x = tl.load(p_x + b_pair[:, None] * K + (k + o_k)[None, :], mask=m_m[:, None] & m_k, other=0.0)
        b_acc = dot(widen(b_w, p_x.dtype.element_ty), tl.trans(b_x), b_acc)  # [N, M]
    b_acc = _scaled(b_acc, p_w2, expert, o_n, m_n, FORMAT)
    b_acc *= tl.load(p_weights + b_pair, mask=m_m, other=0.0)[None, :]
    tl.store(p_y + b_pair[None, :] * N + o_n[:, None], b_acc, mask=m_m[None, :] & m_n[:, None])


def launch_moe_experts_down(
    out: Tensor,
    x: Tensor,
    w2: Sequence[Tensor] | PointerTable,
    weights: Tensor,
    pairs: Tensor,
    tiles: Tensor,
    tile_rows: int,
    scale: Tensor | None = None,
) -> None:
    """Run :func:`moe_experts_down` into `out`, fp32, contiguous [M * P, N], without checking the arguments."""
    down = _as_pointer_table(w2, scale, tiles)
    N, K = down.rows, x.shape[1]
    constants = MOE_EXPERTS_DOWN(N=N, K=K, dtype=x.dtype, rows=tile_rows, weight=down.dtype) | {"N": N, "K": K}
    constants |= {"E": len(down.table), "ALIGNED": down.aligned, "BLOCK_M": tile_rows}
    constants["FORMAT"] = FORMATS.get(down.dtype, 0)
    grid = (len(tiles), triton.cdiv(down.rows, constants["BLOCK_N"]))
    _moe_experts_down_kernel[grid](x, down.table, weights, pairs, tiles, out, **constants)


@operator(launch_moe_experts_down)
def moe_experts_down(
    x: Tensor,
    w2: list[Tensor],
    weights: Tensor,
    pairs: Tensor,
    tiles: Tensor,
    tile_rows: int,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute ``weights * (x @ w2[e].T)`` for every pair of a token and an expert e.

    Args:
        x: [M * P, K] fp32, bf16 or fp16, contiguous, from :func:`moe_experts_up`.
        w2: the weights of the down projections, [N, K], one per expert; the shared experts come last. Only the last
            dimension must be contiguous. They are in x's dtype or in 8 bits (int8 or e4m3).
        weights: fp32 [M, P], from :func:`voxkern.kernels.moe_routing.moe_route`.
        pairs: int32 [M * P], from the same call.
        tiles: int32 [T, 3], from the same call.
        tile_rows: the `tile_rows` of that call.
        scale: fp32 [E, N], the scale of each row of `w2` in 8 bits, else None.

    Returns:
        fp32 [M * P, N], not rounded, because :func:`moe_combine` sums the rows of a token. Row m * P + j is for token m
        and the token's expert at place j.

    Raises:
        ValueError: on the CPU, a tile has an expert that does not exist; see :func:`moe_experts_up`.
    """
    n_pairs, K = expect("x", x, ("M * P", "K"))
    N = _expect_experts("w2", w2, scale, K, x, contiguous=False)
    M, P = expect("weights", weights, ("M", "P"), like=x, dtype=torch.float32)
    if n_pairs != M * P:
        raise ValueError(f"weights is [{M}, {P}] but x has {n_pairs} rows: x must have one row for each weight")
    _expect_pairs(M, pairs, tiles, x)
    return x.new_empty((n_pairs, N), dtype=torch.float32)


@triton.jit
def _moe_combine_kernel(
    p_stream, p_parts, stride_stream, P: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for j in range(P):  # the best expert comes first, the shared experts last
        b_sum += tl.load(p_parts + (i_m * P + j) * N + o_n, mask=m_n, other=0.0)
    p_tile = p_stream + i_m * stride_stream + o_n
    b_sum += tl.load(p_tile, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_tile, cast(b_sum, p_stream.dtype.element_ty), mask=m_n)


def launch_moe_combine(stream: Tensor, parts: Tensor) -> None:
    """Run :func:`moe_combine` without checking the arguments."""
    M, N = stream.shape
    constants = MOE_COMBINE(N=N, K=1, dtype=stream.dtype, rows=1) | {"N": N, "P": len(parts) // M}
    stride = stream.stride(0) if M > 1 else N
    grid = (M, triton.cdiv(N, constants["BLOCK_N"]))
    _moe_combine_kernel[grid](stream, parts, stride, **constants)


@operator(launch_moe_combine, mutates=("stream",))
def moe_combine(stream: Tensor, parts: Tensor) -> None:
    """Add the experts' results to each token: ``stream[m] += sum_j parts[m * P + j]``.

    The sum is in fp32, in the order of j, and rounded once.

    Args:
        stream: [M, N] fp32, bf16 or fp16, written in place; only its last dimension must be contiguous.
        parts: fp32 [M * P, N], from :func:`moe_experts_down`.

    Raises:
        ValueError: the number of rows of `parts` is no multiple of M.
    """
    M, N = expect("stream", stream, ("M", "N"), contiguous=False)
    n_pairs, _ = expect("parts", parts, ("M * P", N), like=stream, dtype=torch.float32)
    if n_pairs % M:
        raise ValueError(f"parts has {n_pairs} rows but must have a multiple of {M}, the rows of stream")


def _as_pointer_table(weights: Sequence[Tensor] | PointerTable, scale: Tensor | None, tiles: Tensor) -> PointerTable:
    if isinstance(weights, PointerTable):
        return weights
    if tiles.device.type == "cpu":  # on a GPU this read would wait for the device
        for expert in tiles[:, 0].tolist():
            if not -1 <= expert < len(weights):
                raise ValueError(f"tiles has expert {expert} but must have -1..{len(weights) - 1}")
    return pointer_table(weights, () if scale is None else scale.unbind())


def _expect_experts(name: str, weights: list[Tensor], scale: Tensor | None, K: int, x: Tensor, contiguous: bool) -> int:
    if not weights:
        raise ValueError(f"{name} is empty but must have one tensor for each expert")
    N = weights[0].shape[0]
    if scale is not None:
        expect(f"the scale of {name}", scale, (len(weights), N), like=x, dtype=torch.float32)
    for i, weight in enumerate(weights):
        expect_weight(f"{name}[{i}]", weight, (N, K), None if scale is None else scale[i], x, contiguous)
        expect_same_format(**{f"{name}[0]": weights[0], f"{name}[{i}]": weight})
    return N


def _expect_pairs(M: int, pairs: Tensor, tiles: Tensor, x: Tensor) -> None:
    (n,) = expect("pairs", pairs, ("M * P",), like=x, dtype=torch.int32)
    if n < M or n % M:
        raise ValueError(f"pairs has {n} rows but must have a multiple of {M}, the number of tokens")
    expect("tiles", tiles, ("T", 3), like=x, dtype=torch.int32)
