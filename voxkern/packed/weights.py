"""The packed forms of a linear layer's weight on a CPU, and the products with them.

Without instructions for bf16, PyTorch converts a 16-bit weight for each product, and most of the time goes into that.
A packed form takes the place of the plain weight in memory. Each form gives the plain weight back, to the last bit.

::

    WideWeight    fp32                           small weights, which stay in the CPU's cache
    OneDNNWeight  bf16, in oneDNN's layout       CPUs with instructions for bf16
    HalfWeight    fp16 * 2^-e, FBGEMM's layout   other x86 CPUs, with AVX2
    PlainWeight   as it was                      every other case

FBGEMM and oneDNN are the libraries that PyTorch itself calls on a CPU. Which form a weight gets depends only on the
weight and the CPU, never on a measurement, so the same seed gives the same sound.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1 << 18  # numbers of a small weight: 1 MB in fp32
ROWS = 512  # rows that are checked at a time, to save memory
LARGEST_EXPONENT = 100  # 2^e must be finite in fp32
# CPUs with one of these multiply bf16 numbers without a conversion
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


class PackedWeight:
    """A weight [N, K] in a form for fast products; the base class of all forms. It is never written to."""

    shape: torch.Size
    dtype: torch.dtype

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.dtype = weight.shape, weight.dtype

    def linear(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``, [..., K] -> [..., N] in the dtype of `x`, with sums in fp32."""
        raise NotImplementedError

    def plain(self) -> Tensor:
        """Return the weight as it was before packing: the same numbers, [N, K] in ``dtype``."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Copy and pickle the plain weight, and pack it again."""
        return pack_weight, (self.plain(),)


class PlainWeight(PackedWeight):
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


class WideWeight(PackedWeight):
    """A small weight in fp32, as [K, N], which makes products of few rows faster."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._wide = weight.t().float().contiguous()

    def linear(self, x: Tensor) -> Tensor:
        """Multiply in fp32."""
        return x @ self._wide if x.dtype == torch.float32 else (x.float() @ self._wide).to(x.dtype)

    def plain(self) -> Tensor:
        """Round back; this is exact, as the numbers come from this dtype."""
        return self._wide.t().to(self.dtype).contiguous()


class OneDNNWeight(PackedWeight):
    """A bf16 weight in the layout that oneDNN prefers on this CPU."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def linear(self, x: Tensor) -> Tensor:
        """Multiply in bf16."""
        y = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self._packed, None, "none", [], "")
        return y.to(x.dtype)  # type: ignore[no-any-return]

    def plain(self) -> Tensor:
        """Return the weight in rows again."""
        return self._packed.to_dense()  # type: ignore[no-any-return]


class HalfWeight(PackedWeight):
    """A 16-bit weight as fp16 numbers times a power of two, in the layout of FBGEMM.

    FBGEMM widens them to fp32 in registers and multiplies in fp32. fp16 has more bits for a number than bf16 but a
    smaller range. The power of two puts the largest number between 2^14 and 2^15. Then all numbers down to
    2^-32 of the largest one are exact. Each row of `x` gives the same bits in a product with any other rows.
    """

    def __init__(self, weight: Tensor, wide: Tensor, scale: float) -> None:
        super().__init__(weight)
        self._scale = scale
        self._packed = torch.ops.quantized.linear_prepack_fp16(wide, None)

    @classmethod
    def of(cls, weight: Tensor) -> "HalfWeight | None":
        """Return the packed weight, or None if it has a number that this form cannot hold, such as NaN."""
        low, high = (float(end) for end in weight.aminmax())
        largest = max(-low, high)
        if not math.isfinite(largest):
            return None
        scale = 2.0 ** min(15 - math.frexp(largest)[1], LARGEST_EXPONENT) if largest else 1.0
        wide = weight.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale)
        for first in range(0, len(weight), ROWS):
            rows = slice(first, first + ROWS)
            if not torch.equal(wide[rows].half().float() / scale, weight[rows].float()):
                return None
        return cls(weight, wide, scale)

    def linear(self, x: Tensor) -> Tensor:
        """Multiply in fp32."""
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._packed)
        return y.mul_(1 / self._scale).to(x.dtype)

    def plain(self) -> Tensor:
        """Divide by the power of two; this is exact, see :meth:`of`."""
        numbers, _ = torch.ops.quantized.linear_unpack_fp16(self._packed)
        return (numbers / self._scale).to(self.dtype)  # type: ignore[no-any-return]


def pack_weight(weight: Tensor) -> PackedWeight:
    """Return a weight in the form that is fastest on this CPU, see the table at the top of this file.

    Args:
        weight: [N, K], of any floating-point dtype and on any device; only bf16 and fp16 on a CPU are packed.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return PlainWeight(weight)
    if weight.numel() <= SMALL:
        return WideWeight(weight)
    if weight.dtype == torch.bfloat16 and has_bf16_instructions() and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return OneDNNWeight(weight)
    if torch.backends.quantized.engine in ("x86", "fbgemm"):
        return HalfWeight.of(weight) or PlainWeight(weight)
    return PlainWeight(weight)


def has_bf16_instructions() -> bool:
    """Return whether this CPU multiplies bf16 numbers without a conversion."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)
