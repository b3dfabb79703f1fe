"""Tests of the timer with a fake clock and a stand-in for a GPU; nothing here runs on a real GPU."""

from types import SimpleNamespace

import pytest
import torch
from fake_clock import FakeClock, calls
from torch import Tensor

from bench.micro import timing
from bench.micro.timing import CPUClock, GPUClock, Timing, copies_for, measure
from bench.static.stand_in_gpu import StandInGPU


def test_variants_are_interleaved_in_rotating_order() -> None:
    clock = FakeClock({"a": [1.0], "b": [2.0], "c": [3.0]})
    measure(clock, {name: calls(name) for name in "abc"}, rounds=4)
    assert "".join(clock.log) == "abc" + "bca" + "cab" + "abc"


def test_median_and_percentiles() -> None:
    clock = FakeClock({"a": [5e-3, 1e-3, 3e-3, 2e-3, 0.2, 4e-3]})
    found = measure(clock, {"a": calls("a")}, rounds=6)["a"]
    assert found.rounds == "graph"
    assert (found.low, found.median, found.high) == pytest.approx((2e-3, 3.5e-3, 5e-3))
    assert Timing.of([1.0, 1.0], "calls") == Timing(1.0, 1.0, 1.0, "calls")


def test_what_takes_long_has_fewer_rounds() -> None:
    slow, fast = FakeClock({"a": [0.2], "b": [0.4]}), FakeClock({"a": [1e-4]})
    measure(slow, {"a": calls("a", 2), "b": calls("b", 2)})
    assert len(slow.log) == 2 * timing.FEWEST_ROUNDS
    measure(fast, {"a": calls("a")})
    assert len(fast.log) == timing.ROUNDS
    assert measure(fast, {}) == {}


@pytest.mark.parametrize(
    ("moved", "held", "n"),
    [
        (100 << 20, 100 << 20, 3), (1 << 40, 1 << 40, 2), (1 << 20, 1 << 20, 257), (7, 7, 1024), (0, 0, 1024),
        (360_000, 55 << 20, 148),  # an operator that reads a few rows of the embeddings
    ],
)  # fmt: skip
def test_inputs_go_past_the_cache(moved: int, held: int, n: int) -> None:
    assert copies_for(FakeClock({}), moved, held) == n
    assert copies_for(CPUClock(), moved, held) == 2


def test_a_gpus_round_is_a_replay_of_a_graph(stand_in: StandInGPU) -> None:
    """The graph has three calls of two launches each, and on the stand-in a launch takes a millisecond."""

    def call() -> tuple[Tensor, ...]:
        out = torch.empty(2, device="cuda").fill_(1)
        return out.add_(1), torch.empty(3, 0, device="cuda"), torch.empty(1, dtype=torch.int64, device="cuda")

    run, how = GPUClock().prepare([call] * 3)
    assert (how, stand_in.n_replays) == ("graph", 1)  # one replay checks that results are written
    assert stand_in.sync_debug_mode == "default"
    assert [run(), run()] == [pytest.approx(2e-3)] * 2
    assert stand_in.n_replays == 3


def test_what_waits_for_the_gpu_is_timed_without_a_graph(stand_in: StandInGPU) -> None:
    x = torch.ones(1, device="cuda")
    run, how = GPUClock().prepare([lambda: x.add_(1).item()] * 4)
    assert (how, stand_in.n_replays, stand_in.sync_debug_mode) == ("no graph", 0, "default")
    assert run() == pytest.approx(1e-3)


def test_an_unrelated_error_in_the_sync_check_is_raised(stand_in: StandInGPU) -> None:
    tried: list[int] = []

    def call() -> None:
        tried.append(0)
        if len(tried) > 1:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        GPUClock().prepare([call])
    assert stand_in.sync_debug_mode == "default"


def test_a_graph_that_caught_nothing_is_refused(stand_in: StandInGPU) -> None:
    with pytest.raises(RuntimeError, match="leaves results unwritten"):
        GPUClock().prepare([lambda: torch.ones(2)])  # a CPU's operator is not in the graph


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
