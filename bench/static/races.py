"""Find races between the blocks of a launch: two blocks access one address, at least one writes, in no certain order.

A GPU runs blocks in any order, or at once. Only an atomic can order them, and only where the registry entry declares
it: the argument of the atomic must be in ``Entry.ordered_by``. These rules of CUDA's memory model are used:

- Block A releases with an atomic, and block B later acquires with an atomic on the same address. Then A's accesses
  before its atomic precede B's accesses after its atomic.
- One thread of a block does the atomic. What the block's other threads did is ordered only if ``tl.debug_barrier``
  comes between it and the atomic.
- A relaxed atomic, and an atomic with the scope of one block, order nothing.

The interpreter runs blocks one after another, so one run shows only one order of the atomics. In that order, a block
may run last by chance, and not because an atomic orders it. So each operator runs in several orders of its blocks. One
of these orders is the reverse of another, so each block of every pair runs first in at least one run. Three rules are
checked:

1. In each run, every two accesses that conflict are ordered by declared atomics.
2. Two conflicting accesses have the same order in all runs. Otherwise no result of an atomic decides their order.
3. The lanes of one store have different addresses.

Other races between the threads of one block are not found.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from bench.static.watch import READS, UPDATES, WRITES, Access, Grid, Launch, Region, Site, Watcher, site, watching

Order = Callable[[Sequence[Grid]], Sequence[Grid]]


def forward(blocks: Sequence[Grid]) -> Sequence[Grid]:
    """Return the blocks as they are."""
    return blocks


def backward(blocks: Sequence[Grid]) -> Sequence[Grid]:
    """Return the blocks from the last to the first."""
    return blocks[::-1]


def shuffled(blocks: Sequence[Grid]) -> Sequence[Grid]:
    """Return the blocks in a random order, the same in every call."""
    return random.Random(0).sample(blocks, len(blocks))


@dataclass(frozen=True)
class Touch:
    """One access of one block.

    Attributes:
        block: the block's position in the grid.
        kind: READS, WRITES or UPDATES.
        declared: whether the access is an atomic on an argument that the registry entry declares.
        region: the argument or indirect tensor.
        site: the line of the kernel.
        rank: position of the block in the order of the run.
        time: the barriers and declared atomics of the block before this access.
        clock: what is ordered before this access, see :class:`_Recorder`.
    """

    block: Grid
    kind: str
    declared: bool
    region: Region
    site: Site
    rank: int
    time: int
    clock: np.ndarray

    def conflicts(self, other: "Touch") -> bool:
        """Return whether two accesses of one address need an order.

        Accesses of different blocks need an order, unless both are reads or both are declared atomics.
        """
        atomic = self.declared and other.declared
        return self.rank != other.rank and not atomic and not self.kind == other.kind == READS

    def comes_before(self, later: "Touch") -> bool:
        """Return whether declared atomics order this access before `later`."""
        return bool(later.clock[int(self.declared), self.rank] > self.time)


OrderedPair = tuple[Grid, Site, Grid, Site]


@dataclass
class CheckedLaunch:
    """A launch without unordered accesses.

    Attributes:
        kernel: name of the Triton function.
        pairs: the accesses that conflict, as (block, line) of the first and (block, line) of the second.
    """

    kernel: str
    pairs: set[OrderedPair] = field(default_factory=set)


@contextmanager
def ordered_launches(
    order: Order = forward, ordered_by: Sequence[str] = (), indirect: Sequence[Tensor] = ()
) -> Iterator[list[CheckedLaunch]]:
    """Check every launch within the ``with`` block, and yield the list of checked launches.

    Launches are ordered by their stream, so only accesses of one launch are compared.

    Args:
        order: the order in which the blocks of a launch run.
        ordered_by: kernel arguments on which atomics order blocks.
        indirect: tensors that a kernel accesses through an argument with a table of addresses.

    Raises:
        RuntimeError: two blocks access one address, at least one writes or updates it, and no declared atomic orders
            them.
        InterpreterError: a lane accesses memory outside of the arguments and the indirect tensors.
    """
    launches: list[CheckedLaunch] = []

    def start(launch: Launch) -> Watcher:
        recorder = _Recorder(launch, order(list(np.ndindex(launch.grid))), ordered_by)
        launches.append(recorder.checked)
        return recorder

    with watching(start, indirect):
        yield launches


def assert_decided(runs: Sequence[Sequence[CheckedLaunch]]) -> None:
    """Check that no two accesses of one launch have opposite orders in two of the runs.

    Args:
        runs: the launches of the same call, from :func:`ordered_launches` with several orders of blocks.

    Raises:
        RuntimeError: two accesses have opposite orders.
    """
    for launches in zip(*runs, strict=True):
        for one, other in itertools.combinations(launches, 2):
            for first, first_site, second, second_site in sorted(one.pairs):
                if (second, second_site, first, first_site) in other.pairs:
                    raise RuntimeError(
                        f"{one.kernel}: the access of block {first} at {first_site} comes before or after that of "
                        f"block {second} at {second_site}, and no result of an atomic decides which"
                    )


@dataclass
class _Recorder(Watcher):
    """Records the accesses of all blocks, and compares them after the last block.

    A clock is an array [2, blocks] that says what is ordered before an access. The accesses of block b at times
    before ``clock[0, b]`` are ordered before it. Its declared atomics at times before ``clock[1, b]`` are too.

    Attributes:
        ordered_by: kernel arguments on which atomics order blocks.
        checked: the result.
        touches: all accesses in the order of the run, and `addresses` their distinct addresses.
        released: address of an atomic -> clock of a block that acquires it.
        rank, time, fenced: the current block, its time, and its time at the last barrier.
        clock: what is ordered before the next access of all of the block's threads.
        acquired: what is ordered before the next access of the thread that does atomics.
    """

    ordered_by: Sequence[str]
    checked: CheckedLaunch = field(init=False)
    touches: list[Touch] = field(default_factory=list)
    addresses: list[np.ndarray] = field(default_factory=list)
    released: dict[int, np.ndarray] = field(default_factory=dict)
    rank: int = -1
    time: int = 0
    fenced: int = 0

    def __post_init__(self) -> None:
        self.checked = CheckedLaunch(self.launch.kernel)
        self.nothing = np.zeros((2, len(self.blocks)), dtype=np.int64)  # clocks are shared, and never changed

    def enter(self, block: Grid) -> None:
        self.rank += 1
        self.time = self.fenced = 0
        self.clock = self.acquired = self.nothing

    def barrier(self) -> None:
        self.time += 1
        self.fenced = self.time
        self.clock = self.acquired

    def access(self, access: Access) -> None:
        declared = access.kind == UPDATES and access.region.name in self.ordered_by
        block = self.blocks[self.rank]
        self.touches.append(
            Touch(block, access.kind, declared, access.region, site(), self.rank, self.time, self.clock)
        )
        addresses, lanes = np.unique(access.addresses, return_counts=True)
        if access.kind == WRITES and (lanes > 1).any():
            element = access.region.element(int(addresses[lanes > 1][0]))
            raise ValueError(f"{self.launch.kernel}: lanes of one store in block {block} share {element}, at {site()}")
        self.addresses.append(addresses)
        if declared:
            for address in addresses.tolist():
                self._synchronise(address, access)
            self.time += 1

    def _synchronise(self, address: int, access: Access) -> None:
        released = self.released.get(address, self.nothing)
        if access.acquires:
            self.acquired = np.maximum(self.acquired, released)
        if access.releases:
            released = np.maximum(self.acquired, released)
            released[:, self.rank] = self.fenced, self.time + 1
            self.released[address] = released

    def leave(self) -> None:
        races: list[tuple[int, int, int]] = []
        for address, group in self._shared():
            for i, j in itertools.combinations(group, 2):
                first, second = self.touches[i], self.touches[j]
                if not first.conflicts(second):
                    continue
                if first.comes_before(second):
                    self.checked.pairs.add((first.block, first.site, second.block, second.site))
                else:
                    races.append((j, i, address))
        if races:
            j, i, address = min(races)  # the first race that happens
            first, second = self.touches[i], self.touches[j]
            raise RuntimeError(
                f"{self.launch.kernel}: block {first.block} {first.kind} {first.region.element(address)} at "
                f"{first.site}, block {second.block} {second.kind} it at {second.site}, and no declared atomic orders "
                "them"
            )

    def _shared(self) -> Iterator[tuple[int, list[int]]]:
        """Yield the written addresses that several blocks access, with the positions of the accesses in `touches`.

        Of addresses with the same accesses, only the first is yielded.
        """
        if all(touch.kind == READS for touch in self.touches):
            return
        order = np.repeat(np.arange(len(self.touches)), [len(one) for one in self.addresses])
        addresses = np.concatenate(self.addresses)
        changed = np.array([touch.kind != READS for touch in self.touches])
        kept = np.isin(addresses, addresses[changed[order]])
        addresses, order = addresses[kept], order[kept]
        sort = np.argsort(addresses, kind="stable")
        addresses, order = addresses[sort], order[sort]
        starts = np.flatnonzero(np.diff(addresses, prepend=np.uint64(0)))
        ends = np.append(starts[1:], len(addresses))
        ranks = np.array([touch.rank for touch in self.touches])[order]
        several = np.minimum.reduceat(ranks, starts) != np.maximum.reduceat(ranks, starts)
        seen = set[bytes]()
        for start, end in zip(starts[several], ends[several], strict=True):
            group = order[start:end]
            if group.tobytes() not in seen:
                seen.add(group.tobytes())
                yield int(addresses[start]), group.tolist()
