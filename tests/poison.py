"""Tensors in poisoned surroundings: what reads past them meets NaN, what writes past them is seen."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bench.registry import each_tensor

BAND = 1 << 16  # elements before and after: wide enough for a tile of strays, and a multiple of 16 bytes


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def guarded(tensor: Tensor) -> Tensor:
    """A copy with the same strides, if contiguous, between two bands of poison."""
    buffer = torch.full((tensor.numel() + 2 * BAND,), _poison(tensor.dtype), dtype=tensor.dtype)
    inner = buffer[BAND : BAND + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def spread(tensor: Tensor, gap: int = 16) -> Tensor:
    """A copy whose rows lie `gap` elements of poison apart, between two bands."""
    *outer, last = tensor.shape
    wide = guarded(torch.full((*outer, last + gap), _poison(tensor.dtype), dtype=tensor.dtype))
    wide[..., :last] = tensor
    return wide[..., :last]


def guarded_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments, every tensor guarded."""
    return each_tensor(guarded, args)


def assert_bands(tensor: Tensor) -> None:
    """Nothing was written around a guarded tensor."""
    buffer = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    bands = torch.cat([buffer[:BAND], buffer[-BAND:]])
    clean = bands.isnan() if tensor.dtype.is_floating_point else bands == torch.iinfo(tensor.dtype).max
    assert clean.all(), f"{int((~clean).sum())} elements were written around a tensor of shape {list(tensor.shape)}"


def poison_pages(cache: Tensor, used: Tensor) -> Tensor:
    """Fill every page of `cache` [pages, ...] whose number is not in `used` with poison, in place."""
    unused = torch.ones(len(cache), dtype=torch.bool)
    unused[used.flatten().long()] = False
    cache[unused] = _poison(cache.dtype)
    return cache
