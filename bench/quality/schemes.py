"""Ways to store the large weights of a model in fewer bits, and the bytes that each takes.

A scheme replaces some of the linear layers that :func:`voxkern.reference.quantized.quantizable` finds. The layers with
8-bit weights are voxkern's. 4-bit weights exist only here: their layers hold the numbers that 4 bits stand for,
rounded to the model's dtype.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from voxkern.reference import VoxtralTTS
from voxkern.reference.quantized import FORMATS, SMALLEST_SCALE, Format, QuantizedLinear, quantizable, quantized

GROUP = 32  # columns of a row that share a scale of 4-bit weights
SHARES_TRIED = torch.linspace(1.0, 0.5, 26)  # limits of clipping, as shares of the row's largest number
HEAD = "acoustic_transformer."
FIRST_QKV = rf"{re.escape(HEAD)}layers\.0\.attention\.w[qkv]"
Importance = Tensor | None  # fp32 [K], the mean square of each input of a layer, or None for equal weights
Convert = Callable[[nn.Linear, Importance], nn.Module]


@dataclass(frozen=True)
class Scheme:
    """A way to store the large weights.

    Attributes:
        name: the scheme's name.
        convert: function of a layer, and of the mean squares of its inputs, that returns the new layer.
        bits: function of the columns of a weight that returns the bits of each number, with its share of the scales.
        pattern: regular expression of the names of the layers that are replaced.
        is_fitted: whether `convert` needs the mean squares of inputs.
    """

    name: str
    convert: Convert
    bits: Callable[[int], float]
    pattern: str = ".*"
    is_fitted: bool = False

    def takes(self, name: str) -> bool:
        """Return whether the scheme replaces the layer with this name."""
        return re.fullmatch(self.pattern, name) is not None

    def apply(self, model: VoxtralTTS, importance: Mapping[str, Tensor]) -> VoxtralTTS:
        """Replace a model's layers, in place, and return the model.

        Args:
            model: the model, without quantised layers.
            importance: name of a layer -> :data:`Importance`; read only if the scheme is fitted.
        """
        for name, linear in quantizable(model).items():
            if self.takes(name):
                model.set_submodule(name, self.convert(linear, importance[name] if self.is_fitted else None))
        return model

    def saved(self, model: VoxtralTTS, evaluations: int) -> tuple[float, float]:
        """Return the bytes that the scheme saves against 16 bits: of the model, and of one request's frame.

        A frame reads the layers of the flow head once for each of `evaluations`. Exceptions are wq, wk and wv of the
        first of these layers. They are read once, like all other layers.
        """
        memory = frame = 0.0
        for name, linear in quantizable(model).items():
            if self.takes(name):
                less = linear.weight.numel() * (16 - self.bits(linear.in_features)) / 8
                memory += less
                is_repeated = name.startswith(f"{HEAD}layers.") and not re.fullmatch(FIRST_QKV, name)
                frame += less * (evaluations if is_repeated else 1)
        return memory, frame


def by_rows(linear: nn.Linear, importance: Importance, format_: Format) -> nn.Module:
    """Store the weight with one scale for each row, as voxkern does."""
    return quantized(linear, format_)


def by_tensor(linear: nn.Linear, importance: Importance, format_: Format) -> nn.Module:
    """Store the weight with one scale for all rows."""
    largest = linear.weight.detach().float().abs().amax()
    return quantized(linear, format_, (largest / format_.largest).expand(linear.out_features))


def clipped(linear: nn.Linear, importance: Importance, format_: Format) -> nn.Module:
    """Store the weight with the scale of each row that has the least squared error, of those in :data:`SHARES_TRIED`.

    With `importance`, the error of a column counts in proportion to the mean square of its input.
    """
    weight = linear.weight.detach().float()
    columns = torch.ones(linear.in_features) if importance is None else importance
    largest = weight.abs().amax(1).clamp(min=SMALLEST_SCALE) / format_.largest
    errors = torch.stack([
        ((dequantized(quantized(linear, format_, share * largest)) - weight).square() * columns).sum(1)
        for share in SHARES_TRIED
    ])  # fmt: skip
    return quantized(linear, format_, SHARES_TRIED[errors.argmin(0)] * largest)


def dequantized(layer: QuantizedLinear) -> Tensor:
    """Return the numbers that a layer's 8-bit weight stands for, fp32 [N, K]."""
    return layer.weight.float() * layer.qscale_weight[:, None]


def dequantize(model: nn.Module) -> None:
    """Replace layers with 8-bit weights by fp32 layers with the numbers that these stand for, which run faster."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            new = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
            new.weight.copy_(dequantized(layer))
            model.set_submodule(name, new)


def int4_by_groups(linear: nn.Linear, importance: Importance) -> nn.Module:
    """Return a layer with the numbers that 4-bit weights stand for: integers in -7..7 times a group's scale in fp16."""
    groups = linear.weight.detach().float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2, keepdim=True) / 7).half().float().clamp(min=2.0**-24)
    new = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
    new.weight.data = ((groups / scale).round().clamp(-7, 7) * scale).flatten(1).to(linear.weight.dtype)
    return new.requires_grad_(False)


def _of_rows(columns: int) -> float:
    return 8 + 32 / columns


def _scheme(name: str, convert: Callable[..., nn.Module], format_: str, **rest: object) -> Scheme:
    return Scheme(name, partial(convert, format_=FORMATS[format_]), _of_rows, **rest)  # type: ignore[arg-type]


PLAIN = Scheme("bf16", lambda linear, _: linear, lambda columns: 16)
INT8, FP8 = _scheme("int8", by_rows, "int8"), _scheme("fp8", by_rows, "fp8")
FP8_BY_TENSOR = Scheme("fp8, by tensor", partial(by_tensor, format_=FORMATS["fp8"]), lambda columns: 8)
INT4 = Scheme(f"int4, groups of {GROUP}", int4_by_groups, lambda columns: 4 + 16 / GROUP)


def schemes(head_layers: int, backbone_layers: int) -> Iterable[Scheme]:
    """Return all schemes that are compared, for a model with these numbers of layers."""
    head, backbone = re.escape(HEAD), r"layers\..*"
    yield from (PLAIN, INT8, FP8, FP8_BY_TENSOR, INT4)
    yield _scheme("int8, clipped", clipped, "int8")
    yield _scheme("int8, clipped by inputs", clipped, "int8", is_fitted=True)
    yield _scheme("fp8, clipped by inputs", clipped, "fp8", is_fitted=True)
    yield _scheme("int8, backbone", by_rows, "int8", pattern=backbone)
    yield _scheme("int8, semantic head", by_rows, "int8", pattern=rf"{head}semantic_codebook_output")
    yield _scheme("int8, flow head", by_rows, "int8", pattern=rf"{head}layers\..*")
    yield _scheme("int8, attention", by_rows, "int8", pattern=r".*\.attention\.w[qkvo]")
    yield _scheme("int8, feed-forward", by_rows, "int8", pattern=r".*\.feed_forward\.w[123]")
    for layer in range(head_layers):
        yield _scheme(f"int8, flow head layer {layer}", by_rows, "int8", pattern=rf"{head}layers\.{layer}\..*")
    first, last = rf"layers\.0\..*|{head}layers\.0\..*", head_layers - 1
    yield _scheme("int8, but the first layers", by_rows, "int8", pattern=rf"(?!{first}).*")
    last_layers = rf"layers\.{backbone_layers - 1}\..*|{head}layers\.{last}\..*"
    yield _scheme("int8, but the last layers", by_rows, "int8", pattern=rf"(?!{last_layers}).*")
