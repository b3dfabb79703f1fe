"""The codec's causal convolutions: weight-normed, and blind to the future."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .layers import upcast


class CausalConv1d(nn.Module):
    """Weight-normed convolution that sees the past only; the missing past of the first rows is padded."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, pad_mode: str = "reflect") -> None:
        """`pad_mode`: "reflect" or "replicate"."""
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(n_in, n_out, kernel, stride, bias=False))
        self.stride, self.padding, self.pad_mode = stride, kernel - stride, pad_mode

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, T] -> [B, n_out, T / stride]; a last stride that is not whole is filled up by `pad_mode`."""
        return self.conv(self.pad(x))  # type: ignore[no-any-return]

    def convolve_upcast(self, padded: Tensor) -> Tensor:
        """The product alone, in and out of wide numbers: for sound, where 8 bits are not enough to hear."""
        weight = upcast(self.conv.weight)
        return F.conv1d(padded.to(weight.dtype), weight, stride=self.stride)

    def pad(self, x: Tensor) -> Tensor:
        """Put the missing past before `x`, and the missing end of its last stride after it."""
        if missing := -x.shape[-1] % self.stride:
            x = F.pad(x, (0, missing), self.pad_mode)
        return pad_left(x, self.padding, self.pad_mode)


class CausalConvTranspose1d(nn.Module):
    """Weight-normed transposed convolution; the ``kernel - stride`` rows that hang over the end are cut off."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int) -> None:
        """The weight is [n_in, n_out, kernel], so its norm is per input channel."""
        super().__init__()
        self.conv = weight_norm(nn.ConvTranspose1d(n_in, n_out, kernel, stride, bias=False))
        self.stride, self.padding = stride, -(-kernel // stride) - 1  # rows before each that reach as far

    def forward(self, x: Tensor) -> Tensor:
        """[B, n_in, T] -> [B, n_out, stride T]."""
        return self.conv(x)[..., : self.stride * x.shape[-1]]  # type: ignore[no-any-return]


def pad_left(x: Tensor, n: int, mode: str) -> Tensor:
    """Pad the last dimension on the left; "reflect" of a too short `x` sees zeros after its end."""
    if n == 0:
        return x
    T = x.shape[-1]
    if mode == "reflect" and n >= T:
        return F.pad(F.pad(x, (0, n + 1 - T)), (n, 0), mode)[..., : n + T]
    return F.pad(x, (n, 0), mode)
