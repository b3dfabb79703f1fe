"""Check the tensors of 8-bit checkpoints, which have Mistral's form, and read the scales.

``X.weight`` has 8 bits, and ``X.qscale_weight`` has one scale for the tensor or one for each row. ``X.qscale_act`` and
``*_fake_quantizer.qscale_act`` are scales of activations. voxkern does not use them, because activations are not
quantised.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .reference.quantized import FORMATS
from .weight_files import EIGHT_BITS, CheckpointError, TensorInfo

log = logging.getLogger(__name__)


def without_activation_scales(table: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors without the scales of activations, and log the number of these scales."""
    used = {name: info for name, info in table.items() if not name.endswith(".qscale_act")}
    if len(used) < len(table):
        log.warning("%d scales of activations are not used: activations are not quantised", len(table) - len(used))
    return used


def linears_in_8_bits(
    folder: Path, table: Mapping[str, TensorInfo], linears: Mapping[str, nn.Linear], format_: str | None
) -> dict[str, nn.Linear]:
    """Return those of `linears` that a checkpoint has in 8 bits.

    Args:
        folder: the checkpoint folder, for messages.
        table: the checkpoint's tensors.
        linears: the layers that can have 8-bit weights, by name.
        format_: the format that ``params.json`` names, or None.

    Raises:
        CheckpointError: another tensor has 8 bits, the tensors do not have the format that ``params.json`` names, or
            a scale is missing.
    """
    found = {}
    for name, info in table.items():
        if info.dtype not in EIGHT_BITS.values():
            continue
        layer, dtype = name.removesuffix(".weight"), str(info.dtype).removeprefix("torch.")
        if layer not in linears or not name.endswith(".weight"):
            raise CheckpointError(f"{info.file}: {name} is {dtype}, but voxkern has no 8-bit form of this tensor")
        if format_ is None or FORMATS[format_].dtype != info.dtype:
            quantization = "no quantization" if format_ is None else f"the quantization {format_}"
            raise CheckpointError(f"{info.file}: {name} is {dtype}, but params.json has {quantization}")
        if f"{layer}.qscale_weight" not in table:
            raise CheckpointError(f"{info.file}: {name} is {dtype}, but {layer}.qscale_weight is missing")
        found[layer] = linears[layer]
    if format_ is not None and not found:
        raise CheckpointError(f"{folder}: params.json has the quantization {format_}, but no tensor has 8 bits")
    return found


def row_scales(name: str, info: TensorInfo, scale: Tensor, n_rows: int) -> Tensor:
    """Convert a stored tensor, with one scale or one for each row, to the scales of all rows, fp32 [n_rows].

    Raises:
        CheckpointError: the shape is wrong, or a scale is zero, negative or not finite.
    """
    if tuple(scale.shape) not in ((), (1,), (n_rows,), (n_rows, 1)):
        allowed = f"[], [1], [{n_rows}] or [{n_rows}, 1]"
        raise CheckpointError(f"{info.file}: {name} is {list(scale.shape)} but must be {allowed}")
    scale = scale.to(torch.float32).reshape(-1)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError(f"{info.file}: {name} has a scale that is zero, negative or not finite")
    return scale.expand(n_rows).contiguous()
