"""The timer's bookkeeping, with a made-up clock; what only a GPU can run is not run."""

from types import SimpleNamespace

import pytest
from fake_clock import FakeClock, calls

from bench import timing
from bench.timing import CPUClock, Timing, copies_for, measure


def test_variants_take_turns_and_begin_in_turn() -> None:
    clock = FakeClock({"a": [1.0], "b": [2.0], "c": [3.0]})
    measure(clock, {name: calls(name) for name in "abc"}, rounds=4)
    assert "".join(clock.log) == "abc" + "bca" + "cab" + "abc"


def test_median_and_percentiles() -> None:
    clock = FakeClock({"a": [5e-3, 1e-3, 3e-3, 2e-3, 0.2, 4e-3]})
    found = measure(clock, {"a": calls("a")}, rounds=6)["a"]
    assert found.rounds == "graph"
    assert (found.timing.low, found.timing.median, found.timing.high) == pytest.approx((2e-3, 3.5e-3, 5e-3))
    assert Timing.of([1.0, 1.0]) == Timing(1.0, 1.0, 1.0)


def test_what_takes_long_has_fewer_rounds() -> None:
    slow, fast = FakeClock({"a": [0.2], "b": [0.4]}), FakeClock({"a": [1e-4]})
    measure(slow, {"a": calls("a", 2), "b": calls("b", 2)})
    assert len(slow.log) == 2 * timing.FEWEST_ROUNDS
    measure(fast, {"a": calls("a")})
    assert len(fast.log) == timing.ROUNDS
    assert measure(fast, {}) == {}


@pytest.mark.parametrize(("nbytes", "n"), [(100 << 20, 3), (1 << 40, 2), (1 << 20, 257), (7, 1024), (0, 1024)])
def test_inputs_go_past_the_cache(nbytes: int, n: int) -> None:
    assert copies_for(FakeClock({}), nbytes) == n
    assert copies_for(CPUClock(), nbytes) == 2


def test_a_processors_seconds_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 16.0, 20.0, 29.0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    made: list[int] = []
    run, how = CPUClock().prepare([lambda: made.append(0), lambda: made.append(1), lambda: made.append(2)])
    assert made == [0, 1, 2]
    assert [run(), run(), how] == [2.0, 3.0, "calls"]
    assert made == [0, 1, 2] * 3


def test_without_a_gpu_its_clock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda: torch finds no GPU here"):
        timing.clock_of("cuda")
    assert isinstance(timing.clock_of("cpu"), CPUClock)
