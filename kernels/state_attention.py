"""Attention in a transformer head's first layer, with queries, keys and values computed from the flow's state.

The x token of the first layer is a projection of the flow's state x, which has only K numbers (36 in the public model).
Its queries, keys and values are RMSNorm and three products of this token. All of these but the scale of RMSNorm are
linear, so the weights can be multiplied before the first frame::

    token = w_in @ x                                       [dim]
    q | k | v = w_qkv @ RMSNorm(token)                     [W]
              = (w_qkv @ diag(norm) @ w_in) @ x / sqrt(mean(token^2) + eps)
              = x @ weight / sqrt(|x @ root|^2 + eps)      weight [K, W], root [K, K]

where ``root root^T = w_in^T w_in / dim``, from a QR decomposition of w_in. The public model's `weight` and `root` have
0.9 MB in fp32, and w_qkv has 38 MB in bf16.

The other two tokens do not depend on the state, so their queries, keys and values are given. A block computes the
attention of BLOCK_B requests over one key head, in both branches. It first computes the x tokens' columns of q | k | v
for this key head and its query heads.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import cast, with_block
from .launch_config import LaunchConfigs
from .operator import expect, expect_batch, operator
from .overlap import OFF, wait_for_launches
from .token_attention import attend, expect_heads_of_tokens, scores

__all__ = ["fold_state_qkv", "state_attention"]

# A block reads the columns of `weight` that belong to a key head and its query heads, 110 KB in the public model. The
# loads of all these bytes are in flight at once, 36 of 16 bytes for each thread.
STATE_ATTENTION = LaunchConfigs(
    "state_attention",
    """
    arch         rows | BLOCK_B  num_warps
    interpreter  *    | 16       4
    *            1    | 1        8
    *            *    | 2        8
    """,
)


def fold_state_qkv(
    w_qkv: Sequence[Tensor], scales: Sequence[Tensor | None], norm: Tensor, w_in: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the weights of :func:`state_attention` in fp64, before the first frame.

    Args:
        w_qkv: the weights of queries, keys and values, each [N, dim]. The columns of `weight` are in this order.
        scales: fp32 [N] for each weight in 8 bits, one scale for each row; None for another weight.
        norm: [dim], the weight of RMSNorm.
        w_in: [dim, K], the projection of the state.

    Returns:
        `weight`, fp32 [K, W], and `root`, fp32 [K, K].
    """
    (dim, K), w_in = w_in.shape, w_in.double()
    w_norm = norm.double()[:, None] * w_in
    products = []
    for weight, scale in zip(w_qkv, scales, strict=True):
        product = torch.cat([rows.double() @ w_norm for rows in weight.split(1024)])
        products.append(product if scale is None else product * scale[:, None])
    root = torch.linalg.qr(w_in, mode="r").R / dim**0.5
    root = torch.cat((root, root.new_zeros(K - len(root), K)))  # if dim < K, the decomposition has only dim rows
    return torch.cat(products).T.float().contiguous(), root.T.float().contiguous()


@triton.jit
def _head(b_heads, o_head, i: tl.constexpr):
    """Return head `i` of [B, heads, D], as [B, 1, D]."""
    return tl.sum(tl.where(o_head == i, b_heads, 0.0), 1)[:, None, :]


@triton.jit
def _rounded(b_x, p_out):
    """Return numbers of the state in fp32, rounded to the network's dtype, as all inputs of the network are."""
    return cast(b_x, p_out.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["B"])
def _state_attention_kernel(
    p_x, p_w, p_root, p_t, p_h, p_out,
    B, eps,
    W: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, K: tl.constexpr, PAD_K: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_B: tl.constexpr,
    OVERLAP: tl.constexpr = OFF,
):  # fmt: skip
    # The heads of a block are the G query heads that share a key head, then the key head, then the head of its values.
    G: tl.constexpr = H // HKV
    COLUMNS: tl.constexpr = triton.next_power_of_2(D)  # type: ignore[arg-type]
    i_kv = tl.program_id(1).to(tl.int64)
    o_b = (tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B))[:, None, None]
    o_i, o_d, o_k = tl.arange(0, HEADS)[None, :, None], tl.arange(0, COLUMNS)[None, None, :], tl.arange(0, PAD_K)
    m_k, m_b, m_w = o_k < K, o_b < B, (o_i < G + 2) & (o_d < D)
    o_head = tl.where(o_i < G, i_kv * G + o_i, tl.where(o_i == G, H, H + HKV) + i_kv)
    o_w = o_head * D + o_d
    wait_for_launches(OVERLAP)
    weights = ()
    for k in tl.static_range(K):
        weights = with_block(weights, tl.load(p_w + k * W + o_w, mask=m_w, other=0.0))  # [1, heads, D]
    b_t = tl.load(p_t + o_w, mask=m_w, other=0.0).to(tl.float32)  # [1, heads, D]
    b_h = tl.load(p_h + o_b * W + o_w, mask=m_w & m_b, other=0.0).to(tl.float32)  # [B, heads, D]
    b_state = tl.load(p_x + o_b * K + o_k[None, :, None], mask=m_b & m_k[None, :, None], other=0.0)  # [B, K, 1]
    b_root = tl.load(p_root + o_k[:, None] * K + o_k[None, :], mask=m_k[:, None] & m_k[None, :], other=0.0)
    b_token = tl.sum(_rounded(b_state, p_out) * b_root[None, :, :], 1)  # [B, K]
    b_scale = tl.rsqrt(tl.sum(b_token * b_token, 1) + tl.full([], eps, tl.float32))
    b_y = tl.zeros([BLOCK_B, HEADS, COLUMNS], dtype=tl.float32)
    for k in tl.static_range(K):
        b_x = _rounded(tl.load(p_x + o_b * K + k, mask=m_b, other=0.0), p_out)  # [B, 1, 1]
        b_y = tl.fma(b_x, weights[k], b_y)
    b_y *= b_scale[:, None, None]
    b_k_x, b_k_t, b_k_h = _head(b_y, o_i, G), _head(b_t, o_i, G), _head(b_h, o_i, G)
    m_o = m_b & m_w & (o_i < G)
    b_v_x, b_v_t, b_v_h = _head(b_y, o_i, G + 1), _head(b_t, o_i, G + 1), _head(b_h, o_i, G + 1)
    for token in tl.static_range(3):
        b_q = b_y if token == 0 else b_t if token == 1 else b_h
        b_s_x, b_s_t, b_s_h = scores(b_q, b_k_x, b_k_t, b_k_h, D)
        b_o = attend(b_s_x, b_s_t, b_s_h, b_v_x, b_v_t, b_v_h)
        p_o = p_out + (2 * token * B + o_b) * (H * D) + o_w
        tl.store(p_o, cast(b_o, p_out.dtype.element_ty), mask=m_o)
        # branch 1: the query of the h token is zero, and so are its key and its value
        if token == 2:
            b_s_x, b_s_t = tl.zeros_like(b_s_x), tl.zeros_like(b_s_t)
        b_o = attend(b_s_x, b_s_t, tl.zeros_like(b_s_h), b_v_x, b_v_t, tl.zeros_like(b_v_h))
        tl.store(p_o + B * (H * D), cast(b_o, p_out.dtype.element_ty), mask=m_o)


def launch_state_attention(
    out: Tensor, x: Tensor, weight: Tensor, root: Tensor, t_qkv: Tensor, h_qkv: Tensor, eps: float,
    n_heads: int, n_kv_heads: int, max_batch: int,
) -> None:  # fmt: skip
    """Run :func:`state_attention` into `out`, contiguous [6B, H * D], without checking the arguments."""
    B, (K, W) = len(x), weight.shape
    D = W // (n_heads + 2 * n_kv_heads)
    constants = STATE_ATTENTION(N=W, K=K, dtype=h_qkv.dtype, rows=max_batch)
    constants |= {"W": W, "H": n_heads, "HKV": n_kv_heads, "D": D, "K": K, "PAD_K": triton.next_power_of_2(K)}
    constants["HEADS"] = triton.next_power_of_2(n_heads // n_kv_heads + 2)
    grid = (triton.cdiv(B, constants["BLOCK_B"]), n_kv_heads)
    _state_attention_kernel[grid](x, weight, root, t_qkv, h_qkv, out, B, eps, **constants)


@operator(launch_state_attention)
def state_attention(
    x: Tensor,
    weight: Tensor,
    root: Tensor,
    t_qkv: Tensor,
    h_qkv: Tensor,
    eps: float,
    n_heads: int,
    n_kv_heads: int,
    max_batch: int,
) -> Tensor:
    """Compute attention over the tokens [x, t, h] of both branches in the first layer.

    The queries, keys and values of the x token are ``x @ weight / sqrt(|x @ root|^2 + eps)``. In branch 1, those of the
    h token are zero.

    Args:
        x: fp32 [B, K], the flow's state. It is rounded to the dtype of `h_qkv` first.
        weight: fp32 [K, W], see :func:`fold_state_qkv`; W = (H + 2 Hkv) * D.
        root: fp32 [K, K], see :func:`fold_state_qkv`.
        t_qkv: [1, W] fp32, bf16 or fp16, q | k | v of the t token, which all requests share.
        h_qkv: [B, W], q | k | v of the h tokens in branch 0.
        eps: added to the mean square.
        n_heads: H query heads.
        n_kv_heads: Hkv key heads, a divisor of H; query head h reads key head ``h // (H / Hkv)``.
        max_batch: the most requests that the operator is prepared for, 1..64; the launch config depends on this number.

    Returns:
        [6B, H * D] in h_qkv's dtype, in rows token * 2B + branch * B + request. All sums and the softmax are fp32, and
        the result is rounded once.

    Raises:
        ValueError: B is not in 1..max_batch, `max_batch` is not in 1..64, or W does not fit `n_heads` and `n_kv_heads`.
    """
    B, W = expect("h_qkv", h_qkv, ("B", "W"))
    D = expect_heads_of_tokens("h_qkv", W, n_heads, n_kv_heads)
    expect_batch("h_qkv", B, 1, max_batch)
    K, _ = expect("weight", weight, ("K", W), like=h_qkv, dtype=torch.float32)
    expect("root", root, (K, K), like=h_qkv, dtype=torch.float32)
    expect("x", x, (B, K), like=h_qkv, dtype=torch.float32)
    expect("t_qkv", t_qkv, (1, W), like=h_qkv)
    return h_qkv.new_empty(6 * B, n_heads * D)
