"""Queries, keys and values: three products after one RMSNorm; for decode also the rotation and the write to the cache.

x is [M, K], the weights wq [Nq, K], wk and wv [Nkv, K]; q | k | v [M, Nq + 2 Nkv] are stored next to each other::

    norm_qkv          n = RMSNorm(x);  q | k | v = n @ wq.T | n @ wk.T | n @ wv.T
    norm_qkv_append   as norm_qkv, then  q = rotate(q),  rotate(k) and v -> kv_cache

``norm_qkv_append`` is for decode. This operator rotates queries and keys before rounding (rope.py), and writes keys and
values directly into their pages (paged_attention.py).

Each operator has one grid over the tiles of wq, wk and wv, in this order, so one launch reads all three weights. The
tiles are those of ``norm_linear.py``: the weight's rows are the first axis of a tile. A tile begins at an even row and
has an even number of rows, so both numbers of a pair are in the same tile.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast
from .launch_config import LaunchConfigs
from .linear import expect_rows
from .norm_linear import NORM_LINEAR, norm_constants, norm_product, norm_shares, normed
from .operator import expect, operator
from .overlap import OFF, prefetch_rows, wait_for_launches
from .paged_attention import expect_cache, expect_heads, page_strides
from .quantized import expect_same_format, expect_weight, scaled, stored
from .rope import expect_rope, rotate
from .shares import Scratch, Shares, add_parts, share_of_block

__all__ = ["norm_qkv", "norm_qkv_append"]

# These configs follow NORM_LINEAR, without SHARES and ROW_TILES, because a launch has only one row for each request. On
# sm_120, the kernel spills with BLOCK_M = 32 and BLOCK_N = 64 on four warps.
NORM_QKV_APPEND = LaunchConfigs(
    "norm_qkv_append",
    """
    arch         dtype  rows | BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      *    | 16       32       64       4          1
    gfx*         fp32   *    | 16       32       64       4          2
    gfx950       *      16   | 16       32       256      4          3
    gfx950       *      32   | 32       32       256      4          3
    gfx*         *      32   | 16       32       256      8          2
    gfx*         *      *    | 32       64       256      8          2
    sm_*         fp32   *    | 16       32       32       4          6
    sm_90        fp8    8    | 8        32       128      2          6
    sm_*         *8     8    | 8        32       256      2          4
    sm_12?       *8     16   | 16       32       128      2          4
    sm_*         *8     16   | 16       32       256      2          4
    sm_*         *8     32   | 32       64       64       4          8
    sm_*         *8     *    | 64       64       64       4          4
    sm_*         *      8    | 8        64       128      8          6
    sm_*         *      16   | 16       64       128      8          5
    sm_12?       *      32   | 32       32       64       8          8
    sm_*         *      32   | 32       64       64       4          8
    sm_*         *      *    | 64       64       64       8          4
    """,
)


@triton.jit
def weight_of_tile(p_q, p_k, p_v, i_n, N: tl.constexpr, N_KV: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the weight that tile `i_n` belongs to, when the tiles of wq, wk and wv are numbered one after the other.

    Args:
        p_q: wq [N, K].
        p_k: wk [N_KV, K].
        p_v: wv [N_KV, K].
        i_n: the tile's number among all tiles of the three weights.
        N: rows of wq.
        N_KV: rows of wk and of wv.
        BLOCK_N: rows of a tile.

    Returns:
        The weight's number (0 for wq, 1 for wk, 2 for wv), its pointer, its number of rows, and the number of the tile
        among the weight's tiles.
    """
    T_Q: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    T_KV: tl.constexpr = (N_KV + BLOCK_N - 1) // BLOCK_N
    is_q, is_k = i_n < T_Q, i_n < T_Q + T_KV
    which = tl.where(is_q, 0, tl.where(is_k, 1, 2))
    p_w = tl.where(is_q, p_q, tl.where(is_k, p_k, p_v))
    n = tl.where(is_q, N, N_KV)
    return which, p_w, n, i_n - tl.where(is_q, 0, tl.where(is_k, T_Q, T_Q + T_KV))


@triton.jit
def scaled_by_tile(b_y, p_scale_q, p_scale_k, p_scale_v, which, o_n, m_n):
    """Multiply sums [N, M] by the scales of the weight `which`, see :func:`weight_of_tile`, if there are any."""
    if p_scale_q is not None:
        p_scale = tl.where(which == 0, p_scale_q, tl.where(which == 1, p_scale_k, p_scale_v))
        b_y = scaled(b_y, p_scale, o_n, m_n)
    return b_y


@triton.jit
def store_qkv(
    blocks, which, p_scale_q, p_scale_k, p_scale_v, p_y, o_m, row_step, o_n, M, n, eps,
    N: tl.constexpr, N_KV: tl.constexpr, K: tl.constexpr, NORM_FIRST: tl.constexpr, ROW_TILES: tl.constexpr,
):  # fmt: skip
    """Store the tiles of one weight's results in their columns of q | k | v."""
    o_y = tl.where(which == 0, 0, N + (which - 1) * N_KV) + o_n
    for r in tl.static_range(ROW_TILES):
        o_r = o_m + r * row_step
        b_y = normed(blocks[r], blocks[ROW_TILES + r], eps, K, NORM_FIRST)
        b_y = scaled_by_tile(b_y, p_scale_q, p_scale_k, p_scale_v, which, o_n, o_n < n)
        p_tile = p_y + o_r[None, :] * (N + 2 * N_KV) + o_y[:, None]
        tl.store(p_tile, cast(b_y, p_y.dtype.element_ty), mask=(o_r < M)[None, :] & (o_n < n)[:, None])


@triton.jit(do_not_specialize=["M", "q_rows"])
def _norm_qkv_kernel(
    p_x, p_norm, p_q, p_k, p_v, p_scale_q, p_scale_k, p_scale_v, p_y, p_parts, p_arrived,
    M, q_rows, stride_x, eps,
    N: tl.constexpr, N_KV: tl.constexpr, K: tl.constexpr, NORM_FIRST: tl.constexpr, COUNT: tl.constexpr,
    SHARES: tl.constexpr, ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * (ROW_TILES * BLOCK_M) + tl.arange(0, BLOCK_M)
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N + 2 * ((N_KV + BLOCK_N - 1) // BLOCK_N)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    if SHARES == 0:
        which, p_w, n, i_n = weight_of_tile(p_q, p_k, p_v, tl.program_id(1).to(tl.int64), N, N_KV, BLOCK_N)
        prefetch_rows(p_w, i_n * BLOCK_N + tl.arange(0, BLOCK_N), n, 0, K, OVERLAP)
        wait_for_launches(OVERLAP)
        M = tl.where(which == 0, q_rows, M)
        if i_m * (ROW_TILES * BLOCK_M) >= M:
            return
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        blocks = norm_product(
            p_x, p_norm, p_w, None, o_m, BLOCK_M, o_n, M, o_n < n, stride_x, eps, 0, K,
            K, NORM_FIRST, ROW_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_qkv(
            blocks, which, p_scale_q, p_scale_k, p_scale_v, p_y, o_m, BLOCK_M, o_n, M, n, eps,
            N, N_KV, K, NORM_FIRST, ROW_TILES,
        )  # fmt: skip
    else:
        start, stop = share_of_block(TILES * STEPS)
        _, p_w, n, i_n = weight_of_tile(p_q, p_k, p_v, start // STEPS, N, N_KV, BLOCK_N)
        o_first = tl.arange(0, BLOCK_N).to(tl.int64) + i_n * BLOCK_N
        prefetch_rows(p_w, o_first, n, start % STEPS * BLOCK_K, K, OVERLAP)
        wait_for_launches(OVERLAP)
        for i_tile in range(start // STEPS, tl.cdiv(stop, STEPS)):
            first, end = tl.maximum(start - i_tile * STEPS, 0), tl.minimum(stop - i_tile * STEPS, STEPS)
            which, p_w, n, i_n = weight_of_tile(p_q, p_k, p_v, i_tile, N, N_KV, BLOCK_N)
            rows = tl.where(which == 0, q_rows, M)
            if i_m * (ROW_TILES * BLOCK_M) < rows:
                o_n = tl.arange(0, BLOCK_N).to(tl.int64) + i_n * BLOCK_N
                blocks = norm_product(
                    p_x, p_norm, p_w, None, o_m, BLOCK_M, o_n, rows, o_n < n, stride_x, eps,
                    first * BLOCK_K, end * BLOCK_K, K, NORM_FIRST, ROW_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                blocks, is_complete = add_parts(
                    blocks, p_parts, p_arrived, i_tile, first, end, TILES, STEPS, COUNT, BLOCK_M * BLOCK_N
                )
                if is_complete:
                    store_qkv(
                        blocks, which, p_scale_q, p_scale_k, p_scale_v, p_y, o_m, BLOCK_M, o_n, rows, n, eps,
                        N, N_KV, K, NORM_FIRST, ROW_TILES,
                    )  # fmt: skip


def norm_qkv_shares(wq: Tensor, wk: Tensor, dtype: torch.dtype, max_rows: int, phase: str = "decode") -> Shares:
    """Return how :func:`launch_norm_qkv` divides the products of `wq`, `wk`, a third weight and rows of `dtype`."""
    constants = norm_constants(NORM_LINEAR, wq, dtype, max_rows, phase)
    return norm_shares(constants, max_rows, tiles_of_qkv(constants, wq, wk))


def tiles_of_qkv(constants: Mapping[str, Any], wq: Tensor, wk: Tensor) -> int:
    return int(triton.cdiv(len(wq), constants["BLOCK_N"]) + 2 * triton.cdiv(len(wk), constants["BLOCK_N"]))


def launch_norm_qkv(
    out: Tensor, x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, eps: float, q_rows: int, max_rows: int,
    phase: str = "decode", scale_q: Tensor | None = None, scale_k: Tensor | None = None, scale_v: Tensor | None = None,
    scratch: Scratch | None = None,
) -> None:  # fmt: skip
    """Run :func:`norm_qkv` into `out`, contiguous [M, Nq + 2 Nkv], without checking the arguments.

    In the rows from `q_rows` on, the queries in `out` are left unchanged. `scratch` is at least
    as large as :func:`norm_qkv_shares` requires. If it is None, the launcher allocates the memory.
    """
    M, K = x.shape
    constants = norm_constants(NORM_LINEAR, wq, x.dtype, max_rows, phase) | {"N_KV": len(wk)}
    tiles = tiles_of_qkv(constants, wq, wk)
    shares = norm_shares(constants, max_rows, tiles)
    # a single row's stride is not used, but Triton would compile another binary if the stride were 1
    stride_x = x.stride(0) if M > 1 else K
    grid = shares.grid(constants, M, tiles)
    parts, arrived = shares.scratch(scratch, x)
    _norm_qkv_kernel[grid](
        x, norm, stored(wq), stored(wk), stored(wv), scale_q, scale_k, scale_v, out, parts, arrived,
        M, q_rows, stride_x, eps, **constants,
    )  # fmt: skip


@operator(launch_norm_qkv)
def norm_qkv(
    x: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    eps: float,
    q_rows: int,
    max_rows: int,
    phase: str = "decode",
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
) -> Tensor:
    """Compute the queries, keys and values of ``RMSNorm(x)``, each from its own weight.

    Args:
        x: [M, K], see :func:`voxkern.kernels.norm_linear.norm_linear`, also for `norm`, `eps`, `max_rows` and `phase`.
        norm: [K].
        wq: [Nq, K], the weight of the queries, in x's dtype or in 8 bits (int8 or e4m3).
        wk: [Nkv, K], the weight of the keys, in the dtype of `wq`.
        wv: [Nkv, K], the weight of the values, in the dtype of `wq`.
        eps: added to the mean square.
        q_rows: the number of rows, from the first, that need queries. The queries of the other rows are zero.
        max_rows: the most rows that the layer is prepared for.
        phase: "decode", "prefill" or "codec".
        scale_q: fp32 [Nq], the scale of each row of `wq` in 8 bits, else None.
        scale_k: fp32 [Nkv], the same of `wk`.
        scale_v: fp32 [Nkv], the same of `wv`.

    Returns:
        [M, Nq + 2 Nkv] in x's dtype: the queries, keys and values of each row.

    Raises:
        ValueError: q_rows is not in 0..M, M is not in 1..max_rows, max_rows is out of range, or the phase is unknown.
    """
    M, N, N_KV = expect_qkv(x, norm, (wq, wk, wv), (scale_q, scale_k, scale_v), max_rows, phase)
    if not 0 <= q_rows <= M:
        raise ValueError(f"q_rows is {q_rows} but must lie in 0..{M}, the rows of x")
    return x.new_zeros(M, N + 2 * N_KV)


def expect_qkv(
    x: Tensor,
    norm: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    scales: tuple[Tensor | None, Tensor | None, Tensor | None],
    max_rows: int,
    phase: str,
) -> tuple[int, int, int]:
    """Check the arguments that :func:`norm_qkv` and :func:`norm_qkv_append` share, and return M, Nq and Nkv.

    The errors are those of :func:`norm_qkv`, and so are the arguments, except two: `weights` are wq, wk and wv, and
    `scales` are their scales.
    """
    (wq, wk, wv), (scale_q, scale_k, scale_v) = weights, scales
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("norm", norm, (K,), like=x)
    N, _ = expect_weight("wq", wq, ("Nq", K), scale_q, like=x)
    N_KV, _ = expect_weight("wk", wk, ("Nkv", K), scale_k, like=x)
    expect_weight("wv", wv, (N_KV, K), scale_v, like=x)
    expect_same_format(wq=wq, wk=wk, wv=wv)
    expect_rows(M, max_rows, phase)
    return M, N, N_KV


@triton.jit(do_not_specialize=["M", "stride_table"], do_not_specialize_on_alignment=["p_table", "p_lengths"])
def _norm_qkv_append_kernel(
    p_x, p_norm, p_q, p_k, p_v, p_scale_q, p_scale_k, p_scale_v, p_rope, p_table, p_lengths, p_out, p_kv,
    M, stride_x, stride_table, stride_page, stride_v, stride_head, stride_token, eps,
    N: tl.constexpr, N_KV: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    NORM_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    which, p_w, n, i_n = weight_of_tile(p_q, p_k, p_v, i_n, N, N_KV, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    prefetch_rows(p_w, o_n, n, 0, K, OVERLAP)
    wait_for_launches(OVERLAP)
    m_m, m_n = o_m < M, o_n < n
    b_acc, b_square = norm_product(
        p_x, p_norm, p_w, None, o_m, BLOCK_M, o_n, M, m_n, stride_x, eps, 0, K,
        K, NORM_FIRST, 1, BLOCK_M, BLOCK_N, BLOCK_K,  # type: ignore[arg-type]
    )  # fmt: skip
    b_acc = normed(b_acc, b_square, eps, K, NORM_FIRST)
    b_acc = scaled_by_tile(b_acc, p_scale_q, p_scale_k, p_scale_v, which, o_n, m_n)
    b_position = tl.load(p_lengths + o_m, mask=m_m, other=0) - 1  # [M]; -1 where a row has no request
    m_m &= b_position >= 0
    if which < 2:
        o_pair = i_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        p_cos = p_rope + b_position[None, :].to(tl.int64) * D + (o_pair % (D // 2))[:, None]  # [N / 2, M]
        m_pair = m_m[None, :] & (2 * o_pair < n)[:, None]
        b_cos = tl.load(p_cos, mask=m_pair, other=0.0)
        b_sin = tl.load(p_cos + D // 2, mask=m_pair, other=0.0)
        b_acc = rotate(b_acc, b_cos, b_sin, BLOCK_N, BLOCK_M)
    b_y = cast(b_acc, p_out.dtype.element_ty)
    m_y = m_m[None, :] & m_n[:, None]
    if which == 0:
        tl.store(p_out + o_m[None, :] * N + o_n[:, None], b_y, mask=m_y)
    else:
        b_page = tl.load(p_table + o_m * stride_table + b_position // PAGE, mask=m_m, other=0).to(tl.int64)
        o_slot = b_page * stride_page + (b_position % PAGE).to(tl.int64) * stride_token + (which - 1) * stride_v
        o_row = (o_n // D) * stride_head + o_n % D
        tl.store(p_kv + o_slot[None, :] + o_row[:, None], b_y, mask=m_y)


def launch_norm_qkv_append(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, rope: Tensor, block_table: Tensor, lengths: Tensor,
    q: Tensor, kv_cache: Tensor, eps: float, max_rows: int,
    scale_q: Tensor | None = None, scale_k: Tensor | None = None, scale_v: Tensor | None = None,
) -> None:  # fmt: skip
    """Run :func:`norm_qkv_append`, which writes to `q` and `kv_cache`, without checking the arguments."""
    (M, K), N_KV = x.shape, len(wk)
    constants = NORM_QKV_APPEND(N=len(wq), K=K, dtype=x.dtype, rows=max_rows, weight=wq.dtype)
    constants |= {"N": len(wq), "N_KV": N_KV, "K": K, "NORM_FIRST": x.dtype == torch.float16}
    constants |= {"D": kv_cache.shape[4], "PAGE": kv_cache.shape[3]}
    stride_x = x.stride(0) if M > 1 else K
    grid = (triton.cdiv(M, constants["BLOCK_M"]), tiles_of_qkv(constants, wq, wk))
    _norm_qkv_append_kernel[grid](
        x, norm, stored(wq), stored(wk), stored(wv), scale_q, scale_k, scale_v,
        rope, block_table, lengths, q, kv_cache,
        M, stride_x, block_table.stride(0), eps=eps, **page_strides(kv_cache), **constants,
    )  # fmt: skip


@operator(launch_norm_qkv_append, mutates=("q", "kv_cache"))
def norm_qkv_append(
    x: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    rope: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    q: Tensor,
    kv_cache: Tensor,
    eps: float,
    max_rows: int,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
    scale_v: Tensor | None = None,
) -> None:
    """Compute :func:`norm_qkv` for one new token per request, rotate q and k, and write k and v into the KV cache.

    Args:
        x: [B, K], the new tokens, see :func:`voxkern.kernels.norm_linear.norm_linear`, also for `norm` and `eps`.
        norm: [K].
        wq: [H * D, K], see :func:`norm_qkv`, also for `wk`, `wv` and the scales.
        wk: [Hkv * D, K].
        wv: [Hkv * D, K].
        rope: fp32 [positions, 2, D / 2], the cosines and then the sines of each position. `positions` is at least the
            largest of `lengths`.
        block_table: int32 [B, max_pages], the pages of each request in order.
        lengths: int32 [B], tokens of each request, the new one included. 0 means that the row has no request, and
            nothing is written for such a row.
        q: [B, H * D], receives the rotated queries. Rows of length 0 are left unchanged.
        kv_cache: [pages, 2, Hkv, PAGE, D], keys at index 0 and values at index 1. The keys and values of the new
            tokens are written to the cache. Only the last dimension must be contiguous.
        eps: added to the mean square.
        max_rows: the most requests that the layer is prepared for, 1..512.
        scale_q: fp32 [H * D], or None.
        scale_k: fp32 [Hkv * D], or None.
        scale_v: fp32 [Hkv * D], or None.

    Raises:
        ValueError: B is not in 1..max_rows, max_rows is out of range, H is not a multiple of Hkv, D is odd, or PAGE is
            not 16, 32, 64 or 128.
    """
    M, N, _ = expect_qkv(x, norm, (wq, wk, wv), (scale_q, scale_k, scale_v), max_rows, "decode")
    _, H_KV, _, D = expect_cache(kv_cache, block_table, lengths, x, M)
    expect_weight("wk", wk, (H_KV * D, x.shape[1]), scale_k, like=x)
    expect_heads("q", N, kv_cache)
    expect("q", q, (M, N), like=x)
    expect_rope(rope, D, x)
