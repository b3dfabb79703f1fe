"""What a frame of the backbone needs beside products and attention: its last norm, and who goes on."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast
from .operator import expect, expect_batch, operator
from .settings import FP_FUSION

END = tl.constexpr(1)


@triton.jit
def _rms_norm_kernel(p_x, p_weight, p_y, stride_x, eps, K: tl.constexpr, BLOCK_K: tl.constexpr):
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    eps = tl.full([], eps, tl.float32)  # torch.compile passes it as fp64
    b_square = tl.zeros([BLOCK_K], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        b_x = tl.load(p_x + i_m * stride_x + k + o_k, mask=k + o_k < K, other=0.0).to(tl.float32)
        b_square += b_x * b_x
    scale = tl.rsqrt(tl.sum(b_square) / K + eps)
    for k in range(0, K, BLOCK_K):
        m_k = k + o_k < K
        b_x = tl.load(p_x + i_m * stride_x + k + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_weight = tl.load(p_weight + k + o_k, mask=m_k, other=0.0).to(tl.float32)
        tl.store(p_y + i_m * K + k + o_k, cast(b_x * scale * b_weight, p_y.dtype.element_ty), mask=m_k)


def launch_rms_norm(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Fill `out`, contiguous [M, K]; the other arguments are those of :func:`rms_norm`, unchecked."""
    M, K = x.shape
    stride_x = x.stride(0) if M > 1 else K  # a lone row may have any stride, and stride 1 would be another binary
    constants: dict[str, Any] = {"K": K, "BLOCK_K": min(1024, max(64, triton.next_power_of_2(K) // 2))}
    constants |= {"num_warps": 4, "enable_fp_fusion": FP_FUSION}
    _rms_norm_kernel[(M,)](x, weight, out, stride_x, eps, **constants)


@operator(launch_rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, ``x / sqrt(mean(x^2) + eps) * weight`` (arXiv 1910.07467), for what no product follows in one launch.

    Args:
        x: [M, K] fp32, bf16 or fp16; rows may lie apart.
        weight: [K].
        eps: added to the mean square.

    Returns:
        [M, K] in x's dtype, rounded once.

    Raises:
        TypeError: a dtype is wrong or differs from x's.
        ValueError: a shape, stride or device is wrong.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("weight", weight, (K,), like=x)
    return x.new_empty(M, K)


@triton.jit(
    do_not_specialize_on_alignment=["p_codes", "p_limits", "p_lengths", "p_frames", "p_said", "p_kept"],
)
def _advance_kernel(p_codes, p_limits, p_lengths, p_frames, p_said, p_kept, K: tl.constexpr, COLUMNS: tl.constexpr):
    i_b = tl.program_id(0).to(tl.int64)
    length, frame = tl.load(p_lengths + i_b), tl.load(p_frames + i_b)
    semantic = tl.load(p_codes + i_b * K)
    if length == 0 or semantic == END:
        tl.store(p_kept + i_b, 0)
        tl.store(p_lengths + i_b, 0)
        return
    o_k = tl.arange(0, COLUMNS)
    b_codes = tl.load(p_codes + i_b * K + o_k, mask=o_k < K, other=0)
    tl.store(p_said + i_b * K + o_k, b_codes, mask=o_k < K)
    tl.store(p_kept + i_b, 1)
    tl.store(p_frames + i_b, frame + 1)
    is_last = frame + 1 >= tl.load(p_limits + i_b)
    tl.store(p_lengths + i_b, tl.where(is_last, 0, length + 1))


def launch_advance(codes: Tensor, limits: Tensor, lengths: Tensor, frames: Tensor, said: Tensor, kept: Tensor) -> None:
    """The arguments are those of :func:`advance`, unchecked."""
    B, K = codes.shape
    constants: dict[str, Any] = {
        "K": K,
        "COLUMNS": triton.next_power_of_2(K),
        "num_warps": 1,
        "enable_fp_fusion": FP_FUSION,
    }
    _advance_kernel[(B,)](codes, limits, lengths, frames, said, kept, **constants)


@operator(launch_advance, mutates=("lengths", "frames", "said", "kept"))
def advance(codes: Tensor, limits: Tensor, lengths: Tensor, frames: Tensor, said: Tensor, kept: Tensor) -> None:
    """Keep a frame's codes and make room for the next, on the device: nobody waits for a host to see END.

    A request of length 0 is not there, and its codes are left alone. One whose semantic code is END, or whose frame was
    its last, gets length 0 from here on: END's own frame is not kept. All others get a frame and a token more.

    Args:
        codes: int64 [B, 1 + K] with the +2 offset, semantic first.
        limits: int64 [B], the most frames of each request.
        lengths: int32 [B], tokens in the cache, then with the next frame's.
        frames: int64 [B], frames kept so far.
        said: int64 [B, 1 + K], the last frame that was kept.
        kept: int64 [B], whether this one is: 1 or 0.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, stride or device is wrong.
    """
    B, K = expect("said", said, ("B", "1 + K"), dtype=torch.int64)
    expect_batch("said", B, 1, 64)
    expect("codes", codes, (B, K), like=said)
    expect("limits", limits, (B,), like=said)
    expect("lengths", lengths, (B,), like=said, dtype=torch.int32)
    expect("frames", frames, (B,), like=said)
    expect("kept", kept, (B,), like=said)
