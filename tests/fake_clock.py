"""A fake clock for the tests of bench/micro/timing.py, which takes times from lists instead of measuring them."""

from collections.abc import Callable, Sequence
from typing import Any

from bench.micro.timing import Copy


class FakeClock:
    """Replaces a GPU's clock: runs the calls of a variant once, then takes the time of each round from a list.

    The first call of a variant must return the variant's name.

    Attributes:
        seconds: the times of a variant's rounds, by the variant's name; the last time is repeated.
        roof: the result of `copy`.
        how: how rounds are run, "graph" for example, as `prepare` returns it.
        log: the name of the variant of each round, in the order of the rounds.
        prepared: the calls of a variant, by the variant's name.
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
