"""Linear layers with 8-bit weights: 8-bit numbers and one scale for each row of the weight.

::

    int8   weight = q * scale,  q = round(weight / scale) in -127..127,   scale = max |row| / 127
    fp8    weight = q * scale,  q = weight / scale as e4m3 (at most 448), scale = max |row| / 448

    y = (x @ q.T) * scale     x has 16 or more bits; the sums of a row are scaled once

At small batches a frame's time is that of reading the weights, and these are half as many bytes. Quantised are the
linear layers of the backbone and of the transformer head (attention, feed-forward, experts), and the semantic head. The
rest stays as it is: norms, embeddings, routers, projections, the MLP as a velocity network, and the codec.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 512  # rows of the weight that are widened at a time, so the whole weight is never held in 16 bits
SEMANTIC_HEAD = "acoustic_transformer.semantic_codebook_output"
SMALLEST_SCALE = 2.0**-126  # the smallest normal fp32 number, also the scale of a row of zeros


@dataclass(frozen=True)
class Format:
    """A format of 8-bit weights.

    Attributes:
        dtype: dtype of the 8-bit numbers.
        largest: the largest 8-bit number.
        shrink: a power of two; all 8-bit numbers times `shrink` are at most 1, and exact in fp16.
    """

    dtype: torch.dtype
    largest: float
    shrink: float


FORMATS = {"int8": Format(torch.int8, 127.0, 2.0**-7), "fp8": Format(torch.float8_e4m3fn, 448.0, 2.0**-9)}


def format_of(name: str) -> Format:
    """Return the format with a name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in FORMATS:
        raise ValueError(f"quantize must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def quantize_weight(weight: Tensor, format_: Format) -> tuple[Tensor, Tensor]:
    """Quantise a weight by rows: each row is divided by its scale and rounded to nearest, ties to even.

    Args:
        weight: [N, K], floating-point and finite.
        format_: the format.

    Returns:
        The 8-bit numbers, [N, K] in the format's dtype, and the scales, fp32 [N].
    """
    q = torch.empty(weight.shape, dtype=format_.dtype, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in _blocks(len(weight)):
        block = weight[rows].float()
        scale[rows] = (block.abs().amax(1) / format_.largest).clamp(min=SMALLEST_SCALE)
        block = (block / scale[rows, None]).clamp(-format_.largest, format_.largest)
        q[rows] = (block.round() if format_.dtype == torch.int8 else block).to(format_.dtype)
    return q, scale


class QuantizedLinear(nn.Module):
    """A linear layer without bias that holds its weight in 8 bits.

    ``to(dtype)`` changes neither the 8-bit numbers nor the scales, because they belong to the checkpoint. The layer
    computes in the dtype of its input.

    Attributes:
        weight: int8 or e4m3 [N, K], the 8-bit numbers.
        qscale_weight: fp32 [N], the scale of each row.
    """

    weight: Tensor
    qscale_weight: Tensor

    def __init__(self, in_features: int, out_features: int, format_: Format) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format_
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=format_.dtype))
        self.register_buffer("qscale_weight", torch.ones(out_features, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the product with a block of rows of the weight at a time, [..., K] -> [..., N].

        The products of int8 numbers would exceed fp16, so in fp16 the numbers are multiplied by the format's `shrink`.
        """
        shrink = self.format.shrink if x.dtype == torch.float16 else 1.0
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for rows in _blocks(self.out_features):
            block = self.weight[rows].to(x.dtype)
            scale = self.qscale_weight[rows]
            if shrink != 1.0:
                block, scale = block.mul_(shrink), scale / shrink
            y[..., rows] = F.linear(x, block) * scale
        return y

    def dequantized(self) -> Tensor:
        """Return the weight that the layer stands for, fp32 [N, K]."""
        return self.weight.float() * self.qscale_weight[:, None]

    def extra_repr(self) -> str:
        """Describe the layer in the model's ``repr``."""
        return f"{self.in_features}, {self.out_features}, {self.format.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-any-return, no-untyped-call]


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model that can have 8-bit weights, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module.bias is None
        and (name.startswith(("layers.", "acoustic_transformer.layers.")) or name == SEMANTIC_HEAD)
    }


def replace_linears(model: nn.Module, linears: Mapping[str, nn.Linear], format_: Format) -> None:
    """Replace `linears`, some of those of :func:`quantizable`, by layers whose 8-bit weights are to be loaded."""
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(linear.in_features, linear.out_features, format_))


def _blocks(n: int) -> Iterator[slice]:
    return (slice(first, min(first + ROWS, n)) for first in range(0, n, ROWS))
