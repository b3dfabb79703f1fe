"""Queries, keys and values of the flow head's three tokens, and attention over the tokens, in one launch.

The product is that of ``norm_qkv``, divided among blocks as in shares.py, and the attention is ``token_attention``::

    qkv  = RMSNorm(x) @ [wq | wk | wv].T      [6B, W]               row = token * 2B + branch * B + request
    out  = token_attention(qkv)               [n_tokens * 2B, H * D]

A tile of rows has the x, t and h tokens of the same BLOCK_M pairs (branch, request). So it has all queries, keys and
values of these pairs. For each tile of rows and each key head, a counter counts the completed tiles of this key head,
of its values and of its query heads. The block that completes the last of these tiles computes their attention. This
block reads what other blocks wrote, and the counter orders these writes before the reads.

In the last layer, only the x tokens need queries. So a tile of queries needs a third of the multiply-adds of a tile of
keys or values. With KV_COST > 1, a launch computes only the queries that are needed. The division among blocks
(shares.py) counts a step of keys or values as KV_COST steps of queries. With KV_COST = 1, a launch multiplies the rows
of all tokens, and does not store the queries that are not needed.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .launch_config import LaunchConfigs
from .norm_linear import norm_constants, norm_product
from .operator import expect, expect_batch, operator
from .overlap import OFF, prefetch_rows, wait_for_launches
from .qkv import expect_qkv, store_qkv, tiles_of_qkv, weight_of_tile
from .shares import Scratch, Shares, add_parts, share_of_block
from .token_attention import expect_heads_of_tokens, expect_n_tokens

__all__ = ["norm_qkv_attention"]

# On sm_100 and on AMD GPUs, two launches are predicted to be faster, so the table has no configs for these GPUs. On an
# H100 with 32 requests, one launch is predicted to be 1 to 3 us slower. ROW_TILES is the number of tokens. A step of
# the loop over pairs computes the attention of PAIRS pairs. With PAIR_STAGES > 1, the loads of PAIR_STAGES - 1 steps
# are in flight. A step of four pairs has 48 KB of queries, keys and values, and most of it pads the rows to 16.
# KV_COST has an effect in the last layer only. KV_COST is 1 where loading a step's weights takes longer than
# multiplying the rows of all tokens. Elsewhere, KV_COST is 3, the ratio of the multiply-adds. On sm_80, KV_COST is 2:
# with 3, a block could have so many steps of queries that their instructions limit the time. Where bf16 and fp16
# differ, fp16 would spill registers with the tiles of bf16.
NORM_QKV_ATTENTION = LaunchConfigs(
    "norm_qkv_attention",
    """
    arch        dtype rows | SHARES KV_COST ROW_TILES BLOCK_M BLOCK_N BLOCK_K PAIRS PAIR_STAGES num_warps num_stages
    interpreter *16   *    | 1      3       3         16      16      64      16    1           4         1
    sm_90       *16   24   | 1      1       3         8       64      128     8     1           8         5
    sm_90       *16   96   | 1      1       3         16      64      64      4     5           8         6
    sm_90       *16   *    | 1      1       3         32      128     64      4     5           8         5
    sm_8?       *16   48   | 1      1       3         8       64      64      8     1           8         4
    sm_80       fp16  *    | 1      2       3         16      128     64      16    1           8         4
    sm_80       *16   *    | 1      2       3         32      128     64      16    1           8         4
    sm_8?       *16   *    | 1      3       3         16      128     32      8     1           8         6
    sm_12?      fp16  48   | 1      1       3         8       64      64      4     1           8         4
    sm_12?      fp16  *    | 1      3       3         16      64      64      4     1           8         4
    sm_12?      *16   48   | 1      1       3         8       64      64      8     1           8         4
    sm_12?      *16   *    | 1      3       3         16      128     32      8     1           8         6
    """,
)
ROWS = tl.constexpr(16)  # the queries of a pair that share a key head, padded to the fewest rows of a matrix product
MAX_COLUMNS = 128  # the most columns of a head; with more, the steps in flight do not fit into shared memory


@triton.jit
def _store_attention(
    p_qkv, p_out, o_pair, i_kv, B2,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, N_TOKENS: tl.constexpr,
):  # fmt: skip
    """Store the attention of some pairs for all query heads of one key head.

    The products are batched: each pair has its own. The rows of a product are the pair's queries, token by token and
    head by head, padded to 16. The three keys of a pair are also padded to 16.
    """
    W: tl.constexpr = (H + 2 * HKV) * D
    G: tl.constexpr = H // HKV
    COLUMNS: tl.constexpr = triton.next_power_of_2(D)  # type: ignore[arg-type]
    PAIRS: tl.constexpr = o_pair.shape[0]
    o_p, o_d = o_pair[:, None, None], tl.arange(0, COLUMNS)[None, None, :]
    o_row, o_token = tl.arange(0, ROWS)[None, :, None], tl.arange(0, ROWS)[None, :, None] // G
    m_p = (o_p < B2) & (o_d < D)
    m_q, m_k = m_p & (o_token < N_TOKENS), m_p & (o_row < 3)
    o_q = (i_kv * G + o_row % G) * D + o_d
    p_k = p_qkv + (o_row * B2 + o_p) * W + (H + i_kv) * D + o_d
    # .cg bypasses the L1 cache, as in add_parts. All three blocks are [pairs, 16, D].
    b_k = tl.load(p_k, mask=m_k, other=0.0, cache_modifier=".cg")
    b_v = tl.load(p_k + HKV * D, mask=m_k, other=0.0, cache_modifier=".cg")
    b_q = tl.load(p_qkv + (o_token * B2 + o_p) * W + o_q, mask=m_q, other=0.0, cache_modifier=".cg")
    b_s = dot(b_q, tl.permute(b_k, (0, 2, 1)), tl.zeros([PAIRS, ROWS, ROWS], dtype=tl.float32)) * D**-0.5
    b_s = tl.where(tl.arange(0, ROWS)[None, None, :] < 3, b_s, float("-inf"))
    b_s = tl.exp(b_s - tl.max(b_s, 2)[:, :, None])
    b_s = cast(b_s * (1.0 / tl.sum(b_s, 2))[:, :, None], b_v.dtype)
    b_o = dot(b_s, b_v, tl.zeros([PAIRS, ROWS, COLUMNS], dtype=tl.float32))
    tl.store(p_out + (o_token * B2 + o_p) * (H * D) + o_q, cast(b_o, p_out.dtype.element_ty), mask=m_q)


@triton.jit
def _compute_part(
    p_x, p_norm, p_w, p_qkv, p_parts, p_arrived, o_m, B2, rows, which, i_tile, i_n, n, stride_x, eps, first, end,
    N: tl.constexpr, N_KV: tl.constexpr, K: tl.constexpr, NORM_FIRST: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, COUNT: tl.constexpr, CHEAP_STEPS: tl.constexpr, KV_COST: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute this block's part of a tile of q | k | v, and store the tile if it is complete.

    The part is the sum over the steps `first` to `end`, for the first TOKENS tokens of the pairs `o_m`. Rows from
    `rows` on count as zero, and are not stored. The result is whether the tile is complete.
    """
    o_n = tl.arange(0, BLOCK_N).to(tl.int64) + i_n * BLOCK_N
    blocks = norm_product(
        p_x, p_norm, p_w, None, o_m, B2, o_n, rows, o_n < n, stride_x, eps, first * BLOCK_K, end * BLOCK_K,
        K, NORM_FIRST, TOKENS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    blocks, is_complete = add_parts(
        blocks, p_parts, p_arrived, i_tile, first, end, TILES, STEPS, COUNT, BLOCK_M * BLOCK_N, CHEAP_STEPS, KV_COST
    )
    if is_complete:
        store_qkv(
            blocks, which, None, None, None, p_qkv, o_m, B2, o_n, rows, n, eps,
            N, N_KV, K, NORM_FIRST, TOKENS,
        )  # fmt: skip
    return is_complete


@triton.jit(do_not_specialize=["B2"])
def _norm_qkv_attention_kernel(
    p_x, p_norm, p_q, p_k, p_v, p_qkv, p_out, p_parts, p_arrived,
    B2, stride_x, eps,
    N: tl.constexpr, N_KV: tl.constexpr, K: tl.constexpr, D: tl.constexpr, N_TOKENS: tl.constexpr,
    NORM_FIRST: tl.constexpr, COUNT: tl.constexpr, SHARES: tl.constexpr, KV_COST: tl.constexpr,
    ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr,
    PAIR_STAGES: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    H: tl.constexpr = N // D
    HKV: tl.constexpr = N_KV // D
    TILES: tl.constexpr = (N + 2 * N_KV) // BLOCK_N
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    CHEAP_STEPS: tl.constexpr = N // BLOCK_N * STEPS
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # pairs, and rows of the x tokens
    o_m = tl.where(o_m < B2, o_m, 3 * B2)  # past the last pair, no token has a row
    start, stop = share_of_block(TILES * STEPS, CHEAP_STEPS, KV_COST)
    _, p_w, n, i_n = weight_of_tile(p_q, p_k, p_v, start // STEPS, N, N_KV, BLOCK_N)
    o_first = tl.arange(0, BLOCK_N).to(tl.int64) + i_n * BLOCK_N
    prefetch_rows(p_w, o_first, n, start % STEPS * BLOCK_K, K, OVERLAP)
    wait_for_launches(OVERLAP)
    for i_tile in range(start // STEPS, tl.cdiv(stop, STEPS)):
        first, end = tl.maximum(start - i_tile * STEPS, 0), tl.minimum(stop - i_tile * STEPS, STEPS)
        which, p_w, n, i_n = weight_of_tile(p_q, p_k, p_v, i_tile, N, N_KV, BLOCK_N)
        rows = tl.where(which == 0, N_TOKENS, 3) * B2
        if (which == 0) & (KV_COST > 1):
            is_complete = _compute_part(
                p_x, p_norm, p_w, p_qkv, p_parts, p_arrived, o_m, B2, rows, which, i_tile, i_n, n, stride_x, eps,
                first, end, N, N_KV, K, NORM_FIRST, TILES, STEPS, COUNT, CHEAP_STEPS, KV_COST,
                N_TOKENS, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            is_complete = _compute_part(
                p_x, p_norm, p_w, p_qkv, p_parts, p_arrived, o_m, B2, rows, which, i_tile, i_n, n, stride_x, eps,
                first, end, N, N_KV, K, NORM_FIRST, TILES, STEPS, COUNT, CHEAP_STEPS, KV_COST,
                ROW_TILES, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if is_complete:
            i_kv = i_n * BLOCK_N // tl.where(which == 0, H // HKV * D, D)
            p_counter = p_arrived + tl.num_programs(0) * TILES + i_m * HKV + i_kv
            tl.debug_barrier()  # as in add_parts: the stores of all threads come before the atomic add
            arrived = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            if arrived == (H // HKV + 2) * (D // BLOCK_N) - 1:
                i_pair = tl.program_id(0) * BLOCK_M
                for i in tl.range(i_pair, tl.minimum(i_pair + BLOCK_M, B2), PAIRS, num_stages=PAIR_STAGES):
                    o_pair = i + tl.arange(0, PAIRS).to(tl.int64)
                    _store_attention(p_qkv, p_out, o_pair, i_kv, B2, H, HKV, D, N_TOKENS)
                tl.store(p_counter, 0)  # the next launch counts from zero


def norm_qkv_attention_shares(wq: Tensor, wk: Tensor, dtype: torch.dtype, n_kv_heads: int, max_batch: int) -> Shares:
    """Return how :func:`launch_norm_qkv_attention` divides the products of `wq`, `wk` and a third weight.

    The result is for three tokens. A launch with the queries of one token needs no more scratch memory.
    """
    return _shares(_constants(wq, dtype, 3, max_batch), wq, wk, n_kv_heads, max_batch)


def _shares(constants: dict[str, Any], wq: Tensor, wk: Tensor, n_kv_heads: int, max_batch: int) -> Shares:
    tiles, cheap_tiles = tiles_of_qkv(constants, wq, wk), len(wq) // constants["BLOCK_N"]
    shares = Shares.of(constants, 6 * max_batch, tiles, constants["COUNT"], cheap_tiles, constants["KV_COST"])
    return replace(shares, counters=shares.counters + shares.row_tiles * n_kv_heads)


def can_fuse_attention(wq: Tensor, dtype: torch.dtype, n_heads: int, n_kv_heads: int, max_batch: int) -> bool:
    """Return whether :func:`norm_qkv_attention` runs with these sizes on the current device.

    The device's architecture needs launch configs. Activations and weights have 16 bits. A head has at most 128
    columns, a multiple of BLOCK_N. At most 16 queries of the three tokens share a key head.
    """
    D = len(wq) // n_heads
    given: dict[str, Any] = {"N": len(wq), "K": wq.shape[1], "dtype": dtype, "rows": 6 * max_batch, "weight": wq.dtype}
    if not NORM_QKV_ATTENTION.has(**given):
        return False
    return _heads_fit(D, n_heads, n_kv_heads) and D % _constants(wq, dtype, 3, max_batch)["BLOCK_N"] == 0


def _heads_fit(D: int, n_heads: int, n_kv_heads: int) -> bool:
    return D <= MAX_COLUMNS and 3 * n_heads // n_kv_heads <= ROWS.value


def _constants(wq: Tensor, dtype: torch.dtype, n_tokens: int, max_batch: int) -> dict[str, Any]:
    constants = norm_constants(NORM_QKV_ATTENTION, wq, dtype, 6 * max_batch, "decode") | {"N_TOKENS": n_tokens}
    return constants if n_tokens == 1 else constants | {"KV_COST": 1}  # with three tokens, all steps cost the same


def launch_norm_qkv_attention(
    out: Tensor, qkv: Tensor, x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, eps: float,
    n_heads: int, n_kv_heads: int, n_tokens: int, max_batch: int,
    scratch: Scratch | None = None,
) -> None:  # fmt: skip
    """Run :func:`norm_qkv_attention` into `out` and `qkv`.

    Of the arguments, only the columns of a head are checked, because BLOCK_N depends on the device.

    Raises:
        ValueError: the columns of a head are not a multiple of BLOCK_N.
    """
    M = len(x)
    constants = _constants(wq, x.dtype, n_tokens, max_batch) | {"N_KV": len(wk), "D": len(wk) // n_kv_heads}
    if constants["D"] % constants["BLOCK_N"]:
        raise ValueError(
            f"wq has heads of {constants['D']} columns, but on this device they must be a multiple of "
            f"{constants['BLOCK_N']}: call norm_qkv, then token_attention"
        )
    shares = _shares(constants, wq, wk, n_kv_heads, max_batch)
    grid = shares.grid(constants, M, tiles_of_qkv(constants, wq, wk))
    parts, arrived = shares.scratch(scratch, x)
    _norm_qkv_attention_kernel[grid](
        x, norm, wq, wk, wv, qkv, out, parts, arrived,
        M // 3, x.stride(0), eps, **constants,
    )  # fmt: skip


@operator(launch_norm_qkv_attention, mutates=("qkv",))
def norm_qkv_attention(
    qkv: Tensor,
    x: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    eps: float,
    n_heads: int,
    n_kv_heads: int,
    n_tokens: int,
    max_batch: int,
) -> Tensor:
    """Compute the queries, keys and values of ``RMSNorm(x)``, and attention over the tokens [x, t, h] of each pair.

    Args:
        qkv: [6B, Nq + 2 Nkv] in x's dtype, written: q | k | v of all rows. With `n_tokens` = 1, the columns of q are
            left unchanged in the rows of the t and h tokens.
        x: [6B, K] bf16 or fp16, in rows token * 2B + branch * B + request.
        norm: [K].
        wq: [Nq, K], the weight of the queries, in x's dtype.
        wk: [Nkv, K], the weight of the keys.
        wv: [Nkv, K], the weight of the values.
        eps: added to the mean square.
        n_heads: H query heads; a head has D = Nq / H columns.
        n_kv_heads: Hkv key heads, see :func:`voxkern.kernels.token_attention.token_attention`.
        n_tokens: 3, or 1 to compute only the queries of the x tokens.
        max_batch: the most requests that the operator is prepared for, 1..64.

    Returns:
        [n_tokens * 2B, Nq], the result of :func:`voxkern.kernels.token_attention.token_attention`. The softmax is
        rounded before its product with the values.

    Raises:
        TypeError: a dtype is wrong, or the weights have 8 bits.
        ValueError: B is not in 1..max_batch, `n_tokens` is not 1 or 3, Nq and Nkv do not fit `n_heads` and
            `n_kv_heads`, or :func:`can_fuse_attention` is false.
    """
    M, _ = expect("x", x, ("6B", "K"), contiguous=False)
    expect_batch("x", M, 6, max_batch)
    _, N, N_KV = expect_qkv(x, norm, (wq, wk, wv), (None, None, None), 6 * max_batch, "decode")
    expect("qkv", qkv, (M, N + 2 * N_KV), like=x)
    D = expect_heads_of_tokens("qkv", N + 2 * N_KV, n_heads, n_kv_heads)
    expect_n_tokens(n_tokens)
    if n_heads * D != N:
        raise ValueError(f"wq has {N} rows but must have {n_heads * D}, for {n_heads} heads of {D} (n_heads)")
    if not _heads_fit(D, n_heads, n_kv_heads):
        raise ValueError(
            f"wq has {n_heads // n_kv_heads} heads of {D} columns for each key head, but may have "
            f"{ROWS.value // 3} of {MAX_COLUMNS}: call norm_qkv, then token_attention"
        )
    return x.new_empty(n_tokens * M // 3, N)
