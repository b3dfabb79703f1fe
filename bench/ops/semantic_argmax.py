"""Registry entry of the semantic head, at the shapes of the public model."""

from typing import Any

import torch
from torch import Tensor

from bench.ops.registry import ALL_DTYPES, BF16_AND_8_BITS, Case, Entry, TensorMaker
from voxkern.kernels.semantic_argmax import semantic_argmax
from voxkern.reference.config import NOT_FINITE
from voxkern.reference.flow_head import lowest_argmax
from voxkern.reference.layers import upcast
from voxkern.reference.quantized import scaled_linear


def semantic_argmax_reference(
    h: Tensor, weight: Tensor, n_codes: int, max_batch: int, scale: Tensor | None = None
) -> Tensor:
    """Compute logits, mask EMPTY and the padding, and return the lowest index of the greatest logit.

    As in the kernel, logits are fp32; for fp64 inputs they are fp64. NaN or infinity outside the mask gives NOT_FINITE.
    """
    logits = scaled_linear(upcast(h), upcast(weight) if scale is None else weight, scale)
    index = torch.arange(len(weight), device=h.device)
    codes = lowest_argmax(logits.masked_fill((index == 0) | (index >= n_codes), -torch.inf))
    return codes.where(logits[:, 1:n_codes].isfinite().all(1), NOT_FINITE)


def semantic_argmax_inputs(s: Any, make: TensorMaker) -> dict[str, Any]:
    """Return arguments with logits of RMS 1; the last `s.rows - s.N` rows of the weight are padding."""
    weight, scale = make.weight(s.rows, s.K, std=s.K**-0.5)
    return {"h": make(s.B, s.K), "weight": weight, "n_codes": s.N, "max_batch": s.max_batch, "scale": scale}


ENTRIES = [
    Entry(
        op=semantic_argmax,
        reference=semantic_argmax_reference,
        inputs=semantic_argmax_inputs,
        cases=(
            Case("odd", {"B": 19, "rows": 160, "K": 150, "N": 139, "max_batch": 20}, dtypes=ALL_DTYPES),
            Case("odd-wide", {"B": 33, "rows": 75, "K": 200, "N": 75, "max_batch": 40}),
            Case(
                "frame-b1",
                {"B": 1, "rows": 8320, "K": 3072, "N": 8194, "max_batch": 1},
                public=True,
                dtypes=ALL_DTYPES,
            ),
            Case(
                "frame-b16",
                {"B": 16, "rows": 8320, "K": 3072, "N": 8194, "max_batch": 16},
                True,
                BF16_AND_8_BITS,
            ),
            Case(
                "frame-b32",
                {"B": 32, "rows": 8320, "K": 3072, "N": 8194, "max_batch": 32},
                public=True,
                dtypes=ALL_DTYPES,
            ),
        ),
        rows="B",
        stage=lambda c: c.get("BLOCK_N", 0) * c.get("BLOCK_K", 0),
        read_once=(),  # the weight's padding is never read: tests/test_flow_head_kernels.py counts the other rows
        weight_names=("weight",),
        ordered_by=("p_arrived",),
        partly={"weight": lambda args: args["n_codes"] * int(args["weight"].shape[1])},
        multiply_adds=lambda args: args["h"].numel() * args["n_codes"],
    ),
]
