"""RMSNorm as a separate launch, for the backbone's last norm, which is not fused with a product.

A block computes one row m of x [M, K], with weight [K]::

    square  = sum over k of x[m, k]^2                            fp32
    scale   = 1 / sqrt(square / K + eps)                         fp32
    y[m, k] = round(x[m, k] * scale * weight[k])                 [M, K] in x's dtype

A block computes a whole row, so no block waits for another. The block reads the row twice, in steps of BLOCK_K <= 1024
columns: first for the sum, then for the result. The second pass finds the row in the cache (6 KB for K = 3072 in bf16).
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import cast
from .launch_config import launch_options
from .operator import expect, operator
from .overlap import OFF, wait_for_launches

__all__ = ["rms_norm"]


@triton.jit
def _rms_norm_kernel(
    p_x, p_weight, p_y, stride_x, eps, K: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    wait_for_launches(OVERLAP)
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    eps = tl.full([], eps, tl.float32)  # torch.compile passes eps as fp64
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
    """Run :func:`rms_norm` into `out`, contiguous [M, K], without checking the arguments."""
    M, K = x.shape
    # a single row's stride is not used, but Triton would compile another binary if the stride were 1
    stride_x = x.stride(0) if M > 1 else K
    constants = launch_options() | {"K": K, "BLOCK_K": min(4096, max(64, triton.next_power_of_2(K) // 2))}
    constants["num_warps"] = 16  # few rows: each block needs many bytes in flight
    _rms_norm_kernel[(M,)](x, weight, out, stride_x, eps, **constants)


@operator(launch_rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm of each row, ``x / sqrt(mean(x^2) + eps) * weight`` (arXiv 1910.07467).

    Args:
        x: [M, K] fp32, bf16 or fp16; only its last dimension must be contiguous.
        weight: [K].
        eps: added to the mean square.

    Returns:
        [M, K] in x's dtype, computed in fp32 and rounded once.
    """
    M, K = expect("x", x, ("M", "K"), contiguous=False)
    expect("weight", weight, (K,), like=x)
    return x.new_empty(M, K)
