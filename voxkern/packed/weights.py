"""The forms of a linear layer's weight on a CPU, and the products with them.

On a CPU without instructions for bf16, PyTorch converts a 16-bit weight for each product, and the conversion takes most
of the time. A packed form takes the place of the plain weight in memory. Each form gives the plain weight back, to the
last bit.

::

    FP32Weight    fp32                           small 16-bit weights, which stay in the CPU's cache
    OneDNNWeight  bf16, in oneDNN's layout       bf16 weights, on CPUs with instructions for bf16
    FP16Weight    fp16 * 2^-e, FBGEMM's layout   other 16-bit weights, on x86 CPUs with AVX2
    PlainWeight   as it was                      every other case

FBGEMM and oneDNN are the libraries that PyTorch itself calls on a CPU. A weight's form depends only on the weight, the
CPU and ``torch.backends.quantized.engine``, not on a measurement, so the same seed gives the same sound.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1 << 18  # numbers of a small weight: 1 MB in fp32
ROWS = 512  # rows of a weight that are checked at a time, to save memory
LARGEST_EXPONENT = 100  # 2^e must be finite in fp32
# CPUs with one of these multiply bf16 numbers without a conversion
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


class LinearWeight:
    """The base class of the forms of a weight [N, K]. The weight is never written to.

    Attributes:
        shape: N and K.
        dtype: dtype of the plain weight.
        device: device of the plain weight.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device

    def linear(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``, [..., K] -> [..., N] in the dtype of `x`, with sums in fp32 (fp64 in fp64)."""
        raise NotImplementedError

    def plain(self) -> Tensor:
        """Return the weight as it was before packing: the same numbers, [N, K] in ``dtype``."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Copy and pickle the plain weight, and pack it again."""
        return pack_weight, (self.plain(),)


class PlainWeight(LinearWeight):
    """A weight that is not packed."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._weight = weight

    def linear(self, x: Tensor) -> Tensor:
        """Multiply in the dtype of the weight."""
        return F.linear(x.to(self.dtype), self._weight).to(x.dtype)

    def plain(self) -> Tensor:
        """Return the weight itself."""
        return self._weight


class FP32Weight(LinearWeight):
    """A small weight in fp32, as [K, N], which makes products of few rows faster."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._weight = weight.t().float().contiguous()

    def linear(self, x: Tensor) -> Tensor:
        """Multiply in fp32."""
        return x @ self._weight if x.dtype == torch.float32 else (x.float() @ self._weight).to(x.dtype)

    def plain(self) -> Tensor:
        """Round back; this is exact, as the numbers come from this dtype."""
        return self._weight.t().to(self.dtype).contiguous()


class OneDNNWeight(LinearWeight):
    """A bf16 weight in the layout that oneDNN prefers on this CPU."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def linear(self, x: Tensor) -> Tensor:
        """Multiply in bf16."""
        y = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self._packed, None, "none", [], "")
        return y.to(x.dtype)  # type: ignore[no-any-return]

    def plain(self) -> Tensor:
        """Return the weight in row-major layout."""
        return self._packed.to_dense()  # type: ignore[no-any-return]


class FP16Weight(LinearWeight):
    """A 16-bit weight, held as ``weight * 2^e`` in fp16, in FBGEMM's layout.

    FBGEMM converts the numbers to fp32 in registers and multiplies in fp32. fp16 has more bits for a number than bf16
    but a smaller range. e puts the largest number between 2^14 and 2^15, but is at most :data:`LARGEST_EXPONENT`. Below
    that limit, every bf16 number of at least 2^-31 times the largest is exact. The result of a row of `x` does not
    depend on the other rows.
    """

    def __init__(self, weight: Tensor, scaled: Tensor, scale: float) -> None:
        super().__init__(weight)
        self._scale = scale
        # mul_() by a Python float takes twice as long as by a tensor: 2.7 instead of 1.1 us
        self._inverse = torch.tensor(1 / scale, dtype=torch.float32, device="cpu")
        self._packed = torch.ops.quantized.linear_prepack_fp16(scaled, None)

    @classmethod
    def of(cls, weight: Tensor) -> "FP16Weight | None":
        """Return the packed weight, or None if it has a number that this form cannot hold, such as NaN."""
        low, high = (float(end) for end in weight.aminmax())
        largest = max(-low, high)
        if not math.isfinite(largest):
            return None
        scale = 2.0 ** min(15 - math.frexp(largest)[1], LARGEST_EXPONENT) if largest else 1.0
        scaled = weight.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale)
        for first in range(0, len(weight), ROWS):
            rows = slice(first, first + ROWS)
            if not torch.equal(scaled[rows].half().float() / scale, weight[rows].float()):
                return None
        return cls(weight, scaled, scale)

    def linear(self, x: Tensor) -> Tensor:
        """Multiply in fp32."""
        # ".default" skips the choice of an overload, which takes as long as a row's product with 2^17 numbers
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16.default(x.float(), self._packed)
        y.mul_(self._inverse)
        return y if x.dtype == y.dtype else y.to(x.dtype)

    def plain(self) -> Tensor:
        """Divide by the power of two; this is exact, see :meth:`of`."""
        numbers, _ = torch.ops.quantized.linear_unpack_fp16(self._packed)
        return (numbers / self._scale).to(self.dtype)  # type: ignore[no-any-return]


def pack_weight(weight: Tensor) -> LinearWeight:
    """Return a weight in its form for this CPU, see the table at the top of this file.

    Args:
        weight: [N, K], of any floating-point dtype and on any device; only bf16 and fp16 on a CPU are packed.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return PlainWeight(weight)
    if weight.numel() <= SMALL:
        return FP32Weight(weight)
    if weight.dtype == torch.bfloat16 and has_bf16_instructions() and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return OneDNNWeight(weight)
    if torch.backends.quantized.engine in ("x86", "fbgemm"):
        return FP16Weight.of(weight) or PlainWeight(weight)
    return PlainWeight(weight)


def has_bf16_instructions() -> bool:
    """Return whether this CPU multiplies bf16 numbers without a conversion."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)
