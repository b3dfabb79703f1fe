"""Tests of the timer with a fake clock and a fake GPU; nothing here runs on a real GPU."""

from types import SimpleNamespace

import pytest
import torch
from fake_clock import FakeClock, calls
from fake_gpu import FakeGPU
from torch import Tensor

from bench.micro import timing
from bench.micro.timing import CPUClock, GPUClock, Timing, copies_for, measure


def test_variants_are_interleaved_in_rotating_order() -> None:
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


def test_a_gpus_round_is_a_replay_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph has three calls of two launches each, and on the fake GPU a launch takes a millisecond."""
    gpu = FakeGPU(monkeypatch)

    def call() -> tuple[Tensor, ...]:
        out = torch.zeros(2)
        gpu.launch(lambda: out.fill_(1))
        gpu.launch(lambda: out.add_(1))
        return out, torch.zeros(3, 0), torch.zeros(1, dtype=torch.int64)

    run, how = GPUClock().prepare([call] * 3)
    assert (how, gpu.replays, gpu.mode) == ("graph", 1, "default")  # one replay checks that results are written
    assert [run(), run()] == [pytest.approx(2e-3)] * 2
    assert gpu.replays == 3


def test_what_waits_for_the_gpu_is_timed_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)

    def call() -> None:
        gpu.launch(lambda: None)
        gpu.wait()

    run, how = GPUClock().prepare([call] * 4)
    assert (how, gpu.replays, gpu.mode) == ("no graph", 0, "default")
    assert run() == pytest.approx(1e-3)


def test_an_unrelated_error_in_the_sync_check_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, tried = FakeGPU(monkeypatch), list[int]()

    def call() -> None:
        tried.append(0)
        if len(tried) > 1:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        GPUClock().prepare([call])
    assert gpu.mode == "default"


def test_a_graph_that_caught_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGPU(monkeypatch)
    with pytest.raises(RuntimeError, match="leaves results unwritten"):
        GPUClock().prepare([lambda: torch.ones(2)])  # torch.ones is not launched on the captured stream


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
