"""The tables of a frame's predicted times."""

import itertools
import math

from bench.report.figures import Figures, ReportTable, fits
from bench.static import filling as filled
from bench.static.roofline import SOLVERS

PREDICTED = "PREDICTED by the model of bench/static/roofline.py, not measured."
SHAPES = ("frame-b1", "frame-b8", "frame-b32")  # columns of the roofline table


def roofline(figures: Figures) -> ReportTable:
    """Make the table of a frame's floor and predicted time on each GPU, at a few batch sizes."""
    columns = [(shape, steps) for shape in SHAPES for steps in SOLVERS]
    lines = [
        [name, *(_floor_and_time(figures, name, *column) for column in columns)]
        for name in figures.values("subject", bench="roofline", metric="floor")
    ]
    head = ("GPU", *(f"{_batch(shape)}, {steps.replace(':', ' ')}" for shape, steps in columns))
    note = (
        "Floor / predicted milliseconds of a whole frame (80 ms of sound) with 7 evaluations of Euler's method and 4 "
        f"of ab2, bf16. The floor is bytes or products at the data sheet's rates. {PREDICTED}"
    )
    return ReportTable("Time of a frame by GPU", note, "python -m bench roofline", head, lines)


def batches(figures: Figures) -> ReportTable:
    """Make the table of a frame's floor and predicted time on each GPU, at every batch size."""
    shapes = figures.values("shape", bench="roofline", metric="floor")
    lines = [
        [name, steps.replace(":", " "), *(_floor_and_time(figures, name, shape, steps) for shape in shapes)]
        for name in figures.values("subject", bench="roofline", metric="floor")
        for steps in SOLVERS
    ]
    head = ("GPU", "solver", *map(_batch, shapes))
    note = f"Floor / predicted milliseconds of a whole frame, bf16. {PREDICTED}"
    return ReportTable("Time of a frame by GPU, every batch", note, "python -m bench roofline", head, lines)


def bounds(figures: Figures) -> ReportTable:
    """Make the table of a frame's predicted time over its bound and over its floor."""
    lines = []
    for name in figures.values("subject", bench="roofline", metric="bound"):
        line = [name]
        for shape in SHAPES:
            wanted = {"bench": "roofline", "subject": name, "shape": shape, "steps": "euler:7", "dtype": "bf16"}
            time, *least = (figures.one(**wanted, metric=metric) for metric in ("time", "bound", "floor"))
            over = [f"{time.value / one.value:.2f}" for one in least if time and one]
            line.append(f"{over[0]} ({over[1]})" if len(over) == 2 else "-")
        if name in filled.NAMES:
            lines.append(line)
    note = f"Predicted time of a frame over the bound, and in brackets over the floor; 7 evaluations, bf16. {PREDICTED}"
    title = "Predicted time of a frame over its bound"
    return ReportTable(title, note, "python -m bench roofline", ("GPU", *map(_batch, SHAPES)), lines)


def quantized(figures: Figures) -> ReportTable:
    """Make the table of a frame's predicted time on each GPU with bf16 and with int8 weights."""
    lines = []
    for name in figures.values("subject", bench="roofline", metric="floor", dtype="int8"):
        wanted = {"bench": "roofline", "subject": name, "steps": "euler:7", "metric": "time"}
        times = [
            [figures.value(".2f", **wanted, shape=shape, dtype=dtype) for dtype in ("bf16", "int8")] for shape in SHAPES
        ]
        lines.append([name, *map(" / ".join, times)])
    note = (
        "Predicted milliseconds of a whole frame with bf16 / with int8 weights; 7 evaluations. The instructions that "
        f"widen the weights are counted in the machine code. {PREDICTED}"
    )
    title = "Predicted time of a frame with 8-bit weights"
    return ReportTable(title, note, "python -m bench roofline", ("GPU", *map(_batch, SHAPES)), lines)


def overlapped(figures: Figures) -> ReportTable:
    """Make the table of a frame's predicted time with launches that overlap, with bf16 and with int8 weights."""
    lines = []
    for name in figures.values("subject", bench="roofline", metric="time with overlap"):
        wanted = {"bench": "roofline", "subject": name, "steps": "euler:7"}
        line = [name]
        for shape, dtype in itertools.product(SHAPES, ("bf16", "int8")):
            metrics = ("time", "time with overlap", "floor")
            rows = [figures.one(**wanted, metric=metric, shape=shape, dtype=dtype) for metric in metrics]
            usual, less, least = (row.value if row else math.nan for row in rows)
            line.append(f"{usual:.2f} / {less:.2f} ({less / least:.2f})")
        lines.append(line)
    head = ("GPU", *(f"{_batch(shape)}, {dtype}" for shape in SHAPES for dtype in ("bf16", "int8")))
    note = (
        "Predicted milliseconds of a whole frame without / with overlap, and in brackets the latter over the floor; 7 "
        "evaluations. The gap between two launches, with the latency of the first load, is assumed to be 1.1 us with "
        f"overlap and 2.2 us without. {PREDICTED}"
    )
    return ReportTable("Predicted time of a frame with overlap", note, "python -m bench roofline", head, lines)


def filling(figures: Figures) -> ReportTable:
    """Make the table of how well each launch with many weights fills each GPU."""
    # only rows of the newest run: an older one may have launches that a frame no longer has
    last_run = max((row.date for row in figures.rows if row.bench == "filling"), default="")
    figures = Figures(row for row in figures.rows if fits(row, {"bench": "filling", "date": last_run}))
    lines = []
    for gpu in figures.values("subject"):
        for metric in figures.values("metric", subject=gpu):
            launch, _, last = metric.rpartition(": ")
            if last == "launches":
                cells = [
                    figures.value(form, subject=gpu, metric=f"{launch}: {name}")
                    for name, (_, form) in filled.METRICS.items()
                ]
                lines.append([gpu, launch, *cells])
    head = (
        "GPU", "launch", "launches", "blocks", "multiprocessors", "in flight on each, B", "DRAM, us", "L2, us",
        "products, us", "over the bound",
    )  # fmt: skip
    note = f"Launches with 8 MB of weights or more in a frame of 32 requests; public shapes, 7 evaluations. {PREDICTED}"
    return ReportTable("Launches and GPUs", note, filled.COMMAND, head, lines)


def work(figures: Figures) -> ReportTable:
    """Make the table of a whole frame's launches, bytes and multiply-adds."""
    wanted = {"bench": "roofline", "subject": "frame", "dtype": "bf16"}
    lines = [
        [
            shape.removeprefix("frame-b"), steps.replace(":", " "),
            figures.value(".0f", **wanted, shape=shape, steps=steps, metric="launches"),
            figures.value(".2f", 1e-9, **wanted, shape=shape, steps=steps, metric="bytes"),
            figures.value(".1f", 1e-9, **wanted, shape=shape, steps=steps, metric="multiply-adds"),
        ]
        for shape in figures.values("shape", **wanted, metric="launches")
        for steps in SOLVERS
    ]  # fmt: skip
    head = ("batch", "solver", "launches", "GB from DRAM", "multiply-adds, G")
    note = "Backbone with 400 tokens behind it, flow head and codec; by arithmetic that tests hold to the count."
    return ReportTable("A whole frame: launches, bytes, operations", note, "python -m bench roofline", head, lines)


def _batch(shape: str) -> str:
    return f"batch {shape.removeprefix('frame-b')}"


def _floor_and_time(figures: Figures, gpu: str, shape: str, steps: str) -> str:
    wanted = {"bench": "roofline", "subject": gpu, "shape": shape, "steps": steps, "dtype": "bf16"}
    return " / ".join(figures.value(".2f", **wanted, metric=metric) for metric in ("floor", "time"))
