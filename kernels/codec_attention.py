"""The codec's streaming attention over a window of past rows, with RMSNorm of queries and keys, and ALiBi.

For B requests with T rows each, row = request * T + t; i and j count the rows of one request::

    q | k | v   = columns of qkv                                   [B T, 3 H D]
    q, k        = RMSNorm(q) * q_norm, RMSNorm(k) * k_norm         [B T, H D], over all heads at once
    s_ij        = q_i . k_j / sqrt(D) + r^h (j - i)                for i - window <= j <= i; head h, r = 2^(-8 / H)
    o_i         = sum_j softmax_j(s_i) v_j                         [B T, H D]
    k, v before the chunk = kv_window[parity]                      [2, B, window, H D]
    kv_window[1 - parity] = the last `window` rows of k and v      for the next chunk

A block computes BLOCK_Q = 16 queries of one head and one request. The block reads 32 keys: those of the same 16 rows
and of the 16 rows before, which include any window of up to 16 rows. Tiles begin at multiples of BLOCK_Q, counted from
the request's first row. A row's sum therefore has the same order however the frames are divided into chunks. One more
block per head and request writes the window for the next chunk. The window is double-buffered like the state in
``codec.py``.
"""

import triton
import triton.language as tl
from torch import Tensor

from .codec import expect_chunk
from .common import cast, dot
from .launch_config import LaunchConfigs
from .operator import expect, operator
from .overlap import OFF, wait_for_launches

__all__ = ["codec_attention"]

MAX_WINDOW = 16

CODEC_ATTENTION = LaunchConfigs(
    "codec_attention",
    """
    arch         dtype | BLOCK_Q  BLOCK_W  num_warps  num_stages
    interpreter  *     | 16       64       4          1
    *            *     | 16       128      8          2
    """,
)


@triton.jit
def _rstd(p_row, m_row, eps, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Return ``1 / sqrt(mean(x^2) + eps)`` of rows of W columns: fp32 [R]."""
    o_w = tl.arange(0, BLOCK_W)
    b_square = tl.zeros([BLOCK_R, BLOCK_W], dtype=tl.float32)
    for w in range(0, W, BLOCK_W):
        m_x = m_row[:, None] & (w + o_w < W)[None, :]
        b_x = tl.load(p_row[:, None] + (w + o_w)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_square += b_x * b_x
    return tl.rsqrt(tl.sum(b_square, 1) / W + eps)


@triton.jit
def _keys(
    p_qkv, p_k_norm, p_old, b_t, m_t, past, eps,
    B, H: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Load the normed keys and the values of rows `b_t` of one request and head. Negative rows are before the chunk.

    Returns:
        Keys and values, [R, COLUMNS] each in the model's dtype, and a mask of the rows that exist, bool [R]. A row
        exists if `m_t` is true and the row is at most `past` rows before the chunk. Other rows are zeros.
    """
    W: tl.constexpr = H * D
    o_d = tl.arange(0, COLUMNS)
    m_new, m_old = m_t & (b_t >= 0), m_t & (b_t < 0) & (b_t >= -past)
    m_d = (o_d < D)[None, :]
    b_rstd = _rstd(p_qkv + b_t * (3 * W) + W, m_new, eps, W, BLOCK_R, BLOCK_W)
    i_head = tl.program_id(1).to(tl.int64) * D
    p_k = p_qkv + (b_t * (3 * W) + W + i_head)[:, None] + o_d[None, :]
    b_norm = tl.load(p_k_norm + i_head + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_k = tl.load(p_k, mask=m_new[:, None] & m_d, other=0.0)
    b_k = cast(b_k.to(tl.float32) * b_rstd[:, None] * b_norm[None, :], b_k.dtype)
    b_v = tl.load(p_k + W, mask=m_new[:, None] & m_d, other=0.0)
    p_kept = p_old + ((WINDOW + b_t) * W + i_head)[:, None] + o_d[None, :]
    m_kept = m_old[:, None] & m_d
    b_k = tl.where(m_old[:, None], tl.load(p_kept, mask=m_kept, other=0.0), b_k)
    b_v = tl.where(m_old[:, None], tl.load(p_kept + B * WINDOW * W, mask=m_kept, other=0.0), b_v)
    return b_k, b_v, m_new | m_old


@triton.jit(
    do_not_specialize=["B", "T", "rate"],
    do_not_specialize_on_alignment=["p_past", "p_new_frames", "p_parity"],
)
def _codec_attention_kernel(
    p_qkv, p_q_norm, p_k_norm, p_window, p_past, p_new_frames, p_parity, p_out,
    B, T, rate, eps,
    H: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_q, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    W: tl.constexpr = H * D
    eps = tl.full([], eps, tl.float32)
    parity = tl.load(p_parity)
    past = (tl.load(p_past + i_b) * rate).to(tl.int32)
    valid = (tl.load(p_new_frames + i_b) * rate).to(tl.int32)
    p_old = p_window + (parity * 2 * B + i_b) * WINDOW * W
    p_request = p_qkv + i_b * T * (3 * W)
    o_d = tl.arange(0, COLUMNS)
    m_d = (o_d < D)[None, :]
    if i_q == tl.num_programs(0) - 1:  # the last block writes the window that the next chunk needs
        o_r = tl.arange(0, KEPT)
        b_k, b_v, _ = _keys(
            p_request, p_k_norm, p_old, valid - WINDOW + o_r, o_r < WINDOW, past, eps,
            B, H, D, COLUMNS, WINDOW, KEPT, BLOCK_W,
        )  # fmt: skip
        p_new = p_window + ((1 - parity) * 2 * B + i_b) * WINDOW * W + o_r[:, None] * W + i_h * D + o_d[None, :]
        m_new = (o_r < WINDOW)[:, None] & m_d
        tl.store(p_new, b_k, mask=m_new)
        tl.store(p_new + B * WINDOW * W, b_v, mask=m_new)
        return
    # tiles begin at multiples of BLOCK_Q, counted from the request's first row: a row's sum has one order in any chunk
    b_t = (past // BLOCK_Q + i_q) * BLOCK_Q - past + tl.arange(0, BLOCK_Q)
    m_q = (b_t >= 0) & (b_t < T)
    p_q = p_request + b_t * (3 * W)
    b_rstd = _rstd(p_q, m_q, eps, W, BLOCK_Q, BLOCK_W)
    b_q = tl.load((p_q + i_h * D)[:, None] + o_d[None, :], mask=m_q[:, None] & m_d, other=0.0)
    b_norm = tl.load(p_q_norm + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_q = cast(b_q.to(tl.float32) * b_rstd[:, None] * b_norm[None, :], b_q.dtype)  # [Q, D]
    KEYS: tl.constexpr = 2 * BLOCK_Q  # the tile's rows, and the BLOCK_Q >= WINDOW rows before them
    b_j = (past // BLOCK_Q + i_q) * BLOCK_Q - past - BLOCK_Q + tl.arange(0, KEYS)
    b_k, b_v, m_k = _keys(
        p_request, p_k_norm, p_old, b_j, b_j < T, tl.minimum(past, WINDOW), eps,
        B, H, D, COLUMNS, WINDOW, KEYS, BLOCK_W,
    )  # fmt: skip
    b_s = dot(b_k, tl.trans(b_q), tl.zeros([KEYS, BLOCK_Q], dtype=tl.float32)) * (D**-0.5)  # [keys, Q]
    b_far = b_j[:, None] - b_t[None, :]
    slope = tl.exp2(-8.0 * i_h.to(tl.float32) / H)
    m_s = m_k[:, None] & (b_far <= 0) & (b_far >= -WINDOW)
    b_s = tl.where(m_s, b_s + slope * b_far.to(tl.float32), float("-inf"))
    b_max = tl.max(b_s, 0)
    b_p = tl.exp2((b_s - tl.where(b_max == float("-inf"), 0.0, b_max)[None, :]) * 1.4426950408889634)
    b_sum = tl.sum(b_p, 0)
    b_o = dot(tl.trans(b_v), cast(b_p, b_v.dtype), tl.zeros([COLUMNS, BLOCK_Q], dtype=tl.float32))  # [D, Q]
    b_o = b_o / tl.where(b_sum > 0.0, b_sum, 1.0)[None, :]
    p_result = p_out + ((i_b * T + b_t) * W + i_h * D)[None, :] + o_d[:, None]
    tl.store(p_result, cast(b_o, p_out.dtype.element_ty), mask=m_q[None, :] & (o_d < D)[:, None])


def launch_codec_attention(
    out: Tensor, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, kv_window: Tensor, past_frames: Tensor,
    new_frames: Tensor, parity: Tensor, rate: int, eps: float, n_heads: int,
) -> None:  # fmt: skip
    """Run :func:`codec_attention` without checking the arguments."""
    (M, W), (B, window) = out.shape, kv_window.shape[2:4]
    T, D = M // B, W // n_heads
    constants = CODEC_ATTENTION(N=W, K=D, dtype=qkv.dtype, rows=1)
    constants |= {"H": n_heads, "D": D, "COLUMNS": max(16, triton.next_power_of_2(D)), "WINDOW": window}
    constants["KEPT"] = triton.next_power_of_2(window)
    # T rows that begin anywhere in a tile touch up to cdiv(T - 1, BLOCK_Q) + 1 tiles; one more block writes the window
    grid = (triton.cdiv(T - 1, constants["BLOCK_Q"]) + 2, n_heads, B)
    _codec_attention_kernel[grid](
        qkv, q_norm, k_norm, kv_window, past_frames, new_frames, parity, out, B, T, rate, eps, **constants
    )


@operator(launch_codec_attention, mutates=("out", "kv_window"))
def codec_attention(
    out: Tensor, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, kv_window: Tensor, past_frames: Tensor,
    new_frames: Tensor, parity: Tensor, rate: int, eps: float, n_heads: int,
) -> None:  # fmt: skip
    """Compute attention over a window, ``i - window <= j <= i``, with ALiBi (arXiv 2108.12409) and RMSNorm of q and k.

    The score of query i and key j in head h is ``q_i . k_j / sqrt(D) + r^h (j - i)`` with r = 2^(-8 / H). The norms are
    over all heads at once.

    Args:
        out: [B T, H D], written.
        qkv: [B T, 3 H D] fp32, bf16 or fp16, q | k | v before the norms.
        q_norm: [H D], the weight of the queries' RMSNorm.
        k_norm: [H D], the weight of the keys' RMSNorm.
        kv_window: [2, 2, B, window, H D]. Index `parity` holds the normed keys and the values of the rows before the
            chunk. The keys and values of the last rows are written to the other index, for the next chunk. Rows before
            a request's first row may hold anything.
        past_frames: int64 [B], frames decoded before the chunk.
        new_frames: int64 [B], frames of the chunk, 0..T / rate.
        parity: int32 [1], 0 or 1.
        rate: rows per frame.
        eps: added to the mean squares.
        n_heads: H, the number of heads.

    Raises:
        ValueError: B is not in 1..64, the window is not in 1..16, T is not a multiple of `rate`, or 3 * `n_heads` does
            not divide the columns of `qkv`.
    """
    M, W = expect("qkv", qkv, ("B T", "3 H D"))
    if W % (3 * n_heads):
        raise ValueError(f"qkv has {W} columns, which are no multiple of 3 * {n_heads} (n_heads)")
    expect("out", out, (M, W // 3), like=qkv)
    expect("q_norm", q_norm, (W // 3,), like=qkv)
    expect("k_norm", k_norm, (W // 3,), like=qkv)
    _, _, B, window, _ = expect("kv_window", kv_window, (2, 2, "B", "window", W // 3), like=qkv)
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"kv_window has a window of {window} but must have 1..{MAX_WINDOW} rows")
    expect_chunk("qkv", M, B, rate, past_frames, new_frames, parity)
