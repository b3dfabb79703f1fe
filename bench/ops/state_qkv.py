"""Registry entry of ``state_qkv``, at the shapes of the public model."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.ops.registry import Case, Entry, TensorMaker
from voxkern.kernels.state_qkv import fold_state_qkv, state_qkv


def state_qkv_reference(x: Tensor, weight: Tensor, root: Tensor, eps: float, qkv: Tensor, max_batch: int) -> None:
    """Compute two products and a division, without rounding any intermediate result."""
    x = x.to(qkv.dtype).to(x.dtype)
    mean_square = F.linear(x, root).square().sum(1, keepdim=True)
    qkv.copy_(F.linear(x, weight) / (mean_square + eps).sqrt())


def state_qkv_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with results of RMS 1, from the weights of a layer of width `s.dim`."""
    w_qkv, norm, w_in = make(s.N, s.dim, std=s.dim**-0.5), make(s.dim, mean=1.0, std=0.2), make(s.dim, s.K)
    weight, root = fold_state_qkv([w_qkv], [None], norm, w_in)
    return {
        "x": make(s.B, s.K).float(),
        "weight": weight,
        "root": root,
        "eps": 1e-5,
        "qkv": make(s.B, s.N),
        "max_batch": s.max_batch,
    }


PUBLIC = {"N": 6144, "K": 36, "dim": 3072}
ENTRIES = [
    Entry(
        op=state_qkv,
        reference=state_qkv_reference,
        inputs=state_qkv_inputs,
        cases=(
            Case("odd", {"B": 19, "max_batch": 20, "N": 150, "K": 37, "dim": 70}),
            Case("odd-narrow", {"B": 33, "max_batch": 40, "N": 75, "K": 5, "dim": 3}),
            Case("frame-b1", {"B": 1, "max_batch": 1, **PUBLIC}, public=True),
            Case("frame-b16", {"B": 16, "max_batch": 16, **PUBLIC}, public=True, dtypes=("bf16",)),
            Case("frame-b32", {"B": 32, "max_batch": 32, **PUBLIC}, public=True),
        ),
        rows="B",
        stage=lambda c: 2 * c["BLOCK_N"] * c["K"],  # elements of two bytes; the weight is fp32
        read_once=("weight",),
        uses_matrix_unit=False,
        multiply_adds=lambda args: len(args["x"]) * (args["weight"].numel() + args["root"].numel()),
    ),
]
