"""A fake GPU for the tests of the timer, with events, graphs that record launches, and a stream of 1 ms per launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class FakeGPU:
    """Replaces the parts of ``torch.cuda`` that the timer uses.

    Attributes:
        now: milliseconds of work done on the stream.
        replays: number of replays of all graphs.
        recording: the graph that is being captured, or None.
        mode: the mode of ``torch.cuda.set_sync_debug_mode``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.replays, self.recording = 0.0, 0, None
        self.mode = "default"
        gpu = self

        class Graph:
            def __init__(self) -> None:
                self.launches = list[Callable[[], Any]]()

            def replay(self) -> None:
                gpu.replays += 1
                for launch in self.launches:
                    gpu.launch(launch)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        for name, what in (
            ("CUDAGraph", Graph), ("graph", self.capture), ("Event", Event), ("synchronize", lambda: None),
            ("set_sync_debug_mode", lambda mode: setattr(gpu, "mode", mode)),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, what)

    @contextmanager
    def capture(self, graph: Any) -> Iterator[None]:
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None

    def launch(self, work: Callable[[], Any]) -> None:
        """Run `work` on the stream, or record it while a graph is being captured."""
        if self.recording is not None:
            self.recording.launches.append(work)
        else:
            self.now += 1.0
            work()

    def wait(self) -> None:
        """Wait for the device, as ``.item()`` does; raise in the debug mode "error"."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
