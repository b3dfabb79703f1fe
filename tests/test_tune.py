"""Tests of the search for launch configs, with a fake clock and a fake compiler."""

import math
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plant import case_of, entry_of
from torch import Tensor

from bench.micro import tune
from bench.micro.providers import Trial, by_verdict
from bench.micro.tune import Tuner, config_of, line_of, lines_of, neighbours, search, with_line
from bench.ops.registry import ROOT, configs_of
from voxkern.kernels.launch_config import LaunchConfigs, target_arch

TEXT = """
    arch   dtype  rows | BLOCK_N  num_warps  num_stages
    gfx*   *      *    | 64       4          1
    sm_90  fp32   *    | 32       4          2
    sm_*   *      8    | 32       4          2
    sm_*   *      *    | 128      8          3
"""
OTHER = 'OTHER = LaunchConfigs("other", """\n arch | A\n * | 1\n""")\n'
SOURCE = f'TOY = LaunchConfigs(\n    "toy",\n    """{TEXT}    """,\n)\n{OTHER}'


class ConfigClock:
    """A clock that computes a variant's seconds from the launch config that its calls run with."""

    rotates = False

    def __init__(self, seconds: Callable[[dict[str, int]], float]) -> None:
        self.seconds, self.timed = seconds, list[tuple[int, int, int]]()

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> tuple[Callable[[], float], str]:
        del RUN[:]
        for call in calls:
            call()
        config = RUN[-1]
        self.timed.append(tuple(config.values()))
        return (lambda: self.seconds(config)), "graph"

    def copy(self) -> None:
        return None


RUN: list[dict[str, int]] = []
TOY = LaunchConfigs("toy", TEXT)


def toy(x: Tensor) -> Tensor:
    """Return 2 x, or a wrong result with blocks of 512, and append the launch config to `RUN`."""
    with target_arch("sm_90"):
        chosen = TOY(N=1, K=1, dtype=torch.bfloat16, rows=32)
    RUN.append({name: chosen[name] for name in TOY.names})
    return x * 2 + (1 if chosen["BLOCK_N"] == 512 else 0)


def tuner(seconds: Callable[[dict[str, int]], float], fits: Callable[[dict[str, int]], str]) -> Tuner:
    x = torch.ones(4)
    one = Trial(
        "toy", "b1", "fp32", {"x": x}, {"voxkern": toy}, lambda x: x * 2, lambda: [2 * x.double()],
        lambda *results: by_verdict(1e-5, *results),
    )  # fmt: skip
    return Tuner("toy", [one, one], ConfigClock(seconds), fits)


def smaller_is_slower(config: dict[str, int]) -> float:
    """Return seconds that are shortest with the widest blocks and 5 stages."""
    return 1e-3 / config["BLOCK_N"] * (1 + abs(config["num_stages"] - 5))


def test_the_fastest_that_fits_and_is_right_is_chosen() -> None:
    one = tuner(smaller_is_slower, lambda s: "spills 8 bytes" if s["BLOCK_N"] == 256 and s["num_stages"] > 4 else "")
    best, ratio = search(config_of(TOY, 3), one.seconds)
    # blocks of 512 would be faster, but are wrong; 5 stages would be faster, but spill
    assert best == {"BLOCK_N": 256, "num_warps": 8, "num_stages": 4}
    assert ratio == pytest.approx((2 / 256) / (3 / 128))
    assert not any(block == 512 or (block, stages) == (256, 5) for block, _, stages in one.clock.timed)
    assert one.known[str({"BLOCK_N": 256, "num_warps": 8, "num_stages": 5})] == "spills 8 bytes"
    assert one.known[str({"BLOCK_N": 512, "num_warps": 8, "num_stages": 4})].startswith("voxkern is wrong at toy b1")


def test_less_than_two_percent_is_noise() -> None:
    one = tuner(lambda config: 1.0 - 1e-4 * config["BLOCK_N"] / 2, lambda config: "")
    assert search(config_of(TOY, 3), one.seconds) == (config_of(TOY, 3), 1.0)


def test_an_invalid_config_has_infinite_time() -> None:
    one = tuner(smaller_is_slower, lambda config: "" if config["num_warps"] == 8 else "does not fit")
    times = one.seconds([{"BLOCK_N": 128, "num_warps": w, "num_stages": 5} for w in (4, 8, 16)])
    assert times == [math.inf, pytest.approx(1e-3 / 128), math.inf]


def test_neighbours_are_a_step_away() -> None:
    start = {"BLOCK_N": 1, "num_warps": 16, "num_stages": 1}
    assert neighbours(start, "BLOCK_N") == [start | {"BLOCK_N": 2}]
    assert neighbours(start, "num_warps") == [start | {"num_warps": 8}]
    assert neighbours(start, "num_stages") == [start | {"num_stages": 2}]


@pytest.mark.parametrize(("dtype", "rows", "line"), [("float32", 8, 1), ("bfloat16", 8, 2), ("bfloat16", 9, 3)])
def test_the_line_that_a_shape_takes(dtype: str, rows: int, line: int) -> None:
    with target_arch("sm_90"):
        assert line_of(TOY, {"N": 1, "K": 1, "dtype": getattr(torch, dtype), "rows": rows}) == line
    with target_arch("xe"), pytest.raises(ValueError, match="no line of toy matches"):
        line_of(TOY, {"N": 1, "K": 1, "dtype": torch.bfloat16, "rows": 8})


def test_a_line_for_one_of_many_is_put_above() -> None:
    config = {"BLOCK_N": 256, "num_warps": 16, "num_stages": 4}
    after = with_line(SOURCE, TOY, 3, "sm_90", config)
    new = "    sm_90  *      *    | 256      16         4\n"
    assert after == SOURCE.replace("    sm_*   *      *    | 128", new + "    sm_*   *      *    | 128")
    with target_arch("sm_90"):
        assert LaunchConfigs("toy", after.split('"""')[1])(N=1, K=1, dtype=torch.float16, rows=9)["BLOCK_N"] == 256


def test_a_line_of_its_own_is_replaced() -> None:
    after = with_line(SOURCE, TOY, 1, "sm_90", {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2})
    assert after == SOURCE.replace("sm_90  fp32   *    | 32 ", "sm_90  fp32   *    | 64 ")
    with pytest.raises(ValueError, match="no table absent"):
        with_line(SOURCE, LaunchConfigs("absent", TEXT), 1, "sm_90", {})


def test_launch_config_tables_are_found_with_their_lines() -> None:
    entry = entry_of("norm_swiglu")
    configs = configs_of(entry)
    assert configs is not None
    with target_arch("sm_90"):
        lines = lines_of(entry, configs)
    by_shape = {(case.name, dtype): configs.lines[line] for line, shapes in lines.items() for case, dtype in shapes}
    assert by_shape["b1", "bf16"]["rows"] == "8"
    assert by_shape["b32", "bf16"]["rows"] == "*"
    assert by_shape["prefill", "bf16"]["phase"] == "prefill"
    assert by_shape["b1", "fp32"]["dtype"] == "fp32"
    source = (ROOT / "kernels" / "norm_linear.py").read_text()
    line = next(line for line, shapes in lines.items() if (case_of(entry, "b32"), "bf16") in shapes)
    assert with_line(source, configs, line, "sm_90", config_of(configs, line)) == source
    assert configs_of(entry_of("moe_route")) is None  # its table has no column of architectures


def test_tuning_ends_in_the_source(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    entry, configs = entry_of("moe_combine"), configs_of(entry_of("moe_combine"))
    assert configs is not None
    monkeypatch.setattr(tune, "architecture", lambda: "sm_90")
    monkeypatch.setattr(tune, "operator_trial", lambda *place: place)
    monkeypatch.setattr(tune, "compiler", lambda *place: __import__("contextlib").nullcontext(lambda shapes: None))
    better = {"BLOCK_N": 512, "num_warps": 8, "num_stages": 1}
    monkeypatch.setattr(tune, "search", lambda start, seconds: (better, 0.5))
    with target_arch("sm_90"):
        before, after = tune.tune(entry, configs, ConfigClock(lambda config: 1.0))
    assert before == (ROOT / "kernels" / "moe_experts.py").read_text()
    (new,) = set(after.splitlines()) - set(before.splitlines())
    assert new.split() == ["sm_90", "|", "512", "8", "1"]
    assert "0.500 of the time" in capsys.readouterr().out


def test_there_is_nothing_to_tune_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no GPU here"):
        tune.main(["--op", "moe_combine"])


def test_a_compile_error_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("tile of 3")

    monkeypatch.setitem(sys.modules, "bench.static.ledger", SimpleNamespace(rows_of=refuse))
    assert (
        tune.faults_of("moe_combine", "small-4-b1", "bf16", "sm_90", {"BLOCK_N": 3}) == "does not compile: RuntimeError"
    )
    row = SimpleNamespace(faults=lambda uses_matrix_unit: ["spills 8 bytes of registers"])
    monkeypatch.setitem(sys.modules, "bench.static.ledger", SimpleNamespace(rows_of=lambda *_: [row]))
    assert (
        tune.faults_of("moe_combine", "small-4-b1", "bf16", "sm_90", {"BLOCK_N": 64}) == "spills 8 bytes of registers"
    )
