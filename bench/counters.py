"""What a launch costs, counted in the interpreter: bytes from DRAM, bytes read again, launches.

DRAM bytes are distinct addresses. A block's addresses at the true N and K are known after running that block alone, and
all blocks of a regular grid are alike, so a launch of thousands of blocks is counted by running its first, second and
last along each axis. Needs ``TRITON_INTERPRET=1``.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

Grid = tuple[int, int, int]


@dataclass
class Block:
    """What one block touched: per argument its distinct byte addresses, and the bytes its instructions asked for."""

    distinct: dict[str, np.ndarray] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def touch(self, name: str, addresses: np.ndarray, size: int) -> None:
        """One load or store of `size` bytes at each address; lanes that share one are served together."""
        addresses = np.unique(addresses)
        seen = self.distinct.get(name, np.empty(0, addresses.dtype))
        self.distinct[name] = np.union1d(seen, addresses)
        self.asked[name] += size * len(addresses)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one argument over a launch.

    Attributes:
        dram: distinct bytes, the least that any cache can bring this down to.
        again: bytes asked for beyond those, which are L2 traffic.
    """

    dram: int
    again: int


@dataclass
class Launch:
    """One launch of one kernel: its grid, and its blocks that were run and watched."""

    kernel: str
    grid: Grid
    blocks: dict[Grid, Block] = field(default_factory=dict)
    item_sizes: dict[str, int] = field(default_factory=dict)

    def traffic(self) -> dict[str, Traffic]:
        """Per argument, of the whole launch."""
        names = {name for block in self.blocks.values() for name in block.distinct}
        whole = len(self.blocks) == math.prod(self.grid)
        return {name: self._whole(name) if whole else self._scaled(name) for name in sorted(names)}

    def _whole(self, name: str) -> Traffic:
        distinct = np.unique(np.concatenate([_addresses(block, name) for block in self.blocks.values()]))
        dram = len(distinct) * self.item_sizes[name]
        return Traffic(dram, sum(block.asked[name] for block in self.blocks.values()) - dram)

    def _scaled(self, name: str) -> Traffic:
        # along each axis blocks either touch the same addresses or others; the last block may be ragged
        first = self.blocks[0, 0, 0]
        dram = float(len(_addresses(first, name)) * self.item_sizes[name])
        asked = float(first.asked[name])
        if not dram:
            raise ValueError(f"{self.kernel}: the first block does not touch {name}; count the whole grid")
        for axis, n in enumerate(self.grid):
            if n == 1:
                continue
            second, last = (self.blocks[_along(axis, i)] for i in (1, n - 1))
            asked *= n - 1 + last.asked[name] / first.asked[name]
            overlap = len(np.intersect1d(_addresses(first, name), _addresses(second, name)))
            if overlap == 0:
                dram *= n - 1 + len(_addresses(last, name)) / len(_addresses(first, name))
            elif overlap < len(_addresses(first, name)):
                raise ValueError(f"{self.kernel}: blocks share a part of {name} along axis {axis}; count the whole grid")
        return Traffic(round(dram), round(asked - dram))


@contextmanager
def counting(whole: bool = False) -> Iterator[list[Launch]]:
    """Watch every launch within the block.

    Args:
        whole: run all blocks. Otherwise only the first, second and last along each axis, so that results are NOT
            computed: a launch must not depend on what an earlier one wrote.
    """
    launches: list[Launch] = []
    call = interpreter.GridExecutor.__call__
    builder = interpreter.interpreter_builder
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        grid: Grid = (*self.grid, 1, 1)[:3]
        launch = Launch(self.fn.__name__, grid)
        launches.append(launch)
        chosen = list(np.ndindex(grid)) if whole else _corners(grid)
        self.grid = (len(chosen), 1, 1)

        def enter(i: int, _y: int, _z: int) -> None:
            set_grid_idx(*chosen[i])
            launch.blocks[chosen[i]] = block = Block()
            watch.block = block

        watch = _Watch(dict(zip(self.arg_names, args, strict=False)) | kwargs, launch)
        builder.set_grid_dim, builder.set_grid_idx = lambda *_: set_grid_dim(*grid), enter
        try:
            with watch.installed(builder), _disable_current_modes():
                call(self, *args, **kwargs)
        finally:
            del builder.set_grid_dim, builder.set_grid_idx

    interpreter.GridExecutor.__call__ = counted
    try:
        yield launches
    finally:
        interpreter.GridExecutor.__call__ = call


class _Watch:
    """Sorts the addresses of loads and stores by the argument they fall into."""

    def __init__(self, args: Mapping[str, Any], launch: Launch) -> None:
        self.block = Block()
        self.ranges = {}
        for name, arg in args.items():
            if isinstance(arg, Tensor) and arg.numel():
                extent = 1 + sum((n - 1) * stride for n, stride in zip(arg.shape, arg.stride(), strict=True))
                self.ranges[name] = (arg.data_ptr(), arg.data_ptr() + extent * arg.element_size())
                launch.item_sizes[name] = arg.element_size()

    def touch(self, pointers: Any, mask: Any = None) -> None:
        addresses = np.asarray(pointers.data, dtype=np.uint64).ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).ravel()]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for name, (start, end) in self.ranges.items():
            inside = (addresses >= start) & (addresses < end)
            if inside.any():
                self.block.touch(name, addresses[inside], size)
                addresses = addresses[~inside]
        if len(addresses):
            raise IndexError(f"{len(addresses)} lanes read or write outside of every argument")

    @contextmanager
    def installed(self, builder: Any) -> Iterator[None]:
        # unmasked and descriptor accesses go through the masked two inside the interpreter
        masks: dict[str, Callable[..., Any]] = {
            "create_masked_load": lambda ptrs, mask, *_: self.touch(ptrs, mask),
            "create_masked_store": lambda ptrs, value, mask, *_: self.touch(ptrs, mask),
            "create_atomic_rmw": lambda op, ptr, value, mask, *_: self.touch(ptr, mask),
            "create_atomic_cas": lambda ptr, *_: self.touch(ptr),
        }
        for name, see in masks.items():
            setattr(builder, name, _after(see, getattr(builder, name)))
        try:
            yield
        finally:
            for name in masks:
                delattr(builder, name)


class NoWork(TorchDispatchMode):
    """Within the block, whatever is not a kernel of ours raises: aten operators except views, allocations, host reads.

    What a frame does must be launches and nothing else, for it to live in one CUDA graph.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let views through."""
        if not func.is_view:
            raise RuntimeError(f"{func} inside a frame: only views and launches may stand there")
        return func(*args, **(kwargs or {}))


@contextmanager
def only_launches(whole: bool = True) -> Iterator[list[Launch]]:
    """:class:`NoWork` together with :func:`counting`: yields the list of launches."""
    with counting(whole) as launches, NoWork():
        yield launches


def _addresses(block: Block, name: str) -> np.ndarray:
    return block.distinct.get(name, np.empty(0, np.uint64))


def _along(axis: int, i: int) -> Grid:
    x, y, z = (i if a == axis else 0 for a in range(3))
    return x, y, z


def _corners(grid: Grid) -> list[Grid]:
    wanted = itertools.product(range(3), (0, 1, -1))
    return sorted({_along(axis, i % grid[axis]) for axis, i in wanted})


def _after(see: Callable[..., None], do: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        see(*args, **kwargs)
        return do(*args, **kwargs)

    return both
