"""Device functions around a velocity network: initial noise, projections of one row, a solver step and codes.

For one request with K acoustic codebooks, a network of width N and embeddings of width E::

    init_noise     x ~ N(0, 1)                                     [K], or given
    project_in     token = w_in @ x + bias                         [N], the same for both branches
        the network, in other launches: token -> y                 [N]
    project_out    v = w_out @ y                                   [K], the velocity
    solver_step    x = x + dt * (v + ab2_ratio * (v - v_last))     [K], with v_last of the step before
    write_codes    code = round((clamp(x, -1, 1) + 1) / 2 * (levels - 1)) + 2      int64 [K]
                   next = sum of the embeddings of the semantic and acoustic codes     [E]

Both projections are small, and the next input projection needs the velocity of all K codebooks. One block therefore
computes a whole step of one request: a step is one launch, and no block waits for another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import END_AUDIO, N_SPECIAL_CODES, cast, normals, round_half_even
from .operator import expect

__all__ = ["init_noise", "load_state", "project_in", "project_out", "solver_step", "write_codes"]


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
def project_out(
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
def load_state(p_x, p_last, i_b, K: tl.constexpr, PAD_K: tl.constexpr):
    """Return a request's state x and the velocity of its last step, fp32 [PAD_K] each, zeros past K."""
    o_k = tl.arange(0, PAD_K)
    b_x = tl.load(p_x + i_b * K + o_k, mask=o_k < K, other=0.0)
    b_last = tl.load(p_last + i_b * K + o_k, mask=o_k < K, other=0.0)
    tl.debug_barrier()  # several warps load the same x: all warps must read x before one warp writes x
    return b_x, b_last


@triton.jit
def solver_step(p_x, p_last, b_x, b_last, b_v, i_b, dt, ab2_ratio, K: tl.constexpr, PAD_K: tl.constexpr):
    """Compute x + dt * (v + ab2_ratio * (v - v_last)), store it as x and v as v_last, and return the new x.

    Returns:
        fp32 [PAD_K], zeros past K.
    """
    dt, ab2_ratio = tl.full([], dt, tl.float32), tl.full([], ab2_ratio, tl.float32)  # torch.compile passes both as fp64
    o_k = tl.arange(0, PAD_K)
    b_x += dt * tl.where(
        ab2_ratio == 0.0, b_v, b_v + ab2_ratio * (b_v - b_last)
    )  # v_last may be NaN in a first step, where ab2_ratio is 0
    tl.store(p_x + i_b * K + o_k, b_x, mask=o_k < K)
    tl.store(p_last + i_b * K + o_k, b_v, mask=o_k < K)
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
def write_codes(
    b_x, p_semantic, p_embeddings, p_codes, p_next, i_b,
    K: tl.constexpr, E: tl.constexpr, PAD_K: tl.constexpr, PAD_E: tl.constexpr,
    LEVELS: tl.constexpr, SEMANTIC_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, PIPE: tl.constexpr,
):  # fmt: skip
    """Write a request's codes, int64 [1 + K], and, unless `p_embeddings` is None, the sum of the embeddings, [E].

    `b_x` is the state, fp32 [PAD_K]. For a semantic code of 1 (END), every acoustic code is 2, which is level 0.
    """
    b_x = tl.where(b_x > -1.0, b_x, -1.0)  # NaN becomes -1 too: every code must be a valid index of embeddings
    b_x = tl.where(b_x < 1.0, b_x, 1.0)
    b_level = round_half_even((b_x + 1) / 2 * (LEVELS - 1)).to(tl.int64)
    semantic = tl.load(p_semantic + i_b)
    b_code = tl.where(semantic == END_AUDIO, 0, b_level) + N_SPECIAL_CODES  # [K]
    o_k, o_e = tl.arange(0, PAD_K), tl.arange(0, PAD_E)
    tl.store(p_codes + i_b * (1 + K), semantic)
    tl.store(p_codes + i_b * (1 + K) + 1 + o_k, b_code, mask=o_k < K)

    if p_embeddings is not None:
        m_e = o_e < E
        b_next = tl.load(p_embeddings + semantic * E + o_e, mask=m_e, other=0.0).to(tl.float32)
        b_row = SEMANTIC_SIZE + N_SPECIAL_CODES + (LEVELS + N_SPECIAL_CODES) * o_k + b_code  # [K], int64
        for k in tl.range(0, K, BLOCK_K, num_stages=PIPE):
            o_some = k + tl.arange(0, BLOCK_K)
            o_row = tl.sum(tl.where(o_some[:, None] == o_k[None, :], b_row[None, :], 0), 1)  # [BLOCK_K] of b_row
            m_b = (o_some < K)[:, None] & m_e[None, :]
            b_next += tl.sum(
                tl.load(p_embeddings + o_row[:, None] * E + o_e[None, :], mask=m_b, other=0.0).to(tl.float32), 0
            )
        tl.store(p_next + i_b * E + o_e, cast(b_next, p_next.dtype.element_ty), mask=m_e)


def padded(N: int, K: int) -> dict[str, int]:
    """Return the kernel constants N, PAD_N and PAD_K.

    PAD_N and PAD_K are N and K, rounded up to powers of two. PAD_K is at least 4, because noise is drawn for four
    codebooks at once.
    """
    return {"N": N, "K": K, "PAD_N": triton.next_power_of_2(N), "PAD_K": max(4, triton.next_power_of_2(K))}


def expect_codes(
    B: int, w_out: Tensor, semantic: Tensor, levels: int, embeddings: Tensor | None, semantic_size: int
) -> tuple[Tensor, Tensor]:
    """Check the arguments of :func:`write_codes`, and allocate its results.

    Args:
        B: requests.
        w_out: [K, dim], the projection of the velocity, with the dtype and device of the embeddings.
        semantic: int64 [B], semantic codes with the offset of 2.
        levels: the number of levels of an acoustic code, 2 or more.
        embeddings: [rows, E], or None.
        semantic_size: the number of codes in the semantic codebook, without the 2 special codes, 1 or more.

    Returns:
        Two uninitialised tensors: the codes, int64 [B, 1 + K], and the sums of embeddings, [B, E], where E = 0 if
        `embeddings` is None.

    Raises:
        ValueError: `embeddings` has too few rows for all codes, or `levels` or `semantic_size` is too small.
    """
    K = len(w_out)
    expect("semantic", semantic, (B,), like=w_out, dtype=torch.int64)
    codes = w_out.new_empty((B, 1 + K), dtype=torch.int64)
    if embeddings is None:
        return codes, w_out.new_empty(B, 0)
    rows, E = expect("embeddings", embeddings, ("rows", "E"), like=w_out)
    least = semantic_size + 2 + K * (levels + 2)
    if levels < 2 or semantic_size < 1 or rows < least:
        raise ValueError(
            f"embeddings has {rows} rows but must have {least} or more: {semantic_size} + 2 semantic codes "
            f"(semantic_size, 1 or more) and {K} x ({levels} + 2) acoustic codes (levels, 2 or more)"
        )
    return codes, w_out.new_empty(B, E)
