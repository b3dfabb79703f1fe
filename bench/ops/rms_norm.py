"""Registry entry of RMSNorm, at the shapes of the public model."""

from typing import Any

from bench.ops.registry import Case, Entry, TensorMaker
from voxkern.kernels.rms_norm import rms_norm
from voxkern.reference.layers import rms_norm as rms_norm_reference


def rms_norm_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with weights near 1."""
    return {"x": make(s.M, s.K), "weight": make(s.K, mean=1.0, std=0.1), "eps": 1e-5}


ENTRIES = [
    Entry(
        op=rms_norm,
        reference=rms_norm_reference,
        inputs=rms_norm_inputs,
        cases=(
            Case("odd", {"M": 5, "K": 150}),
            Case("odd-wide", {"M": 3, "K": 3001}),
            Case("b1", {"M": 1, "K": 3072}, public=True),
            Case("b32", {"M": 32, "K": 3072}, public=True, dtypes=("bf16",)),
        ),
        stage=lambda c: 0,
        read_once=(),
        uses_matrix_unit=False,
    ),
]
