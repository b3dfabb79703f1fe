"""The table and the plot of packed weights on a CPU, from the rows of ``python -m bench cpu``."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from bench.report.figures import Figures, ReportTable

THREADS = ("1 thread", "2 threads")
INSTRUCTIONS = {False: "without bf16 instructions", True: "with bf16 instructions"}
BATCHES = ("public-b1", "public-b4", "public-b16")
# what is timed -> subject, shapes, metric, and the factor from the row's unit to the table's
TIMED = {
    "flow head": ("flow_head", BATCHES, "time", 1e-6),
    "whole frame": ("frame", ("frame-b1",), "time", 1e-6),
    "demo voice": ("demo_voice", ("one text",), "real-time factor", 1.0),
}
NAMES = {
    "vllm-omni": "vLLM-Omni's module", "torch": "PyTorch", "torch.compile": "torch.compile",
    "voxkern-packed": "packed weights",
}  # fmt: skip
COLOURS = {"vllm-omni": "#8c8c8c", "torch": "#4c72b0", "torch.compile": "#55a868", "voxkern-packed": "#dd8452"}


def on_a_cpu(figures: Figures, with_bf16: bool) -> ReportTable:
    """Make the table of the flow head, a whole frame and the demo voice on a CPU, with 1 and 2 threads.

    `with_bf16` is whether the CPU has instructions for bf16.
    """
    figures = figures.on_cpus(with_bf16)
    lines, device = [], ""
    for what, (subject, shapes, metric, factor) in TIMED.items():
        for shape in shapes:
            for provider, name in NAMES.items():
                wanted = {"bench": "cpu", "subject": subject, "shape": shape, "provider": provider}
                rows = [figures.one(**wanted, metric=f"{metric}, {n}") for n in THREADS]
                if None in rows:
                    continue
                device = rows[0].device if rows[0] else device
                times = [f"{factor * row.value:.3g}" for row in rows if row]
                rates = [figures.value(".1f", **wanted, metric=f"weights read, {n}") for n in THREADS]
                requests = shape.rpartition("-b")[2] if "-b" in shape else "1"
                lines.append([what, requests, name, *times, " / ".join(rates)])
    copies = " and ".join(figures.value(".1f", bench="cpu", subject="copy", metric=f"bandwidth, {n}") for n in THREADS)
    note = (
        "The table gives seconds per frame (80 ms of sound) of the public sizes, in bf16 with 7 evaluations. For the "
        "demo voice, it gives seconds of work per second of sound. All implementations run in turn. The weights read "
        "count the velocity network once per evaluation, and each other weight that a frame needs once. A "
        f"large copy reads and writes {copies} GB a second with 1 and 2 threads. {device.partition(',')[0]}."
    )
    head = (
        "what",
        "requests",
        "implementation",
        "1 thread, s",
        "2 threads, s",
        "GB of weights a second, 1 / 2 threads",
    )
    title = f"Packed weights on a CPU {INSTRUCTIONS[with_bf16]}"
    command = "python -m bench cpu --threads 1; python -m bench cpu --threads 2"
    return ReportTable(title, note, command, head, lines)


def head_times(figures: Figures) -> Figure:
    """Draw the seconds of the public flow head at each batch size, by implementation."""
    panels = [(n, with_bf16) for with_bf16 in (False, True) for n in THREADS]
    plot, axes = plt.subplots(1, len(panels), figsize=(14, 3.4), layout="constrained", sharey=True)
    for axis, (n, with_bf16) in zip(axes, panels, strict=True):
        of_kind = figures.on_cpus(with_bf16)
        for i, (provider, name) in enumerate(NAMES.items()):
            rows = [
                of_kind.one(bench="cpu", subject="flow_head", shape=shape, provider=provider, metric=f"time, {n}")
                for shape in BATCHES
            ]
            at = [j + 0.2 * i - 0.3 for j, row in enumerate(rows) if row]
            axis.bar(at, [1e-6 * row.value for row in rows if row], 0.2, color=COLOURS[provider], label=name)
        axis.set_xticks(np.arange(len(BATCHES)), [shape.rpartition("-b")[2] for shape in BATCHES])
        axis.set_xlabel("requests")
        axis.set_yscale("log")
        axis.set_title(f"{n}, {INSTRUCTIONS[with_bf16]}", fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("seconds a frame (80 ms)")
    axes[0].legend(fontsize=8)
    plot.suptitle("The public flow head on a CPU, bf16, 7 evaluations: MEASURED", fontsize=11)
    return plot
