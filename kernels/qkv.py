"""Queries, keys and values: three products after one RMSNorm, and on the backbone's way their rotation and the cache.

``norm_qkv`` leaves them side by side; ``norm_qkv_append``, for decode, rotates queries and keys before they are rounded
and writes keys and values straight into their pages; ``rope_append`` does the latter two to what ``norm_qkv`` left, for
a prefill and for other hosts. Pages: see kernels/paged_attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast
from .launch_config import FP_FUSION
from .linear import NORM_LINEAR, expect_rows, norm_constants, norm_product
from .operator import expect, operator
from .paged_attention import expect_cache, expect_heads, page_strides

__all__ = ["norm_qkv", "norm_qkv_append", "rope_append"]


@triton.jit
def weight_of_tile(p_q, p_k, p_v, i_n, N: tl.constexpr, N_KV: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of three weights tile `i_n` lies in, as they stand side by side: 0, 1 or 2; its pointer, rows, own tile."""
    T_Q: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    T_KV: tl.constexpr = (N_KV + BLOCK_N - 1) // BLOCK_N
    is_q, is_k = i_n < T_Q, i_n < T_Q + T_KV
    which = tl.where(is_q, 0, tl.where(is_k, 1, 2))
    p_w = tl.where(is_q, p_q, tl.where(is_k, p_k, p_v))
    n = tl.where(is_q, N, N_KV)
    return which, p_w, n, i_n - tl.where(is_q, 0, tl.where(is_k, T_Q, T_Q + T_KV))


@triton.jit
def rotate(b_v, b_cos, b_sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rotate the interleaved pairs along the first axis, fp32 (RoFormer, arXiv 2104.09864).

    Args:
        b_v: [ROWS, COLUMNS], pairs are rows 2i and 2i + 1.
        b_cos: [ROWS / 2, COLUMNS].
        b_sin: as `b_cos`.
        ROWS: even.
        COLUMNS: of all three.
    """
    b_pairs = tl.permute(tl.reshape(b_v, [ROWS // 2, 2, COLUMNS]), (0, 2, 1))
    b_even, b_odd = tl.split(b_pairs)
    b_pairs = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
    return tl.reshape(tl.permute(b_pairs, (0, 2, 1)), [ROWS, COLUMNS])


@triton.jit(do_not_specialize=["M", "q_rows"])
def _norm_qkv_kernel(
    p_x, p_norm, p_q, p_k, p_v, p_y,
    M, q_rows, stride_x, eps,
    N: tl.constexpr, N_KV: tl.constexpr, K: tl.constexpr, NORM_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    which, p_w, n, i_n = weight_of_tile(p_q, p_k, p_v, i_n, N, N_KV, BLOCK_N)
    M = tl.where(which == 0, q_rows, M)
    if i_m * BLOCK_M >= M:
        return
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < n
    b_acc, _ = norm_product(
        p_x, p_norm, p_w, None, o_m, o_n, m_m, m_n, stride_x, eps, K, NORM_FIRST, BLOCK_M, BLOCK_N, BLOCK_K
    )
    o_y = tl.where(which == 0, 0, N + (which - 1) * N_KV) + o_n
    p_tile = p_y + o_m[None, :] * (N + 2 * N_KV) + o_y[:, None]
    tl.store(p_tile, cast(b_acc, p_y.dtype.element_ty), mask=m_m[None, :] & m_n[:, None])


def launch_norm_qkv(
    out: Tensor, x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, eps: float, q_rows: int, max_rows: int,
    phase: str = "decode",
) -> None:  # fmt: skip
    """Fill `out`, contiguous [M, Nq + 2 Nkv], but for the queries of rows from `q_rows` on, which stay as they are.

    The other arguments are those of :func:`norm_qkv`, unchecked.
    """
    (M, K), N_KV = x.shape, len(wk)
    constants = norm_constants(NORM_LINEAR, x, wq, max_rows, phase) | {"N_KV": N_KV}
    stride_x = x.stride(0) if M > 1 else K  # a lone row may have any stride, and stride 1 would be another binary
    tiles = triton.cdiv(len(wq), constants["BLOCK_N"]) + 2 * triton.cdiv(N_KV, constants["BLOCK_N"])
    grid = (triton.cdiv(M, constants["BLOCK_M"]), tiles)
    _norm_qkv_kernel[grid](x, norm, wq, wk, wv, out, M, q_rows, stride_x, eps, **constants)


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
) -> Tensor:
    """Queries, keys and values of ``RMSNorm(x)`` side by side, each from its own weight.

    Args:
        x: [M, K], see :func:`voxkern.kernels.linear.norm_linear`, also for `norm`, `eps`, `max_rows` and `phase`.
        norm: [K].
        wq: [Nq, K].
        wk: [Nkv, K].
        wv: [Nkv, K].
        eps: added to the mean square.
        q_rows: the first rows, that ask; the queries of the others are zero.
        max_rows: prepared for.
        phase: "decode" or "prefill".

    Returns:
        [M, Nq + 2 Nkv] in x's dtype.

    Raises:
        TypeError: a dtype is wrong or differs from x's.
        ValueError: a shape, stride or device is wrong, or a number out of range.
    """
    M, N, N_KV = expect_qkv(x, norm, wq, wk, wv, max_rows, phase)
    if not 0 <= q_rows <= M:
        raise ValueError(f"q_rows is {q_rows} but must lie in 0..{M}, the rows of x")
    return x.new_zeros(M, N + 2 * N_KV)


def expect_qkv(
    x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, max_rows: int, phase: str
) -> tuple[int, int, int]:
    """Raise unless the arguments fit each other; rows, and columns of queries and of keys otherwise."""
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("norm", norm, (K,), like=x)
    N, _ = expect("wq", wq, ("Nq", K), like=x)
    N_KV, _ = expect("wk", wk, ("Nkv", K), like=x)
    expect("wv", wv, (N_KV, K), like=x)
    expect_rows(M, max_rows, phase)
    return M, N, N_KV


@triton.jit(do_not_specialize=["M", "stride_table"], do_not_specialize_on_alignment=["p_table", "p_lengths"])
def _norm_qkv_append_kernel(
    p_x, p_norm, p_q, p_k, p_v, p_rope, p_table, p_lengths, p_out, p_kv,
    M, stride_x, stride_table, stride_page, stride_v, stride_head, stride_token, eps,
    N: tl.constexpr, N_KV: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    NORM_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    which, p_w, n, i_n = weight_of_tile(p_q, p_k, p_v, i_n, N, N_KV, BLOCK_N)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < n
    b_acc, _ = norm_product(
        p_x, p_norm, p_w, None, o_m, o_n, m_m, m_n, stride_x, eps, K, NORM_FIRST, BLOCK_M, BLOCK_N, BLOCK_K
    )
    b_position = tl.load(p_lengths + o_m, mask=m_m, other=0) - 1  # [M], -1 holds no request
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
) -> None:  # fmt: skip
    """Fill `q` and the tokens' slots of `kv_cache`; the arguments are those of :func:`norm_qkv_append`, unchecked."""
    (M, K), N_KV = x.shape, len(wk)
    constants = norm_constants(NORM_LINEAR, x, wq, max_rows, "decode")
    constants |= {"N_KV": N_KV, "D": kv_cache.shape[4], "PAGE": kv_cache.shape[3]}
    stride_x = x.stride(0) if M > 1 else K
    tiles = triton.cdiv(len(wq), constants["BLOCK_N"]) + 2 * triton.cdiv(N_KV, constants["BLOCK_N"])
    grid = (triton.cdiv(M, constants["BLOCK_M"]), tiles)
    _norm_qkv_append_kernel[grid](
        x, norm, wq, wk, wv, rope, block_table, lengths, q, kv_cache,
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
) -> None:
    """:func:`norm_qkv` of one token a request; queries and keys rotated, keys and values into the token's page slot.

    Args:
        x: [B, K], one token a request, see :func:`voxkern.kernels.linear.norm_linear`, also for `norm` and `eps`.
        norm: [K].
        wq: [H * D, K].
        wk: [Hkv * D, K].
        wv: [Hkv * D, K].
        rope: fp32 [positions, 2, D / 2], cosines and then sines of each position, at least as many as lengths say.
        block_table: int32 [B, max_pages], the pages of each request in order.
        lengths: int32 [B], tokens of each request with the new one; 0 holds none, and nothing is written for it.
        q: [B, H * D], filled; rows of length 0 stay as they are.
        kv_cache: [pages, 2, Hkv, PAGE, D], keys at index 0 and values at 1; only its last dimension must be dense.
        eps: added to the mean square.
        max_rows: the most requests this is prepared for.

    Raises:
        TypeError: a dtype is wrong or differs from x's.
        ValueError: a shape, stride or device is wrong, or a number out of range.
    """
    M, N, _ = expect_qkv(x, norm, wq, wk, wv, max_rows, "decode")
    _, H_KV, _, D = expect_cache(kv_cache, block_table, lengths, x, M)
    expect("wk", wk, (H_KV * D, x.shape[1]), like=x)
    expect_heads("q", N, kv_cache)
    expect("q", q, (M, N), like=x)
    expect_rope(rope, D, x)


@triton.jit(
    do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["p_request_ids", "p_positions", "p_table"]
)
def _rope_append_kernel(
    p_qkv, p_rope, p_request_ids, p_positions, p_table, p_kv,
    stride_qkv, stride_table, stride_page, stride_v, stride_head, stride_token,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # a block has the queries of one row and key head, then that head's key and value: [D, GROUP + 1] is not a tile
    i_r, i_kv = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(p_positions + i_r).to(tl.int64)
    if position < 0:
        return
    o_pair, o_d = tl.arange(0, COLUMNS // 2), tl.arange(0, COLUMNS)
    m_d = o_d < D
    b_cos = tl.load(p_rope + position * D + o_pair, mask=o_pair < D // 2, other=0.0)[:, None]
    b_sin = tl.load(p_rope + position * D + D // 2 + o_pair, mask=o_pair < D // 2, other=0.0)[:, None]

    p_row = p_qkv + i_r * stride_qkv
    o_g = tl.arange(0, GROUP)
    m_q = m_d[:, None] & (o_g < H // HKV)[None, :]
    p_q = p_row + (i_kv * (H // HKV) + o_g)[None, :] * D + o_d[:, None]  # [D, G]
    b_q = tl.load(p_q, mask=m_q, other=0.0)
    tl.store(p_q, cast(rotate(b_q.to(tl.float32), b_cos, b_sin, COLUMNS, GROUP), b_q.dtype), mask=m_q)

    p_key = p_row + (H + i_kv) * D + o_d
    b_k, b_v = tl.load(p_key, mask=m_d, other=0.0), tl.load(p_key + HKV * D, mask=m_d, other=0.0)
    b_rotated = rotate(b_k.to(tl.float32)[:, None], b_cos, b_sin, COLUMNS, 1)  # type: ignore[arg-type]
    page = tl.load(p_table + tl.load(p_request_ids + i_r).to(tl.int64) * stride_table + position // PAGE).to(tl.int64)
    p_slot = p_kv + page * stride_page + i_kv * stride_head + position % PAGE * stride_token + o_d
    tl.store(p_slot, cast(tl.reshape(b_rotated, [COLUMNS]), b_k.dtype), mask=m_d)
    tl.store(p_slot + stride_v, b_v, mask=m_d)


def launch_rope_append(
    rope: Tensor, request_ids: Tensor, positions: Tensor, block_table: Tensor, qkv: Tensor, kv_cache: Tensor
) -> None:
    """Rotate queries in place and fill `kv_cache`; the arguments are those of :func:`rope_append`, unchecked."""
    R, W = qkv.shape
    _, _, HKV, PAGE, D = kv_cache.shape
    H = W // D - 2 * HKV
    constants = page_strides(kv_cache) | {"H": H, "HKV": HKV, "D": D, "PAGE": PAGE}
    constants |= {"GROUP": triton.next_power_of_2(H // HKV)}
    constants |= {"COLUMNS": triton.next_power_of_2(D), "num_warps": 4, "enable_fp_fusion": FP_FUSION}
    stride_qkv = qkv.stride(0) if R > 1 else W
    _rope_append_kernel[(R, HKV)](
        qkv, rope, request_ids, positions, block_table, kv_cache, stride_qkv, block_table.stride(0), **constants
    )


@operator(launch_rope_append, mutates=("qkv", "kv_cache"))
def rope_append(
    rope: Tensor, request_ids: Tensor, positions: Tensor, block_table: Tensor, qkv: Tensor, kv_cache: Tensor
) -> None:
    """Rotate queries in place; rotate keys and write them and the values into their pages.

    Args:
        rope: fp32 [positions, 2, D / 2], see :func:`norm_qkv_append`, also for `block_table` and `kv_cache`.
        request_ids: int32 [R], the request of each row.
        positions: int32 [R], the row's place in its request; -1 holds nothing and is left alone.
        block_table: int32 [B, max_pages].
        qkv: [R, (H + 2 Hkv) * D] fp32, bf16 or fp16, q | k | v of each row; rows may lie apart.
        kv_cache: [pages, 2, Hkv, PAGE, D].

    Raises:
        TypeError: a dtype is wrong or differs from qkv's.
        ValueError: a shape, stride or device is wrong.
    """
    R, W = expect("qkv", qkv, ("R", "W"), contiguous=False)
    _, H_KV, _, D = expect_cache(kv_cache, block_table, None, qkv, None)
    if W % D or W // D <= 2 * H_KV or (W // D) % H_KV:
        raise ValueError(f"qkv has {W} columns, which are no (H + 2 * {H_KV}) heads of {D} with H a multiple of {H_KV}")
    expect("request_ids", request_ids, (R,), like=qkv, dtype=torch.int32)
    expect("positions", positions, (R,), like=qkv, dtype=torch.int32)
    expect_rope(rope, D, qkv)


def expect_rope(rope: Tensor, D: int, like: Tensor) -> None:
    """Raise unless `rope` is a table of rotations for heads of `D` columns, an even number: rotated in pairs."""
    if D % 2:
        raise ValueError(f"kv_cache has heads of {D} columns but must have an even number of them: rope rotates pairs")
    expect("rope", rope, ("positions", 2, D // 2), like=like, dtype=torch.float32)
