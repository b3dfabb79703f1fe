"""Capture a frame as one CUDA graph, for each of a few numbers of rows: the host starts it with a single launch.

A graph launches what was launched while it was captured, with the same addresses and numbers. So all that varies from
frame to frame lives on the device, in memory that stays, and fewer rows than a graph has are filled up with empty ones,
of length 0.

:class:`CudaCapture` can only run on a GPU and has not been run yet: there has been none. What surrounds it is tested
with a capture that records launches in Triton's interpreter and replays them (tests/test_cuda_graphs.py).
"""

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

CAPTURE_SIZES = (1, 2, 4, 8, 16, 32)  # rows, as vLLM-Omni captures them
T = TypeVar("T")


class Capture(Protocol):
    """Makes graphs."""

    def __call__(self, run: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Warm up, capture, and return (replay function, static outputs).

        The static outputs lie in memory that each replay writes again.
        """


class CudaCapture:
    """On a GPU; graphs made by one object share their memory."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is captured yet."""
        self._device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """See :class:`Capture`."""
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                run()  # compiles, loads and makes memory, none of which may happen in a capture
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads may use the GPU meanwhile: a server's own, or one that copies sound
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run()
        self._pool = graph.pool()
        return graph.replay, outputs


def capture_for(device: torch.device) -> Capture | None:
    """What makes graphs on a device; None where launches are made one by one."""
    return CudaCapture(device) if device.type == "cuda" else None


class BatchGraphs(Generic[T]):
    """Work on the first rows of static memory, captured for every size up front and replayed by the smallest that fits.

    Attributes:
        sizes: numbers of rows that there are graphs for.
    """

    def __init__(self, work: Callable[[int], T], n: int, capture: Capture) -> None:
        """Capture `work` on 1, 2, 4, .. and `n` rows, all of which must be empty; the largest first, whose memory is
        then there for the others.
        """
        self.sizes = (*(size for size in CAPTURE_SIZES if size < n), n)
        self._graphs = {size: capture(lambda size=size: work(size)) for size in reversed(self.sizes)}  # type: ignore[misc]

    def __call__(self, rows: int) -> T:
        """Run it on the first `rows`, and on as many empty ones behind them as the graph has more."""
        replay, outputs = self._graphs[next(size for size in self.sizes if size >= rows)]
        replay()
        return outputs


def weight_addresses(module: nn.Module) -> tuple[tuple[int, torch.dtype], ...]:
    """Where a module's weights lie: graphs captured before it changed would read where they lay."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)
