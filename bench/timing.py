"""The timer: how long one call of each variant takes, variants interleaved round by round.

A variant is a list of calls that do the same work on copies of their inputs of their own. What starts them, and what a
second is, stands in a :class:`Clock`: a CPU's, a GPU's, or a made-up one in tests. The GPU's has not been run on a GPU:
all that only a GPU can run is in :class:`GPUClock`, and what stands around it is tested with a made-up clock.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

COLD = 256 << 20  # bytes of copies to go round, so that weights come from memory: five times the L2 cache of an H100
# copies at most: of a few kilobytes of activations 256 MiB would be 50,000 launches a round. What is so small comes
# from the cache in a frame as well, where the launch before has just written it.
MOST_COPIES = 1024
MOST_BYTES = 8 << 30  # of all copies: some operators use a few rows of tables of 50 MB
ROUNDS, FEWEST_ROUNDS = 20, 5
PATIENCE = 0.3  # seconds a variant after which the fewest rounds are enough

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the rounds, and their 20th and 80th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> "Timing":
        """Of two rounds or more."""
        low, *_, high = statistics.quantiles(rounds, n=5, method="inclusive")
        return cls(statistics.median(rounds), low, high)


@dataclass(frozen=True)
class Copy:
    """One large copy from device memory to device memory: what bandwidth there is.

    Attributes:
        call: does it.
        nbytes: that it moves, read and written.
    """

    call: Call
    nbytes: int


class Clock(Protocol):
    """A machine that runs calls and says how long they took.

    Attributes:
        rotates: whether inputs must be rotated past a cache.
    """

    rotates: bool

    def prepare(self, calls: Sequence[Call]) -> tuple[Callable[[], float], str]:
        """Warm the calls up.

        Returns:
            What runs one round of them and gives the seconds of a call, and how rounds are run, for the record.
        """

    def copy(self) -> Copy | None:
        """What the roof is measured with; None where bandwidth means nothing."""


@dataclass(frozen=True)
class Measured:
    """One variant's timing.

    Attributes:
        timing: seconds a call.
        rounds: how they were run, see :meth:`Clock.prepare`.
    """

    timing: Timing
    rounds: str


def copies_for(clock: Clock, moved: int, held: int) -> int:
    """Copies of the inputs to rotate through.

    Args:
        clock: whose cache they are to pass.
        moved: bytes of them that a call moves.
        held: bytes that they take.
    """
    if not clock.rotates:
        return 2
    return max(2, min(MOST_COPIES, COLD // max(moved, 1) + 1, MOST_BYTES // max(held, 1)))


def measure(clock: Clock, variants: Mapping[str, Sequence[Call]], rounds: int = ROUNDS) -> dict[str, Measured]:
    """Time variants in turn, round by round: what slows the machine down for a while slows all of them.

    The first one of a round is another one each time, so that none always follows the same neighbour. Slow variants
    have fewer rounds.
    """
    ready = {name: clock.prepare(calls) for name, calls in variants.items()}
    names, found = list(ready), {name: list[float]() for name in ready}
    spent = 0.0
    for i in range(rounds if names else 0):
        if i >= FEWEST_ROUNDS and spent > PATIENCE * len(names):
            break
        first = i % len(names)
        for name in names[first:] + names[:first]:
            seconds = ready[name][0]()
            found[name].append(seconds)
            spent += seconds * len(variants[name])
    return {name: Measured(Timing.of(times), ready[name][1]) for name, times in found.items()}


class CPUClock:
    """The processor at hand. A round is one pass over a variant's copies."""

    rotates = False

    def prepare(self, calls: Sequence[Call]) -> tuple[Callable[[], float], str]:
        """One call each to warm up."""
        for call in calls:
            call()

        def run() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return run, "calls"

    def copy(self) -> None:
        """None: weights of one operator may lie in a processor's cache, and bytes per second would say nothing."""


class GPUClock:
    """The GPU at hand. A round is one replay of a CUDA graph over a variant's copies. It has not been run on a GPU.

    Event pairs around single short launches would time the gaps between them, which a frame in one graph does not have.
    """

    rotates = True

    def prepare(self, calls: Sequence[Call]) -> tuple[Callable[[], float], str]:
        """Capture the calls; those that wait for the device cannot be captured, and are run as they are."""
        for call in calls:
            call()
        if _waits(calls[0]):
            return lambda: _between_events(lambda: [call() for call in calls]) / len(calls), "no graph"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in calls]
        _expect_written(graph, results)
        return lambda: _between_events(graph.replay) / len(calls), "graph"

    def copy(self) -> Copy:
        """Of twice the bytes that make the cache cold."""
        source = torch.empty(2 * COLD, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return Copy(lambda: target.copy_(source), 2 * source.numel())


def _expect_written(graph: torch.cuda.CUDAGraph, results: list[object]) -> None:
    """A graph that caught nothing is fast: of floating results a replay must leave nothing as it was before.

    Raises:
        RuntimeError: it does.
    """
    tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    tensors = [tensor for tensor in tensors if tensor.numel()]
    for tensor in tensors:
        tensor.fill_(torch.nan)
    graph.replay()
    if any(bool(tensor.isnan().all()) for tensor in tensors):
        raise RuntimeError("a replay of the captured graph leaves results unwritten")


def _waits(call: Call) -> bool:
    # asked before a capture: one that fails halfway leaves the stream in a state that is hard to leave
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _between_events(run: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def clock_of(device: str) -> Clock:
    """The clock of ``cpu`` or ``cuda``.

    Raises:
        SystemExit: there is no such device here.
    """
    if not device.startswith("cuda"):
        return CPUClock()
    if not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: torch finds no GPU here; --device cpu times plain PyTorch")
    return GPUClock()
