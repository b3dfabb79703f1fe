"""The rotation of queries and keys by their position, and the write into the paged KV cache.

::

    rope_append     q | k | v  ->  q = rotate(q) in place,  rotate(k) and v -> kv_cache

    rotate, at position t, for each pair (2i, 2i + 1) of a head:
        a' = a cos(t, i) - b sin(t, i)
        b' = a sin(t, i) + b cos(t, i)

``rope_append`` is for a prefill, and for callers that compute q | k | v themselves. In a decode step,
``norm_qkv_append`` in qkv.py does the same with the results of its product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast
from .launch_config import launch_options
from .operator import expect, operator
from .overlap import OFF, wait_for_launches
from .paged_attention import expect_cache, page_strides

__all__ = ["rope_append"]


@triton.jit
def rotate(b_v, b_cos, b_sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rotate the interleaved pairs along the first axis (RoFormer, arXiv 2104.09864).

    Args:
        b_v: fp32 [ROWS, COLUMNS]; rows 2i and 2i + 1 are pair i.
        b_cos: fp32 [ROWS / 2, COLUMNS], the cosine of each pair's angle.
        b_sin: fp32 [ROWS / 2, COLUMNS], the sine of each pair's angle.
        ROWS: rows of `b_v`, an even number.
        COLUMNS: columns of all three blocks.

    Returns:
        fp32 [ROWS, COLUMNS].
    """
    b_pairs = tl.permute(tl.reshape(b_v, [ROWS // 2, 2, COLUMNS]), (0, 2, 1))
    b_even, b_odd = tl.split(b_pairs)
    b_pairs = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
    return tl.reshape(tl.permute(b_pairs, (0, 2, 1)), [ROWS, COLUMNS])


@triton.jit(
    do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["p_request_ids", "p_positions", "p_table"]
)
def _rope_append_kernel(
    p_qkv, p_rope, p_request_ids, p_positions, p_table, p_kv,
    stride_qkv, stride_table, stride_page, stride_v, stride_head, stride_token,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    # A block computes one row and one key head: first a tile of the queries that share the key head, then the key and
    # the value. One tile [D, GROUP + 1] for queries and key is impossible, because a tile's sizes are powers of two.
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
    """Run :func:`rope_append`, which writes to `qkv` and `kv_cache`, without checking the arguments."""
    R, W = qkv.shape
    _, _, HKV, PAGE, D = kv_cache.shape
    H = W // D - 2 * HKV
    constants = launch_options() | page_strides(kv_cache) | {"H": H, "HKV": HKV, "D": D, "PAGE": PAGE}
    constants |= {"GROUP": triton.next_power_of_2(H // HKV)}
    constants |= {"COLUMNS": triton.next_power_of_2(D), "num_warps": 4}
    stride_qkv = qkv.stride(0) if R > 1 else W
    _rope_append_kernel[(R, HKV)](
        qkv, rope, request_ids, positions, block_table, kv_cache, stride_qkv, block_table.stride(0), **constants
    )


@operator(launch_rope_append, mutates=("qkv", "kv_cache"))
def rope_append(
    rope: Tensor, request_ids: Tensor, positions: Tensor, block_table: Tensor, qkv: Tensor, kv_cache: Tensor
) -> None:
    """Rotate the queries in place, and write the rotated keys and the values into the KV cache.

    The keys in `qkv` stay unrotated.

    Args:
        rope: fp32 [positions, 2, D / 2], see :func:`voxkern.kernels.qkv.norm_qkv_append`, also for `block_table` and
            `kv_cache`.
        request_ids: int32 [R], the request of each row, as a row number of `block_table`.
        positions: int32 [R], the position of each row's token in its request. -1 means that the row has no token, and
            nothing is written for such a row.
        block_table: int32 [B, max_pages].
        qkv: [R, (H + 2 Hkv) * D] fp32, bf16 or fp16, q | k | v of each row; only its last dimension must be contiguous.
        kv_cache: [pages, 2, Hkv, PAGE, D], in qkv's dtype.

    Raises:
        ValueError: the columns of qkv are not (H + 2 Hkv) * D with H a multiple of Hkv, D is odd, or PAGE is not 16,
            32, 64 or 128.
    """
    R, W = expect("qkv", qkv, ("R", "W"), contiguous=False)
    _, H_KV, _, D = expect_cache(kv_cache, block_table, None, qkv, None)
    if W % D or W // D <= 2 * H_KV or (W // D) % H_KV:
        raise ValueError(
            f"qkv has {W} columns but must have (H + 2 * {H_KV}) heads of {D}, with H a multiple of {H_KV}"
        )
    expect("request_ids", request_ids, (R,), like=qkv, dtype=torch.int32)
    expect("positions", positions, (R,), like=qkv, dtype=torch.int32)
    expect_rope(rope, D, qkv)


def expect_rope(rope: Tensor, D: int, like: Tensor) -> None:
    """Check that `rope` is fp32 [positions, 2, D / 2] on the device of `like`, and that `D` is even.

    Raises:
        TypeError: `rope` is not fp32.
        ValueError: `D` is odd, or `rope` has a wrong shape, stride or device.
    """
    if D % 2:
        raise ValueError(
            f"kv_cache has heads of {D} columns, but this number must be even: rope rotates pairs of columns"
        )
    expect("rope", rope, ("positions", 2, D // 2), like=like, dtype=torch.float32)
