"""Device functions of a frame's solver steps, which ``flow.py`` puts together: noise, guidance, projections, codes.

The velocity network has width N, and the embeddings have width E. For classifier-free guidance, a request has two
branches: "cond" has the backbone's hidden state, and "uncond" has zeros in its place. For one request with K acoustic
codebooks::

    init_noise       x ~ N(0, 1)                                     [K], or loaded from `p_noise`
    project_in       token = w_in @ x + bias                         [N], the same for both branches
        the network, in other launches: token -> y                   [N] of each branch
    guided_step      n = a * norm(y_cond) + (1 - a) * norm(y_uncond) [N], a = cfg_alpha
                     v = w_out @ n + bias                            [K], the guided velocity
                     x = x + dt * (v + ab2_ratio * (v - v_last))     [K], v_last of the step before (ab2)
    write_codes      code = round((clamp(x, -1, 1) + 1) / 2 * (levels - 1)) + 2      int64 [K]
                     next = sum of the embeddings of the semantic and acoustic codes     [E]

Both projections are small, and the next input projection needs the velocity of all K codebooks. One block therefore
computes a whole step of one request: a step is one launch, and no block waits for another.
"""

import triton
import triton.language as tl

from .common import END_AUDIO, N_SPECIAL_CODES, NOT_FINITE, cast, normals, round_half_even

__all__ = ["guided_step", "init_noise", "project_in", "write_codes", "write_time_tokens"]


@triton.jit
def init_noise(p_seed, p_frame, p_noise, p_quantiles, i_b, K: tl.constexpr, PAD_K: tl.constexpr):
    """Return a request's initial state, loaded from `p_noise`, or drawn from seed and frame if `p_noise` is None.

    Returns:
        fp32 [PAD_K], zeros past K.
    """
    o_k = tl.arange(0, PAD_K)
    if p_noise is None:
        b_n0, b_n1, b_n2, b_n3 = normals(
            tl.load(p_seed + i_b), tl.load(p_frame + i_b), tl.arange(0, PAD_K // 4), p_quantiles
        )  # [PAD_K / 4] each: b_n0 has codebooks 0, 4, 8, .., b_n1 has 1, 5, 9, ..
        b_x = tl.interleave(tl.interleave(b_n0, b_n2), tl.interleave(b_n1, b_n3))  # [K]
        b_x = tl.where(o_k < K, b_x, 0.0)
    else:
        b_x = tl.load(p_noise + i_b * K + o_k, mask=o_k < K, other=0.0)
    return b_x


@triton.jit
def project_in(
    p_w_in, p_bias, p_tokens, b_x, i_b, n, B,
    N: tl.constexpr, K: tl.constexpr, PAD_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write columns n .. n + BLOCK_N of ``w_in @ x + bias`` to the tokens of both branches: rows i_b and B + i_b.

    `b_x` is the state, fp32 [PAD_K] with zeros past K; `p_bias` may be None.
    """
    o_n, o_k = n + tl.arange(0, BLOCK_N), tl.arange(0, PAD_K)
    m_n = o_n < N
    b_w = tl.load(p_w_in + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)
    b_x = cast(b_x, b_w.dtype).to(tl.float32)  # rounded to the weights' dtype, as all inputs of the network are
    b_token = tl.sum(b_w.to(tl.float32) * b_x[None, :], 1)  # [N]
    if p_bias is not None:
        b_token += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_token = cast(b_token, p_tokens.dtype.element_ty)
    tl.store(p_tokens + i_b * N + o_n, b_token, mask=m_n)
    tl.store(p_tokens + (B + i_b) * N + o_n, b_token, mask=m_n)


@triton.jit
def write_time_tokens(p_time, p_tokens, i_b, B, N: tl.constexpr, PAD_N: tl.constexpr):
    """Write `p_time` [N] to the t tokens of both branches of a request."""
    o_n = tl.arange(0, PAD_N)
    b_time = tl.load(p_time + o_n, mask=o_n < N, other=0.0)
    tl.store(p_tokens + (2 * B + i_b) * N + o_n, b_time, mask=o_n < N)
    tl.store(p_tokens + (3 * B + i_b) * N + o_n, b_time, mask=o_n < N)


@triton.jit
def _modulated_norm(p_x, p_mod, eps, N: tl.constexpr, PAD_N: tl.constexpr):
    """Return ``(x - mean) / sqrt(variance + eps) * (1 + scale) + shift`` of one row: fp32 [PAD_N], zeros past N.

    `p_mod` points to the row's shift [N]; the row's scale [N] follows directly.
    """
    o_n = tl.arange(0, PAD_N)
    m_n = o_n < N
    b_x = tl.load(p_x + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_x = tl.where(m_n, b_x - tl.sum(b_x, 0) / N, 0.0)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / N + eps)
    b_shift = tl.load(p_mod + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_scale = tl.load(p_mod + N + o_n, mask=m_n, other=0.0).to(tl.float32)
    return b_x * (1 + b_scale) + b_shift


@triton.jit
def _guided_input(
    p_y, p_norm, p_mod, stride_mod, alpha, i_b, B, eps,
    N: tl.constexpr, PAD_N: tl.constexpr,
):  # fmt: skip
    """Return ``alpha * norm(y_cond) + (1 - alpha) * norm(y_uncond)`` of a request: fp32 [PAD_N], zeros past N.

    The norm is RMSNorm with the weight `p_norm`, or a layer norm modulated by `p_mod`: by row 1 + i_b for
    y_cond, and by row 0 for y_uncond. The guidance and the projection after it are both linear, so combining the two
    rows first halves the multiply-adds.
    """
    if p_norm is None:
        b_y = alpha * _modulated_norm(p_y + i_b * N, p_mod + (1 + i_b) * stride_mod, eps, N, PAD_N)
        b_y += (1 - alpha) * _modulated_norm(p_y + (B + i_b) * N, p_mod, eps, N, PAD_N)
    else:
        o_n = tl.arange(0, PAD_N)
        m_n = o_n < N
        b_y = tl.load(p_y + i_b * N + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_uncond = tl.load(p_y + (B + i_b) * N + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_norm = tl.load(p_norm + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_y *= alpha * tl.rsqrt(tl.sum(b_y * b_y, 0) / N + eps)
        b_uncond *= (1 - alpha) * tl.rsqrt(tl.sum(b_uncond * b_uncond, 0) / N + eps)
        b_y = (b_y + b_uncond) * b_norm  # [N]
    return b_y


@triton.jit
def guided_step(
    p_y, p_norm, p_mod, p_w_out, p_b_out, p_alpha, p_x, p_last, i_b, B, stride_mod, eps, dt, ab2_ratio,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr,
    BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """Run a solver step of one request: update x and v_last, and return the new x, fp32 [PAD_K] with zeros past K.

    The bias of the projection, which may be None, is added once, because the guidance weights a and 1 - a sum to 1.
    """
    # torch.compile passes these numbers as fp64
    eps, dt, ab2_ratio = tl.full([], eps, tl.float32), tl.full([], dt, tl.float32), tl.full([], ab2_ratio, tl.float32)
    o_k = tl.arange(0, PAD_K)
    b_x = tl.load(p_x + i_b * K + o_k, mask=o_k < K, other=0.0)
    b_last = tl.load(p_last + i_b * K + o_k, mask=o_k < K, other=0.0)
    tl.debug_barrier()  # several warps load the same x: all warps must read x before one warp writes x
    b_y = _guided_input(p_y, p_norm, p_mod, stride_mod, tl.load(p_alpha + i_b), i_b, B, eps, N, PAD_N)
    b_v = _project_out(p_w_out, b_y, N, K, PAD_N, PAD_K, BLOCK_K, PIPE)
    if p_b_out is not None:
        b_v += tl.load(p_b_out + o_k, mask=o_k < K, other=0.0).to(tl.float32)
    # v_last may be NaN in a first step, where ab2_ratio is 0
    b_x += dt * tl.where(ab2_ratio == 0.0, b_v, b_v + ab2_ratio * (b_v - b_last))
    tl.store(p_x + i_b * K + o_k, b_x, mask=o_k < K)
    tl.store(p_last + i_b * K + o_k, b_v, mask=o_k < K)
    return b_x


@triton.jit
def _project_out(
    p_w_out, b_y,
    N: tl.constexpr, K: tl.constexpr, PAD_N: tl.constexpr, PAD_K: tl.constexpr,
    BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """Return ``w_out @ y``, fp32 [PAD_K] with zeros past K, for one row `b_y`, fp32 [PAD_N]."""
    o_n, o_k = tl.arange(0, PAD_N), tl.arange(0, PAD_K)
    b_v = tl.zeros([PAD_K], dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=PIPE):
        o_row = k + tl.arange(0, BLOCK_K)
        m_w = (o_row < K)[:, None] & (o_n < N)[None, :]
        b_w = tl.load(p_w_out + o_row[:, None] * N + o_n[None, :], mask=m_w, other=0.0).to(tl.float32)
        b_some = tl.sum(b_w * b_y[None, :], 1)  # [BLOCK_K]
        b_v += tl.sum(tl.where(o_k[:, None] == o_row[None, :], b_some[None, :], 0.0), 1)
    return b_v


@triton.jit
def write_codes(
    b_x, p_semantic, p_embeddings, p_codes, p_next, i_b,
    K: tl.constexpr, E: tl.constexpr, PAD_K: tl.constexpr, PAD_E: tl.constexpr,
    LEVELS: tl.constexpr, SEMANTIC_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """Write a request's codes, int64 [1 + K], and, unless `p_embeddings` is None, the sum of the embeddings, [E].

    `b_x` is the state, fp32 [PAD_K]. For a semantic code of 1 (END), every acoustic code is 2, which is level 0. If the
    state has NaN or infinity, the semantic code is replaced by NOT_FINITE (-1). The sum of such a frame's embeddings
    means nothing.
    """
    is_finite = tl.min((tl.abs(b_x) < float("inf")).to(tl.int32), 0) == 1
    b_x = tl.where(b_x > -1.0, b_x, -1.0)  # NaN becomes -1 too: every code must be a valid index of embeddings
    b_x = tl.where(b_x < 1.0, b_x, 1.0)
    b_level = round_half_even((b_x + 1) / 2 * (LEVELS - 1)).to(tl.int64)
    semantic = tl.where(is_finite, tl.load(p_semantic + i_b), NOT_FINITE)
    b_code = tl.where(semantic == END_AUDIO, 0, b_level) + N_SPECIAL_CODES  # [K]
    o_k, o_e = tl.arange(0, PAD_K), tl.arange(0, PAD_E)
    tl.store(p_codes + i_b * (1 + K), semantic)
    tl.store(p_codes + i_b * (1 + K) + 1 + o_k, b_code, mask=o_k < K)

    if p_embeddings is not None:
        m_e = o_e < E
        row = tl.maximum(semantic, 0)  # NOT_FINITE is -1, which is not a row
        b_next = tl.load(p_embeddings + row * E + o_e, mask=m_e, other=0.0).to(tl.float32)
        b_row = SEMANTIC_SIZE + N_SPECIAL_CODES + (LEVELS + N_SPECIAL_CODES) * o_k + b_code  # [K], int64
        for k in tl.range(0, K, BLOCK_K, num_stages=PIPE):
            o_some = k + tl.arange(0, BLOCK_K)
            o_row = tl.sum(tl.where(o_some[:, None] == o_k[None, :], b_row[None, :], 0), 1)  # [BLOCK_K] of b_row
            m_b = (o_some < K)[:, None] & m_e[None, :]
            b_next += tl.sum(
                tl.load(p_embeddings + o_row[:, None] * E + o_e[None, :], mask=m_b, other=0.0).to(tl.float32), 0
            )
        tl.store(p_next + i_b * E + o_e, cast(b_next, p_next.dtype.element_ty), mask=m_e)
