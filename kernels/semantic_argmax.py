"""The semantic head: the largest logit of each request, without the logits ever being in memory."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import END_AUDIO, dot
from .launch_config import FP_FUSION, LaunchConfigs
from .operator import expect, expect_batch, operator

__all__ = ["semantic_argmax", "semantic_argmax_scratch"]

# 8,194 rows of weights make 129 tiles of 64, one wave on 132 multiprocessors. 16 KB of weights a stage for few requests
# and 8 KB for many, as many stages as the 101,376 bytes of sm_86, 89 and 120 hold.
SEMANTIC_ARGMAX = LaunchConfigs(
    "semantic_argmax",
    """
    arch         dtype  rows | BLOCK_B  BLOCK_N  BLOCK_K  num_warps  num_stages
    interpreter  *      *    | 16       32       64       4          1
    gfx*         fp32   *    | 16       32       64       4          2
    gfx*         *      16   | 16       64       128      4          2
    gfx*         *      *    | 32       64       64       4          2
    sm_*         fp32   *    | 16       32       32       4          6
    sm_*         *      8    | 8        64       128      8          6
    sm_*         *      16   | 16       64       128      8          5
    sm_*         *      *    | 32       64       64       4          8
    """,
)


@triton.jit(do_not_specialize=["B"])
def _semantic_argmax_tiles_kernel(
    p_h, p_w, p_best,
    B, stride_h,
    N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_b, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_b = i_b * BLOCK_B + tl.arange(0, BLOCK_B)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_b, m_n = o_b < B, o_n < N
    b_acc = tl.zeros([BLOCK_N, BLOCK_B], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = k + o_k < K
        b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_h = tl.load(p_h + o_b[:, None] * stride_h + (k + o_k)[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
        b_acc = dot(b_w, tl.trans(b_h), b_acc)  # [N, B]

    # One integer that orders by logit and then by lowest index: above, the logit's bits, whose order as integers is
    # that of the numbers once the negative ones' are turned round; below, the index, turned round as well.
    b_acc = tl.where(b_acc == 0.0, 0.0, b_acc)  # -0 ties with 0
    b_bits = b_acc.to(tl.int32, bitcast=True)
    b_order = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits).to(tl.int64)
    b_allowed = (m_n & (o_n >= END_AUDIO))[:, None] & (b_acc == b_acc)  # not EMPTY, and not NaN
    b_key = tl.where(b_allowed, (b_order << 32) | (0x7FFFFFFF - o_n)[:, None], -0x8000000000000000)
    tl.store(p_best + o_b * TILES + i_n, tl.max(b_key, 0), mask=m_b)


@triton.jit
def _semantic_argmax_final_kernel(p_best, p_codes, TILES: tl.constexpr, PAD_TILES: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    o_t = tl.arange(0, PAD_TILES)
    b_best = tl.load(p_best + i_b * TILES + o_t, mask=o_t < TILES, other=-0x8000000000000000)
    best = tl.max(b_best, 0)
    index = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    tl.store(p_codes + i_b, tl.where(best == -0x8000000000000000, END_AUDIO, index))  # all NaN: the request ends


def _constants(weight: Tensor, n_codes: int, max_batch: int) -> dict[str, Any]:
    # rows from n_codes on are padding: they are not read
    constants = SEMANTIC_ARGMAX(N=n_codes, K=weight.shape[1], dtype=weight.dtype, rows=max_batch)
    return constants | {"TILES": triton.cdiv(n_codes, constants["BLOCK_N"])}


def semantic_argmax_scratch(weight: Tensor, n_codes: int, max_batch: int) -> Tensor:
    """The memory that :func:`launch_semantic_argmax` needs between its two kernels: int64 [max_batch, tiles]."""
    tiles = _constants(weight, n_codes, max_batch)["TILES"]
    return weight.new_empty((max_batch, tiles), dtype=torch.int64)


def launch_semantic_argmax(
    out: Tensor, h: Tensor, weight: Tensor, n_codes: int, max_batch: int, scratch: Tensor | None = None
) -> None:
    """Fill `out`, int64 [B]; the other arguments are those of :func:`semantic_argmax`, unchecked.

    Args:
        out: written.
        h: as in :func:`semantic_argmax`, and so are `weight`, `n_codes` and `max_batch`.
        weight: [N, K].
        n_codes: rows that count.
        max_batch: as it was for `scratch`.
        scratch: from :func:`semantic_argmax_scratch`; without one it is allocated, which may not be inside a frame.
    """
    (B, K), constants = h.shape, _constants(weight, n_codes, max_batch)
    scratch = semantic_argmax_scratch(weight, n_codes, max_batch) if scratch is None else scratch
    stride_h = h.stride(0) if B > 1 else K  # a lone row may have any stride, and stride 1 would be another binary
    grid = (triton.cdiv(B, constants["BLOCK_B"]), constants["TILES"])
    _semantic_argmax_tiles_kernel[grid](h, weight, scratch, B, stride_h, **constants)
    tiles = constants["TILES"]
    of_all = {"TILES": tiles, "PAD_TILES": triton.next_power_of_2(tiles), "enable_fp_fusion": FP_FUSION}
    _semantic_argmax_final_kernel[(B,)](scratch, out, **of_all)


@operator(launch_semantic_argmax)
def semantic_argmax(h: Tensor, weight: Tensor, n_codes: int, max_batch: int) -> Tensor:
    """The semantic code of each request: where ``h @ weight.T`` is largest, the lowest index where several are equal.

    EMPTY (0) and the rows from `n_codes` on, a table's padding, are never chosen. A request whose logits are all NaN
    gets END (1).

    Args:
        h: [B, dim] fp32, bf16 or fp16, the backbone's hidden state; rows may lie apart.
        weight: [N, dim].
        n_codes: rows of `weight` that are codes, the special ones EMPTY and END included.
        max_batch: the most requests this is prepared for; B may be any of 1..max_batch, and a request's code does not
            depend on the others.

    Returns:
        int64 [B]; logits are summed in fp32 and not rounded.

    Raises:
        TypeError: a dtype is wrong or differs from h's.
        ValueError: a shape, stride or device is wrong, or a number is not one of those above.
    """
    B, K = expect("h", h, ("B", "dim"), contiguous=False)
    N, _ = expect("weight", weight, ("N", K), like=h)
    expect_batch("h", B, 1, max_batch)
    if not 2 <= n_codes <= N:
        raise ValueError(f"n_codes is {n_codes} but must lie in 2..{N}, the rows of weight")
    return h.new_empty((B,), dtype=torch.int64)
