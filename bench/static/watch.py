"""Watch the memory accesses of kernels in Triton's interpreter, block by block.

``counters.py`` counts the accesses, and ``races.py`` finds conflicts between blocks. Watching needs
``TRITON_INTERPRET=1``.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

from bench.ops.registry import ROOT

Grid = tuple[int, int, int]
READS, WRITES, UPDATES = "reads", "writes", "updates"  # kinds of accesses; an atomic updates
MACHINERY = (
    str(Path(triton.__file__).parent),
    str(Path(__file__).parent),
)  # a stack frame of another folder is a kernel's


class Site(NamedTuple):
    """A line of a kernel's source."""

    file: str
    line: int

    def __str__(self) -> str:
        path = Path(self.file).resolve()
        return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{self.line}"


@dataclass(frozen=True)
class Region:
    """The memory of a tensor's elements, without the gaps between the rows of a view.

    Attributes:
        name: the kernel's argument, or ``indirect[i]`` for a tensor that is reached through a table of addresses.
        start: address of the first element.
        end: address after the last element.
        item_size: bytes of an element.
        dims: (stride in bytes, size) of each dimension from the largest stride on; empty for a contiguous tensor.
    """

    name: str
    start: int
    end: int
    item_size: int
    dims: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Region":
        """Return the region of `tensor`. Its strides must nest: no element of a row may lie past the next row."""
        item = tensor.element_size()
        dims = [(stride * item, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and stride]
        extent = item + sum(stride * (n - 1) for stride, n in dims) if tensor.numel() else 0
        nested = () if tensor.is_contiguous() else tuple(sorted(dims, reverse=True))
        return cls(name, tensor.data_ptr(), tensor.data_ptr() + extent, item, nested)

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        """Return which of the addresses are those of an element."""
        inside: np.ndarray = (addresses >= self.start) & (addresses < self.end)
        if self.dims and inside.any():
            rest = addresses[inside] - np.uint64(self.start)
            fits = np.ones(len(rest), dtype=bool)
            for stride, size in self.dims:
                fits &= rest // np.uint64(stride) < size
                rest %= np.uint64(stride)
            inside[inside] = fits & (rest == 0)
        return inside

    def element(self, address: int) -> str:
        """Return the name of the element at `address`, which may lie outside of the region: ``p_x[-3]``."""
        return f"{self.name}[{(address - self.start) // self.item_size}]"

    def distance(self, address: int) -> int:
        """Return the bytes between `address` and the region."""
        return max(self.start - address, address + 1 - self.end, 0)


@dataclass(frozen=True)
class Access:
    """The lanes of one load, store or atomic that access elements of one region.

    Attributes:
        kind: READS, WRITES or UPDATES.
        region: the argument or indirect tensor.
        addresses: address of each unmasked lane.
        acquires: whether the access is an atomic that comes after what other blocks released at the same address.
        releases: whether the access is an atomic that releases what its block did before it.
    """

    kind: str
    region: Region
    addresses: np.ndarray
    acquires: bool = False
    releases: bool = False


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel.

    Attributes:
        kernel: name of the Triton function.
        grid: blocks along x, y and z.
        constants: the kernel's constexprs by name.
        regions: the tensors that the kernel may access: its arguments and the indirect tensors.
    """

    kernel: str
    grid: Grid
    constants: Mapping[str, Any]
    regions: Sequence[Region]


@dataclass
class Watcher:
    """Receives what the blocks of one launch do, in the order in which they do it.

    Attributes:
        launch: the launch.
        blocks: positions in the grid of the blocks to run, in order.
    """

    launch: Launch
    blocks: Sequence[Grid]

    def enter(self, block: Grid) -> None:
        """Note that `block` begins."""

    def access(self, access: Access) -> None:
        """Note an access of the current block; :func:`site` returns its line."""

    def barrier(self) -> None:
        """Note a barrier between the threads of the current block."""

    def leave(self) -> None:
        """Note that all blocks have ended."""


@contextmanager
def watching(start: Callable[[Launch], Watcher], indirect: Sequence[Tensor] = ()) -> Iterator[None]:
    """Watch every launch within the ``with`` block.

    Args:
        start: called before a launch, returns the watcher of this launch.
        indirect: tensors that a kernel accesses through an argument with a table of addresses.

    Raises:
        InterpreterError: an unmasked lane accesses memory outside of the arguments and the indirect tensors. The
            message names the kernel, the block, the line, and the nearest argument.
    """
    call = interpreter.GridExecutor.__call__
    builder = interpreter.interpreter_builder
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        grid: Grid = (*self.grid, 1, 1)[:3]
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        regions = [Region.of(name, arg) for name, arg in named.items() if isinstance(arg, Tensor)]
        regions += [Region.of(f"indirect[{i}]", arg) for i, arg in enumerate(indirect)]
        constants = {name: named[name] for name in self.constexprs if name in named}  # without defaults
        launch = Launch(self.fn.__name__, grid, constants, regions)
        hooks = _Hooks(launch, start(launch), len(indirect))
        self.grid = (len(hooks.watcher.blocks), 1, 1)

        def enter(i: int, _y: int, _z: int) -> None:
            hooks.block = hooks.watcher.blocks[i]
            set_grid_idx(*hooks.block)
            hooks.watcher.enter(hooks.block)

        builder.set_grid_dim, builder.set_grid_idx = lambda *_: set_grid_dim(*grid), enter
        try:
            with hooks.installed(builder), _disable_current_modes():
                call(self, *args, **kwargs)
        finally:
            del builder.set_grid_dim, builder.set_grid_idx
        hooks.watcher.leave()

    interpreter.GridExecutor.__call__ = watched
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = call


def site() -> Site:
    """Return the line of the kernel that is being interpreted."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename.startswith(MACHINERY):
        frame = frame.f_back
    return Site(frame.f_code.co_filename, frame.f_lineno)


@dataclass
class _Hooks:
    """Assigns the addresses of loads, stores and atomics to the regions that contain them."""

    launch: Launch
    watcher: Watcher
    n_indirect: int
    block: Grid = (0, 0, 0)
    direct: Sequence[Region] = field(init=False)
    indirect: list[Region] = field(init=False)
    starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        direct = len(self.launch.regions) - self.n_indirect
        self.direct = self.launch.regions[:direct]
        self.indirect = sorted(self.launch.regions[direct:], key=lambda region: region.start)
        self.starts = np.array([region.start for region in self.indirect], dtype=np.uint64)

    def access(self, kind: str, pointers: Any, mask: Any = None, sem: Any = None, scope: Any = None) -> None:
        addresses = np.asarray(pointers.data, dtype=np.uint64).ravel()
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, pointers.data.shape).ravel()]
        # a scope of one block orders nothing between blocks
        ordering = "" if sem is None or scope.name == "CTA" else sem.name
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        for region, inside in self._split(kind, addresses):
            if width != region.item_size:
                raise ValueError(
                    f"{self.launch.kernel}: {region.name} is accessed by {width} bytes but its elements have "
                    f"{region.item_size}, at {site()}: such accesses cannot be watched"
                )
            self.watcher.access(Access(kind, region, inside, "ACQUIRE" in ordering, "RELEASE" in ordering))

    def _split(self, kind: str, addresses: np.ndarray) -> Iterator[tuple[Region, np.ndarray]]:
        for region in self.direct:
            inside = region.holds(addresses)
            if inside.any():
                yield region, addresses[inside]
                addresses = addresses[~inside]
        while len(addresses):
            # regions of views may interleave, so the last one that begins before an address need not be the right one
            before = self.indirect[: int(self.starts.searchsorted(addresses[0], "right"))]
            found = next((region for region in reversed(before) if region.holds(addresses[:1])[0]), None)
            if found is None:
                break
            inside = found.holds(addresses)
            yield found, addresses[inside]
            addresses = addresses[~inside]
        if len(addresses):
            first = int(addresses[0])
            nearest = min(self.launch.regions, key=lambda region: region.distance(first))
            raise IndexError(
                f"{self.launch.kernel}: block {self.block} {kind} {len(addresses)} lanes outside of every argument, "
                f"the first at {nearest.element(first)}, at {site()}"
            )

    @contextmanager
    def installed(self, builder: Any) -> Iterator[None]:
        # in the interpreter, unmasked accesses and accesses through descriptors call these masked functions too
        hooks: dict[str, Callable[..., None]] = {
            "create_masked_load": lambda pointers, mask, *_, **__: self.access(READS, pointers, mask),
            "create_masked_store": lambda pointers, value, mask, *_, **__: self.access(WRITES, pointers, mask),
            "create_atomic_rmw": lambda op, pointers, value, *rest: self.access(UPDATES, pointers, *rest),
            "create_atomic_cas": lambda pointers, old, new, *rest: self.access(UPDATES, pointers, None, *rest),
            "create_barrier": lambda: self.watcher.barrier(),
        }
        for name, hook in hooks.items():
            setattr(builder, name, _after(hook, getattr(builder, name)))
        try:
            yield
        finally:
            for name in hooks:
                delattr(builder, name)


def _after(see: Callable[..., None], do: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        see(*args, **kwargs)
        return do(*args, **kwargs)

    return both
