"""Device functions that the kernels share: the matrix product, the cast from fp32, rounding, and the model's noise."""

import triton
import triton.language as tl

__all__ = ["cast", "dot", "normals", "philox", "round_half_even", "with_block"]

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
END_AUDIO = tl.constexpr(1)  # the semantic code that ends a request
NOT_FINITE = tl.constexpr(-1)  # the semantic code of a frame that has NaN or infinity
N_SPECIAL_CODES = tl.constexpr(2)  # codes 0 (EMPTY) and 1 (END) precede the audio codes in every codebook


@triton.jit
def with_block(blocks, b_next):
    """Return the tuple `blocks` with one more block at its end."""
    return blocks + (b_next,)  # noqa: RUF005 - Triton's language has no iterable unpacking


@triton.jit
def dot(b_a, b_b, b_acc):
    """Return ``b_acc + b_a @ b_b``, summed in fp32. Every matrix product of the kernels goes through this function.

    On a GPU the operands keep their dtype. fp32 operands are multiplied as IEEE fp32, because Triton's default is
    TF32, with 10 bits of mantissa. Triton's interpreter stores bf16 as raw integers, so both operands are cast to fp32
    in the interpreter. A product of two bf16 or fp16 numbers is exact in fp32. The interpreter therefore computes the
    same as a tensor core, up to the order of the sum.

    Args:
        b_a: [M, K], fp32, bf16 or fp16.
        b_b: [K, N], in b_a's dtype.
        b_acc: [M, N], fp32.

    Returns:
        [M, N], fp32.
    """
    if INTERPRETED:
        return b_acc + tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), input_precision="ieee")
    return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit
def cast(b_v, dtype: tl.constexpr):
    """Round the fp32 block `b_v` to `dtype`, to nearest with ties to even.

    Every cast of the kernels from fp32 to another float dtype goes through this function.

    Triton's interpreter truncates to bf16: it drops the lower 16 bits. Half of all numbers would then be wrong, always
    towards zero. In the interpreter this function therefore rounds on the bits.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        b_bits = b_v.to(tl.uint32, bitcast=True)
        b_round = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
        return tl.where(b_v == b_v, b_round, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return b_v.to(dtype)


@triton.jit
def round_half_even(b_v):
    """Round each fp32 value to the nearest integer, with ties to the even one, for ``|v| <= 2^22``.

    The sum with 1.5 * 2^23 has no bits below 1, so the addition itself rounds to an integer, to nearest even.
    ``libdevice.rint`` does the same on a GPU, but does not run in Triton's interpreter.
    """
    return (b_v + 12582912.0) - 12582912.0


@triton.jit
def philox(seed, frame, group):
    """Return four random uint32 words per element of `group`, by Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        seed: int64, the two words of the key, the low word first.
        frame: int, the second word of the counter. The third and fourth words are zero.
        group: int block, the first word of the counter: codebook // 4.

    Returns:
        Four uint32 blocks in the shape of `group`. Block j holds the words of codebook 4 * group + j.
    """
    b_c0 = group.to(tl.uint32)
    b_zero = b_c0 * 0
    b_c1 = b_zero + frame.to(tl.uint32)
    return tl.philox(seed.to(tl.uint64), b_c0, b_c1, b_zero, b_zero)


@triton.jit
def normals(seed, frame, group, p_quantiles):
    """Return four standard normal fp32 numbers per element of `group`.

    The upper 16 bits of each word of :func:`philox` are the index of a quantile in `p_quantiles`. Logarithms and
    cosines would differ between machines. With a table, the noise has the bits of the reference's on every machine.

    Args:
        seed: int64, see :func:`philox`, also for `frame` and `group`.
        frame: int.
        group: int block.
        p_quantiles: fp32 [65536], the quantiles of the normal distribution at (i + 1/2) / 65536.

    Returns:
        Four fp32 blocks in the shape of `group`. Block j holds the numbers of codebook 4 * group + j.
    """
    b_w0, b_w1, b_w2, b_w3 = philox(seed, frame, group)
    b_n0 = tl.load(p_quantiles + (b_w0 >> 16).to(tl.int32))
    b_n1 = tl.load(p_quantiles + (b_w1 >> 16).to(tl.int32))
    b_n2 = tl.load(p_quantiles + (b_w2 >> 16).to(tl.int32))
    b_n3 = tl.load(p_quantiles + (b_w3 >> 16).to(tl.int32))
    return b_n0, b_n1, b_n2, b_n3
