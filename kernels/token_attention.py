"""Attention over the three tokens [x, t, h] of the flow head, alone or fused with the output projection wo.

Each pair (branch, request) is a sequence of three tokens: the flow's state x, the time t and the hidden state h. The
two branches are those of classifier-free guidance: branch 0 has the hidden state, and branch 1 has zeros in its place::

    qkv  = q | k | v                   [6B, W], W = (H + 2 Hkv) * D, in rows token * 2B + branch * B + request
    s_ij = q_i . k_j / sqrt(D)         [3, 3] for each pair and query head; i, j = x, t, h
    o_i  = sum_j softmax_j(s_i) v_j    [D]

    token_attention        = o                       [n_tokens * 2B, H * D]
    token_attention_linear = residual + o @ wo.T     [6, dim], or [2, dim] for the queries of x alone, with B = 1

A block of ``token_attention`` computes all queries of 2 * BLOCK_B pairs that read one key head: three tokens and
H / Hkv query heads. With only three keys, scores are elementwise products and sums, not matrix products.
``token_attention_linear`` is for one request. It is tiled along the rows of wo. Each block repeats the attention, which
saves a launch. The attention is computed by matrix products, which take few instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot, with_block
from .launch_config import LaunchConfigs
from .operator import expect, expect_batch, operator
from .overlap import OFF, prefetch_rows, wait_for_launches
from .quantized import expect_weight, scaled, stored, widen

__all__ = ["token_attention", "token_attention_linear"]

# No two blocks load the same elements. In the public model, a block loads 2 pairs x 3 tokens x (4 query heads + key +
# value) = 36 rows of 128 columns, before it computes.
TOKEN_ATTENTION = LaunchConfigs(
    "token_attention",
    """
    arch         rows | BLOCK_B  num_warps
    interpreter  *    | 2        4
    *            *    | 1        4
    """,
)

# With BLOCK_N = 32, a step of the public model holds 32 KB of 16-bit weights: the columns of wo that belong to the four
# heads of a key head. With 3 stages, two steps lie in shared memory: 92,160 of the 101,376 bytes on sm_86, sm_89 and
# sm_120. On AMD GPUs, each of 192 blocks with 16 rows of wo has 16 KB of weights in flight on gfx942, and 32 KB on
# gfx950.
TOKEN_ATTENTION_LINEAR = LaunchConfigs(
    "token_attention_linear",
    """
    arch         | BLOCK_M  BLOCK_N  num_warps  num_stages
    interpreter  | 16       32       4          1
    gfx950       | 16       16       4          3
    gfx*         | 16       16       4          2
    sm_*         | 8        32       4          3
    """,
)


MAX_FUSED_COLUMNS = 512  # columns of the heads of one key head; with more, a step does not fit into shared memory


@triton.jit
def scores(b_q, b_k_x, b_k_t, b_k_h, D: tl.constexpr):
    """Return the products of queries with the keys of three tokens, divided by ``sqrt(D)``.

    Args:
        b_q: [P, G, D], the queries of G heads that share a key head, for P pairs.
        b_k_x: [P, 1, D], the key of each pair's x token.
        b_k_t: [P, 1, D], the key of each pair's t token.
        b_k_h: [P, 1, D], the key of each pair's h token.
        D: columns of a head. The blocks may have more columns, which are zero.

    The first dimension of a block may also be 1, and is then broadcast.

    Returns:
        Three fp32 blocks [P, G].
    """
    b_q = b_q.to(tl.float32) * D**-0.5
    b_s_x, b_s_t = tl.sum(b_q * b_k_x.to(tl.float32), 2), tl.sum(b_q * b_k_t.to(tl.float32), 2)
    return b_s_x, b_s_t, tl.sum(b_q * b_k_h.to(tl.float32), 2)


@triton.jit
def attend(b_s_x, b_s_t, b_s_h, b_v_x, b_v_t, b_v_h):
    """Return the softmax of :func:`scores` times the values [P, 1, D] of three tokens: fp32 [P, G, D]."""
    b_max = tl.maximum(tl.maximum(b_s_x, b_s_t), b_s_h)
    b_s_x, b_s_t, b_s_h = tl.exp(b_s_x - b_max), tl.exp(b_s_t - b_max), tl.exp(b_s_h - b_max)
    b_scale = 1.0 / (b_s_x + b_s_t + b_s_h)
    b_o = (b_s_x * b_scale)[:, :, None] * b_v_x.to(tl.float32)
    b_o += (b_s_t * b_scale)[:, :, None] * b_v_t.to(tl.float32)
    b_o += (b_s_h * b_scale)[:, :, None] * b_v_h.to(tl.float32)
    return b_o


@triton.jit(do_not_specialize=["B2"])
def _token_attention_kernel(
    p_qkv, p_out,
    B2,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, N_TOKENS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    W: tl.constexpr = (H + 2 * HKV) * D
    G: tl.constexpr = H // HKV
    COLUMNS: tl.constexpr = triton.next_power_of_2(D)  # type: ignore[arg-type]
    i_p, i_kv = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_p = (i_p * 2 * BLOCK_B + tl.arange(0, 2 * BLOCK_B))[:, None, None]
    o_g, o_d = tl.arange(0, GROUP)[None, :, None], tl.arange(0, COLUMNS)[None, None, :]
    m_k = (o_p < B2) & (o_d < D)
    m_q = m_k & (o_g < G)
    o_q = (i_kv * G + o_g) * D + o_d
    token = B2.to(tl.int64) * W  # elements from a token's rows to those of the next token
    p_k = p_qkv + o_p * W + (H + i_kv) * D + o_d  # [pairs, 1, D]
    p_v = p_k + HKV * D
    b_k_x, b_v_x = tl.load(p_k, mask=m_k, other=0.0), tl.load(p_v, mask=m_k, other=0.0)
    b_k_t, b_v_t = tl.load(p_k + token, mask=m_k, other=0.0), tl.load(p_v + token, mask=m_k, other=0.0)
    b_k_h, b_v_h = tl.load(p_k + 2 * token, mask=m_k, other=0.0), tl.load(p_v + 2 * token, mask=m_k, other=0.0)
    queries = ()
    for i in tl.static_range(N_TOKENS):
        queries = with_block(queries, tl.load(p_qkv + i * token + o_p * W + o_q, mask=m_q, other=0.0))  # [pairs, G, D]
    for i in tl.static_range(N_TOKENS):
        b_s_x, b_s_t, b_s_h = scores(queries[i], b_k_x, b_k_t, b_k_h, D)
        b_o = attend(b_s_x, b_s_t, b_s_h, b_v_x, b_v_t, b_v_h)
        tl.store(p_out + (i * B2 + o_p) * (H * D) + o_q, cast(b_o, p_out.dtype.element_ty), mask=m_q)


def launch_token_attention(
    out: Tensor, qkv: Tensor, n_heads: int, n_kv_heads: int, n_tokens: int, max_batch: int
) -> None:
    """Run :func:`token_attention` into `out`, contiguous [n_tokens * 2B, H * D], without checking the arguments."""
    B2, W = len(qkv) // 3, qkv.shape[1]
    D = W // (n_heads + 2 * n_kv_heads)
    constants = TOKEN_ATTENTION(N=W, K=D, dtype=qkv.dtype, rows=max_batch)
    constants |= {"H": n_heads, "HKV": n_kv_heads, "D": D, "N_TOKENS": n_tokens}
    constants["GROUP"] = triton.next_power_of_2(n_heads // n_kv_heads)
    grid = (triton.cdiv(B2, 2 * constants["BLOCK_B"]), n_kv_heads)
    _token_attention_kernel[grid](qkv, out, B2, **constants)


@operator(launch_token_attention)
def token_attention(qkv: Tensor, n_heads: int, n_kv_heads: int, n_tokens: int, max_batch: int) -> Tensor:
    """Compute attention over the three tokens [x, t, h] of each pair (branch, request), without mask or positions.

    Args:
        qkv: [6B, W] fp32, bf16 or fp16, q | k | v of the tokens, in rows token * 2B + branch * B + request;
            W = (H + 2 Hkv) * D.
        n_heads: H query heads.
        n_kv_heads: Hkv key heads, a divisor of H; query head h reads key head ``h // (H / Hkv)``.
        n_tokens: 3, or 1 to compute only the queries of the x tokens.
        max_batch: the most requests that the operator is prepared for, 1..64. The launch config depends on this number,
            so a request's result depends neither on B nor on the other requests.

    Returns:
        [n_tokens * 2B, H * D], token-major. The softmax and all sums are fp32, and the result is rounded once.

    Raises:
        ValueError: B is not in 1..max_batch, `n_tokens` is not 1 or 3, or W does not fit `n_heads` and `n_kv_heads`.
    """
    M, W = expect("qkv", qkv, ("6B", "W"))
    D = expect_heads_of_tokens("qkv", W, n_heads, n_kv_heads)
    expect_n_tokens(n_tokens)
    expect_batch("qkv", M, 6, max_batch)
    return qkv.new_empty(n_tokens * M // 3, n_heads * D)


def expect_heads_of_tokens(name: str, columns: int, n_heads: int, n_kv_heads: int) -> int:
    """Check that the `columns` of q | k | v split into H + 2 Hkv heads, and return the columns of a head.

    Raises:
        ValueError: the columns do not fit, or H is not a multiple of Hkv.
    """
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads or columns % (n_heads + 2 * n_kv_heads):
        raise ValueError(
            f"{name} has {columns} columns, which do not split into {n_heads} + 2 * {n_kv_heads} heads "
            f"(n_heads, n_kv_heads)"
        )
    return columns // (n_heads + 2 * n_kv_heads)


def expect_n_tokens(n_tokens: int) -> None:
    """Check the number of tokens that have queries.

    Raises:
        ValueError: it is not 1 or 3.
    """
    if n_tokens not in (1, 3):
        raise ValueError(f"n_tokens is {n_tokens} but must be 3, or 1 for the x tokens alone")


@triton.jit(do_not_specialize=["M"])
def _token_attention_linear_kernel(
    p_qkv, p_w, p_scale, p_residual, p_y,
    M,
    N: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    # A step computes the query heads of one key head, by batched products. In the public model, each of the four warps
    # has one head. The six keys are the rows of the scores, padded to 16. A query sees the three keys of its branch.
    G: tl.constexpr = H // HKV
    W: tl.constexpr = (H + 2 * HKV) * D
    COLUMNS: tl.constexpr = triton.next_power_of_2(D)  # type: ignore[arg-type]
    o_m, o_n = tl.arange(0, BLOCK_M), tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_g, o_key, o_d = tl.arange(0, GROUP)[:, None, None], tl.arange(0, 16), tl.arange(0, COLUMNS)
    prefetch_rows(p_w, o_n, N, 0, H * D, OVERLAP)
    wait_for_launches(OVERLAP)
    m_n = o_n < N
    m_w = m_n[None, :, None] & (o_g < G) & (o_d < D)[None, None, :]
    m_q = (o_m < M)[None, :, None] & (o_g < G) & (o_d < D)[None, None, :]
    m_k = (o_key < 6)[:, None] & (o_d < D)[None, :]
    p_q = p_qkv + o_m[None, :, None] * W + o_d[None, None, :]
    p_k = p_qkv + o_key[:, None] * W + o_d[None, :]
    p_w += o_n[None, :, None] * (H * D) + o_d[None, None, :]
    is_seen = ((o_key % 2)[:, None] == (o_m % 2)[None, :]) & (o_key < 6)[:, None]
    b_mask = tl.where(is_seen, 0.0, float("-inf"))[None, :, :]
    b_acc = tl.zeros([GROUP, BLOCK_N, BLOCK_M], dtype=tl.float32)
    for i_kv in range(0, HKV):
        o_head = (i_kv * G + o_g) * D
        b_w = tl.load(p_w + o_head, mask=m_w, other=0)  # [G, N, D]
        b_q = tl.load(p_q + o_head, mask=m_q, other=0.0)  # [G, M, D]
        b_k = tl.load(p_k + (H + i_kv) * D, mask=m_k, other=0.0)  # [16, D]
        b_v = tl.load(p_k + (H + HKV + i_kv) * D, mask=m_k, other=0.0)
        b_k = tl.broadcast_to(b_k[None, :, :], [GROUP, 16, COLUMNS])
        b_s = dot(b_k, tl.permute(b_q, (0, 2, 1)), tl.zeros([GROUP, 16, BLOCK_M], dtype=tl.float32)) * D**-0.5 + b_mask
        b_s = tl.exp(b_s - tl.max(b_s, 1)[:, None, :])
        b_s = cast(b_s * (1.0 / tl.sum(b_s, 1))[:, None, :], b_v.dtype)
        b_v = tl.broadcast_to(tl.trans(b_v)[None, :, :], [GROUP, COLUMNS, 16])
        b_o = dot(b_v, b_s, tl.zeros([GROUP, COLUMNS, BLOCK_M], dtype=tl.float32))  # [G, D, M]
        b_acc = dot(widen(b_w, b_v.dtype), cast(b_o, b_v.dtype), b_acc)
    b_y = scaled(tl.sum(b_acc, 0), p_scale, o_n, m_n)
    m_y = (o_m < M)[None, :] & m_n[:, None]
    o_y = o_m[None, :] * N + o_n[:, None]
    b_y += tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, cast(b_y, p_y.dtype.element_ty), mask=m_y)


def launch_token_attention_linear(
    out: Tensor, qkv: Tensor, wo: Tensor, residual: Tensor, n_heads: int, n_kv_heads: int, scale: Tensor | None = None
) -> None:
    """Run :func:`token_attention_linear` into `out`, contiguous [M, dim], without checking the arguments."""
    M, N = out.shape
    D = qkv.shape[1] // (n_heads + 2 * n_kv_heads)
    constants = TOKEN_ATTENTION_LINEAR(N=N, K=n_heads * D, dtype=qkv.dtype, rows=6, weight=wo.dtype)
    constants |= {"N": N, "H": n_heads, "HKV": n_kv_heads, "D": D}
    constants["GROUP"] = triton.next_power_of_2(n_heads // n_kv_heads)
    _token_attention_linear_kernel[(1, triton.cdiv(N, constants["BLOCK_N"]))](
        qkv, stored(wo), scale, residual, out, M, **constants
    )


@operator(launch_token_attention_linear)
def token_attention_linear(
    qkv: Tensor, wo: Tensor, residual: Tensor, n_heads: int, n_kv_heads: int, scale: Tensor | None = None
) -> Tensor:
    """Compute ``residual + attention @ wo.T`` of one request in one launch. Each block repeats the attention.

    Args:
        qkv: [6, W] bf16 or fp16, see :func:`token_attention`, also for `n_heads` and `n_kv_heads`.
        wo: [dim, H * D], the output projection, as a checkpoint stores it, in qkv's dtype or in 8 bits.
        residual: [6, dim], or [2, dim] to compute only the queries of the x tokens.
        n_heads: H query heads.
        n_kv_heads: Hkv key heads.
        scale: fp32 [dim], the scale of each row of `wo` in 8 bits, else None.

    Returns:
        [6, dim] or [2, dim], like `residual`, token-major. The softmax and all sums are fp32. The softmax is rounded
        before its product with the values, and so is the attention before its product with `wo`.

    Raises:
        TypeError: the tensors are fp32. For fp32, call :func:`token_attention` and then
            :func:`voxkern.kernels.linear.linear`.
        ValueError: `qkv` has more than one request, or W does not fit `n_heads` and `n_kv_heads`. The heads of a key
            head have more than 512 columns, or `residual` has neither 2 nor 6 rows.
    """
    if qkv.dtype == torch.float32:  # a product over 128 fp32 columns needs more registers than a thread has
        raise TypeError("qkv is torch.float32 but must be bf16 or fp16: for fp32 call token_attention, then linear")
    attended = token_attention.declare(qkv, n_heads, n_kv_heads, 3, 1)
    if (columns := attended.shape[1] // n_kv_heads) > MAX_FUSED_COLUMNS:
        raise ValueError(
            f"the heads of one key head have {columns} columns (n_heads / n_kv_heads * D) but may have "
            f"{MAX_FUSED_COLUMNS}: call token_attention, then linear"
        )
    N, _ = expect_weight("wo", wo, ("dim", attended.shape[1]), scale, like=qkv)
    M, _ = expect("residual", residual, ("M", N), like=qkv)
    if M not in (2, 6):
        raise ValueError(f"residual has {M} rows but must have 2 or 6")
    return residual.new_empty(M, N)
