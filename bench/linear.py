"""The skinny linear family at the shapes of the public model."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.registry import Case, Entry, Maker
from voxkern.kernels.linear import norm_linear
from voxkern.reference.linear import rms_norm


def norm_linear_reference(x: Tensor, norm: Tensor, weight: Tensor, eps: float, max_rows: int) -> Tensor:
    """RMSNorm, rounded, then the product: what the public servers run as two kernels."""
    return F.linear(rms_norm(x, norm, eps), weight)


def norm_linear_inputs(s: Any, make: Maker) -> dict[str, Any]:
    """Weights as a trained layer has them: a norm near 1, and outputs of RMS 1."""
    return {
        "x": make(s.M, s.K),
        "norm": make(s.K, mean=1.0, std=0.1),
        "weight": make(s.N, s.K, std=s.K**-0.5),
        "eps": 1e-5,
        "max_rows": s.max_rows,
    }


ENTRIES = [
    Entry(
        op=norm_linear,
        reference=norm_linear_reference,
        inputs=norm_linear_inputs,
        cases=(
            Case("odd", {"M": 19, "N": 75, "K": 150, "max_rows": 19}),
            Case("odd-many", {"M": 70, "N": 97, "K": 129, "max_rows": 100}),
            Case("odd-deep", {"M": 17, "N": 40, "K": 3001, "max_rows": 17}),
            # the flow head carries six rows a request: three tokens, with and without condition
            Case("q-b1", {"M": 6, "N": 4096, "K": 3072, "max_rows": 6}, public=True),
            Case("q-b2", {"M": 12, "N": 4096, "K": 3072, "max_rows": 12}, public=True, dtypes=("bf16",)),
            Case("q-b4", {"M": 24, "N": 4096, "K": 3072, "max_rows": 24}, public=True, dtypes=("bf16",)),
            Case("q-b32", {"M": 192, "N": 4096, "K": 3072, "max_rows": 192}, public=True),
            Case("w1-b1", {"M": 6, "N": 9216, "K": 3072, "max_rows": 6}, public=True, dtypes=("bf16",)),
            Case("w1-b32", {"M": 192, "N": 9216, "K": 3072, "max_rows": 192}, public=True, dtypes=("bf16",)),
        ),
    ),
]
