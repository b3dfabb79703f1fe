"""Attention over the three tokens [x, t, h] of the flow head, alone or fused with the output projection wo.

Each pair (branch, request) is a sequence of three tokens: the flow's state x, the time t and the hidden state h. The
two branches are those of classifier-free guidance: branch 0 has the hidden state, and branch 1 has zeros in its place::

    q | k | v                          columns of x_qkv [n_x, W], t_qkv [n_t, W], h_qkv [2B, W]; W = (H + 2 Hkv) * D
    s_ij = q_i . k_j / sqrt(D)         [3, 3] for each pair and query head; i, j = x, t, h
    o_i  = sum_j softmax_j(s_i) v_j    [D]

    token_attention        = o                       [n_tokens * 2B, H * D]
    token_attention_linear = residual + o @ wo.T     [6, dim], or [2, dim] for the queries of x alone, with B = 1

    row = token * 2B + branch * B + request          token 0 = x, 1 = t, 2 = h

Rows that are equal for many pairs are stored once. In the first layer, the two branches of a request share the x row
(n_x = B), and all pairs share one t row (n_t = 1).

For BLOCK_B requests, a block of ``token_attention`` computes all queries that read one key head: 2 branches, 3 tokens
and H / Hkv query heads. No other block loads these q, k and v, except those of a shared t row. With only three keys,
scores are elementwise products and sums, not matrix products. ``token_attention_linear`` is for one request. It is
tiled along the rows of wo. Each block repeats the attention, which saves a launch. The attention is computed by matrix
products, which take few instructions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .launch_config import LaunchConfigs
from .operator import expect, expect_batch, operator
from .overlap import OFF, prefetch_rows, wait_for_launches
from .quantized import expect_weight, scaled, stored, widen

__all__ = ["token_attention", "token_attention_linear"]

# A block computes all queries that read one key head of a request, so no other block loads the same elements of q, k
# and v, except those of a t row that all requests share. In the public model, these queries are 2 branches x 3 tokens x
# 4 query heads = 24 rows per request, padded to 32. A row has 128 columns, which are held in registers as fp32.
TOKEN_ATTENTION = LaunchConfigs(
    "token_attention",
    """
    arch         rows | BLOCK_B  num_warps
    interpreter  *    | 2        4
    *            *    | 1        16
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
def attend_tokens(
    p_x, p_t, p_h, o_row, m_row, B2, n_x, n_t, i_head,
    W: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Compute attention of some rows: ``softmax(q k^T / sqrt(D)) v`` over the three tokens of each row's pair.

    Args:
        p_x: [n_x, W], q | k | v of the x tokens; pair i reads row i % n_x.
        p_t: [n_t, W], q | k | v of the t tokens; pair i reads row i % n_t.
        p_h: [2B, W], q | k | v of the h tokens.
        o_row: int block [rows], row numbers: token * 2B + branch * B + request.
        m_row: bool [rows], which rows exist; the other rows give zeros.
        B2: 2B, the number of pairs.
        n_x: B or 2B.
        n_t: 1 or 2B.
        i_head: int block [rows], query heads.
        W: (H + 2 HKV) * D.
        H: query heads.
        HKV: key heads.
        D: columns of a head.

    Returns:
        fp32 [rows, D], with the columns padded with zeros to a power of two.
    """
    COLUMNS: tl.constexpr = triton.next_power_of_2(D)  # type: ignore[arg-type]
    o_d = tl.arange(0, COLUMNS)
    m_d = m_row[:, None] & (o_d < D)[None, :]
    token = o_row.to(tl.int32) // B2  # int32, because a 64-bit division takes a hundred instructions
    i = o_row.to(tl.int32) % B2
    o_x = (i % n_x).to(tl.int64)[:, None] * W + o_d[None, :]  # [rows, D]
    o_t = (i % n_t).to(tl.int64)[:, None] * W + o_d[None, :]
    o_h = i.to(tl.int64)[:, None] * W + o_d[None, :]
    o_q = (i_head * D)[:, None]
    o_k = ((H + i_head // (H // HKV)) * D)[:, None]
    o_v = o_k + HKV * D

    # Each row loads from one of three pointers, and the row's other two loads are masked off. The compiler could not
    # infer the alignment of a single pointer that is selected among three.
    b_q = tl.load(p_x + o_x + o_q, mask=m_d & (token == 0)[:, None], other=0.0).to(tl.float32)
    b_q += tl.load(p_t + o_t + o_q, mask=m_d & (token == 1)[:, None], other=0.0).to(tl.float32)
    b_q += tl.load(p_h + o_h + o_q, mask=m_d & (token == 2)[:, None], other=0.0).to(tl.float32)
    b_q *= D**-0.5

    b_s_x = tl.sum(b_q * tl.load(p_x + o_x + o_k, mask=m_d, other=0.0).to(tl.float32), 1)  # [rows]
    b_s_t = tl.sum(b_q * tl.load(p_t + o_t + o_k, mask=m_d, other=0.0).to(tl.float32), 1)
    b_s_h = tl.sum(b_q * tl.load(p_h + o_h + o_k, mask=m_d, other=0.0).to(tl.float32), 1)
    b_max = tl.maximum(tl.maximum(b_s_x, b_s_t), b_s_h)
    b_s_x, b_s_t, b_s_h = tl.exp(b_s_x - b_max), tl.exp(b_s_t - b_max), tl.exp(b_s_h - b_max)
    b_scale = 1.0 / (b_s_x + b_s_t + b_s_h)

    b_o = (b_s_x * b_scale)[:, None] * tl.load(p_x + o_x + o_v, mask=m_d, other=0.0).to(tl.float32)
    b_o += (b_s_t * b_scale)[:, None] * tl.load(p_t + o_t + o_v, mask=m_d, other=0.0).to(tl.float32)
    b_o += (b_s_h * b_scale)[:, None] * tl.load(p_h + o_h + o_v, mask=m_d, other=0.0).to(tl.float32)
    return b_o


@triton.jit(do_not_specialize=["B2", "n_x", "n_t"])
def _token_attention_kernel(
    p_x, p_t, p_h, p_out,
    B2, n_x, n_t,
    W: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, N_TOKENS: tl.constexpr,
    N_QUERIES: tl.constexpr, GROUP: tl.constexpr, BLOCK_B: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    # a row of the block is a (request, branch, token, head of the group); tokens and heads are padded to powers of two
    i_b, i_kv = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o = tl.arange(0, BLOCK_B * 2 * N_QUERIES * GROUP)
    o_group, o_token, o_branch = o % GROUP, o // GROUP % N_QUERIES, o // (GROUP * N_QUERIES) % 2
    o_b = i_b * BLOCK_B + o // (GROUP * N_QUERIES * 2)
    m_row = (o_b < B2 // 2) & (o_token < N_TOKENS) & (o_group < H // HKV)
    i_head = i_kv * (H // HKV) + o_group
    o_row = o_token * B2 + o_branch * (B2 // 2) + o_b
    b_o = attend_tokens(p_x, p_t, p_h, o_row, m_row, B2, n_x, n_t, i_head, W, H, HKV, D)
    COLUMNS: tl.constexpr = triton.next_power_of_2(D)  # type: ignore[arg-type]
    o_d = tl.arange(0, COLUMNS)
    p_row = p_out + o_row * (H * D) + i_head * D
    m_o = m_row[:, None] & (o_d < D)[None, :]
    tl.store(p_row[:, None] + o_d[None, :], cast(b_o, p_out.dtype.element_ty), mask=m_o)


def launch_token_attention(
    out: Tensor, x_qkv: Tensor, t_qkv: Tensor, h_qkv: Tensor,
    n_heads: int, n_kv_heads: int, n_tokens: int, max_batch: int,
) -> None:  # fmt: skip
    """Run :func:`token_attention` into `out`, contiguous [n_tokens * 2B, H * D], without checking the arguments."""
    B2, W = h_qkv.shape
    D = W // (n_heads + 2 * n_kv_heads)
    constants = TOKEN_ATTENTION(N=W, K=D, dtype=h_qkv.dtype, rows=max_batch)
    constants |= {"W": W, "H": n_heads, "HKV": n_kv_heads, "D": D, "N_TOKENS": n_tokens}
    constants["N_QUERIES"] = triton.next_power_of_2(n_tokens)
    constants["GROUP"] = triton.next_power_of_2(n_heads // n_kv_heads)
    grid = (triton.cdiv(B2 // 2, constants["BLOCK_B"]), n_kv_heads)
    _token_attention_kernel[grid](x_qkv, t_qkv, h_qkv, out, B2, x_qkv.shape[0], t_qkv.shape[0], **constants)


@operator(launch_token_attention)
def token_attention(
    x_qkv: Tensor, t_qkv: Tensor, h_qkv: Tensor, n_heads: int, n_kv_heads: int, n_tokens: int, max_batch: int
) -> Tensor:
    """Compute attention over the three tokens [x, t, h] of each pair (branch, request), without mask or positions.

    Args:
        x_qkv: [n_x, W] fp32, bf16 or fp16, q | k | v of the x tokens; n_x = B or 2B, W = (H + 2 Hkv) * D.
        t_qkv: [n_t, W], q | k | v of the t tokens; n_t = 1 or 2B.
        h_qkv: [2B, W], q | k | v of the h tokens.
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
    B2, W = expect("h_qkv", h_qkv, ("2B", "W"))
    n_x, _ = expect("x_qkv", x_qkv, ("n_x", W), like=h_qkv)
    n_t, _ = expect("t_qkv", t_qkv, ("n_t", W), like=h_qkv)
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads or W % (n_heads + 2 * n_kv_heads):
        raise ValueError(
            f"h_qkv has {W} columns, which do not split into {n_heads} + 2 * {n_kv_heads} heads (n_heads, n_kv_heads)"
        )
    if n_tokens not in (1, 3):
        raise ValueError(f"n_tokens is {n_tokens} but must be 3, or 1 for the x tokens alone")
    expect_batch("h_qkv", B2, 2, max_batch)
    if n_x not in (B2, B2 // 2):
        raise ValueError(f"x_qkv has {n_x} rows but must have B = {B2 // 2} or 2B = {B2}")
    if n_t not in (1, B2):
        raise ValueError(f"t_qkv has {n_t} rows but must have 1 or 2B = {B2}")
    return h_qkv.new_empty(n_tokens * B2, n_heads * (W // (n_heads + 2 * n_kv_heads)))


@triton.jit
def _offset_of_token(p_x, p_t, p_h, o_row, n_x, n_t, W: tl.constexpr, ALIGN: tl.constexpr):
    """Return the offset of each token's q | k | v from `p_x`, in elements; one pointer then serves all three tensors.

    Args:
        p_x: [n_x, W], q | k | v of the x tokens, one for both branches or one for each.
        p_t: [n_t, W], q | k | v of the t tokens.
        p_h: [2, W], q | k | v of the h tokens.
        o_row: int block, row numbers: 2 * token + branch. From row 6 on, the result is 0.
        n_x: 1 or 2.
        n_t: 1 or 2.
        W: columns of q | k | v.
        ALIGN: a number that divides the number of elements between the three pointers.
    """
    SIZE: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth // 8
    to_t = tl.multiple_of((p_t.to(tl.int64) - p_x.to(tl.int64)) // SIZE, ALIGN)
    to_h = tl.multiple_of((p_h.to(tl.int64) - p_x.to(tl.int64)) // SIZE, ALIGN)
    token, branch = o_row // 2, o_row % 2
    o_x, o_t, o_h = tl.minimum(branch, n_x - 1) * W, to_t + tl.minimum(branch, n_t - 1) * W, to_h + branch * W
    # a sum, because the compiler cannot infer the alignment of tl.where's result
    return (token == 0).to(tl.int64) * o_x + (token == 1).to(tl.int64) * o_t + (token == 2).to(tl.int64) * o_h


@triton.jit(do_not_specialize=["M", "n_x", "n_t"])
def _token_attention_linear_kernel(
    p_x, p_t, p_h, p_w, p_scale, p_residual, p_y,
    M, n_x, n_t,
    N: tl.constexpr, W: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr,
    GROUP: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    # A step computes the query heads of one key head, by batched products. In the public model, each of the four warps
    # has one head. The six keys are the rows of the scores, padded to 16. A query sees the three keys of its branch.
    G: tl.constexpr = H // HKV
    COLUMNS: tl.constexpr = triton.next_power_of_2(D)  # type: ignore[arg-type]
    o_m, o_n = tl.arange(0, BLOCK_M), tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_g, o_key, o_d = tl.arange(0, GROUP)[:, None, None], tl.arange(0, 16), tl.arange(0, COLUMNS)
    prefetch_rows(p_w, o_n, N, 0, H * D, OVERLAP)
    wait_for_launches(OVERLAP)
    m_n = o_n < N
    m_w = m_n[None, :, None] & (o_g < G) & (o_d < D)[None, None, :]
    m_q = (o_m < M)[None, :, None] & (o_g < G) & (o_d < D)[None, None, :]
    m_k = (o_d < D)[None, :]
    p_q = p_x + _offset_of_token(p_x, p_t, p_h, o_m, n_x, n_t, W, ALIGN)[None, :, None] + o_d[None, None, :]
    p_k = p_x + _offset_of_token(p_x, p_t, p_h, o_key, n_x, n_t, W, ALIGN)[:, None] + o_d[None, :]
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
    out: Tensor, x_qkv: Tensor, t_qkv: Tensor, h_qkv: Tensor, wo: Tensor, residual: Tensor,
    n_heads: int, n_kv_heads: int, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Run :func:`token_attention_linear` into `out`, contiguous [M, dim], without checking the arguments."""
    W, (M, N) = h_qkv.shape[1], out.shape
    D = W // (n_heads + 2 * n_kv_heads)
    constants = TOKEN_ATTENTION_LINEAR(N=N, K=n_heads * D, dtype=h_qkv.dtype, rows=6, weight=wo.dtype)
    constants |= {"N": N, "W": W, "H": n_heads, "HKV": n_kv_heads, "D": D}
    constants["GROUP"] = triton.next_power_of_2(n_heads // n_kv_heads)
    # loads of 16 bytes need tokens at distances of multiples of 16 bytes
    is_aligned = all((qkv.data_ptr() - x_qkv.data_ptr()) % 16 == 0 for qkv in (t_qkv, h_qkv))
    constants["ALIGN"] = 16 // x_qkv.element_size() if is_aligned else 1
    _token_attention_linear_kernel[(1, triton.cdiv(N, constants["BLOCK_N"]))](
        x_qkv, t_qkv, h_qkv, stored(wo), scale, residual, out, M, len(x_qkv), len(t_qkv), **constants
    )


@operator(launch_token_attention_linear)
def token_attention_linear(
    x_qkv: Tensor,
    t_qkv: Tensor,
    h_qkv: Tensor,
    wo: Tensor,
    residual: Tensor,
    n_heads: int,
    n_kv_heads: int,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute ``residual + attention @ wo.T`` of one request in one launch. Each block repeats the attention.

    Args:
        x_qkv: [n_x, W] bf16 or fp16, see :func:`token_attention`, also for `n_heads` and `n_kv_heads`; n_x = 1 or 2.
        t_qkv: [n_t, W], q | k | v of the t tokens; n_t = 1 or 2.
        h_qkv: [2, W], q | k | v of the h tokens.
        wo: [dim, H * D], the output projection, as a checkpoint stores it, in x_qkv's dtype or in 8 bits.
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
        ValueError: `h_qkv` has more than one request, or W does not fit `n_heads` and `n_kv_heads`. The heads of a key
            head have more than 512 columns, or `residual` has neither 2 nor 6 rows.
    """
    if h_qkv.dtype == torch.float32:  # a product over 128 fp32 columns needs more registers than a thread has
        raise TypeError("h_qkv is torch.float32 but must be bf16 or fp16: for fp32 call token_attention, then linear")
    attended = token_attention.declare(x_qkv, t_qkv, h_qkv, n_heads, n_kv_heads, 3, 1)
    if (columns := attended.shape[1] // n_kv_heads) > MAX_FUSED_COLUMNS:
        raise ValueError(
            f"the heads of one key head have {columns} columns (n_heads / n_kv_heads * D) but may have "
            f"{MAX_FUSED_COLUMNS}: call token_attention, then linear"
        )
    N, _ = expect_weight("wo", wo, ("dim", attended.shape[1]), scale, like=h_qkv)
    M, _ = expect("residual", residual, ("M", N), like=h_qkv)
    if M not in (2, 6):
        raise ValueError(f"residual has {M} rows but must have 2 or 6")
    return residual.new_empty(M, N)
