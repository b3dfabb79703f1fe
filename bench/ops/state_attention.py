"""Registry entry of ``state_attention``, at the shapes of the public model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.registry import Case, Entry, TensorMaker
from bench.ops.token_attention import token_attention_reference
from voxkern.kernels.state_attention import fold_state_qkv, state_attention


def state_attention_reference(
    x: Tensor, weight: Tensor, root: Tensor, t_qkv: Tensor, h_qkv: Tensor, eps: float,
    n_heads: int, n_kv_heads: int, max_batch: int,
) -> Tensor:  # fmt: skip
    """Compute q | k | v of the x tokens from the state, then plain attention over the three tokens."""
    x = x.to(h_qkv.dtype).to(x.dtype)
    mean_square = F.linear(x, root.T).square().sum(1, keepdim=True)
    x_qkv = (F.linear(x, weight.T) / (mean_square + eps).sqrt()).to(h_qkv.dtype)
    tokens = (x_qkv, x_qkv, t_qkv.expand(2 * len(x), -1), h_qkv, torch.zeros_like(h_qkv))
    return token_attention_reference(torch.cat(tokens), n_heads, n_kv_heads, 3, max_batch)


def state_attention_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with scores of standard deviation 1, from the weights of a layer of width `s.dim`."""
    W = (s.H + 2 * s.HKV) * s.D
    w_qkv, norm, w_in = make(W, s.dim, std=s.dim**-0.5), make(s.dim, mean=1.0, std=0.2), make(s.dim, s.K)
    weight, root = fold_state_qkv([w_qkv], [None], norm, w_in)
    return {
        "x": make(s.B, s.K).float(),
        "weight": weight,
        "root": root,
        "t_qkv": make(1, W),
        "h_qkv": make(s.B, W),
        "eps": 1e-5,
        "n_heads": s.H,
        "n_kv_heads": s.HKV,
        "max_batch": s.max_batch,
    }


PUBLIC = {"H": 32, "HKV": 8, "D": 128, "K": 36, "dim": 3072}
ENTRIES = [
    Entry(
        op=state_attention,
        reference=state_attention_reference,
        inputs=state_attention_inputs,
        cases=(
            Case("odd", {"B": 19, "max_batch": 20, "H": 6, "HKV": 2, "D": 16, "K": 37, "dim": 70}),
            Case("odd-narrow", {"B": 17, "max_batch": 40, "H": 3, "HKV": 3, "D": 24, "K": 5, "dim": 3}),
            Case("frame-b1", {"B": 1, "max_batch": 1, **PUBLIC}, public=True),
            Case("frame-b32", {"B": 32, "max_batch": 32, **PUBLIC}, public=True),
        ),
        rows="B",
        # elements of two bytes; the weight is fp32
        stage=lambda c: 2 * c["K"] * c["D"] * (c["H"] // c["HKV"] + 2),
        read_once=("weight",),
        uses_matrix_unit=False,
        multiply_adds=lambda args: len(args["x"]) * (args["weight"].numel() + args["root"].numel()),
    ),
]
