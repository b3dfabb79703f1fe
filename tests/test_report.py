"""Tests of the report: the page, the plots and the marked tables are made from rows of results."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the report's plots need matplotlib: pip install 'voxkern[bench]'")

from bench import results
from bench.report import page, plots, report
from bench.report.figures import Figures, ReportTable
from bench.report.tables import tables
from bench.results import WITH_BF16, ResultRow
from bench.static import filling, ledger

CPU, GPU = "a CPU, 1 thread", "NVIDIA H100 80GB HBM3"
TIME = ResultRow(
    "micro", "linear", "time", 0.25, "us", "measured", "again", "torch", "b1", "bf16", date="2026-01-01", device=CPU
)
LEDGER = ledger.read(ledger.FILE.read_text())[1]


def counted(provider: str, metric: str, value: float, **more: Any) -> ResultRow:
    row = ResultRow("server_cost", "flow head, eager", metric, value, "1", "counted", "again", provider, "frame-b1")
    return replace(row, **more)


@pytest.mark.parametrize("file", report.MARKED_FILES, ids=lambda file: file.name)
def test_marked_tables_show_the_newest_rows(file: Path) -> None:
    """``python -m bench report --no-measure`` writes the tables."""
    made = tables(Figures(results.read(results.FILE.read_text())), LEDGER)
    text = file.read_text()
    assert report.with_tables(text, made) == text
    assert report.MARKED.findall(text)


def test_the_report_took_less_than_a_quarter_of_an_hour() -> None:
    row = Figures(results.read(results.FILE.read_text())).one(bench="report", subject="all parts", metric="time")
    assert row is not None
    assert (row.unit, row.value < 900) == ("s", True)


def test_a_table_that_differs_from_its_rows_is_replaced() -> None:
    made = {"engine": ReportTable("t", "A note.", "again", ("a", "b"), [("1", "2")])}
    text = "before\n<!-- figures: engine -->\n| a | b |\n| --- | --- |\n| 1 | 3 |\n<!-- end -->\nafter"
    right = report.with_tables(text, made)
    assert right != text
    assert "| 1 | 2 |\n\n`again`. A note.\n<!-- end -->\nafter" in right
    assert report.with_tables(right, made) == right
    with pytest.raises(ValueError, match="marks the table 'engine', but the tables are"):
        report.with_tables(text, {"claim": made["engine"]})


def test_launches_of_a_frame_on_each_gpu() -> None:
    row = ResultRow(
        "roofline",
        "A",
        "launches of the flow head",
        95,
        "1",
        "counted",
        "again",
        "voxkern",
        "frame-b8",
        "bf16",
        "euler:7",
    )
    parts = {"flow head": 95, "bookkeeping": 1, "backbone": 131, "codec": 47}
    rows = [
        replace(row, subject=gpu, metric=f"launches of the {part}", value=n + more * (part == "flow head"))
        for gpu, more in (("A", 0), ("B", 14), ("C", 0))
        for part, n in parts.items()
    ]
    floors = [replace(row, subject=gpu, metric="floor", how="predicted") for gpu in ("A", "B", "C", "D")]
    table = tables(Figures([*floors, *rows]), [])["launches"]
    assert table.lines == [
        ["bf16", "8", "A, C", "95", "1", "131", "47", "274"], ["bf16", "8", "B", "109", "1", "131", "47", "288"],
    ]  # fmt: skip


def test_launches_of_an_older_run_are_left_out() -> None:
    row = ResultRow("filling", "A", "", 2, "1", "predicted", "again", shape="frame-b32", date="2026-01-02")
    rows = [replace(row, metric=f"new: {metric}") for metric in filling.METRICS]
    rows += [replace(row, metric=f"old: {metric}", date="2026-01-01") for metric in filling.METRICS]
    (line,) = tables(Figures(rows), [])["filling"].lines
    assert line[:3] == ["A", "new", "2"]


def test_8_bit_weights_on_each_kind_of_cpu() -> None:
    fast = CPU.replace(",", f"{WITH_BF16},")
    row = replace(TIME, subject="flow_head", shape="public-b1", value=2e6)
    packed = replace(row, provider="voxkern-packed", value=1e6)
    elsewhere = replace(packed, device="another CPU, 2 threads", value=9e6)
    rows = [row, packed, elsewhere, replace(row, device=fast, value=5e5)]
    assert tables(Figures(rows), [])["quantization_cpu"].lines == [
        [CPU, "bf16", "2.00", "1.00"],
        [fast, "bf16", "0.50", "-"],
    ]


def test_cells() -> None:
    rows = [
        counted("voxkern", "launches", 96), counted("voxkern", "bytes", 5.0e9), counted("vllm-omni", "launches", 470),
        counted("voxkern", "launches", 97, date="later", device="another"), TIME,
        replace(TIME, value=0.125, date="later"),
    ]  # fmt: skip
    made = tables(Figures(rows), [])
    assert made.keys() == {"server", "micro"}  # tables without rows are left out
    assert made["server"].lines == [
        ["1", "voxkern", "eager", "97", "5.000", "-"],
        ["1", "vllm-omni", "eager", "470", "-", "-"],
    ]
    assert made["micro"].lines == [["linear", "b1", "bf16", "torch", "0.125", "", CPU]]


def test_resources_of_the_ledger() -> None:
    lines = {line[0]: line[1:] for line in tables(Figures([]), LEDGER)["resources"].lines}
    of_h100 = [row for row in LEDGER if row.arch == "sm_90"]
    assert lines["sm_90"][:3] == [str(len(of_h100)), str(max(row.registers for row in of_h100)), "0"]


def test_what_a_gpu_measured_stands_apart() -> None:
    """A GPU's times have a table of their own, and a CPU's time of the same operator does not replace them."""
    time = ResultRow(
        "micro", "linear", "time", 4.5, "us", "measured", "again", "voxkern", "b1", "bf16", low=4.0, high=5.0
    )
    rate = replace(time, metric="bandwidth", value=2900.0, unit="GB/s", device=GPU)
    rows = [replace(time, device=GPU), rate, replace(rate, metric="of the copy roof", value=95.0, unit="%")]
    slow = replace(time, metric="time, no graph", provider="torch", value=50.0, device=GPU)
    made = tables(Figures([*rows, slow, replace(time, value=900.0, provider="torch", device=CPU)]), [])
    assert made["gpu"].lines == [
        ["linear", "b1", "bf16", "voxkern", "graph", "4.5", "4 to 5", "2900", "95", GPU],
        ["linear", "b1", "bf16", "torch", "calls", "50", "4 to 5", "-", "-", GPU],
    ]
    assert made["micro"].lines == [["linear", "b1", "bf16", "torch", "900", "4 to 5", CPU]]


@pytest.mark.parametrize("device", [CPU, GPU])
def test_the_page_says_what_was_run_on_a_gpu(device: str) -> None:
    time = ResultRow("run", "frame", "time", 4.5, "ms", "measured", "again", "voxkern", "frame-b1", "bf16", "euler:7")
    figures = Figures([TIME, replace(time, device=device, date="2026-01-01")])
    said = page.html(
        tables(figures, LEDGER), dict.fromkeys(("frame", "claim", "steps", "resources"), b""), figures, "3"
    )
    assert ("Nothing on this page was run on a GPU" in said) == (device == CPU)
    assert (f"measured come from: {GPU}" in said) == (device == GPU)
    assert "<td>0.25</td>" in said
    assert "<script" not in said
    assert "http" not in said  # the page loads nothing else


def test_text_is_escaped() -> None:
    table = ReportTable("<b>", "a < b", "x --y", ("a",), [("<i>",)])
    said = page.html({"engine": table}, dict.fromkeys(("frame", "claim", "steps", "resources"), b""), Figures([]), "3")
    assert "<td>&lt;i&gt;</td>" in said
    assert "a &lt; b" in said


def test_pictures_are_drawn_of_rows() -> None:
    figures = Figures(results.read(results.FILE.read_text()))
    drawn = plots.frame_times(figures)
    bars = drawn.axes[0].containers[0]
    floor = figures.one(
        bench="roofline", subject="L4", metric="time of the backbone", shape="frame-b1", steps="euler:7", dtype="bf16"
    )
    assert floor is not None
    assert bars[0].get_width() == pytest.approx(floor.value)
    for plot in (drawn, plots.claim(figures), plots.error_by_steps(figures), plots.resources(LEDGER)):
        assert plots.png(plot).startswith(b"\x89PNG")


def test_a_measured_frame_is_laid_over_the_prediction() -> None:
    rows = results.read(results.FILE.read_text())
    frame = ResultRow(
        "run", "frame", "time", 4500.0, "us", "measured", "again", "voxkern", "frame-b1", "bf16", "euler:7"
    )
    drawn = plots.frame_times(Figures([*rows, replace(frame, device=GPU)]))
    (star,) = [line for line in drawn.axes[0].lines if line.get_label() == "measured"]
    assert list(star.get_xdata()) == [pytest.approx(4.5)]
    assert list(star.get_ydata()) == ["H100 SXM"]


def test_a_failed_part_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command[3:])
        return SimpleNamespace(returncode=int("depth" in command), stdout="WRONG: ", stderr="because of this")

    monkeypatch.setattr(report.subprocess, "run", run)
    monkeypatch.setattr(report, "write", lambda: None)
    assert report.main(["--only", "roofline", "depth", "run"]) == 1
    # depth and run measure times, so they run after roofline
    assert asked == [["report", "--part", "roofline"], ["report", "--part", "depth"], ["run", "--quick"]]
    said = capsys.readouterr().out
    assert "WRONG: because of this" in said
    assert "FAILED, so the page has their older rows: depth" in said
