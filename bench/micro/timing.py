"""The timer, which measures the time of one call of each variant. The variants are interleaved round by round.

A variant is a list of calls that do the same work, each on its own copy of the inputs. A clock runs the calls and
measures seconds. :class:`GPUClock` has not been run on a GPU; it is tested on a stand-in. The rest is tested with a
simulated clock.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Total bytes that one round of calls on all copies must move, so that weights come from memory: 5 times an H100's L2.
COLD = 256 << 20
# The most copies. With inputs of a few kilobytes, 256 MiB would be 50,000 launches a round. In a frame, such small
# inputs come from the cache too, because the launch before has just written them.
MOST_COPIES = 1024
MOST_BYTES = 8 << 30  # the most bytes of all copies: some operators move few bytes, but have tables of 50 MB
ROUNDS, FEWEST_ROUNDS = 20, 5
PATIENCE = 0.3  # after this many seconds for each variant, FEWEST_ROUNDS are enough

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: the median of the rounds.
        low: their 20th percentile.
        high: their 80th percentile.
        rounds: how the rounds were run, see :meth:`CPUClock.prepare`.
    """

    median: float
    low: float
    high: float
    rounds: str

    @classmethod
    def of(cls, seconds: Sequence[float], rounds: str) -> "Timing":
        """Return the timing of the seconds of a call in each of two rounds or more."""
        low, *_, high = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), low, high, rounds)


@dataclass(frozen=True)
class Copy:
    """One large copy within device memory. The copy's bandwidth is the highest that other calls can reach.

    Attributes:
        call: makes the copy.
        nbytes: bytes that the copy reads and writes together.
    """

    call: Call
    nbytes: int


class CPUClock:
    """Times calls on this machine's CPU. A round is one call on each of a variant's copies.

    Attributes:
        rotates: whether calls must rotate through many copies of the inputs, so that no cache holds the inputs.
    """

    rotates = False

    def prepare(self, calls: Sequence[Call]) -> tuple[Callable[[], float], str]:
        """Run each call once to warm up.

        Returns:
            A function that runs one round of the calls and returns the seconds of one call, and how rounds are run
            ("calls", or on a GPU "graph" or "no graph").
        """
        for call in calls:
            call()

        def run() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return run, "calls"

    def copy(self) -> None:
        """Return None: a CPU's cache may hold one operator's weights, so bytes per second have no meaning."""


class GPUClock:
    """Times calls on this machine's GPU. A round is one replay of a CUDA graph of the calls on all copies.

    Pairs of events around single short launches would include the gaps between launches. A frame in one graph has no
    such gaps. This class has not been run on a GPU.
    """

    rotates = True

    def prepare(self, calls: Sequence[Call]) -> tuple[Callable[[], float], str]:
        """Capture the calls in a CUDA graph; see :meth:`CPUClock.prepare`.

        Calls that wait for the device cannot be captured. Such calls run one after another ("no graph").
        """
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
        """Return a copy of twice :data:`COLD` bytes."""
        source = torch.empty(2 * COLD, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return Copy(lambda: target.copy_(source), 2 * source.numel())


def _expect_written(graph: torch.cuda.CUDAGraph, results: list[object]) -> None:
    """Check that a replay writes every floating-point result, because a graph that captured nothing would seem fast.

    Raises:
        RuntimeError: a replay leaves a result unwritten.
    """
    tensors = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    tensors = [tensor for tensor in tensors if tensor.numel()]
    for tensor in tensors:
        tensor.fill_(torch.nan)
    graph.replay()
    if any(bool(tensor.isnan().all()) for tensor in tensors):
        raise RuntimeError("a replay of the captured graph leaves results unwritten")


def _waits(call: Call) -> bool:
    # checked before the capture, because a failed capture leaves the stream in a state that is hard to recover
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


Clock = CPUClock | GPUClock


def copies_for(clock: Clock, moved: int, held: int) -> int:
    """Return the number of copies of the inputs that the calls must rotate through.

    Args:
        clock: the clock of the device. If `clock.rotates` is False, two copies are enough.
        moved: bytes of the inputs that one call moves.
        held: bytes of the inputs.
    """
    if not clock.rotates:
        return 2
    return max(2, min(MOST_COPIES, COLD // max(moved, 1) + 1, MOST_BYTES // max(held, 1)))


def measure(clock: Clock, variants: Mapping[str, Sequence[Call]], rounds: int = ROUNDS) -> dict[str, Timing]:
    """Time variants in turn, round by round, so that a slow phase of the machine affects all of them.

    Each round begins with another variant. Slow variants reduce the number of rounds, to no fewer than 5.

    Args:
        clock: runs the calls.
        variants: name -> calls, which do the same work on different copies of the inputs.
        rounds: the most rounds.
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
    return {name: Timing.of(times, ready[name][1]) for name, times in found.items()}


def clock_of(device: str) -> Clock:
    """Return the clock of the device ``cpu`` or ``cuda``.

    Raises:
        SystemExit: `device` is ``cuda``, but torch finds no GPU.
    """
    if not device.startswith("cuda"):
        return CPUClock()
    if not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: torch finds no GPU here; --device cpu times plain PyTorch")
    return GPUClock()
