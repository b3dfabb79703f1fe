"""The codec's decoder as codes come: causal convolutions as products, windowed attention, and their memory.

What a chunk needs of the past lies twice, as ``memory[turn]`` and ``memory[1 - turn]``: a launch reads the one and
writes the other, so that no block can read what another has overwritten; ``codec_advance`` then turns them round.

Rows are request-major, row = request * T + t. A row's bits depend on no other row of the chunk, and not on where in the
chunk it stands: a sound is the same however its frames come.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .operator import expect, expect_batch, operator
from .settings import FP_FUSION, Table

RULES = ("zero", "replicate", "reflect")  # what stands before a request's first row
MAX_WINDOW = 16

# A frame is 1 to 8 rows and a chunk of 25 up to 200: tiles of 32 waste little of either. What makes sound is fp32.
CODEC_CONV = Table(
    "codec_conv",
    """
    arch         dtype | BLOCK_M  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *     | 16       32       64       4          1
    gfx*         fp32  | 16       32       32       4          2
    gfx*         *     | 32       32       64       4          2
    sm_*         fp32  | 16       32       32       4          4
    sm_*         *     | 32       32       64       4          6
    """,
)

CODEC_ATTENTION = Table(
    "codec_attention",
    """
    arch         dtype | BLOCK_Q  BLOCK_W  num_warps  num_stages
    interpreter  *     | 16       64       4          1
    *            *     | 16       128      4          2
    """,
)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["p_codes", "p_lengths"])
def _codec_dequantise_kernel(
    p_codes, p_lengths, p_sum, p_usage, p_z, T, scale,
    DIM: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    there = i_t < tl.load(p_lengths + i_b)  # later codes may be anything: code 0 stands for them
    p_code, p_row = p_codes + i_b * (1 + K) * T + i_t, p_z + (i_b * T + i_t) * (DIM + K)
    scale = tl.full([], scale, tl.float32)
    o_d, o_k = tl.arange(0, COLUMNS), tl.arange(0, LEVELS)
    semantic = tl.where(there, tl.load(p_code), 0)
    usage = tl.maximum(tl.load(p_usage + semantic).to(tl.float32), 1e-5)
    b_sum = tl.load(p_sum + semantic * DIM + o_d, mask=o_d < DIM, other=0.0).to(tl.float32)
    tl.store(p_row + o_d, cast(b_sum / usage, p_z.dtype.element_ty), mask=o_d < DIM)
    b_code = tl.where(there, tl.load(p_code + (1 + o_k).to(tl.int64) * T, mask=o_k < K, other=0), 0)
    tl.store(p_row + DIM + o_k, cast(b_code.to(tl.float32) * scale - 1.0, p_z.dtype.element_ty), mask=o_k < K)


def launch_codec_dequantise(
    out: Tensor, codes: Tensor, lengths: Tensor, embedding_sum: Tensor, cluster_usage: Tensor, levels: int
) -> None:
    """Fill `out`, contiguous [B T, dim + K]; the other arguments are those of :func:`codec_dequantise`, unchecked."""
    (B, K, T), dim = codes.shape, embedding_sum.shape[1]
    constants: dict[str, Any] = {"DIM": dim, "K": K - 1, "num_warps": 4, "enable_fp_fusion": FP_FUSION}
    constants |= {"COLUMNS": triton.next_power_of_2(dim), "LEVELS": triton.next_power_of_2(K - 1)}
    _codec_dequantise_kernel[(T, B)](
        codes, lengths, embedding_sum, cluster_usage, out, T, 2 / (levels - 1), **constants
    )


@operator(launch_codec_dequantise)
def codec_dequantise(
    codes: Tensor, lengths: Tensor, embedding_sum: Tensor, cluster_usage: Tensor, levels: int
) -> Tensor:
    """Latents of codes: ``embedding_sum / max(cluster_usage, 1e-5)``, and each acoustic code on -1..1.

    Args:
        codes: int64 [B, 1 + K, T] without the offset, semantic first, each of a code that there is.
        lengths: int64 [B], how many of the T frames each request has; what codes hold after them is not read.
        embedding_sum: [size, dim] fp32, bf16 or fp16.
        cluster_usage: [size].
        levels: of an acoustic code.

    Returns:
        [B T, dim + K] in the codebook's dtype.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride or device is wrong.
    """
    B, K, T = expect("codes", codes, ("B", "1 + K", "T"), dtype=torch.int64)
    expect("lengths", lengths, (B,), like=codes)
    size, dim = expect("embedding_sum", embedding_sum, ("size", "dim"))
    expect("cluster_usage", cluster_usage, (size,), like=embedding_sum)
    return embedding_sum.new_empty(B * T, dim + K - 1)


@triton.jit
def _source(p_x, p_old, i_b, b_t, b_fresh, T, C: tl.constexpr, TAIL: tl.constexpr, RULE: tl.constexpr):
    """Where rows lie, and whether they are anywhere: [R] pointers and mask.

    Args:
        p_x: the chunk, [B T, C].
        p_old: the rows before it, [B, TAIL, C].
        i_b: int64 [R] or scalar, requests.
        b_t: int [R], rows of the chunk; negative before it.
        b_fresh: bool [R], whether nothing was before the chunk.
        T: rows of a request.
        C: columns.
        TAIL: rows that are kept.
        RULE: see RULES.
    """
    b_rule = b_t * 0
    if RULE == 2:
        b_rule = -b_t
    b_row = tl.where(b_t < 0, b_rule, b_t)
    m_old = (b_t < 0) & (b_fresh == 0)
    p_row = tl.where(m_old, p_old + (i_b * TAIL + TAIL + b_t) * C, p_x + (i_b * T + b_row) * C)
    m_row = b_t == b_t
    if RULE == 0:
        m_row = (b_t >= 0) | (b_fresh == 0)
    return p_row, m_row


@triton.jit(
    do_not_specialize=["B", "T", "rate"],
    do_not_specialize_on_alignment=["p_frames", "p_lengths", "p_turn"],
)
def _codec_conv_kernel(
    p_x, p_w, p_tail, p_frames, p_lengths, p_turn, p_y,
    B, T, rate,
    N: tl.constexpr, K: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    RULE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    turn = tl.load(p_turn)
    p_old, p_new = p_tail + turn * B * TAIL * K, p_tail + (1 - turn) * B * TAIL * K
    if i_n == tl.num_programs(1) - 1:  # the last column of blocks keeps the rows that the next chunk needs
        o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        for i in range(i_m, B, tl.num_programs(0)):
            i_b = tl.full([], i, tl.int64)
            b_fresh = tl.load(p_frames + i_b) + o_r * 0 == 0
            b_t = tl.load(p_lengths + i_b) * rate - TAIL + o_r
            p_row, m_row = _source(p_x, p_old, i_b, b_t, b_fresh, T, K, TAIL, RULE)
            for c in range(0, K, COLUMNS):
                m_c = (o_r < TAIL)[:, None] & (c + o_c < K)[None, :]
                b_x = tl.load(p_row[:, None] + (c + o_c)[None, :], mask=m_c & m_row[:, None], other=0.0)
                tl.store(p_new + (i_b * TAIL + o_r)[:, None] * K + (c + o_c)[None, :], b_x, mask=m_c)
        return
    o_m, o_n, o_k = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < B * T, o_n < N
    i_b, b_t = o_m // T, o_m % T
    b_fresh = tl.load(p_frames + i_b, mask=m_m, other=0) == 0
    valid = tl.load(p_lengths + i_b, mask=m_m, other=0) * rate
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    b_acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for step in range(0, (TAIL + 1) * STEPS):
        tap = step // STEPS
        k = (step - tap * STEPS) * BLOCK_K
        m_k = k + o_k < K
        p_w_tile = p_w + o_n[:, None] * ((TAIL + 1) * K) + (tap * K + k + o_k)[None, :]
        b_w = tl.load(p_w_tile, mask=m_n[:, None] & m_k[None, :], other=0.0)
        p_row, m_row = _source(p_x, p_old, i_b, b_t - TAIL + tap, b_fresh, T, K, TAIL, RULE)
        m_x = (m_m & m_row)[:, None] & m_k[None, :]
        b_x = tl.load(p_row[:, None] + (k + o_k)[None, :], mask=m_x, other=0.0).to(b_w.dtype)  # [M, K]
        b_acc = dot(b_w, tl.trans(b_x), b_acc)  # [N, M]
    b_acc = tl.where((b_t < valid)[None, :], b_acc, 0.0)
    tl.store(p_y + o_m[None, :] * N + o_n[:, None], cast(b_acc, p_y.dtype.element_ty), mask=m_m[None, :] & m_n[:, None])


def launch_codec_conv(
    y: Tensor, x: Tensor, weight: Tensor, tail: Tensor, frames: Tensor, lengths: Tensor, turn: Tensor, rate: int,
    rule: str,
) -> None:  # fmt: skip
    """The arguments are those of :func:`codec_conv`, unchecked."""
    (M, K), N, B, n_tail = x.shape, weight.shape[0], tail.shape[1], tail.shape[2]
    constants = CODEC_CONV(N=N, K=K, dtype=weight.dtype, rows=1)
    constants |= {"TAIL": n_tail, "ROWS": triton.next_power_of_2(n_tail), "RULE": RULES.index(rule)}
    constants["COLUMNS"] = min(512, triton.next_power_of_2(K))
    grid = (triton.cdiv(M, constants["BLOCK_M"]), triton.cdiv(N, constants["BLOCK_N"]) + 1)
    _codec_conv_kernel[grid](x, weight, tail, frames, lengths, turn, y, B, M // B, rate, **constants)


@operator(launch_codec_conv, mutates=("y", "tail"))
def codec_conv(
    y: Tensor, x: Tensor, weight: Tensor, tail: Tensor, frames: Tensor, lengths: Tensor, turn: Tensor, rate: int,
    rule: str,
) -> None:  # fmt: skip
    """A causal convolution over a chunk and the rows before it: each row and its n predecessors times a weight.

    A transposed convolution of stride s is one whose N is s times its channels: row t gives s rows, side by side.

    Args:
        y: [B T, N], written; zeros after a request's own rows.
        x: [B T, K] fp32, bf16 or fp16.
        weight: [N, (n + 1) K], taps side by side, the oldest first; in x's dtype, or in fp32, as y then is.
        tail: [2, B, n, K], the n rows before the chunk at index `turn`; the next chunk's are written to the other.
        frames: int64 [B], decoded before the chunk; 0: nothing was, and `rule` says what stands there.
        lengths: int64 [B], frames of the chunk, 0..T / rate.
        turn: int32 [1], 0 or 1.
        rate: rows a frame.
        rule: "zero", "replicate" the first row, or "reflect" about it, for which a frame must have more than n rows.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride or device is wrong, or a number out of range.
    """
    M, K = expect("x", x, ("B T", "K"))
    _, B, n, _ = expect("tail", tail, (2, "B", "n", K), like=x)
    _expect_chunk("x", M, B, rate, frames, lengths, turn)
    like = x if weight.dtype == x.dtype else weight
    expect("weight", weight, ("N", (n + 1) * K), like=like, dtype=like.dtype if like is x else torch.float32)
    expect("y", y, (M, weight.shape[0]), like=weight)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if rule == "reflect" and rate <= n:
        raise ValueError(f"rate is {rate} but must be more than {n}, the rows that are reflected about the first")


@triton.jit
def _scales(p_row, m_row, eps, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """``1 / sqrt(mean(x^2) + eps)`` of whole rows: [R]."""
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
    """Keys, normed, and values of the rows `b_t` of a request and head, in the chunk or, if negative, before it.

    Returns:
        Two [R, COLUMNS] in the model's dtype, zeros where `m_t` is false or nothing was, and what is there: [R].
    """
    W: tl.constexpr = H * D
    o_d = tl.arange(0, COLUMNS)
    m_new, m_old = m_t & (b_t >= 0), m_t & (b_t < 0) & (b_t >= -past)
    m_d = (o_d < D)[None, :]
    b_scale = _scales(p_qkv + b_t * (3 * W) + W, m_new, eps, W, BLOCK_R, BLOCK_W)
    i_head = tl.program_id(1).to(tl.int64) * D
    p_k = p_qkv + (b_t * (3 * W) + W + i_head)[:, None] + o_d[None, :]
    b_norm = tl.load(p_k_norm + i_head + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_k = tl.load(p_k, mask=m_new[:, None] & m_d, other=0.0)
    b_k = cast(b_k.to(tl.float32) * b_scale[:, None] * b_norm[None, :], b_k.dtype)
    b_v = tl.load(p_k + W, mask=m_new[:, None] & m_d, other=0.0)
    p_kept = p_old + ((WINDOW + b_t) * W + i_head)[:, None] + o_d[None, :]
    m_kept = m_old[:, None] & m_d
    b_k = tl.where(m_old[:, None], tl.load(p_kept, mask=m_kept, other=0.0), b_k)
    b_v = tl.where(m_old[:, None], tl.load(p_kept + B * WINDOW * W, mask=m_kept, other=0.0), b_v)
    return b_k, b_v, m_new | m_old


@triton.jit(
    do_not_specialize=["B", "T", "rate"],
    do_not_specialize_on_alignment=["p_frames", "p_lengths", "p_turn"],
)
def _codec_attention_kernel(
    p_qkv, p_q_norm, p_k_norm, p_ring, p_frames, p_lengths, p_turn, p_out,
    B, T, rate, eps,
    H: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    i_q, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    W: tl.constexpr = H * D
    eps = tl.full([], eps, tl.float32)
    turn = tl.load(p_turn)
    past = (tl.load(p_frames + i_b) * rate).to(tl.int32)
    valid = (tl.load(p_lengths + i_b) * rate).to(tl.int32)
    p_old = p_ring + (turn * 2 * B + i_b) * WINDOW * W
    p_request = p_qkv + i_b * T * (3 * W)
    o_d = tl.arange(0, COLUMNS)
    m_d = (o_d < D)[None, :]
    if i_q == tl.num_programs(0) - 1:  # the last block keeps the window that the next chunk needs
        o_r = tl.arange(0, KEPT)
        b_k, b_v, _ = _keys(
            p_request, p_k_norm, p_old, valid - WINDOW + o_r, o_r < WINDOW, past, eps,
            B, H, D, COLUMNS, WINDOW, KEPT, BLOCK_W,
        )  # fmt: skip
        p_new = p_ring + ((1 - turn) * 2 * B + i_b) * WINDOW * W + o_r[:, None] * W + i_h * D + o_d[None, :]
        m_new = (o_r < WINDOW)[:, None] & m_d
        tl.store(p_new, b_k, mask=m_new)
        tl.store(p_new + B * WINDOW * W, b_v, mask=m_new)
        return
    # tiles begin at multiples of BLOCK_Q of the request's own rows: a row is summed alike in whichever chunk it comes
    b_t = (past // BLOCK_Q + i_q) * BLOCK_Q - past + tl.arange(0, BLOCK_Q)
    m_q = (b_t >= 0) & (b_t < T)
    p_q = p_request + b_t * (3 * W)
    b_scale = _scales(p_q, m_q, eps, W, BLOCK_Q, BLOCK_W)
    b_q = tl.load((p_q + i_h * D)[:, None] + o_d[None, :], mask=m_q[:, None] & m_d, other=0.0)
    b_norm = tl.load(p_q_norm + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_q = cast(b_q.to(tl.float32) * b_scale[:, None] * b_norm[None, :], b_q.dtype)  # [Q, D]
    KEYS: tl.constexpr = 2 * BLOCK_Q  # the tile's own rows, and BLOCK_Q >= WINDOW before them
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
    out: Tensor, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, ring: Tensor, frames: Tensor, lengths: Tensor,
    turn: Tensor, rate: int, eps: float, n_heads: int,
) -> None:  # fmt: skip
    """The arguments are those of :func:`codec_attention`, unchecked."""
    (M, W), (B, window) = out.shape, ring.shape[2:4]
    T, D = M // B, W // n_heads
    constants = CODEC_ATTENTION(N=W, K=D, dtype=qkv.dtype, rows=1)
    del constants["N"], constants["K"]
    constants |= {"H": n_heads, "D": D, "COLUMNS": max(16, triton.next_power_of_2(D)), "WINDOW": window}
    constants["KEPT"] = triton.next_power_of_2(window)
    # rows that begin anywhere in a tile may touch one more
    grid = (triton.cdiv(T - 1, constants["BLOCK_Q"]) + 2, n_heads, B)
    _codec_attention_kernel[grid](qkv, q_norm, k_norm, ring, frames, lengths, turn, out, B, T, rate, eps, **constants)


@operator(launch_codec_attention, mutates=("out", "ring"))
def codec_attention(
    out: Tensor, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, ring: Tensor, frames: Tensor, lengths: Tensor,
    turn: Tensor, rate: int, eps: float, n_heads: int,
) -> None:  # fmt: skip
    """Attention over a window, ``i - window <= j <= i``, with ALiBi (arXiv 2108.12409) and RMSNorm of q and k.

    Scores are ``q k / sqrt(D) + r^h (j - i)`` with r = 2^(-8 / H); the norms are over all heads at once.

    Args:
        out: [B T, H D], written.
        qkv: [B T, 3 H D] fp32, bf16 or fp16, not normed.
        q_norm: [H D].
        k_norm: [H D].
        ring: [2, 2, B, window, H D], the last keys, normed, and values before the chunk at index `turn`; the next
            chunk's are written to the other. Those from before a request's first row may hold anything.
        frames: int64 [B], decoded before the chunk.
        lengths: int64 [B], frames of the chunk, 0..T / rate.
        turn: int32 [1], 0 or 1.
        rate: rows a frame.
        eps: added to the mean squares.
        n_heads: H.

    Raises:
        TypeError: a dtype is wrong or differs from qkv's.
        ValueError: a shape, stride or device is wrong, or a number out of range.
    """
    M, W = expect("qkv", qkv, ("B T", "3 H D"))
    if W % (3 * n_heads):
        raise ValueError(f"qkv has {W} columns, which are no multiple of 3 * {n_heads} (n_heads)")
    expect("out", out, (M, W // 3), like=qkv)
    expect("q_norm", q_norm, (W // 3,), like=qkv)
    expect("k_norm", k_norm, (W // 3,), like=qkv)
    _, _, B, window, _ = expect("ring", ring, (2, 2, "B", "window", W // 3), like=qkv)
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"ring has a window of {window} but must have 1..{MAX_WINDOW}")
    _expect_chunk("qkv", M, B, rate, frames, lengths, turn)


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["p_lengths", "p_frames", "p_turn"])
def _codec_advance_kernel(p_lengths, p_frames, p_turn, B, ROWS: tl.constexpr):
    o_b = tl.arange(0, ROWS)
    b_frames = tl.load(p_frames + o_b, mask=o_b < B, other=0) + tl.load(p_lengths + o_b, mask=o_b < B, other=0)
    tl.store(p_frames + o_b, b_frames, mask=o_b < B)
    tl.store(p_turn, 1 - tl.load(p_turn))


def launch_codec_advance(lengths: Tensor, frames: Tensor, turn: Tensor) -> None:
    """The arguments are those of :func:`codec_advance`, unchecked."""
    constants: dict[str, Any] = {"ROWS": 64, "num_warps": 1, "enable_fp_fusion": FP_FUSION}
    _codec_advance_kernel[(1,)](lengths, frames, turn, len(frames), **constants)


@operator(launch_codec_advance, mutates=("frames", "turn"))
def codec_advance(lengths: Tensor, frames: Tensor, turn: Tensor) -> None:
    """A chunk is done: count its frames, and turn the memory round.

    Args:
        lengths: int64 [B], frames of the chunk.
        frames: int64 [B], decoded so far.
        turn: int32 [1], 0 or 1.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride or device is wrong.
    """
    (B,) = expect("frames", frames, ("B",), dtype=torch.int64)
    expect_batch("frames", B, 1, 64)
    expect("lengths", lengths, (B,), like=frames)
    expect("turn", turn, (1,), like=frames, dtype=torch.int32)


def _expect_chunk(name: str, rows: int, B: int, rate: int, frames: Tensor, lengths: Tensor, turn: Tensor) -> None:
    """Raise unless `rows` are whole frames of as many requests as the memory is of."""
    expect_batch("frames", B, 1, 64)
    expect("frames", frames, (B,), dtype=torch.int64)
    expect("lengths", lengths, (B,), like=frames)
    expect("turn", turn, (1,), like=frames, dtype=torch.int32)
    if rate < 1 or rows % (B * rate) or not rows:
        raise ValueError(f"{name} has {rows} rows but must have {rate} a frame (rate) for each of {B} requests")
