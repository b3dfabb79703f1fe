"""Attention over a paged KV cache: one new token per request (decode), or many (prefill).

The kernels compute the following for each request and key head. The queries of the H / Hkv query heads that read this
key head are the columns of s, p and o::

    q [H / Hkv, D]    kv_cache [pages, 2, Hkv, PAGE, D]    block_table [B, max_pages]
    K, V [tokens, D]: token t of request b is entry t % PAGE of page block_table[b, t // PAGE]

    s = K q^T * log2(e) / sqrt(D)          [tokens, queries]   -inf where a query must not see a token
    m = max of s over tokens               [queries]
    p = 2^(s - m)                          [tokens, queries]
    o = V^T p / sum of p over tokens       [D, queries]        in steps of BLOCK_N tokens, m updated at each step

Keys and values are read once for all query heads of a key head. The few queries are the columns of a tile: on NVIDIA
GPUs, a matrix instruction takes 16 or 64 rows, but as few as 8 columns (see kernels/linear.py). The online softmax is
that of FlashAttention (arXiv 2205.14135), in fp32, with powers of two instead of e. For the product with V, p is
rounded to the cache's dtype; the sums are fp32.

Decode divides a request into spans of a fixed number of tokens, one block each, so that a long request uses the whole
GPU. The block that finishes last combines the results of all spans, in order (Flash-Decoding). A result depends neither
on the other requests in the batch, nor on how a prompt was divided for the prefill.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .launch_config import LaunchConfigs
from .operator import expect, expect_batch, operator
from .overlap import OFF, wait_for_launches

__all__ = ["paged_attention", "paged_attention_scratch", "prefill_attention"]

NO_WINDOW = 1 << 30
MAX_SPANS = 64
PAGE_SIZES = (16, 32, 64, 128)  # numbers of tokens that a page may have

# A pipeline stage holds 64 tokens of one key head: 16 KB of keys and 16 KB of values for D = 128. Three stages need at
# most 98,304 bytes of shared memory; a block may have 101,376 bytes on sm_86, sm_89 and sm_120. On NVIDIA GPUs, fp32
# products run on the ordinary FP32 units, which read their operands from registers, so fp32 tiles are smaller. A tile
# has at least MIN_GROUP columns, even if fewer query heads read the key head.
PAGED_ATTENTION = LaunchConfigs(
    "paged_attention",
    """
    arch         dtype | MIN_GROUP  BLOCK_N  num_warps  num_stages
    interpreter  *     | 8          16       4          1
    gfx*         fp32  | 16         16       4          1
    gfx*         *     | 16         64       4          3
    sm_*         fp32  | 8          16       4          3
    sm_*         *     | 8          64       4          3
    """,
)

# A tile has COLUMNS_Q columns: BLOCK_Q tokens times the query heads of a key head. On sm_90 and sm_100, a tile of 64
# columns fits in the registers of eight warps; on other sm_*, such a tile spills. A tile of 16 fp32 columns spills with
# four warps.
PREFILL_ATTENTION = LaunchConfigs(
    "prefill_attention",
    """
    arch         dtype | COLUMNS_Q  BLOCK_N  num_warps  num_stages
    interpreter  *     | 16         16       4          1
    gfx*         fp32  | 16         16       4          1
    gfx*         *     | 64         64       4          1
    sm_*         fp32  | 16         16       8          2
    sm_90        *     | 64         64       8          2
    sm_100       *     | 64         64       8          2
    sm_*         *     | 32         64       4          2
    """,
)


@triton.jit
def _attend(
    b_q, b_end, p_kv, p_table, first, end, window, stride_page, stride_v, stride_token,
    D: tl.constexpr, PAGE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute the weighted sum of the values of the tokens `first` to `end`, for one request and one key head.

    The caller divides the result by the sum of the weights.

    Args:
        b_q: [BLOCK_R, COLUMNS], queries.
        b_end: int32 [BLOCK_R], the token after the last token that each query sees. A query sees `window` tokens or
            fewer.
        p_kv: points to the key head's first element in page 0.
        p_table: points to the request's row of the block table.
        first: the first token.
        end: the token after the last token. Tokens from `end` on may hold anything and are not read.
        window: the most tokens that a query sees.
        stride_page: elements from a page to the next.
        stride_v: elements from a key to its value.
        stride_token: elements from a token to the next in a page.
        D: columns of a head.
        PAGE: tokens of a page.
        COLUMNS: D, rounded up to a power of two.
        BLOCK_N: tokens per step.
        BLOCK_R: queries.

    Returns:
        fp32 [COLUMNS, BLOCK_R], the weighted sum. fp32 [BLOCK_R], the largest score s (see above), or -inf where
        the query sees no token. fp32 [BLOCK_R], the sum of the weights.
    """
    o_d, o_n = tl.arange(0, COLUMNS), tl.arange(0, BLOCK_N)
    m_d = (o_d < D)[None, :]
    b_max = tl.full([BLOCK_R], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], dtype=tl.float32)
    b_acc = tl.zeros([COLUMNS, BLOCK_R], dtype=tl.float32)
    SCALE: tl.constexpr = D**-0.5 * 1.4426950408889634  # 1 / ln 2
    for n in range(first, end, BLOCK_N):
        b_n = n + o_n
        m_n = b_n < end
        b_page = tl.load(p_table + b_n // PAGE, mask=m_n, other=0).to(tl.int64)
        p_k = p_kv + (b_page * stride_page + (b_n % PAGE) * stride_token)[:, None] + o_d[None, :]  # [N, D]
        b_k = tl.load(p_k, mask=m_n[:, None] & m_d, other=0.0)
        b_v = tl.load(p_k + stride_v, mask=m_n[:, None] & m_d, other=0.0)
        b_s = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)) * SCALE  # [N, R]
        m_s = (b_n[:, None] < b_end[None, :]) & (b_n[:, None] >= b_end[None, :] - window)
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 0))
        # avoids -inf - (-inf), which is NaN, for a query that has seen no token yet
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_base[None, :])
        b_keep = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_keep + tl.sum(b_p, 0)
        b_acc = dot(tl.trans(b_v), cast(b_p, b_v.dtype), b_acc * b_keep[None, :])
        b_max = b_new
    return b_acc, b_max, b_sum


@triton.jit(
    do_not_specialize=["stride_table", "spans", "window"], do_not_specialize_on_alignment=["p_table", "p_lengths"]
)
def _paged_attention_kernel(
    p_q, p_kv, p_table, p_lengths, p_partial, p_arrived, p_out,
    stride_table, stride_page, stride_v, stride_head, stride_token, spans, window,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_s, i_kv, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    length = tl.load(p_lengths + i_b).to(tl.int32)
    skipped = tl.maximum(length - window, 0)  # the tokens before the window; the query does not see these tokens
    n_spans = tl.cdiv(length - skipped, SPAN)
    if i_s >= tl.maximum(n_spans, 1):
        return
    o_g, o_d = tl.arange(0, GROUP), tl.arange(0, COLUMNS)
    m_g, m_d = o_g < H // HKV, o_d < D
    o_head = i_b * H + i_kv * (H // HKV) + o_g
    m_q = m_g[:, None] & m_d[None, :]
    b_q = tl.load(p_q + o_head[:, None] * D + o_d[None, :], mask=m_q, other=0.0)  # [G, D]
    first = skipped + i_s * SPAN
    b_acc, b_max, b_sum = _attend(
        b_q, length + tl.zeros_like(o_g), p_kv + i_kv * stride_head, p_table + i_b * stride_table,
        first, tl.minimum(first + SPAN, length), window, stride_page, stride_v, stride_token,
        D, PAGE, COLUMNS, BLOCK_N, GROUP,
    )  # fmt: skip
    p_result = p_out + o_head[None, :] * D + o_d[:, None]
    m_result = m_g[None, :] & m_d[:, None]
    if n_spans <= 1:
        b_o = b_acc / tl.where(b_sum > 0.0, b_sum, 1.0)[None, :]  # a request without tokens gets zeros
        tl.store(p_result, cast(b_o, p_out.dtype.element_ty), mask=m_result)
        return

    # a span's partial result: D columns, the largest score, the sum of the weights
    p_first = p_partial + o_head * spans * (D + 2)
    p_part = p_first + i_s * (D + 2)
    tl.store(p_part[None, :] + o_d[:, None], b_acc, mask=m_result)
    tl.store(p_part + D, b_max, mask=m_g)
    tl.store(p_part + D + 1, b_sum, mask=m_g)
    tl.debug_barrier()  # the stores of all threads must come before the atomic add, which one thread does
    arrived = tl.atomic_add(p_arrived + i_b * HKV + i_kv, 1, sem="acq_rel", scope="gpu")
    if arrived == n_spans - 1:
        tl.debug_barrier()
        b_max = tl.full([GROUP], float("-inf"), tl.float32)
        b_sum = tl.zeros([GROUP], dtype=tl.float32)
        b_acc = tl.zeros([COLUMNS, GROUP], dtype=tl.float32)
        for i in range(0, n_spans):
            p_part = p_first + i * (D + 2)
            # .cg bypasses the L1 cache, which may hold values from before the stores of other multiprocessors
            b_o = tl.load(p_part[None, :] + o_d[:, None], mask=m_result, other=0.0, cache_modifier=".cg")
            b_m = tl.load(p_part + D, mask=m_g, other=0.0, cache_modifier=".cg")
            b_l = tl.load(p_part + D + 1, mask=m_g, other=0.0, cache_modifier=".cg")
            b_new = tl.maximum(b_max, b_m)
            b_keep, b_add = tl.exp2(b_max - b_new), tl.exp2(b_m - b_new)
            b_acc = b_acc * b_keep[None, :] + b_o * b_add[None, :]
            b_sum = b_sum * b_keep + b_l * b_add
            b_max = b_new
        b_o = b_acc / tl.where(m_g, b_sum, 1.0)[None, :]
        tl.store(p_result, cast(b_o, p_out.dtype.element_ty), mask=m_result)
        tl.store(p_arrived + i_b * HKV + i_kv, 0)  # the next launch counts from zero


def span_of(max_seq_len: int) -> int:
    """Return the number of tokens of a span, when a request has at most `max_seq_len` tokens.

    A span has 256 tokens if `max_seq_len` is at most 16,384, else `max_seq_len` / 64, rounded up to a power of two. A
    request thus has at most 64 spans.
    """
    return max(256, 1 << (-(-max_seq_len // MAX_SPANS) - 1).bit_length())


def page_strides(kv_cache: Tensor) -> dict[str, Any]:
    """Return the strides of `kv_cache` in elements, under the names of the kernels' arguments."""
    names = ("stride_page", "stride_v", "stride_head", "stride_token")
    return dict(zip(names, kv_cache.stride(), strict=False))


def paged_attention_scratch(q: Tensor, kv_cache: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor]:
    """Allocate the memory that :func:`launch_paged_attention` needs for the B requests of `q`.

    Args:
        q: [B, H * D].
        kv_cache: [pages, 2, Hkv, PAGE, D].
        max_seq_len: the most tokens that a request may ever have.

    Returns:
        fp32 [B, H, spans, D + 2], the partial results of the spans. int32 [B, Hkv], counters of finished spans, which
        are zero before and after every launch.
    """
    B, D = len(q), kv_cache.shape[4]
    spans = triton.cdiv(max_seq_len, span_of(max_seq_len))
    partial = q.new_empty((B, q.shape[1] // D, spans, D + 2), dtype=torch.float32)
    return partial, q.new_zeros((B, kv_cache.shape[2]), dtype=torch.int32)


def launch_paged_attention(
    out: Tensor, q: Tensor, kv_cache: Tensor, block_table: Tensor, lengths: Tensor, window: int, max_seq_len: int,
    scratch: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Run :func:`paged_attention` into `out`, without checking the arguments.

    Args:
        out: contiguous [B, H * D], receives the result.
        q: [B, H * D], see :func:`paged_attention`, also for the next four arguments.
        kv_cache: [pages, 2, Hkv, PAGE, D].
        block_table: int32 [B, max_pages].
        lengths: int32 [B].
        window: the number of last tokens that each query sees, or 0 for all tokens.
        max_seq_len: the value that `scratch` was allocated for.
        scratch: from :func:`paged_attention_scratch`, for B requests or more. With None, the launcher
            allocates this memory. Pass `scratch` if a CUDA graph captures the launches.
    """
    B, _, HKV, PAGE, D = len(q), *kv_cache.shape[1:]
    H = q.shape[1] // D
    partial, arrived = paged_attention_scratch(q, kv_cache, max_seq_len) if scratch is None else scratch
    SPAN, spans = span_of(max_seq_len), partial.shape[2]
    constants = PAGED_ATTENTION(N=H * D, K=D, dtype=q.dtype, rows=1)
    constants["GROUP"] = max(triton.next_power_of_2(H // HKV), constants.pop("MIN_GROUP"))
    constants |= {"H": H, "HKV": HKV, "D": D, "PAGE": PAGE, "SPAN": SPAN, "COLUMNS": triton.next_power_of_2(D)}
    numbers = {"spans": spans, "window": window or NO_WINDOW} | page_strides(kv_cache)
    grid = (min(spans, triton.cdiv(block_table.shape[1] * PAGE, SPAN)), HKV, B)
    _paged_attention_kernel[grid](
        q, kv_cache, block_table, lengths, partial, arrived, out, block_table.stride(0), **numbers, **constants
    )


@operator(launch_paged_attention)
def paged_attention(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, lengths: Tensor, window: int, max_seq_len: int
) -> Tensor:
    """Compute ``softmax(q k^T / sqrt(D)) v`` of each request's last token over all tokens in its pages.

    Args:
        q: [B, H * D] fp32, bf16 or fp16, the rotated queries. Query head h reads key head ``h // (H / Hkv)``.
        kv_cache: [pages, 2, Hkv, PAGE, D], keys at index 0 and values at index 1, those of the last token included.
            Only the cache's last dimension must be contiguous.
        block_table: int32 [B, max_pages], the pages of each request in order. Entries past a request's length may
            be anything.
        lengths: int32 [B], tokens of each request. The result of a request of length 0 is zero.
        window: the number of last tokens that each query sees, or 0 for all tokens.
        max_seq_len: the most tokens that a request may ever have. The size of a span depends on this number, and so do
            the last bits of the result.

    Returns:
        [B, H * D] in q's dtype; the softmax and all sums are fp32, and the result is rounded once.

    Raises:
        ValueError: B is not in 1..64, H is not a multiple of Hkv, PAGE is not 16, 32, 64 or 128, window is negative, or
            block_table has more pages per request than max_seq_len tokens need.
    """
    B, W = expect("q", q, ("B", "H * D"))
    expect_cache(kv_cache, block_table, lengths, q, B)
    expect_heads("q", W, kv_cache)
    expect_batch("q", B, 1, 64)
    if window < 0:
        raise ValueError(f"window is {window} but must be positive, or 0 for no window")
    max_pages, PAGE = block_table.shape[1], kv_cache.shape[3]
    if max_pages > triton.cdiv(max_seq_len, PAGE):
        raise ValueError(
            f"block_table has {max_pages} pages of {PAGE} tokens per request but must have at most "
            f"{triton.cdiv(max_seq_len, PAGE)}, because max_seq_len is {max_seq_len}"
        )
    return torch.empty_like(q)


@triton.jit(
    do_not_specialize=["stride_q", "stride_table", "window"],
    do_not_specialize_on_alignment=["p_table", "p_cu_seqlens", "p_lengths"],
)
def _prefill_attention_kernel(
    p_q, p_kv, p_table, p_cu_seqlens, p_lengths, p_out,
    stride_q, stride_table, stride_page, stride_v, stride_head, stride_token, window,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    # the longest tiles start first: the last tile of a prompt sees the most tokens
    i_q = tl.num_programs(0) - 1 - tl.program_id(0)
    i_kv, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.load(p_cu_seqlens + i_b).to(tl.int64)
    T = (tl.load(p_cu_seqlens + i_b + 1) - start).to(tl.int32)
    length = tl.load(p_lengths + i_b).to(tl.int32)
    if i_q * BLOCK_Q >= T:
        return
    o_r, o_d = tl.arange(0, BLOCK_Q * GROUP), tl.arange(0, COLUMNS)
    o_t, o_g = i_q * BLOCK_Q + o_r // GROUP, o_r % GROUP
    m_q = ((o_t < T) & (o_g < H // HKV))[:, None] & (o_d < D)[None, :]
    o_row, o_head = start + o_t, i_kv * (H // HKV) + o_g
    b_q = tl.load(p_q + (o_row * stride_q + o_head * D)[:, None] + o_d[None, :], mask=m_q, other=0.0)  # [R, D]
    b_end = length - T + o_t + 1  # a query sees the tokens up to and including its own
    # Steps begin at multiples of BLOCK_N, no matter where the queries begin. So the sums have the same order for a
    # divided prompt as for the whole prompt.
    first = tl.maximum(length - T + i_q * BLOCK_Q + 1 - window, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(length - T + (i_q + 1) * BLOCK_Q, length)
    b_acc, _, b_sum = _attend(
        b_q, b_end, p_kv + i_kv * stride_head, p_table + i_b * stride_table,
        first, end, window, stride_page, stride_v, stride_token, D, PAGE, COLUMNS, BLOCK_N, BLOCK_Q * GROUP,
    )  # fmt: skip
    b_o = b_acc / tl.where(b_sum > 0.0, b_sum, 1.0)[None, :]
    p_result = p_out + (o_row * (H * D) + o_head * D)[None, :] + o_d[:, None]
    tl.store(p_result, cast(b_o, p_out.dtype.element_ty), mask=tl.trans(m_q))


def launch_prefill_attention(
    out: Tensor, q: Tensor, kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, lengths: Tensor, window: int,
    max_new: int, n_heads: int,
) -> None:  # fmt: skip
    """Run :func:`prefill_attention` into `out`, contiguous [R, H * D], without checking the arguments."""
    _, _, HKV, PAGE, D = kv_cache.shape
    constants = PREFILL_ATTENTION(N=n_heads * D, K=D, dtype=q.dtype, rows=1, phase="prefill")
    group = triton.next_power_of_2(n_heads // HKV)
    constants["BLOCK_Q"] = max(constants.pop("COLUMNS_Q") // group, 1)
    constants |= {"H": n_heads, "HKV": HKV, "D": D, "PAGE": PAGE, "GROUP": group}
    constants["COLUMNS"] = triton.next_power_of_2(D)
    numbers = {"window": window or NO_WINDOW} | page_strides(kv_cache)
    grid = (triton.cdiv(max_new, constants["BLOCK_Q"]), HKV, len(lengths))
    _prefill_attention_kernel[grid](
        q, kv_cache, block_table, cu_seqlens, lengths, out, q.stride(0), block_table.stride(0), **numbers, **constants
    )


@operator(launch_prefill_attention)
def prefill_attention(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, cu_seqlens: Tensor, lengths: Tensor, window: int, max_new: int,
    n_heads: int,
) -> Tensor:  # fmt: skip
    """Compute causal attention of the new tokens of several requests over all tokens in the requests' pages.

    Args:
        q: [R, W] fp32, bf16 or fp16, W >= H * D. The first H * D columns are the rotated queries. The rows from
            ``cu_seqlens[b]`` to before ``cu_seqlens[b + 1]`` are request b's. Only the last dimension must be
            contiguous.
        kv_cache: [pages, 2, Hkv, PAGE, D], see :func:`paged_attention`, also for `block_table`. The keys and values of
            the new tokens are already stored in the cache.
        block_table: int32 [B, max_pages].
        cu_seqlens: int32 [B + 1], the first row of each request in `q`, from 0 to R.
        lengths: int32 [B], tokens of each request, the new ones included.
        window: the number of last tokens that a query sees, the query's own token included, or 0 for all tokens.
        max_new: the most rows of one request, 1..R. Only the number of blocks depends on this number.
        n_heads: H, a multiple of Hkv.

    Returns:
        [R, H * D] in q's dtype; the softmax and all sums are fp32, and the result is rounded once.

    Raises:
        ValueError: max_new is not in 1..R, n_heads is not a multiple of Hkv, W is less than H * D, PAGE is not 16, 32,
            64 or 128, or window is negative.
    """
    R, W = expect("q", q, ("R", "W"), contiguous=False)
    B, _ = expect("block_table", block_table, ("B", "max_pages"), like=q, dtype=torch.int32)
    _, _, _, D = expect_cache(kv_cache, block_table, lengths, q, B)
    expect_heads("q", n_heads * D, kv_cache)
    if n_heads * D > W:
        raise ValueError(f"q has {W} columns but must have {n_heads} * {D} or more (n_heads)")
    expect("cu_seqlens", cu_seqlens, (B + 1,), like=q, dtype=torch.int32)
    if not 1 <= max_new <= R:
        raise ValueError(f"max_new is {max_new} but must lie in 1..{R}, the rows of q")
    if window < 0:
        raise ValueError(f"window is {window} but must be positive, or 0 for no window")
    return q.new_empty(R, n_heads * D)


def expect_cache(
    kv_cache: Tensor, block_table: Tensor, lengths: Tensor | None, like: Tensor, B: int | None
) -> tuple[int, int, int, int]:
    """Check the tensors of a KV cache, and return the cache's pages, Hkv, PAGE and D.

    Args:
        kv_cache: [pages, 2, Hkv, PAGE, D], in `like`'s dtype.
        block_table: int32 [B, max_pages].
        lengths: int32 [B], or None.
        like: a tensor with the dtype and device that the cache must have.
        B: the number of requests, or None for any.

    Raises:
        ValueError: PAGE is not 16, 32, 64 or 128. Other errors are those of :func:`expect`.
    """
    pages, _, H_KV, PAGE, D = expect(
        "kv_cache", kv_cache, ("pages", 2, "Hkv", "PAGE", "D"), like=like, contiguous=False
    )
    if PAGE not in PAGE_SIZES:
        raise ValueError(f"kv_cache has pages of {PAGE} tokens but must have 16, 32, 64 or 128")
    expect("block_table", block_table, (B or "B", "max_pages"), like=like, contiguous=False, dtype=torch.int32)
    if lengths is not None:
        expect("lengths", lengths, (len(block_table),), like=like, dtype=torch.int32)
    return pages, H_KV, PAGE, D


def expect_heads(name: str, columns: int, kv_cache: Tensor) -> None:
    """Check that `columns` are H * D with H a multiple of Hkv, for the Hkv and D of `kv_cache`.

    Raises:
        ValueError: `columns` is not such a number; the message names the argument `name`.
    """
    _, _, H_KV, _, D = kv_cache.shape
    if columns < 1 or columns % (H_KV * D):
        raise ValueError(f"{name} has {columns} columns but must have H * {D}, with H a multiple of {H_KV}")
