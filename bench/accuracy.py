"""When a kernel is right: no further from the fp64 truth than plain PyTorch in the same dtype would be, times two."""

from dataclasses import dataclass

import torch
from torch import Tensor

CEILINGS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Verdict:
    """How far an output is from the truth, and how far it may be.

    Attributes:
        error: the largest absolute error; infinite where the output is not finite and the truth is.
        limit: 2 x that of plain PyTorch + 1e-6 x RMS(truth).
        ratio: RMS of the error / RMS of the truth.
        ceiling: of that ratio, by dtype.
    """

    error: float
    limit: float
    ratio: float
    ceiling: float

    @property
    def right(self) -> bool:
        """Within both."""
        return self.error <= self.limit and self.ratio < self.ceiling

    def __str__(self) -> str:
        """One line for a failing test."""
        return f"error {self.error:.3g} (limit {self.limit:.3g}), RMS ratio {self.ratio:.3g} (below {self.ceiling:.3g})"


def judge(out: Tensor, plain: Tensor, truth: Tensor) -> Verdict:
    """Hold `out` against the fp64 `truth`, given what plain PyTorch made of it in the same dtype."""
    if truth.dtype != torch.float64 or out.dtype != plain.dtype or not out.shape == plain.shape == truth.shape:
        raise ValueError(f"cannot compare {out.dtype} {list(out.shape)} with {plain.dtype} {list(plain.shape)} "
                         f"and {truth.dtype} {list(truth.shape)}")  # fmt: skip
    rms = truth.square().mean().sqrt().item()
    error = (out.double() - truth).abs().nan_to_num(nan=float("inf"))
    ratio = error.square().mean().sqrt().item() / max(rms, 1e-30)
    limit = 2 * (plain.double() - truth).abs().max().item() + 1e-6 * rms
    return Verdict(error.max().item(), limit, ratio, CEILINGS[out.dtype])
