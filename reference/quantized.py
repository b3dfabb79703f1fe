"""Linear layers with 8-bit weights: 8-bit numbers and one scale for each row of the weight.

::

    int8   weight = q * scale,  q = round(weight / scale) in -127..127,   scale = max |row| / 127
    fp8    weight = q * scale,  q = weight / scale as e4m3 (at most 448), scale = max |row| / 448

    y = (x @ q.T) * scale     x is not quantised; each sum is scaled once

8-bit weights need half the bytes of 16-bit weights. These modules widen each block of a weight before its product, so
they save memory, not time. Quantised weights: the linear layers of the backbone and of the transformer head (attention,
feed-forward, experts), and the semantic head. All others are unchanged: norms, embeddings, routers, projections, the
MLP as a velocity network, and the codec.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .layers import upcast

ROWS = 512  # rows that are widened at a time, so that the whole weight is never widened
SEMANTIC_HEAD = "semantic_codebook_output"
SMALLEST_SCALE = 2.0**-126  # the smallest normal fp32 number, also the scale of a row of zeros


@dataclass(frozen=True)
class Format:
    """A format of 8-bit weights.

    Attributes:
        dtype: dtype of the 8-bit numbers.
        largest: the largest 8-bit number.
    """

    dtype: torch.dtype
    largest: float


FORMATS = {"int8": Format(torch.int8, 127.0), "fp8": Format(torch.float8_e4m3fn, 448.0)}


def format_of(name: str) -> Format:
    """Return the format with a name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in FORMATS:
        raise ValueError(f"quantize must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def quantize_weight(weight: Tensor, format_: Format, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a weight by rows: each row is divided by its scale and rounded to nearest, ties to even.

    Args:
        weight: [N, K], floating-point. A row with a value that is not finite in fp32 gets a scale that is not finite.
        format_: the format.
        scale: fp32 [N], the scales; None takes the smallest with which no number of a row is clipped.

    Returns:
        The 8-bit numbers, [N, K] in the format's dtype, and the scales, fp32 [N].
    """
    q = torch.empty(weight.shape, dtype=format_.dtype, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in _blocks(len(weight)):
        block = weight[rows].float()
        largest = block.abs().amax(1)
        scales[rows] = (largest / format_.largest).clamp(min=SMALLEST_SCALE) if scale is None else scale[rows]
        block = (block / scales[rows, None]).clamp(-format_.largest, format_.largest)
        q[rows] = (block.round() if format_.dtype == torch.int8 else block).to(format_.dtype)
    return q, scales


def widened(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 8-bit numbers in `dtype`; on a CPU e4m3 goes through a table, because PyTorch's conversion is slow."""
    if q.dtype != torch.float8_e4m3fn or q.device.type != "cpu":
        return q.to(dtype)
    numbers = torch.arange(256, dtype=torch.uint8).view(q.dtype).to(dtype)
    return numbers.index_select(0, q.view(torch.uint8).flatten().int()).view(q.shape)


def scaled_linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Compute ``x @ weight.T``, and scale each column once if `weight` is quantised.

    For fp16, the product is computed in fp32, because a sum of 8-bit numbers that are not scaled may exceed 65,504.

    Args:
        x: [..., K].
        weight: [N, K] in x's dtype, or 8-bit numbers.
        scale: [N], or None for a weight that is not quantised.

    Returns:
        [..., N] in x's dtype.
    """
    if scale is None:
        return F.linear(x, weight)
    wide = upcast(x) if x.dtype == torch.float16 else x
    return (F.linear(wide, widened(weight, wide.dtype)) * scale).to(x.dtype)


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
        """Multiply x [..., K] by the weight, ROWS of its rows at a time, and return [..., N]."""
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for rows in _blocks(self.out_features):
            y[..., rows] = scaled_linear(x, self.weight[rows], self.qscale_weight[rows])
        return y

    def extra_repr(self) -> str:
        """Describe the layer in the model's ``repr``."""
        return f"{self.in_features}, {self.out_features}, {self.format.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-any-return, no-untyped-call]


def scale_of(layer: nn.Module) -> Tensor | None:
    """Return the scales of a layer's weight, fp32 [N], or None if the weight is not in 8 bits."""
    return layer.qscale_weight if isinstance(layer, QuantizedLinear) else None


def scales_of_qkv(attention: Attention) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the scales of wq, wk and wv, see :func:`scale_of`."""
    return scale_of(attention.wq), scale_of(attention.wk), scale_of(attention.wv)


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model, or of a flow head alone, that can have 8-bit weights, by name."""
    found: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        in_head = name.removeprefix("acoustic_transformer.")
        is_large = in_head.startswith("layers.") or in_head == SEMANTIC_HEAD
        if is_large and type(module) is nn.Linear and module.bias is None:
            found[name] = module
    return found


def replace_linears(model: nn.Module, linears: Mapping[str, nn.Linear], format_: Format) -> None:
    """Replace `linears`, a part of the result of :func:`quantizable`, by layers with 8-bit weights, not yet loaded."""
    for name, linear in linears.items():
        model.set_submodule(name, QuantizedLinear(linear.in_features, linear.out_features, format_))


def quantize_linears(model: nn.Module, linears: Mapping[str, nn.Linear], format_: Format) -> None:
    """Replace `linears`, a part of the result of :func:`quantizable`, by layers with their weights in 8 bits."""
    for name, linear in linears.items():
        model.set_submodule(name, quantized(linear, format_))


def quantized(linear: nn.Linear, format_: Format, scale: Tensor | None = None) -> QuantizedLinear:
    """Return a layer with the weight of `linear` in 8 bits; `scale` is that of :func:`quantize_weight`."""
    new = QuantizedLinear(linear.in_features, linear.out_features, format_)
    new.weight, new.qscale_weight = quantize_weight(linear.weight.detach(), format_, scale)
    return new


def _blocks(n: int) -> Iterator[slice]:
    return (slice(first, first + ROWS) for first in range(0, n, ROWS))
