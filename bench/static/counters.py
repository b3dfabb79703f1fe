"""Count launches, the DRAM bytes of launches and the bytes that blocks access again, in Triton's interpreter.

DRAM bytes are those at distinct addresses. Tensors have their true N and K, but not all blocks need to run: blocks of a
regular grid differ only in their addresses. A launch of thousands of blocks is therefore counted by running the first,
second and last block along each axis. Counting needs ``TRITON_INTERPRET=1``.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.static.watch import Access, Grid, Launch, Watcher, watching


@dataclass
class Block:
    """The memory accesses of one block: per argument, the addresses of each load and store."""

    touched: dict[str, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def touch(self, name: str, addresses: np.ndarray) -> None:
        """Record one load or store of the argument `name`. Lanes that share an address count as one access."""
        self.touched[name].append(np.unique(addresses))

    def n_accesses(self, name: str) -> int:
        """Return the number of accesses to an argument's elements. Each load or store of an element counts."""
        return sum(map(len, self.touched[name]))

    def distinct(self, name: str) -> np.ndarray:
        """Return the distinct addresses of an argument that were accessed."""
        return np.unique(np.concatenate([np.empty(0, np.uint64), *self.touched[name]]))


@dataclass(frozen=True)
class Traffic:
    """Bytes of one argument that a launch loads and stores.

    Attributes:
        dram: bytes at distinct addresses: the DRAM traffic with a perfect cache.
        again: bytes of all accesses to an address after the first: L2 traffic.
    """

    dram: int
    again: int


@dataclass
class CountedLaunch:
    """One launch of one kernel, with the accesses of the blocks that were run.

    Attributes:
        kernel: name of the Triton function.
        grid: blocks along x, y and z.
        constants: the kernel's constexprs by name.
        blocks: position in the grid -> accesses of the block at this position, for the blocks that were run.
        item_sizes: argument -> bytes of an element.
        pointers: argument -> address of its first element.
    """

    kernel: str
    grid: Grid
    constants: Mapping[str, Any] = field(default_factory=dict)
    blocks: dict[Grid, Block] = field(default_factory=dict)
    item_sizes: dict[str, int] = field(default_factory=dict)
    pointers: dict[str, int] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Traffic:
        """Return the traffic of `tensor`, which must be an argument or one of the `indirect` tensors."""
        return self._traffic(next(name for name, pointer in self.pointers.items() if pointer == tensor.data_ptr()))

    def traffic(self) -> dict[str, Traffic]:
        """Return the traffic of the whole launch, as argument -> traffic."""
        names = {name for block in self.blocks.values() for name in block.touched}
        return {name: self._traffic(name) for name in sorted(names)}

    def scratch(self) -> int:
        """Return the DRAM bytes of the launch's scratch memory: parts of tiles, and counters. Without shares, return 0.

        This scratch memory is no argument of the operator; see ``voxkern/kernels/shares.py``.
        """
        if not self.constants.get("SHARES"):
            return 0
        touched = {name for block in self.blocks.values() for name in block.touched}
        return sum(self._traffic(name).dram for name in ("p_parts", "p_arrived") if name in touched)

    def _traffic(self, name: str) -> Traffic:
        return self._whole(name) if len(self.blocks) == math.prod(self.grid) else self._scaled(name)

    def _whole(self, name: str) -> Traffic:
        dram = len(np.unique(np.concatenate([block.distinct(name) for block in self.blocks.values()])))
        n_accesses = sum(block.n_accesses(name) for block in self.blocks.values())
        return self._bytes(name, dram, n_accesses)

    def _scaled(self, name: str) -> Traffic:
        # Along each axis, either all blocks access the same addresses, or no two blocks share an address. The last
        # block may access fewer, because its tile may end past the tensor.
        first, n_accesses_first = self.blocks[0, 0, 0].distinct(name), self.blocks[0, 0, 0].n_accesses(name)
        if not n_accesses_first:
            raise ValueError(f"{self.kernel}: the first block does not access {name}; use whole=True")
        dram, n_accesses = float(len(first)), float(n_accesses_first)
        for axis, n in enumerate(self.grid):
            if n == 1:
                continue
            second, last = (self.blocks[_along(axis, i)] for i in (1, n - 1))
            n_accesses *= n - 1 + last.n_accesses(name) / n_accesses_first
            overlap = len(np.intersect1d(first, second.distinct(name), assume_unique=True))
            if 0 < overlap < len(first):
                raise ValueError(f"{self.kernel}: blocks share a part of {name} along axis {axis}; use whole=True")
            if not overlap:
                dram *= n - 1 + len(last.distinct(name)) / len(first)
        return self._bytes(name, round(dram), round(n_accesses))

    def _bytes(self, name: str, dram: int, n_accesses: int) -> Traffic:
        return Traffic(dram * self.item_sizes[name], (n_accesses - dram) * self.item_sizes[name])


@dataclass
class _Counter(Watcher):
    """Counts the accesses of each block."""

    counted: CountedLaunch = field(init=False)

    def __post_init__(self) -> None:
        self.counted = CountedLaunch(
            self.launch.kernel,
            self.launch.grid,
            self.launch.constants,
            item_sizes={region.name: region.item_size for region in self.launch.regions},
            pointers={region.name: region.start for region in self.launch.regions},
        )

    def enter(self, block: Grid) -> None:
        self.counted.blocks[block] = self.block = Block()

    def access(self, access: Access) -> None:
        self.block.touch(access.region.name, access.addresses)


@contextmanager
def counting(whole: bool = False, indirect: Sequence[Tensor] = ()) -> Iterator[list[CountedLaunch]]:
    """Count every launch within the ``with`` block, and yield the list of counted launches.

    Args:
        whole: run all blocks of a launch. If False, only the first, second and last block along each axis run, and
            results are NOT computed. No launch may then depend on the results of an earlier launch. All blocks of a
            launch with shares (voxkern/kernels/shares.py) run in any case.
        indirect: tensors that a kernel accesses through an argument with a table of addresses. Each of these tensors is
            counted like an argument, and ``CountedLaunch.of`` returns its traffic.
    """
    launches: list[CountedLaunch] = []

    def start(launch: Launch) -> _Counter:
        every = whole or launch.constants.get("SHARES")  # blocks that divide tiles evenly do not form a regular grid
        counter = _Counter(launch, list(np.ndindex(launch.grid)) if every else _corners(launch.grid))
        launches.append(counter.counted)
        return counter

    with watching(start, indirect):
        yield launches


class _NoWork(TorchDispatchMode):
    """Raises an error at every aten operator except views.

    Other operators start a kernel, allocate memory, or make the CPU wait.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            raise _not_in_a_frame(str(func))
        return func(*args, **(kwargs or {}))


class _NoCopies(TorchFunctionMode):
    """Raises an error at copies between tensors and Python or NumPy.

    :class:`_NoWork` does not catch these, because copies of a CPU tensor do not reach the dispatcher.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("tolist", "numpy", "__array__", "tensor", "as_tensor", "from_numpy"):
            raise _not_in_a_frame(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def launches_only(whole: bool = True, indirect: Sequence[Tensor] = ()) -> Iterator[list[CountedLaunch]]:
    """Count launches as :func:`counting` does, and allow only launches and views within the ``with`` block.

    A frame must consist of launches only, so that one CUDA graph can hold the whole frame.

    Raises:
        RuntimeError: the ``with`` block calls an operator, allocates memory, or reads a tensor's values on the CPU.
    """
    with counting(whole, indirect) as launches, _NoCopies(), _NoWork():
        yield launches


def _not_in_a_frame(what: str) -> RuntimeError:
    return RuntimeError(f"{what} is called inside a frame: only views and launches are allowed there")


def _along(axis: int, i: int) -> Grid:
    x, y, z = (i if a == axis else 0 for a in range(3))
    return x, y, z


def _corners(grid: Grid) -> list[Grid]:
    wanted = itertools.product(range(3), (0, 1, -1))
    return sorted({_along(axis, i % grid[axis]) for axis, i in wanted})
