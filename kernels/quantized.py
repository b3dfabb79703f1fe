"""8-bit weights in kernels: a tile is loaded in 8 bits, widened in registers, and each sum is scaled once.

A weight [N, K] in 8 bits is int8 or e4m3, with one scale for each row, fp32 [N] (see ``reference/quantized.py``)::

    y = (x @ q.T) * scale       q widened to x's dtype, which is exact; the sum is fp32

A kernel has one parameter for the weight and one for the scales. Without scales, the weight has x's dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRETED
from .launch_config import DTYPES_IN_8_BITS
from .operator import expect

__all__ = ["expect_same_format", "expect_weight", "scaled", "stored", "widen"]

E4M3_BIAS = tl.constexpr(2.0**120)  # 2^(127 - 7): the exponent's bias is 127 in fp32 and 7 in e4m3


@triton.jit
def widen(b_w, dtype: tl.constexpr):
    """Return a tile of weights in `dtype`, the activations' dtype: fp32, bf16 or fp16.

    On NVIDIA GPUs from sm_80 on for int8, and from sm_89 on for e4m3, the compiler has a short way. Other GPUs, and the
    interpreter, go through fp32. e4m3 comes as its bits, uint8: the sign, exponent and mantissa move to their places in
    fp32, and a product with a power of two gives the exponent its bias. This is exact, for subnormal numbers too, but
    NaN becomes 480.
    """
    if b_w.dtype == tl.uint8:
        if not INTERPRETED and tl.target_info.cuda_capability_geq(8, 9):
            b_w = b_w.to(tl.float8e4nv, bitcast=True).to(dtype)
        else:
            b_bits = (b_w.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000  # 0x87F00000
            b_w = _exactly(b_bits.to(tl.float32, bitcast=True) * E4M3_BIAS, dtype)
    elif b_w.dtype == tl.int8:
        is_short = not INTERPRETED and tl.target_info.is_cuda()
        b_w = b_w.to(dtype) if is_short else _exactly(b_w.to(tl.float32), dtype)
    return b_w


@triton.jit
def _exactly(b_v, dtype: tl.constexpr):
    """Return fp32 numbers in `dtype`, which represents them exactly: bf16 is the upper half of the bits."""
    if dtype == tl.bfloat16:
        return (b_v.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return b_v.to(dtype)


@triton.jit
def scaled(b_sum, p_scale, o_n, m_n):
    """Multiply the sums [N, M] by the scales of the weight's rows `o_n`, if there are any."""
    if p_scale is not None:
        b_sum *= tl.load(p_scale + o_n, mask=m_n, other=0.0)[:, None]
    return b_sum


def stored(weight: Tensor) -> Tensor:
    """Return a weight as kernels take it: e4m3 as its bits, uint8, because Triton refuses e4m3 on old GPUs."""
    return weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight


def expect_weight(
    name: str, weight: Tensor, shape: tuple[int | str, ...], scale: Tensor | None, like: Tensor, contiguous: bool = True
) -> tuple[int, ...]:
    """Check a weight and the scales of its rows, and return the weight's shape.

    Args:
        name: the weight's name, for the error message.
        weight: [N, K] in the dtype of `like`, or in 8 bits with scales.
        shape: the sizes that the weight must have, see :func:`voxkern.kernels.operator.expect`.
        scale: fp32 [N], or None for a weight that is not quantised.
        like: the activations.
        contiguous: whether the whole weight must be contiguous.

    Raises:
        TypeError: a dtype is wrong, scales are missing, or there are scales for a weight that is not in 8 bits.
        ValueError: a shape, stride or device is wrong.
    """
    is_8_bit = isinstance(weight, Tensor) and weight.dtype in DTYPES_IN_8_BITS
    if is_8_bit and scale is None:
        raise TypeError(f"{name} is {weight.dtype} but has no scales: pass one scale for each of its rows")
    if not is_8_bit and scale is not None:
        raise TypeError(f"{name} has scales but is {weight.dtype}: it must be torch.int8 or torch.float8_e4m3fn")
    sizes = expect(name, weight, shape, like=like, contiguous=contiguous, dtype=weight.dtype if is_8_bit else None)
    if scale is not None:
        expect(f"the scale of {name}", scale, (sizes[0],), like=like, dtype=torch.float32)
    return sizes


def expect_same_format(**weights: Tensor) -> None:
    """Check that weights which one launch reads have one dtype.

    Raises:
        TypeError: their dtypes differ.
    """
    (name, first), *others = weights.items()
    for other, weight in others:
        if weight.dtype != first.dtype:
            raise TypeError(f"{other} is {weight.dtype} but must be {first.dtype}, like {name}")
