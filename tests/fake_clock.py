"""A made-up clock: what a GPU's would be asked is asked of it, and nothing is run but the warm-up."""

from collections.abc import Callable, Sequence
from typing import Any

from bench.timing import Copy


class FakeClock:
    """A GPU's clock that runs nothing but the warm-up: seconds come from a list for each variant, by its first result.

    Attributes:
        log: whose round was run, in order.
        prepared: calls of each variant.
    """

    rotates = True

    def __init__(self, seconds: dict[str, list[float]], roof: Copy | None = None, rounds: str = "graph") -> None:
        self.seconds, self.roof, self.how = {name: list(s) for name, s in seconds.items()}, roof, rounds
        self.log: list[str] = []
        self.prepared: dict[str, Sequence[Callable[[], Any]]] = {}

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], float], str]:
        name, *_ = [str(call()) for call in calls]
        self.prepared[name] = calls

        def run() -> float:
            self.log.append(name)
            times = self.seconds[name]
            return times.pop(0) if len(times) > 1 else times[0]

        return run, self.how

    def copy(self) -> Copy | None:
        return self.roof


def calls(name: str, n: int = 1) -> list[Callable[[], str]]:
    return [lambda: name] * n
