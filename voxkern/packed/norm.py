"""Compute RMSNorm on a CPU in fewer calls than the reference, and with fewer new tensors."""

from torch import Tensor

from ..reference.layers import RMSNorm, upcast


class PackedNorm:
    """Replaces ``forward`` of an RMSNorm, with the same result up to rounding.

    Attributes:
        module: the RMSNorm. Each call reads its current weight.
    """

    def __init__(self, module: RMSNorm) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last dimension, [..., dim] -> [..., dim] in the dtype of `x`; see :meth:`RMSNorm.forward`."""
        return norm(self.module, upcast(x)).to(x.dtype)


def norm(module: RMSNorm, x: Tensor) -> Tensor:
    """Normalise the last dimension of `x`, which must be fp32 or fp64, as `module` does."""
    scale = x.square().mean(-1, keepdim=True).add_(module.eps).rsqrt_()
    return x.mul(scale).mul_(module.weight)  # PyTorch converts a 16-bit weight within mul_()
