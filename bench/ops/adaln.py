"""Registry entries of the linear layers with adaptive layer norm.

The public shapes have the width of MAR-H (arXiv 2406.11838) and of VibeVoice-1.5B's head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.linear import own_rows, split_stage
from bench.ops.registry import Case, Entry, TensorMaker
from voxkern.kernels.adaln import adaln_linear_silu, adaln_modulation
from voxkern.reference.mlp_head import modulated_norm
from voxkern.reference.solver import MAX_STEPS


def adaln_modulation_reference(
    times: Tensor, states: Tensor, weights: list[Tensor], biases: list[Tensor], max_rows: int
) -> Tensor:
    """Compute SiLU(`times` + `states`) and then each layer's linear product, rounding after each operation."""
    c = F.silu(times[:, None] + states)
    return torch.cat([F.linear(c, *layer) for layer in zip(weights, biases, strict=True)], dim=-1)


def adaln_modulation_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments for `s.blocks` blocks with shift, scale and gate, and a final layer with shift and scale."""
    sizes = [s.N] * s.blocks + [2 * s.K]
    return {
        "times": make(s.S, s.K),
        "states": make(s.R, s.K),
        "weights": [make(n, s.K, std=s.K**-0.5) for n in sizes],
        "biases": [make(n, std=0.1) for n in sizes],
        "max_rows": s.max_rows,
    }


def adaln_linear_silu_reference(
    x: Tensor, modulation: Tensor, weight: Tensor, bias: Tensor, eps: float, max_rows: int
) -> Tensor:
    """Compute the modulated norm, rounded once, then the linear product and SiLU, each rounded."""
    shift, scale = own_rows(modulation, len(x))[:, : 2 * x.shape[1]].chunk(2, dim=1)
    return F.silu(F.linear(modulated_norm(x, shift, scale, eps), weight, bias))


def adaln_linear_silu_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments in which half of the rows have their own modulation, and x has mean 1 and deviation 1."""
    return {
        "x": make(s.M, s.K, mean=1.0),
        "modulation": make(1 + s.M // 2, 3 * s.K, std=0.5),
        "weight": make(s.N, s.K, std=s.K**-0.5),
        "bias": make(s.N, std=0.1),
        "eps": 1e-6,
        "max_rows": s.max_rows,
    }


BLOCK = {"N": 1536, "K": 1536}
ALL = {"N": 4608, "K": 1536, "blocks": 3, "S": 7}

ENTRIES = [
    Entry(
        op=adaln_modulation,
        reference=adaln_modulation_reference,
        inputs=adaln_modulation_inputs,
        cases=(
            Case("odd", {"N": 225, "K": 75, "blocks": 2, "S": 5, "R": 5, "M": 25, "max_rows": 30}),
            Case("odd-one-block", {"N": 390, "K": 130, "blocks": 1, "S": 3, "R": 7, "M": 21, "max_rows": 21}),
            Case("mar-b1", {**ALL, "R": 1, "max_rows": MAX_STEPS}, public=True),
            Case("mar-b32", {**ALL, "R": 32, "max_rows": 32 * MAX_STEPS}, public=True, dtypes=("bf16",)),
        ),
        rows="R",
        read_once=(),  # the weights are in lists; tests/test_adaln.py counts their bytes
        weight_names=("weights",),
        multiply_adds=lambda args: len(args["times"]) * len(args["states"]) * sum(w.numel() for w in args["weights"]),
    ),
    Entry(
        op=adaln_linear_silu,
        reference=adaln_linear_silu_reference,
        inputs=adaln_linear_silu_inputs,
        cases=(
            Case("odd", {"M": 19, "N": 75, "K": 150, "max_rows": 19}),
            Case("odd-many", {"M": 70, "N": 97, "K": 129, "max_rows": 100}),
            Case("mar-b1", {"M": 2, **BLOCK, "max_rows": 2}, public=True),
            Case("mar-b32", {"M": 64, **BLOCK, "max_rows": 64}, public=True, dtypes=("bf16",)),
        ),
        stage=split_stage,
        partly={"modulation": lambda args: len(args["modulation"]) * 2 * int(args["x"].shape[1])},  # no gate
    ),
]
