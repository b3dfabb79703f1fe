"""The codec's convolutions, which have weight norm and are causal: output rows do not depend on later input rows."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .layers import upcast


class CausalConv1d(nn.Module):
    """A causal convolution with weight norm, which pads its input, see :meth:`pad`.

    Args:
        n_in: number of input channels.
        n_out: number of output channels.
        kernel: number of input rows that an output row depends on.
        stride: number of input rows per output row.
        pad_mode: how the padding is filled, "reflect" or "replicate" as in ``F.pad``.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, pad_mode: str = "reflect") -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(n_in, n_out, kernel, stride, bias=False))
        self.stride, self.padding, self.pad_mode = stride, kernel - stride, pad_mode

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve, [B, n_in, T] -> [B, n_out, ceil(T / stride)]."""
        return self.conv(self.pad(x))  # type: ignore[no-any-return]

    def convolve_upcast(self, padded: Tensor) -> Tensor:
        """Convolve rows that are already padded, [B, n_in, T] -> fp32 (fp64 in an fp64 model) [B, n_out, T_out].

        The codec's first convolution reads samples, and the last one produces samples. For samples, the 8 bits of bf16
        are audibly too few.
        """
        weight = upcast(self.conv.weight)
        return F.conv1d(padded.to(weight.dtype), weight, stride=self.stride)

    def pad(self, x: Tensor) -> Tensor:
        """Pad rows at the start, so that the convolution is causal, and at the end to a multiple of the stride.

        Args:
            x: [B, n_in, T].

        Returns:
            [B, n_in, kernel - stride + T], with T rounded up to a multiple of the stride.
        """
        if missing := -x.shape[-1] % self.stride:
            x = F.pad(x, (0, missing), self.pad_mode)
        return pad_left(x, self.padding, self.pad_mode)


class CausalConvTranspose1d(nn.Module):
    """A causal transposed convolution with weight norm; the last ``kernel - stride`` output rows are cut off.

    The weight is [n_in, n_out, kernel], and weight norm acts on the first dimension, so it is per input channel.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = weight_norm(nn.ConvTranspose1d(n_in, n_out, kernel, stride, bias=False))
        self.stride, self.padding = stride, -(-kernel // stride) - 1  # padding: earlier input rows per output row

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, [B, n_in, T] -> [B, n_out, stride * T]."""
        return self.conv(x)[..., : self.stride * x.shape[-1]]  # type: ignore[no-any-return]


def pad_left(x: Tensor, n: int, mode: str) -> Tensor:
    """Pad the last dimension of `x` with `n` values on the left, [..., T] -> [..., n + T].

    Reflection needs at least n + 1 values. If `x` has fewer, zeros are added on the right of `x` before padding and are
    removed afterwards.
    """
    if n == 0:
        return x
    T = x.shape[-1]
    if mode == "reflect" and n >= T:
        return F.pad(F.pad(x, (0, n + 1 - T)), (n, 0), mode)[..., : n + T]
    return F.pad(x, (n, 0), mode)
