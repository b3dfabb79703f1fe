"""Tensors between bands of poison: a read outside them gives NaN or the largest integer, a write is detected."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.ops.registry import each_tensor

BAND = 1 << 16  # elements of a band: more than a stray tile spans, and a multiple of 16 bytes

aten = torch.ops.aten
ALLOCATE = (
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_zeros, aten.zeros, aten.zeros_like,
    aten.full, aten.new_full, aten.ones,
)  # fmt: skip


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max


def guarded(tensor: Tensor) -> Tensor:
    """Return a copy of `tensor` with the same strides between two bands of poison, with poison between its rows."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (extent if tensor.numel() else 0) + 2 * BAND
    buffer = torch.full((size,), _poison(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    return buffer.as_strided(tensor.shape, tensor.stride(), BAND).copy_(tensor)


def spread(tensor: Tensor, gap: int = 16) -> Tensor:
    """Return a copy of `tensor` with `gap` elements of poison after each row, between two bands of poison."""
    *outer, last = tensor.shape
    wide = guarded(tensor.new_full((*outer, last + gap), _poison(tensor.dtype)))
    wide[..., :last] = tensor
    return wide[..., :last]


class GuardedMemory(TorchDispatchMode):
    """Puts bands of poison around each tensor that is allocated in the ``with`` block, such as results and scratch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return guarded(out) if func.overloadpacket in ALLOCATE else out


def guarded_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with a guarded copy of every tensor, also of tensors in lists."""
    return each_tensor(guarded, args)


def assert_bands(tensor: Tensor) -> None:
    """Check that nothing was written to the bands around a guarded tensor."""
    buffer = tensor.new_empty(0).set_(tensor.untyped_storage())
    bands = torch.cat([buffer[:BAND], buffer[-BAND:]])
    clean = bands.isnan() if tensor.dtype.is_floating_point else bands == torch.iinfo(tensor.dtype).max
    assert clean.all(), f"{int((~clean).sum())} elements were written around a tensor of shape {list(tensor.shape)}"


def poison_pages(cache: Tensor, used: Tensor) -> Tensor:
    """Fill the pages of `cache` [pages, ...] that are not in `used` with poison, in place; return `cache`."""
    unused = torch.ones(len(cache), dtype=torch.bool, device=cache.device)
    unused[used.flatten().long()] = False
    cache[unused] = _poison(cache.dtype)
    return cache
