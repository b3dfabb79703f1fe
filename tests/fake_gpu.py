"""A made-up GPU for the clock: a stream whose launches take a millisecond, graphs that record them, and events."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class FakeGPU:
    """What ``torch.cuda`` is asked for by the timer.

    Attributes:
        now: milliseconds that its stream has worked.
        replays: of all graphs.
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
        """Put work on the stream."""
        if self.recording is not None:
            self.recording.launches.append(work)
        else:
            self.now += 1.0
            work()

    def wait(self) -> None:
        """What ``.item()`` does."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
