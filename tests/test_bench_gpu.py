"""Tests of ``python -m bench gpu``: the order of its steps, its budget of time, failures, and the closing table."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plant import case_of, entry_of
from torch import Tensor

from bench.micro import gpu
from bench.ops.registry import TensorMaker, entries
from bench.results import ResultRow, read
from bench.static.roofline import GPUS

HERE = {"date": "2026-01-01T00:00:00+00:00", "commit": "abc", "device": "NVIDIA H100 80GB HBM3", "versions": "torch 2"}


def session(tmp_path: Path, minutes: float, seconds: list[float]) -> gpu.Session:
    """Return a session with a clock that returns `seconds` one after another, and then the last one."""
    times = iter(seconds)
    return gpu.Session(minutes, tmp_path / "rows.csv", HERE, None, now=lambda: next(times, seconds[-1]))


def row(subject: str) -> ResultRow:
    return ResultRow("micro", subject, "time", 1.0, "us", "measured", "again", "voxkern", "b1", "bf16")


def test_a_failure_is_listed_and_the_next_step_runs(tmp_path: Path) -> None:
    def fails(_: gpu.Session) -> list[ResultRow]:
        raise RuntimeError("out of memory")

    one = session(tmp_path, 1, [0.0])
    one.run(iter([("first", lambda _: [row("a")]), ("second", fails), ("third", lambda _: [row("b")])]))
    assert one.failures == ["second: RuntimeError: out of memory"]
    assert [found.subject for found in one.rows] == ["a", "b"]
    assert read(one.file.read_text()) == one.rows
    assert one.skipped == []


def test_steps_run_until_the_time_is_up(tmp_path: Path) -> None:
    one = session(tmp_path, 1, [0.0, 0.0, 1.0, 59.0, 59.5, 61.0])
    one.run((name, lambda _, name=name: [row(name)]) for name in ("a", "b", "c"))  # type: ignore[misc]
    assert [found.subject for found in one.rows] == ["a", "b"]
    assert one.skipped == ["c"]


def test_the_most_important_steps_come_first() -> None:
    names = [name for name, _ in gpu.steps(entries())]
    order = ["check of norm_linear", "frame-b1", "frame-b8", "frame-b32", "first sound and memory", "norm_linear"]
    order += ["codec_chunk", "frame-b1, compiled", "norm_linear, all"]
    assert [name for name in names if name in order] == order
    assert len(names) == len(set(names))


def test_the_table_compares_with_the_prediction() -> None:
    times = [
        ResultRow("micro", "frame", "time", 5000.0, "us", "measured", "again", provider, "frame-b1", "bf16", "euler:7")
        for provider in ("voxkern", "torch")
    ]
    (line,) = gpu.table(times, GPUS["H100 SXM"])[1:]
    measured, plain, predicted, floor, ratio = map(float, line.split()[4:])
    assert (measured, plain) == (5000.0, 5000.0)
    assert 3000 < floor < predicted < 5000
    assert ratio == pytest.approx(measured / predicted, abs=0.01)
    (line,) = gpu.table(times, None)[1:]
    assert len(line.split()) == 6  # an unknown GPU has no prediction


def test_the_table_compares_with_pytorch_at_the_same_dtype_and_solver() -> None:
    cases = {("bf16", "euler:7"): 2.0, ("bf16", "ab2:4"): 3.0, ("fp32", "euler:7"): 4.0}
    times = [
        ResultRow("micro", "head", "time", value, "us", "measured", "again", provider, "b1", dtype, steps)
        for (dtype, steps), theirs in cases.items()
        for provider, value in (("voxkern", 1.0), ("torch", theirs))
    ]
    lines = gpu.table(times, None)[1:]
    assert [line.split() for line in lines] == [
        ["head", "b1", "bf16", "euler:7", "1.00", "2.00"],
        ["head", "b1", "bf16", "ab2:4", "1.00", "3.00"],
        ["head", "b1", "fp32", "euler:7", "1.00", "4.00"],
    ]


def test_the_work_of_an_operator_includes_a_result_that_is_an_argument() -> None:
    entry = entry_of("codec_attention")
    timed = replace(row(entry.name), shape="b1")
    (work,) = gpu.work_at(timed, "sm_90")
    args = entry.args(case_of(entry, "b1"), TensorMaker(torch.bfloat16))
    assert work.dram == sum(arg.numel() * arg.element_size() for arg in args.values() if isinstance(arg, Tensor))


def test_a_dry_run_writes_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--minutes", "2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "frame frame-b32 bf16" in out
    assert "all invented" in out
    assert "no time was left" not in out


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="torch finds no GPU"):
        gpu.main([])
