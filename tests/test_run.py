"""Tests of the microbenchmarks: what is timed, what is checked before it is timed, and what the rows hold.

The comparison of two revisions is tested as well.
"""

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_clock import FakeClock
from plant import case_of, entry_of
from torch import Tensor

from bench.micro import compare, providers, run
from bench.micro.modules import BenchPoint, modules
from bench.micro.providers import LazyCall, Trial, by_codes, by_distance, by_frame, by_verdict, operator_trial
from bench.micro.run import Selection, rows_of, selection_of, time_trial, trials
from bench.micro.timing import Copy, Timing
from bench.ops.registry import TensorMaker
from bench.results import ResultRow, read, store
from bench.static.traffic import fewest_bytes
from voxkern.kernels import launch_config

HERE = {"date": "2026-01-01T00:00:00+00:00", "commit": "abc", "device": "a GPU", "versions": "torch 2"}
ROOF = Copy(lambda: run.ROOF, 3_000_000)


def trial(**variants: Callable[..., Any]) -> Trial:
    """Return a trial of an operation that doubles x in place, with these providers."""
    args = {"x": torch.arange(8.0), "y": torch.zeros(1)}
    return Trial(
        "twice", "b1", "fp32", args, variants, lambda x, y: x.mul_(2), lambda: [2 * torch.arange(8.0).double()],
        lambda found, plain, exact: by_verdict(1e-5, found[1:], plain[1:], exact), 600_000, ("x",),
    )  # fmt: skip


def named(name: str, factor: float = 2.0) -> Callable[..., Any]:
    """Return a provider that multiplies x by `factor` and returns a tensor that prints as `name`, for FakeClock."""

    class Name(Tensor):
        def __str__(self) -> str:
            return name

    return lambda x, y: (x.mul_(factor), y.as_subclass(Name))[1]


def test_a_wrong_provider_is_named_and_never_timed() -> None:
    clock = FakeClock({"good": [2e-6], "copy": [1e-6]})
    found, wrong = time_trial(trial(good=named("good"), bad=named("bad", 2.001)), clock, ROOF)
    assert set(clock.log) == {"good", "copy"}
    assert list(found) == ["good", "copy"]
    (fault,) = wrong
    assert fault.startswith("bad is wrong at twice b1 fp32: result 0: error 0.007")
    assert len(clock.prepared["good"]) == (256 << 20) // 600_000 + 1
    assert clock.log[:4] == ["good", "copy", "copy", "good"]


def test_a_provider_that_fails_is_named_and_the_others_are_timed() -> None:
    def unmade() -> Callable[..., Any]:
        raise KeyError("float32")

    made: list[int] = []
    lazy = LazyCall(lambda: made.append(0) or named("good"))  # type: ignore[func-returns-value]
    clock = FakeClock({"good": [2e-6], "copy": [1e-6]})
    both = trial(good=lazy, bad=LazyCall(unmade))
    assert made == []
    found, wrong = time_trial(both, clock, ROOF)
    assert list(found) == ["good", "copy"]
    assert wrong == ["bad fails at twice b1 fp32: KeyError: 'float32'"]
    assert made == [0]


def test_only_a_coarser_peer_has_a_wider_bound() -> None:
    both = replace(trial(good=named("good", 2.1), peer=named("peer", 2.1)), of_peers={"peer": lambda *_: ""})
    assert both.fault("peer") == ""
    assert "good is wrong" in both.fault("good")


def test_nothing_right_is_nothing_timed() -> None:
    clock = FakeClock({})
    found, wrong = time_trial(trial(bad=named("bad", 1.0)), clock, ROOF)
    assert (found, clock.log, len(wrong)) == ({}, [], 1)


def test_rows_say_time_bandwidth_and_part_of_the_roof() -> None:
    found = {
        "voxkern": Timing(2e-6, 1e-6, 3e-6, "graph"),
        "torch": Timing(4e-6, 4e-6, 4e-6, "no graph"),
        "copy": Timing(5e-6, 4e-6, 6e-6, "graph"),
    }
    rows = rows_of(trial(), found, ROOF, Selection(device="cuda"), HERE)
    said = {(row.provider, row.metric): (row.value, row.low, row.high, row.unit) for row in rows}
    assert said == {
        ("voxkern", "time"): (2.0, 1.0, 3.0, "us"),
        ("voxkern", "bandwidth"): (300.0, 200.0, 600.0, "GB/s"),
        ("voxkern", "of the copy roof"): (50.0, 33.333, 100.0, "%"),
        ("torch", "time, no graph"): (4.0, 4.0, 4.0, "us"),
        ("torch", "bandwidth, no graph"): (150.0, 150.0, 150.0, "GB/s"),
        ("torch", "of the copy roof, no graph"): (25.0, 25.0, 25.0, "%"),
        ("copy", "time"): (5.0, 4.0, 6.0, "us"),
        ("copy", "bandwidth"): (600.0, 500.0, 750.0, "GB/s"),
        ("copy", "of the copy roof"): (100.0, 83.333, 125.0, "%"),
    }
    first = rows[0]
    assert (first.bench, first.subject, first.shape, first.dtype, first.how) == (
        "micro", "twice", "b1", "fp32", "measured",
    )  # fmt: skip
    assert (first.device, first.commit, first.date, first.versions) == ("a GPU", "abc", HERE["date"], "torch 2")
    assert first.command == "python -m bench run --op twice --shape b1 --dtype fp32 --device cuda --provider voxkern"
    assert not any(row.provider == "copy" and "--provider copy" in row.command for row in rows)


def test_a_run_appends_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    both = trial(torch=named("torch"), voxkern=named("voxkern", 3.0))
    monkeypatch.setattr(run, "trials", lambda selection: iter([both, replace(both, shape="b2", steps="euler:7")]))
    monkeypatch.setattr(Selection, "timed", ["torch", "voxkern"])
    file = tmp_path / "rows.csv"
    clock = FakeClock({"torch": [2e-6], "copy": [1e-6]}, ROOF)
    rows, wrong = run.run(Selection(device="cuda"), clock, file, HERE)
    assert read(file.read_text()) == rows
    assert [(row.shape, row.steps, row.provider) for row in rows[::3]] == [
        ("b1", "", "torch"), ("b1", "", "copy"), ("b2", "euler:7", "torch"), ("b2", "euler:7", "copy"),
    ]  # fmt: skip
    assert len(wrong) == 2
    assert capsys.readouterr().out.count("WRONG, not timed: voxkern is wrong at twice") == 2


def test_on_a_processor_the_torch_providers_of_an_operator_are_right() -> None:
    one = operator_trial(entry_of("flow_step"), case_of(entry_of("flow_step"), "odd"), "bf16", "cpu")
    assert set(one.variants) == {"torch", "torch.compile"}
    assert one.fault("torch") == ""
    spoilt = replace(one, variants={"torch.compile": lambda x, **rest: entry_of("flow_step").reference(x=-x, **rest)})
    assert "torch.compile is wrong at flow_step odd bf16" in spoilt.fault("torch.compile")
    assert [len(t) for t in one.results(one.reference)] == [5, 5, 30]  # x, v_last and the tokens that are written to


@pytest.mark.parametrize(
    ("name", "steps"), [("frame", "euler:7"), ("flow_head", "euler:7"), ("codec_chunk", ""), ("backbone", "")]
)
def test_modules_of_the_demo_voice_are_right(name: str, steps: str) -> None:
    module = next(module for module in modules("cpu") if module.name == name and module.shape == "demo-b1")
    one = module.build(BenchPoint(name, module.shape, "bf16", "cpu"))
    assert one.steps == steps
    with torch.inference_mode():
        assert one.fault("torch") == ""
        assert all(torch.equal(a, b) for a, b in zip(*(one.results(one.reference) for _ in range(2)), strict=True))
    assert (one.nbytes, one.rotates) == (0, False)


def test_whole_modules_have_tolerances_of_their_own() -> None:
    exact = [torch.tensor([[5, 10, 10], [1, 2, 2]])]
    near, far = [torch.tensor([[5, 10, 11], [1, 2, 2]])], [torch.tensor([[5, 10, 13], [1, 2, 2]])]
    assert by_codes(near, near, exact) == ""
    assert by_codes(far, near, exact) == (
        "acoustic codes are off by 0.750 levels in the mean where plain torch's are by 0.250"
    )
    assert by_codes([torch.tensor([[6, 10, 10], [1, 2, 2]])], exact, exact) == "1 of 2 semantic codes differ"
    truth = [torch.tensor([3.0, 4.0]).double()]
    plain, twice, thrice = ([torch.tensor([3.0, 4.0 + 0.01 * n])] for n in (1, 2, 3))
    assert by_distance(twice, [plain[0] + 1e-5], truth) == ""
    assert "the RMS error is 0.006 of the truth's RMS, plain torch's is 0.002" in by_distance(thrice, plain, truth)
    assert by_distance([torch.full((2,), torch.nan)], plain, truth)
    off = [torch.tensor([[5, 9, 11], [1, 3, 1]])]
    assert by_codes(exact, off, exact) == "acoustic codes of plain torch are off by 1.000 levels in the mean"
    one_off = [torch.tensor([[5, 10, 10], [1, 2, 3]])]
    assert by_codes(one_off, exact, exact)
    assert by_codes(one_off, exact, exact, slack=0.25) == ""
    frame = [exact[0], *truth]
    assert by_frame([near[0], *twice], [near[0], plain[0] + 1e-5], frame) == ""
    assert "semantic" in by_frame([exact[0] + 1, *truth], frame, frame)
    assert "the RMS error is 99 of" in by_frame([exact[0], 100 * truth[0]], frame, frame)
    assert "result 0" in by_frame([exact[0], torch.full((2,), torch.nan)], frame, frame)


def test_bytes_are_those_that_must_move() -> None:
    entry, sizes = entry_of("paged_attention"), {"H": 32, "HKV": 8, "D": 128}
    args = entry.args(case_of(entry, "b1"), TensorMaker(torch.bfloat16))
    rows = 2 * 2 * sizes["H"] * sizes["D"]  # q and the result
    table = sum(args[name].numel() * args[name].element_size() for name in ("block_table", "lengths"))
    assert fewest_bytes(entry, args) == rows + table + 2 * 2 * int(args["lengths"].sum()) * sizes["HKV"] * sizes["D"]
    entry = entry_of("norm_linear")
    args = entry.args(case_of(entry, "odd"), TensorMaker(torch.bfloat16))
    made = entry.op.declare(**args)
    assert fewest_bytes(entry, args) == 2 * (sum(args[n].numel() for n in ("x", "norm", "weight")) + made.numel())


def test_only_the_selected_trials_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "operator_trial", lambda entry, case, dtype, device: (entry.name, case.name, dtype))
    monkeypatch.setattr(run, "modules", lambda device: [])
    chosen = [("linear", "down-b1", dtype) for dtype in ("bf16", "int8", "fp8", "fp16", "fp32")]
    with launch_config.target_arch("sm_90"):
        others = [("linear", "down-b16", dtype) for dtype in ("bf16", "int8", "fp8")]
        others += [("linear", case, "bf16") for case in ("codec-down-b1", "codec-down-b16")]
        assert list(trials(Selection(("linear",), shape="down-b1"))) == [*chosen, *others]
        assert list(trials(Selection(("linear",), quick=True))) == [one for one in chosen if one[2] != "fp16"]
        assert list(trials(Selection(("linear",), shape="down-b1", dtypes=("fp16",)))) == [chosen[3]]
        # the 2 GB of 64 experts, and their fp64 results, are too much for a CPU
        on_cpu, on_gpu = (
            {shape for _, shape, _ in trials(Selection(("moe_experts_up",), device=device))}
            for device in ("cpu", "cuda")
        )
        assert on_gpu - on_cpu == {"small-4-b32"}
        assert "small-4-b1" in on_cpu


def test_absent_providers_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None if name == "vllm_omni" else name)
    assert providers.missing("cpu") == {
        "voxkern": "no GPU", "voxkern-overlap": "no GPU", "vllm-omni": "no vllm_omni", "flashinfer": "no GPU",
    }  # fmt: skip
    monkeypatch.setattr(providers, "can_overlap", lambda device: device == torch.device("cuda"))
    packed = "packed weights are for a CPU"
    assert providers.missing("cuda") == {"vllm-omni": "no vllm_omni", "voxkern-packed": packed}
    assert Selection().timed == ["voxkern-packed", "torch", "transformers"]
    assert Selection(device="cuda").timed == [
        "voxkern", "voxkern-overlap", "torch", "torch.compile", "transformers", "flashinfer",
    ]  # fmt: skip
    assert Selection(providers=("torch.compile", "voxkern")).timed == ["torch.compile"]
    with pytest.raises(SystemExit, match="none of the providers voxkern is available here"):
        run.main(["--provider", "voxkern", "--csv", "-"])
    said = "not available: voxkern (no GPU); voxkern-overlap (no GPU); vllm-omni (no vllm_omni)"
    assert said in capsys.readouterr().out


def test_an_unknown_operator_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        selection_of(["--op", "linear", "liner"])
    assert "--op: there is no liner; there are" in capsys.readouterr().err
    selection, options = selection_of(["--op", "linear", "frame", "--dtype", "bf16", "--csv", "-"])
    assert (selection.subjects, selection.dtypes, options.csv) == (("linear", "frame"), ("bf16",), "-")


def timed(value: float, unit: str = "us", shape: str = "b1") -> ResultRow:
    metric = "time" if unit == "us" else "bandwidth"
    return ResultRow("micro", "linear", metric, value, unit, "measured", "run", "torch", shape, "bf16")


def test_old_and_new_are_measured_in_turn_and_the_better_half_counts() -> None:
    values = {"old": iter([8.0, 10.0]), "new": iter([6.0, 5.0])}
    log = []

    def measure(tree: Path, asked: Any) -> list[ResultRow]:
        log.append((tree.name, asked))
        value = next(values[tree.name])
        return [timed(value), timed(1000 / value, "GB/s")]

    rows = compare.measure_interleaved({"old": Path("old"), "new": Path("new")}, ["--op", "linear"], measure)
    assert log == [(name, ["--op", "linear"]) for name in ("old", "new", "new", "old")]
    assert [row.value for row in rows["old"]] == [8.0, 125.0]
    assert [row.value for row in rows["new"]] == [5.0, 200.0]
    head, line = compare.table("v1", rows)
    assert head.split() == ["us", "v1", "this", "tree", "new", "/", "old"]
    assert line.split() == ["linear", "b1", "bf16", "torch", "8", "5", "0.625"]
    with pytest.raises(ValueError, match="was measured, and then"):
        compare.faster(timed(1.0), timed(1.0, shape="b2"))


def test_the_ratio_is_printed_and_the_new_rows_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {"old": [timed(8.0)], "new": [timed(4.0)]}
    monkeypatch.setattr(compare, "measure_interleaved", lambda trees, asked, measure: measured)
    monkeypatch.setattr(compare, "worktree", lambda rev: compare.tempfile.TemporaryDirectory())
    file = tmp_path / "rows.csv"
    compare.compare("v1", ["--op", "linear"], file)
    assert capsys.readouterr().out.splitlines()[1].split()[-3:] == ["8", "4", "0.500"]
    assert read(file.read_text()) == [timed(4.0)]


def test_a_tree_is_timed_in_a_process_that_compares_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(returncode=0, stdout="WRONG, not timed: voxkern is wrong at linear", stderr="")

    def child(command: list[str], **_: Any) -> SimpleNamespace:
        selection, options = selection_of(command[4:])
        assert (selection.subjects, options.compare) == (("linear",), "")
        store([timed(8.0)], Path(options.csv))
        return done

    monkeypatch.setattr(compare.subprocess, "run", child)
    asked = ["--op", "linear", "--compare", "HEAD~1", "--csv=x"]
    assert compare.measure(tmp_path, asked) == [timed(8.0)]
    done.returncode = 1
    with pytest.raises(SystemExit, match="failed:\nWRONG, not timed: voxkern is wrong at linear"):
        compare.measure(tmp_path, asked)


def test_a_revision_has_a_worktree_of_its_own_with_this_tree_s_timer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "repo"
    files = [repo / "bench" / name for name in ("micro/run.py", "ops/linear.py", "static/traffic.py")]
    for file in (*files, repo / "kernel"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("old")
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a"}
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "old"]):
        subprocess.run(["git", *words], cwd=repo, check=True, env=os.environ | who)
    for file in (*files, repo / "kernel"):
        file.write_text("new")
    monkeypatch.setattr(compare, "ROOT", repo)
    with compare.worktree("HEAD") as tree:
        assert [(tree / file.relative_to(repo)).read_text() for file in files] == ["new", "old", "new"]
        assert (tree / "kernel").read_text() == "old"
    assert not tree.exists()
    assert (repo / "kernel").read_text() == "new"
    with pytest.raises(SystemExit, match=r"--compare nowhere: .*invalid reference"), compare.worktree("nowhere"):
        pass
    subprocess.run(["git", "rm", "-qrf", "bench/micro"], cwd=repo, check=True)
    subprocess.run(["git", "commit", "-qam", "none"], cwd=repo, check=True, env=os.environ | who)
    with pytest.raises(SystemExit, match="this revision has no bench/micro"), compare.worktree("HEAD"):
        pass
