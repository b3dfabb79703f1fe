"""Device functions that every kernel shares: the matrix product, rounding half to even, and the model's noise."""

import triton
import triton.language as tl

__all__ = ["cast", "dot", "normals", "philox", "round_half_even"]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
END_AUDIO = tl.constexpr(1)  # the semantic code that ends a request
N_SPECIAL_CODES = tl.constexpr(2)  # EMPTY and END stand before the codes of sound, in every codebook


@triton.jit
def dot(b_a, b_b, b_acc):
    """``b_acc + b_a @ b_b``, summed in fp32: the only matrix product of the kernels.

    On a GPU the operands keep their dtype, and fp32 ones are multiplied as IEEE fp32: Triton's default is TF32, with
    10 bits of mantissa. The interpreter holds bf16 as raw integers, so there both are cast to fp32 first; a product of
    two bf16 or fp16 numbers is exact in fp32, so it computes what a tensor core does, up to the order of the sum.

    Args:
        b_a: [M, K], fp32, bf16 or fp16.
        b_b: [K, N], of the same dtype.
        b_acc: [M, N], fp32.
    """
    if INTERPRETED:
        return b_acc + tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit
def cast(b_v, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest and ties to even: the only way down from fp32 in the kernels.

    The interpreter cuts the lower 16 bits off instead of rounding to bf16 (half of all numbers come out wrong, always
    towards zero), so there it is done on the bits.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        b_bits = b_v.to(tl.uint32, bitcast=True)
        b_round = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        return tl.where(b_v == b_v, b_round, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return b_v.to(dtype)


@triton.jit
def round_half_even(b_v):
    """The integer nearest to each fp32 value, ties to the even one; right for ``|v| <= 2^22``.

    Adding 1.5 * 2^23 leaves no bit below the unit, so the addition itself rounds, as IEEE does. ``libdevice.rint``
    does the same on a GPU, but does not run in the interpreter.
    """
    return (b_v + 12582912.0) - 12582912.0


@triton.jit
def philox(seed, frame, group):
    """Four random uint32 words of Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        seed: int64, the key: its low word, then its high word.
        frame: int, second word of the counter.
        group: int block, first word of the counter: codebook // 4. The other two words are zero.

    Returns:
        Four blocks in the shape of `group`; word j belongs to codebook 4 * group + j.
    """
    b_c0 = group.to(tl.uint32)
    b_zero = b_c0 * 0
    b_c1 = b_zero + frame.to(tl.uint32)
    return tl.philox(seed.to(tl.uint64), b_c0, b_c1, b_zero, b_zero)


@triton.jit
def normals(seed, frame, group, p_quantiles):
    """Four standard normal fp32 numbers a group: each word's upper 16 bits choose a quantile of the normal.

    Looking quantiles up, instead of computing logarithms and cosines, makes the noise bit-equal to the reference's on
    every machine.

    Args:
        seed: int64; see :func:`philox`, also for `frame` and `group`.
        frame: int.
        group: int block.
        p_quantiles: fp32 [65536], the normal's quantiles at (i + 1/2) / 65536.
    """
    b_w0, b_w1, b_w2, b_w3 = philox(seed, frame, group)
    b_n0 = tl.load(p_quantiles + (b_w0 >> 16).to(tl.int32))
    b_n1 = tl.load(p_quantiles + (b_w1 >> 16).to(tl.int32))
    b_n2 = tl.load(p_quantiles + (b_w2 >> 16).to(tl.int32))
    b_n3 = tl.load(p_quantiles + (b_w3 >> 16).to(tl.int32))
    return b_n0, b_n1, b_n2, b_n3
