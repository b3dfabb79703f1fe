"""The fewest bytes that a call of an operator can move: each argument and result once, without parts that are not used.

Bytes per second and predicted times are computed from these bytes. ``bench/static/counters.py`` counts in the
interpreter the bytes that a kernel really moves; tests/test_work.py compares the two.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bench.ops.registry import Args, Entry


@dataclass(frozen=True)
class Traffic:
    """Bytes that one call moves at least.

    Attributes:
        weights: bytes of weights.
        cache: bytes of keys and values that attention reads.
        moved: bytes of all other arguments and of the results.
    """

    weights: int
    cache: int
    moved: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.cache + self.moved


def fewest(entry: Entry, args: Args) -> Traffic:
    """Return the fewest bytes of a call.

    Args:
        entry: the operator.
        args: the arguments by name, and the result as ``out`` if there is one. A tensor that is an argument twice, such
            as a residual that is also the result, counts once.
    """
    parts: dict[str, dict[tuple[int, int], int]] = {"weights": {}, "cache": {}, "moved": {}}
    for name, arg in args.items():
        for tensor in arg if isinstance(arg, list | tuple) else (arg,):
            if not isinstance(tensor, Tensor):
                continue
            is_weight = name in entry.weights and tensor.ndim > 1
            is_cache = name == "kv_cache" and name not in entry.op.mutates  # a new token is written to it
            part = "weights" if is_weight else "cache" if is_cache else "moved"
            elements = entry.partly[name](args) if name in entry.partly else tensor.numel()
            place = tensor.untyped_storage()._cdata, tensor.storage_offset()
            parts[part][place] = elements * tensor.element_size()
    return Traffic(*(sum(part.values()) for part in parts.values()))


def with_result(entry: Entry, args: Args) -> dict[str, Any]:
    """Return the arguments of a public call, and its result as ``out``.

    An operator that writes to its arguments may return nothing. An argument ``out`` of such an operator is kept.
    """
    result = entry.op.declare(**args)
    return dict(args) if result is None else {**args, "out": result}


def fewest_bytes(entry: Entry, args: Args) -> int:
    """Return the fewest bytes that one public call of the operator `entry` with these arguments can move."""
    return fewest(entry, with_result(entry, args)).total
