"""Registry entries of the linear layers for few rows.

The public shapes are those of the public model, and ``mar-*`` those of MAR-H (arXiv 2406.11838).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.registry import ALL_DTYPES, BF16_AND_8_BITS, Case, Entry, TensorMaker
from voxkern.kernels.linear import linear
from voxkern.reference.quantized import scaled_linear


def phase_of(s: Any) -> str:
    """Return the phase of a case: "prefill" or "codec" if that is a key of its sizes, else "decode"."""
    return next((phase for phase in ("prefill", "codec") if hasattr(s, phase)), "decode")


def own_rows(modulation: Tensor, M: int) -> Tensor:
    """Return the modulation of each of M rows.

    Row 1 + i of `modulation` belongs to row i; row 0 is for all rows without a modulation of their own.
    """
    i = torch.arange(M, device=modulation.device) + 1
    return modulation[i.where(i < len(modulation), 0)]


def linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    max_rows: int,
    phase: str = "decode",
    scale: Tensor | None = None,
) -> Tensor:
    """Compute the linear product, the gate and the sum with the residual, rounding after each operation."""
    y = F.linear(x, weight, bias) if scale is None else scaled_linear(x, weight, scale) + (0 if bias is None else bias)
    y = y if gate is None else own_rows(gate, len(x)) * y
    return y if residual is None else residual + y


def linear_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with a bias and a residual if `s.bias` and `s.residual` are not 0.

    With `s.gates` = 0 the gate is None, with 1 all rows share a gate, and with 2 half of the rows have their own gate.
    """
    x, (weight, scale) = make(s.M, s.K), make.weight(s.N, s.K, std=s.K**-0.5)
    return {
        "x": x,
        "weight": weight,
        "bias": make(s.N, std=0.1) if s.bias else None,
        "gate": make(1 + s.M // 2 if s.gates > 1 else 1, s.N, std=0.5) if s.gates else None,
        "residual": make(s.M, s.N) if s.residual else None,
        "max_rows": s.max_rows,
        "phase": phase_of(s),
        "scale": scale,
    }


def split_stage(c: Any) -> int:
    """Return the number of weight elements that one stage of the pipeline loads, for all SPLIT partial sums along K."""
    return c["SPLIT"] * c["BLOCK_N"] * c["BLOCK_K"]  # type: ignore[no-any-return]


PLAIN = {"bias": 0, "gates": 0, "residual": 0}
DOWN = {"N": 3072, "K": 9216, **PLAIN, "residual": 1}
CODEC = {"N": 1024, "bias": 0, "gates": 1, "residual": 1, "codec": 1}  # a frame of a request has up to 8 rows
BLOCK = {"N": 1536, "K": 1536, "bias": 1, "residual": 1}

ENTRIES = [
    Entry(
        op=linear,
        reference=linear_reference,
        inputs=linear_inputs,
        cases=(
            Case(
                "odd",
                {"M": 19, "N": 75, "K": 150, "bias": 1, "gates": 2, "residual": 1, "max_rows": 19},
                dtypes=ALL_DTYPES,
            ),
            Case("odd-plain", {"M": 17, "N": 75, "K": 150, **PLAIN, "max_rows": 19}),
            Case("odd-bias", {"M": 19, "N": 75, "K": 150, **PLAIN, "bias": 1, "max_rows": 19}),
            Case(
                "odd-residual",
                {"M": 70, "N": 75, "K": 150, **PLAIN, "residual": 1, "max_rows": 100},
                dtypes=("bf16", "int8", "fp16", "fp32"),
            ),
            Case("odd-scale", {"M": 29, "N": 97, "K": 129, "bias": 0, "gates": 1, "residual": 1, "max_rows": 32}),
            Case("odd-many", {"M": 70, "N": 97, "K": 129, "bias": 1, "gates": 2, "residual": 1, "max_rows": 100}),
            Case(
                "odd-prefill",
                {**DOWN, "M": 150, "N": 75, "K": 150, "max_rows": 150, "prefill": 1},
                dtypes=BF16_AND_8_BITS,
            ),
            Case("down-b1", {"M": 6, **DOWN, "max_rows": 6}, public=True, dtypes=ALL_DTYPES),
            Case("down-b2", {"M": 12, **DOWN, "max_rows": 12}, public=True, dtypes=BF16_AND_8_BITS),
            Case("down-b4", {"M": 24, **DOWN, "max_rows": 24}, public=True, dtypes=BF16_AND_8_BITS),
            Case("down-b8", {"M": 48, **DOWN, "max_rows": 48}, public=True, dtypes=BF16_AND_8_BITS),
            Case("down-b16", {"M": 96, **DOWN, "max_rows": 96}, public=True, dtypes=BF16_AND_8_BITS),
            Case("last-b32", {"M": 64, **DOWN, "max_rows": 64}, public=True, dtypes=BF16_AND_8_BITS),
            Case("down-b32", {"M": 192, **DOWN, "max_rows": 192}, public=True, dtypes=BF16_AND_8_BITS),
            Case(
                "prefill",
                {"M": 230, **DOWN, "max_rows": 230, "prefill": 1},
                public=True,
                dtypes=BF16_AND_8_BITS,
            ),
            Case("llm-b1", {"M": 1, "N": 3072, "K": 3072, **PLAIN, "max_rows": 6}, public=True, dtypes=("bf16",)),
            Case("odd-codec", {**CODEC, "M": 150, "N": 75, "K": 150, "max_rows": 150}, dtypes=("bf16",)),
            Case("codec-wo-b1", {**CODEC, "M": 8, "K": 1024, "max_rows": 8}, public=True, dtypes=("bf16",)),
            Case("codec-down-b1", {**CODEC, "M": 8, "K": 4096, "max_rows": 8}, public=True, dtypes=("bf16",)),
            Case("codec-down-b8", {**CODEC, "M": 64, "K": 4096, "max_rows": 64}, public=True, dtypes=("bf16",)),
            Case("codec-down-b16", {**CODEC, "M": 128, "K": 4096, "max_rows": 128}, public=True, dtypes=("bf16",)),
            Case("codec-down-b32", {**CODEC, "M": 256, "K": 4096, "max_rows": 256}, public=True, dtypes=("bf16",)),
            Case("mar-b1", {"M": 2, **BLOCK, "gates": 2, "max_rows": 2}, public=True),
            Case("mar-b32", {"M": 64, **BLOCK, "gates": 2, "max_rows": 64}, public=True, dtypes=("bf16",)),
        ),
        stage=split_stage,
        ordered_by=("p_arrived",),
    ),
]
