"""The accuracy rule for kernels: the error against fp64 is at most twice plain PyTorch's in the same dtype."""

from dataclasses import dataclass

import torch
from torch import Tensor

CEILINGS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Verdict:
    """The error of an output against the fp64 result ("truth"), and the limits of that error.

    Attributes:
        error: the largest absolute error. It is infinite if the output has a NaN. It is fp64's largest number if the
            output has an infinite value but no NaN.
        limit: the most that `error` may be, 2 x plain PyTorch's largest error + 1e-6 x RMS(truth).
        ratio: RMS of the error / RMS of the truth.
        ceiling: the limit of `ratio`, by dtype: 5e-3 (bf16), 1e-3 (fp16), 1e-5 (fp32).
    """

    error: float
    limit: float
    ratio: float
    ceiling: float

    @property
    def right(self) -> bool:
        """Whether `error` is at most `limit` and `ratio` is below `ceiling`."""
        return self.error <= self.limit and self.ratio < self.ceiling

    def __str__(self) -> str:
        return f"error {self.error:.3g} (limit {self.limit:.3g}), RMS ratio {self.ratio:.3g} (below {self.ceiling:.3g})"


def judge(out: Tensor, plain: Tensor, truth: Tensor) -> Verdict:
    """Compare `out` with the fp64 result of the same computation.

    Args:
        out: the output to judge, in bf16, fp16 or fp32.
        plain: plain PyTorch's output, in the dtype and shape of `out`.
        truth: fp64, the result in the shape of `out`.

    Raises:
        ValueError: the shapes differ, `truth` is not fp64, or the dtypes of `out` and `plain` differ.
    """
    if truth.dtype != torch.float64 or out.dtype != plain.dtype or not out.shape == plain.shape == truth.shape:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, plain is {plain.dtype} {list(plain.shape)} and truth "
                         f"is {truth.dtype} {list(truth.shape)}: the shapes must be equal, out and plain must have "
                         "the same dtype, and truth must be fp64")  # fmt: skip
    rms = truth.square().mean().sqrt().item()
    error = (out.double() - truth).abs().nan_to_num(nan=float("inf"))
    ratio = error.square().mean().sqrt().item() / max(rms, 1e-30)
    limit = 2 * (plain.double() - truth).abs().max().item() + 1e-6 * rms
    return Verdict(error.max().item(), limit, ratio, CEILINGS[out.dtype])
