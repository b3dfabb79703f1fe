"""Queries, keys and values of the flow's state in a transformer's first layer, without the layer's weights.

The x token of the first layer is a projection of the flow's state x, which has only K numbers (36 in the public model).
Its queries, keys and values are RMSNorm and three products of this token. All of these but the scale of RMSNorm are
linear, so the weights can be multiplied before the first frame::

    token = w_in @ x                                       [dim]
    q | k | v = w_qkv @ RMSNorm(token)                     [W]
              = (w_qkv @ diag(norm) @ w_in) @ x / sqrt(mean(token^2) + eps)
              = weight @ x / sqrt(|root @ x|^2 + eps)      weight [W, K], root [K, K]

where ``root^T root = w_in^T w_in / dim``, from a QR decomposition of w_in. The public model's `weight` and `root` have
0.9 MB in fp32, and w_qkv has 38 MB in bf16.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, dot
from .launch_config import LaunchConfigs
from .operator import expect, expect_batch, operator
from .overlap import OFF, prefetch_rows, wait_for_launches

__all__ = ["fold_state_qkv", "state_qkv"]

# The products are fp32. On NVIDIA GPUs they run on the ordinary FP32 units. Each block repeats the product with `root`,
# so for more requests a tile has more rows of `weight`. Eight warps keep such a tile in registers.
STATE_QKV = LaunchConfigs(
    "state_qkv",
    """
    arch         rows | BLOCK_B  BLOCK_N  num_warps  num_stages
    interpreter  *    | 16       64       4          1
    *            8    | 8        32       4          1
    *            16   | 16       64       8          1
    *            *    | 32       64       8          1
    """,
)


def fold_state_qkv(
    w_qkv: Sequence[Tensor], scales: Sequence[Tensor | None], norm: Tensor, w_in: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the weights of :func:`state_qkv` in fp64, before the first frame.

    Args:
        w_qkv: the weights of queries, keys and values, each [N, dim]. The rows of the result are in this order.
        scales: fp32 [N] for each weight in 8 bits, one scale for each row; None for another weight.
        norm: [dim], the weight of RMSNorm.
        w_in: [dim, K], the projection of the state.

    Returns:
        `weight`, fp32 [W, K], and `root`, fp32 [K, K].
    """
    (dim, K), w_in = w_in.shape, w_in.double()
    w_norm = norm.double()[:, None] * w_in
    products = []
    for weight, scale in zip(w_qkv, scales, strict=True):
        product = torch.cat([rows.double() @ w_norm for rows in weight.split(1024)])
        products.append(product if scale is None else product * scale[:, None])
    root = torch.linalg.qr(w_in, mode="r").R / dim**0.5
    root = torch.cat((root, root.new_zeros(K - len(root), K)))  # if dim < K, the decomposition has only dim rows
    return torch.cat(products).float(), root.float()


@triton.jit(do_not_specialize=["B"])
def _state_qkv_kernel(
    p_x, p_w, p_root, p_y,
    B, eps,
    N: tl.constexpr, K: tl.constexpr, PAD_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, PAD_K)
    prefetch_rows(p_w, o_n, N, 0, K, OVERLAP)
    wait_for_launches(OVERLAP)
    m_k = o_k < K
    b_w = tl.load(p_w + o_n[:, None] * K + o_k[None, :], mask=(o_n < N)[:, None] & m_k[None, :], other=0.0)  # [N, K]
    b_root = tl.load(p_root + o_k[:, None] * K + o_k[None, :], mask=m_k[:, None] & m_k[None, :], other=0.0)  # [K, K]
    b_x = tl.load(p_x + o_b[None, :] * K + o_k[:, None], mask=(o_b < B)[None, :] & m_k[:, None], other=0.0)  # [K, B]
    # rounded to the network's dtype, as all inputs of the network are
    b_x = cast(b_x, p_y.dtype.element_ty).to(tl.float32)
    b_token = dot(b_root, b_x, tl.zeros([PAD_K, BLOCK_B], dtype=tl.float32))
    b_scale = tl.rsqrt(tl.sum(b_token * b_token, 0) + tl.full([], eps, tl.float32))  # [B]
    b_y = dot(b_w, b_x, tl.zeros([BLOCK_N, BLOCK_B], dtype=tl.float32)) * b_scale[None, :]
    p_tile = p_y + o_b[None, :] * N + o_n[:, None]
    tl.store(p_tile, cast(b_y, p_y.dtype.element_ty), mask=(o_b < B)[None, :] & (o_n < N)[:, None])


def launch_state_qkv(x: Tensor, weight: Tensor, root: Tensor, eps: float, qkv: Tensor, max_batch: int) -> None:
    """Run :func:`state_qkv` without checking the arguments."""
    B, (N, K) = len(x), weight.shape
    constants = STATE_QKV(N=N, K=K, dtype=qkv.dtype, rows=max_batch) | {"N": N, "K": K}
    constants["PAD_K"] = max(16, triton.next_power_of_2(K))  # a product has at least 16 columns
    grid = (triton.cdiv(B, constants["BLOCK_B"]), triton.cdiv(N, constants["BLOCK_N"]))
    _state_qkv_kernel[grid](x, weight, root, qkv, B, eps, **constants)


@operator(launch_state_qkv, mutates=("qkv",))
def state_qkv(x: Tensor, weight: Tensor, root: Tensor, eps: float, qkv: Tensor, max_batch: int) -> None:
    """Compute the queries, keys and values of the x tokens: ``weight @ x / sqrt(|root @ x|^2 + eps)``.

    Args:
        x: fp32 [B, K], the flow's state. It is rounded to the dtype of `qkv` first.
        weight: fp32 [W, K], see :func:`fold_state_qkv`.
        root: fp32 [K, K], see :func:`fold_state_qkv`.
        eps: added to the mean square.
        qkv: [B, W] fp32, bf16 or fp16, written: summed in fp32 and rounded once.
        max_batch: the most requests that the operator is prepared for, 1..64; the launch config depends on this number.

    Raises:
        ValueError: B is not in 1..max_batch, or `max_batch` is not in 1..64.
    """
    B, W = expect("qkv", qkv, ("B", "W"))
    expect_batch("qkv", B, 1, max_batch)
    _, K = expect("weight", weight, (W, "K"), like=qkv, dtype=torch.float32)
    expect("root", root, (K, K), like=qkv, dtype=torch.float32)
    expect("x", x, (B, K), like=qkv, dtype=torch.float32)
