"""Registry entries of RMSNorm with the linear layer after it, at the shapes of the public model."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.ops.linear import phase_of
from bench.ops.registry import ALL_DTYPES, BF16_AND_8_BITS, Case, Entry, TensorMaker
from voxkern.kernels.norm_linear import norm_linear, norm_swiglu
from voxkern.reference.layers import rms_norm
from voxkern.reference.quantized import scaled_linear


def norm_linear_reference(
    x: Tensor, norm: Tensor, weight: Tensor, eps: float, max_rows: int, phase: str = "decode",
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute RMSNorm, round, then multiply, as the public servers do in two kernels."""
    return scaled_linear(rms_norm(x, norm, eps), weight, scale)


def norm_linear_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with weights like those of a trained layer: `norm` near 1, and outputs of RMS 1."""
    x, norm = make(s.M, s.K), make(s.K, mean=1.0, std=0.1)
    weight, scale = make.weight(s.N, s.K, std=s.K**-0.5)
    return {
        "x": x,
        "norm": norm,
        "weight": weight,
        "eps": 1e-5,
        "max_rows": s.max_rows,
        "phase": phase_of(s),
        "scale": scale,
    }


def norm_swiglu_reference(
    x: Tensor, norm: Tensor, w1: Tensor, w3: Tensor, eps: float, max_rows: int, phase: str = "decode",
    scale1: Tensor | None = None, scale3: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute the reference's feed-forward up to the gated product, rounding after each operation."""
    n = rms_norm(x, norm, eps)
    return F.silu(scaled_linear(n, w1, scale1)) * scaled_linear(n, w3, scale3)


def norm_swiglu_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments like those of :func:`norm_linear_inputs`, with the weights `w1` and `w3`."""
    x, norm = make(s.M, s.K), make(s.K, mean=1.0, std=0.1)
    (w1, scale1), (w3, scale3) = (make.weight(s.N, s.K, std=s.K**-0.5) for _ in range(2))
    return {
        "x": x,
        "norm": norm,
        "w1": w1,
        "w3": w3,
        "eps": 1e-5,
        "max_rows": s.max_rows,
        "phase": phase_of(s),
        "scale1": scale1,
        "scale3": scale3,
    }


UP = {"N": 9216, "K": 3072}
CODEC = {"N": 4096, "K": 1024, "codec": 1}

ENTRIES = [
    Entry(
        op=norm_linear,
        reference=norm_linear_reference,
        inputs=norm_linear_inputs,
        ordered_by=("p_arrived",),
        cases=(
            Case("odd", {"M": 19, "N": 75, "K": 150, "max_rows": 19}, dtypes=ALL_DTYPES),
            Case("odd-many", {"M": 70, "N": 97, "K": 129, "max_rows": 100}),
            Case("odd-deep", {"M": 17, "N": 40, "K": 3001, "max_rows": 17}),
            # the flow head has six rows per request: three tokens, with and without the hidden state
            Case("q-b1", {"M": 6, "N": 4096, "K": 3072, "max_rows": 6}, public=True),
            Case("q-b32", {"M": 192, "N": 4096, "K": 3072, "max_rows": 192}, public=True, dtypes=("bf16",)),
        ),
    ),
    Entry(
        op=norm_swiglu,
        reference=norm_swiglu_reference,
        inputs=norm_swiglu_inputs,
        ordered_by=("p_arrived",),
        cases=(
            Case("odd", {"M": 19, "N": 75, "K": 150, "max_rows": 19}, dtypes=ALL_DTYPES),
            Case("odd-many", {"M": 70, "N": 97, "K": 129, "max_rows": 100}, dtypes=("bf16", "int8", "fp16", "fp32")),
            Case("b1", {"M": 6, **UP, "max_rows": 6}, public=True, dtypes=ALL_DTYPES),
            Case("b2", {"M": 12, **UP, "max_rows": 12}, public=True, dtypes=BF16_AND_8_BITS),
            Case("b4", {"M": 24, **UP, "max_rows": 24}, public=True, dtypes=BF16_AND_8_BITS),
            Case("b8", {"M": 48, **UP, "max_rows": 48}, public=True, dtypes=BF16_AND_8_BITS),
            Case("b16", {"M": 96, **UP, "max_rows": 96}, public=True, dtypes=BF16_AND_8_BITS),
            Case("last-b32", {"M": 64, **UP, "max_rows": 64}, public=True, dtypes=BF16_AND_8_BITS),
            Case("b32", {"M": 192, **UP, "max_rows": 192}, public=True, dtypes=BF16_AND_8_BITS),
            Case("odd-prefill", {"M": 150, "N": 75, "K": 150, "max_rows": 150, "prefill": 1}, dtypes=("bf16",)),
            Case("prefill", {"M": 230, **UP, "max_rows": 230, "prefill": 1}, public=True, dtypes=BF16_AND_8_BITS),
            Case("odd-codec", {**CODEC, "M": 150, "N": 75, "K": 150, "max_rows": 150}, dtypes=("bf16",)),
            Case("codec-b1", {**CODEC, "M": 8, "max_rows": 8}, public=True, dtypes=("bf16",)),
            Case("codec-b8", {**CODEC, "M": 64, "max_rows": 64}, public=True, dtypes=("bf16",)),
            Case("codec-b16", {**CODEC, "M": 128, "max_rows": 128}, public=True, dtypes=("bf16",)),
            Case("codec-b32", {**CODEC, "M": 256, "max_rows": 256}, public=True, dtypes=("bf16",)),
        ),
        stage=lambda c: 2 * c["BLOCK_N"] * c["BLOCK_K"],
        read_once=("w1", "w3"),
    ),
]
