"""The tables of the report, the README and docs/, made from the committed rows and the ledger only."""

import itertools
from collections import defaultdict
from collections.abc import Sequence

from bench.report import cpu, quantization
from bench.report.figures import Figures, ReportTable, on_cpu
from bench.report.predicted import PREDICTED, batches, bounds, filling, overlapped, quantized, roofline, work
from bench.results import ResultRow
from bench.static.ledger import LedgerRow

FRAME_PARTS = ("flow head", "bookkeeping", "backbone", "codec")  # of a frame
LEVELS = ("1 level", "2 levels", "more")  # distances of acoustic codes, as the metrics name them


def tables(figures: Figures, ledger: Sequence[LedgerRow]) -> dict[str, ReportTable]:
    """Return all tables by name, without those that have no lines."""
    made = {
        "frame": frame(figures), "launches": launches(figures), "cache": cache(figures), "server": server(figures),
        "claim": claim(figures), "roofline": roofline(figures), "batches": batches(figures), "work": work(figures),
        "bounds": bounds(figures), "quantized": quantized(figures), "overlapped": overlapped(figures),
        "filling": filling(figures),
        "errors": errors(figures), "distortion": distortion(figures), "recognition": recognition(figures),
        "engine": engine(figures), "served": served(figures), "host": host(figures), "micro": micro(figures),
        "gpu": gpu(figures),
        "resources": resources(ledger), "quantization_given": quantization.given(figures),
        "quantization_free": quantization.free(figures), "quantization_cpu": quantization.on_cpus(figures),
        "cpu": cpu.on_a_cpu(figures, with_bf16=False), "cpu_with_bf16": cpu.on_a_cpu(figures, with_bf16=True),
    }  # fmt: skip
    return {name: table for name, table in made.items() if table.lines}


def frame(figures: Figures) -> ReportTable:
    """Make the table of the launches, bytes and multiply-adds of a frame's parts."""
    lines = []
    for subject in figures.values("subject", bench="frame", metric="launches"):
        for shape in figures.values("shape", bench="frame", metric="launches", subject=subject):
            wanted = {"bench": "frame", "subject": subject, "shape": shape}
            lines.append([
                subject, shape.removeprefix("frame-b"), figures.value(".0f", **wanted, metric="launches"),
                figures.value(".3f", 1e-9, **wanted, metric="bytes"),
                figures.value(".3f", **wanted, metric="of the fewest bytes"),
                figures.value(".1f", 1e-9, **wanted, metric="multiply-adds"),
                figures.value(".3f", **wanted, metric="of the usual multiply-adds"),
            ])  # fmt: skip
    head = (
        "of a frame",
        "batch",
        "launches",
        "GB from DRAM",
        "of the fewest",
        "multiply-adds, G",
        "of PyTorch's",
    )
    note = "Public shapes, bf16, 7 evaluations, tiles of sm_90, counted in the interpreter; keys and values apart."
    return ReportTable("What a frame costs, counted", note, "python -m bench frame", head, lines)


def launches(figures: Figures) -> ReportTable:
    """Make the table of the launches of a whole frame, which is one graph, by part."""
    wanted = {"bench": "roofline", "steps": "euler:7"}
    lines, gpus = [], figures.values("subject", **wanted, metric="floor")
    for dtype, shape in itertools.product(("bf16", "int8"), ("frame-b1", "frame-b8", "frame-b32")):
        gpus_of: dict[tuple[int, ...], list[str]] = defaultdict(list)  # GPUs with the same launches
        for gpu in gpus:
            here = wanted | {"subject": gpu, "shape": shape, "dtype": dtype}
            parts = [figures.one(**here, metric=f"launches of the {part}") for part in FRAME_PARTS]
            if None not in parts:
                gpus_of[tuple(round(row.value) for row in parts if row)].append(gpu)
        for counts, names in gpus_of.items():
            lines.append([dtype, shape.removeprefix("frame-b"), ", ".join(names), *map(str, counts), str(sum(counts))])
    note = "Public shapes, 7 evaluations of Euler's method. Recorded from the fused modules."
    head = ("weights", "max_batch", "GPUs", *FRAME_PARTS, "whole graph")
    return ReportTable("Launches of a whole frame", note, "python -m bench roofline", head, lines)


def cache(figures: Figures) -> ReportTable:
    """Make the table of the bytes of one request's keys and values, by length of the context."""
    lines = [
        [
            shape.removeprefix("context "), figures.value(".1f", 1e-6, bench="frame", metric="bytes", shape=shape),
            figures.value(".3f", bench="frame", metric="of the fewest bytes", shape=shape),
            figures.value(".1f", 1e-6, bench="frame", metric="bytes of spans' parts", shape=shape),
        ]
        for shape in figures.values("shape", bench="frame", subject="keys and values")
    ]  # fmt: skip
    head = ("tokens", "MB from DRAM", "of the fewest", "partial results of spans, MB")
    note = "Public shapes, bf16, 26 layers, counted in the interpreter."
    return ReportTable("Keys and values of one request in a frame", note, "python -m bench frame", head, lines)


def server(figures: Figures) -> ReportTable:
    """Make the table of the cost of the public server's flow head and of ours."""
    lines = []
    for shape in figures.values("shape", bench="server_cost"):
        for row in figures.all(bench="server_cost", metric="launches", shape=shape):
            wanted = {"bench": "server_cost", "subject": row.subject, "provider": row.provider, "shape": shape}
            lines.append([
                shape.removeprefix("frame-b"), row.provider, row.subject.removeprefix("flow head, "),
                f"{row.value:.0f}", figures.value(".3f", 1e-9, **wanted, metric="bytes"),
                figures.value(".3f", 1e-9, **wanted, metric="bytes of weights"),
            ])  # fmt: skip
    head = ("batch", "provider", "path", "launches", "GB from DRAM", "GB of weights")
    note = (
        "The flow head's frame, public shapes, bf16, 7 evaluations; counted, an operator of plain torch as one launch."
    )
    return ReportTable("The public server's flow head and ours", note, "python -m bench server_cost", head, lines)


def claim(figures: Figures) -> ReportTable:
    """Make the table that compares the flow head with a depth transformer."""
    lines = []
    for row in figures.by("subject", "steps", bench="depth", metric="launches"):
        wanted = {"bench": "depth", "subject": row.subject, "steps": row.steps}
        widths = figures.values("shape", **wanted, metric="time")
        lines.append([
            f"{row.subject}, {row.steps.replace(':', ' ')}",
            figures.value(".2f", 1e-9, **wanted, metric="bytes of weights"), f"{row.value:.0f}",
            *(figures.value(".2f", **wanted, metric=f"time on {gpu}") for gpu in ("L4", "H100 SXM", "B200")),
            *(figures.value(".0f", **wanted, metric="time", shape=shape) for shape in widths),
        ])  # fmt: skip
    widths = [
        f"this CPU, ms, width {shape.partition('width ')[2]}"
        for shape in figures.values("shape", bench="depth", metric="time")
    ]
    head = ("one frame, batch 1", "GB of weights", "launches", "L4, ms", "H100, ms", "B200, ms", *widths)
    note = (
        "36 acoustic codes from the same hidden state by heads of equal width and layers. The depth transformer has no "
        "kernels here: its launches are what our backbone's would be. GPU times are " + PREDICTED
    )
    title = "The architecture's claim: a few flow steps, or 36 codes in a row"
    return ReportTable(title, note, "python -m bench depth", head, lines)


def errors(figures: Figures) -> ReportTable:
    """Make the table of the errors of each dtype: codes flipped, and signal-to-noise ratio in dB."""
    lines = []
    for row in figures.by("dtype", "provider", bench="errors", metric="acoustic codes flipped"):
        wanted = {"bench": "errors", "provider": row.provider, "dtype": row.dtype}
        of = {kind: figures.one(**wanted, metric=f"{kind} codes compared") for kind in ("acoustic", "semantic")}
        counts = []
        for metric in ("acoustic codes flipped", *(f"acoustic codes flipped by {n}" for n in LEVELS),
                       "semantic codes flipped"):  # fmt: skip
            found, n = figures.one(**wanted, metric=metric), of[metric.partition(" ")[0]]
            counts.append("-" if found is None or n is None else f"{found.value * n.value / 100:.0f} of {n.value:.0f}")
        lines.append([row.dtype, row.provider, *counts, figures.value(".1f", **wanted, metric="waveform SNR")])
    head = ("dtype", "provider", "acoustic codes flipped", "by 1 level", "by 2", "by more", "semantic", "SNR, dB")
    note = (
        "The demo voice against fp64, histories given; kernels in the interpreter, with tiles larger than a GPU's. "
        "SNR is of the codec's sound from the same codes."
    )
    return ReportTable("What rounding changes", note, "python -m bench errors", head, lines)


def distortion(figures: Figures) -> ReportTable:
    """Make the table of the errors with fewer evaluations: RMSE, and codes that differ."""
    steps = [row.steps for row in figures.all(bench="distortion", metric="codes that differ")]
    counts = sorted({int(one.partition(":")[2]) for one in steps})
    lines = []
    for solver, name in (("euler", "Euler, even times"), ("ab2", "ab2, warped times")):
        cells = [name]
        for n in counts:
            wanted = {"bench": "distortion", "steps": f"{solver}:{n}"}
            rmse = figures.value(".3f", **wanted, metric="RMSE from 256 steps")
            cells.append(f"{rmse}, {figures.value('.1f', **wanted, metric='codes that differ')} %")
        lines.append(cells)
    head = ("solver", *(f"{n} evaluations" for n in counts))
    note = "The demo voice's flow head, from its own states: RMSE of x and codes that differ from 256 steps'."
    return ReportTable("What fewer evaluations cost", note, "python -m bench distortion", head, lines if steps else [])


def recognition(figures: Figures) -> ReportTable:
    """Make the table of the words and strings that a recogniser recognises."""
    most: dict[tuple[str, ...], ResultRow] = {}  # the row with the most words among several runs
    for row in figures.all(bench="recognition", metric="words"):
        of = (row.subject, row.steps, "digits" if "digits" in row.shape else "sentences")
        most[of] = max(most.get(of, row), row, key=lambda one: one.value)
    lines = []
    for said in sorted(most.values(), key=lambda one: ("sentences" in one.shape, one.provider == "torch")):
        wanted = {"bench": "recognition", "subject": said.subject, "shape": said.shape, "steps": said.steps}
        row = next(iter(figures.all(**wanted, metric="words recognised")))
        wanted["provider"] = row.provider
        n_words, n_strings = (figures.value(".0f", **wanted, metric=m) for m in ("words", "strings"))
        lines.append([
            row.subject, row.steps.replace(":", " ") or "-", row.shape, f"{row.value:.1f} % of {n_words}",
            f"{figures.value('.1f', **wanted, metric='strings recognised')} % of {n_strings}",
            figures.value(".1f", **wanted, metric="ended by itself"), figures.value(".2f", **wanted, metric="longest"),
        ])  # fmt: skip
    head = (
        "source of the sound",
        "solver",
        "what was said",
        "words right",
        "strings right",
        "ended, %",
        "longest",
    )
    note = (
        "pocketsphinx, with a grammar of the words that may come. flite is what the voice was trained on. "
        "Longest: the longest generated sound, as a multiple of flite's for the same text."
    )
    return ReportTable("What a recogniser hears of the demo voice", note, "python -m bench recognition", head, lines)


def host(figures: Figures) -> ReportTable:
    """Make the table of the host's work between two frames."""
    lines = [
        [
            row.shape.removeprefix("batch "),
            *(figures.value(".0f", bench="host", metric=name, shape=row.shape) for name in ("operators", "waits")),
            figures.value(".0f", bench="host", metric="replays", shape=row.shape), f"{row.value:.0f}",
        ]
        for row in figures.all(bench="host", metric="time")
    ]  # fmt: skip
    note = "On a stand-in for a GPU, with graphs, on one thread of this CPU. The stand-in's own time is included."
    head = ("requests", "PyTorch operators", "waits", "replays", "us")
    return ReportTable("What the host does for a frame", note, "python -m bench host", head, lines)


def engine(figures: Figures) -> ReportTable:
    """Make the table of the engine's speed and memory with many requests at once."""
    lines = []
    for row in figures.all(bench="engine", metric="frames a second"):
        wanted = {"bench": "engine", "subject": row.subject, "shape": row.shape}
        lines.append([
            row.subject, row.shape.removeprefix("batch "), f"{row.value:.1f}",
            figures.value(".3f", **wanted, metric="first sound under load"),
            figures.value(".0f", **wanted, metric="peak memory"),
            " / ".join(
                figures.value(".2f", **wanted, metric=f"keys and values of {n} tokens") for n in (64, 400, 1000)
            ),
        ])  # fmt: skip
    head = ("model", "requests", "frames a second, all", "first sound beside the others, s", "peak memory, MB",
            "keys and values of 64 / 400 / 1000 tokens, MB a request")  # fmt: skip
    note = "Plain PyTorch on one thread of this CPU, 7 evaluations; 12.5 frames a second are one voice in real time."
    return ReportTable("Many requests at once", note, "python -m bench engine", head, lines)


def served(figures: Figures) -> ReportTable:
    """Make the table of the server's speed with many clients at once."""
    lines, device = [], ""
    for row in figures.all(bench="serve", metric="requests"):
        wanted, device = {"bench": "serve", "subject": row.subject, "shape": row.shape}, row.device
        lines.append([
            row.subject, row.shape.removesuffix(" clients"), f"{row.value:.0f}",
            figures.value(".2f", **wanted, metric="first sound, p50"),
            figures.value(".2f", **wanted, metric="first sound, p95"),
            figures.value(".2f", **wanted, metric="sound"),
            figures.value(".0f", **wanted, metric="failures"), figures.value(".0f", **wanted, metric="bytes lost"),
        ])  # fmt: skip
    head = ("server", "clients", "requests", "first sound, p50, s", "p95, s", "seconds of sound a second", "failures",
            "bytes lost")  # fmt: skip
    note = (
        "The demo voice with 7 evaluations. Each server or replica has 32 slots and one model thread. Clients and "
        f"Ray's own processes share the two processors. {device}."
    )
    return ReportTable("The speech server", note, "python -m bench serve", head, lines)


def micro(figures: Figures) -> ReportTable:
    """Make the table of single operators and modules timed on a CPU."""
    rows = [row for row in figures.on_each_device(bench="micro", metric="time") if on_cpu(row)]
    lines = [[row.subject, row.shape, row.dtype, row.provider, *_spread(row), row.device] for row in rows]
    head = ("operator or module", "shape", "dtype", "provider", "median, us", "20 % to 80 %", "on")
    note = "On a CPU, where only plain PyTorch can be timed: it says nothing about the kernels."
    return ReportTable("Microbenchmarks on a CPU", note, "python -m bench run --quick", head, lines)


def gpu(figures: Figures) -> ReportTable:
    """Make the table of single operators, modules and whole frames timed on GPUs."""
    lines = []
    for metric in ("time", "time, no graph"):
        for row in figures.on_each_device(bench="micro", metric=metric):
            if not on_cpu(row):
                same = {name: getattr(row, name) for name in ("subject", "shape", "dtype", "provider", "device")}
                suffix = metric.removeprefix("time")
                rate = figures.value(".0f", bench="micro", **same, metric=f"bandwidth{suffix}")
                share = figures.value(".0f", bench="micro", **same, metric=f"of the copy roof{suffix}")
                how = "calls" if suffix else "graph"
                lines.append(
                    [row.subject, row.shape, row.dtype, row.provider, how, *_spread(row), rate, share, row.device]
                )
    head = ("operator or module", "shape", "dtype", "provider", "as", "median, us", "20 % to 80 %", "GB/s",
            "% of a copy", "on")  # fmt: skip
    note = "Under a CUDA graph, or call after call where a provider waits for the device. GB/s of the fewest bytes."
    return ReportTable("Microbenchmarks on a GPU", note, "python -m bench run --device cuda", head, lines)


def _spread(row: ResultRow) -> tuple[str, str]:
    return f"{row.value:.4g}", "" if row.low is None else f"{row.low:.4g} to {row.high:.4g}"


def resources(ledger: Sequence[LedgerRow]) -> ReportTable:
    """Make the table of the compiled kernels' registers, spills and shared memory, by architecture."""
    by_arch: dict[str, list[LedgerRow]] = defaultdict(list)
    for row in ledger:
        by_arch[row.arch].append(row)
    lines = [
        [
            arch, str(len(rows)), str(max(row.registers for row in rows)), str(sum(row.spill for row in rows)),
            f"{max(row.shared / row.limit for row in rows):.0%}", str(max(row.binaries for row in rows)),
        ]
        for arch, rows in by_arch.items()
    ]  # fmt: skip
    head = ("architecture", "launches compiled", "most registers a thread", "bytes spilled",
            "most shared memory, of the limit", "binaries a launch")  # fmt: skip
    note = "Compiled ahead of time, not run. Every change of a kernel is compared with bench/ledger.csv."
    return ReportTable("Resources by architecture", note, "python -m bench ledger --check", head, lines)
