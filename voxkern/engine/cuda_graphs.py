"""Capture a frame as CUDA graphs, one for each of several numbers of rows; the host starts a graph in one launch.

A graph repeats the captured launches with the same addresses and arguments. So everything that varies from frame to
frame is in static memory on the device. A frame with fewer rows than its graph is padded with empty rows of length 0.

:class:`CudaCapture` needs a GPU, and has not been run on one yet. It is tested on a stand-in that records launches in
Triton's interpreter and replays them (bench/static/stand_in_gpu.py).
"""

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

CAPTURE_SIZES = (1, 2, 4, 8, 16, 32)  # numbers of rows, the same as vLLM-Omni's
T = TypeVar("T")


class Capture(Protocol):
    """Captures a function as a graph."""

    def __call__(self, run: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Warm up, capture, and return (replay function, static outputs).

        The static outputs are in memory that each replay overwrites.
        """


class CudaCapture:
    """Captures CUDA graphs on a GPU; all graphs of one object share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """Warm up, capture, and return (replay function, static outputs), as in :class:`Capture`."""
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(current)
            with torch.cuda.stream(side):
                run()  # this run compiles, loads and allocates; a capture may do none of these
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads, such as those of a server, may use the GPU during the capture
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                outputs = run()
        self._pool = graph.pool()
        return graph.replay, outputs


def capture_for(device: torch.device) -> Capture | None:
    """Return the capture for a device, or None for a CPU, on which kernels are launched one by one."""
    return CudaCapture(device) if device.type == "cuda" else None


class BatchGraphs(Generic[T]):
    """Captures a function of the first rows of static memory, as one graph for each of several numbers of rows.

    A call replays the smallest graph that has enough rows.

    Attributes:
        sizes: numbers of rows that have a graph.
    """

    def __init__(self, work: Callable[[int], T], n: int, capture: Capture) -> None:
        """Capture `work` on 1, 2, 4, .. and `n` rows, all of which must be empty.

        The largest graph is captured first, so that the other graphs can use the memory of the largest.
        """
        self.sizes = (*(size for size in CAPTURE_SIZES if size < n), n)
        self._graphs = {size: capture(lambda size=size: work(size)) for size in reversed(self.sizes)}  # type: ignore[misc]

    def __call__(self, rows: int) -> T:
        """Run the work on the first `rows` rows, and on the empty rows after them up to the graph's number of rows."""
        replay, outputs = self._graphs[next(size for size in self.sizes if size >= rows)]
        replay()
        return outputs


def weight_addresses(module: nn.Module) -> tuple[tuple[int, torch.dtype], ...]:
    """Return the address and dtype of each parameter and buffer; if one changes, earlier graphs are invalid."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)
