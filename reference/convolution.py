"""The codec's causal convolutions, with weight norm: an output row depends on no later input row."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .layers import upcast


class CausalConv1d(nn.Module):
    """A causal convolution with weight norm; the rows that are missing before the first row are padded.

    Args:
        n_in: input channels.
        n_out: output channels.
        kernel: kernel size.
        stride: input rows per output row.
        pad_mode: "reflect" or "replicate".
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, pad_mode: str = "reflect") -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv1d(n_in, n_out, kernel, stride, bias=False))
        self.stride, self.padding, self.pad_mode = stride, kernel - stride, pad_mode

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve, [B, n_in, T] -> [B, n_out, ceil(T / stride)]."""
        return self.conv(self.pad(x))  # type: ignore[no-any-return]

    def convolve_upcast(self, padded: Tensor) -> Tensor:
        """Convolve rows that are already padded, in fp32 (fp64 in an fp64 model), and return that dtype.

        The codec's first convolution reads samples and its last writes samples: bf16's 8 bits are audibly too few.
        """
        weight = upcast(self.conv.weight)
        return F.conv1d(padded.to(weight.dtype), weight, stride=self.stride)

    def pad(self, x: Tensor) -> Tensor:
        """Pad `x` at its start for causality, and at its end to a multiple of the stride."""
        if missing := -x.shape[-1] % self.stride:
            x = F.pad(x, (0, missing), self.pad_mode)
        return pad_left(x, self.padding, self.pad_mode)


class CausalConvTranspose1d(nn.Module):
    """A causal transposed convolution with weight norm; the last ``kernel - stride`` output rows are cut off.

    The weight is [n_in, n_out, kernel], so the weight norm is per input channel.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = weight_norm(nn.ConvTranspose1d(n_in, n_out, kernel, stride, bias=False))
        self.stride, self.padding = stride, -(-kernel // stride) - 1  # padding counts earlier input rows

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, [B, n_in, T] -> [B, n_out, stride T]."""
        return self.conv(x)[..., : self.stride * x.shape[-1]]  # type: ignore[no-any-return]


def pad_left(x: Tensor, n: int, mode: str) -> Tensor:
    """Pad the last dimension of `x` with `n` values on the left.

    If `mode` is "reflect" and `x` has at most `n` values, `x` is first extended by zeros at its end.
    """
    if n == 0:
        return x
    T = x.shape[-1]
    if mode == "reflect" and n >= T:
        return F.pad(F.pad(x, (0, n + 1 - T)), (n, 0), mode)[..., : n + T]
    return F.pad(x, (n, 0), mode)
