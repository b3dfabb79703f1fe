"""The pictures of the report, the README and docs/figures.md, drawn from the committed rows and the ledger."""

import io
from collections.abc import Sequence

import matplotlib as mpl

mpl.use("Agg")  # draws without a display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from bench.report.figures import Figures
from bench.static.ledger import LedgerRow
from bench.static.roofline import GPUS, SECONDS, compare_with_measured

PARTS = {"the backbone": "#4c72b0", "the flow head": "#dd8452", "the codec": "#55a868"}
COLOURS = {"euler": "#4c72b0", "ab2": "#dd8452"}
NAMES = {"euler": "Euler, even times", "ab2": "ab2, warped times"}


def frame_times(figures: Figures) -> Figure:
    """Draw the predicted milliseconds of a frame's parts on each GPU, the frame's floor, and measured times if any."""
    gpus, stars = figures.values("subject", bench="roofline", metric="floor"), compare_with_measured(figures.rows)
    plot, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axis, shape in zip(axes, ("frame-b1", "frame-b32"), strict=True):
        wanted = {"bench": "roofline", "shape": shape, "steps": "euler:7", "dtype": "bf16"}
        left = np.zeros(len(gpus))
        for part, colour in PARTS.items():
            width = np.array([_value(figures, **wanted, subject=gpu, metric=f"time of {part}") for gpu in gpus])
            axis.barh(gpus, width, left=left, color=colour, label=f"predicted: {part.removeprefix('the ')}")
            left += width
        floors = [_value(figures, **wanted, subject=gpu, metric="floor") for gpu in gpus]
        axis.plot(floors, gpus, "k|", markersize=16, markeredgewidth=2, label="floor: bytes at the data sheet's rate")
        for row, *_ in stars:
            if row.shape == shape:
                name = next(name for name, gpu in GPUS.items() if gpu.device == row.device)
                axis.plot(1e3 * SECONDS[row.unit] * row.value, name, "r*", markersize=11, label="measured")
        axis.set_title(f"batch {shape.removeprefix('frame-b')}")
        axis.set_xlabel("ms a frame of 80 ms (bf16, 7 evaluations)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=8, loc="lower right")
    known = "stars are measured" if stars else "not measured on a GPU"
    plot.suptitle(f"A frame's time, PREDICTED from bytes, launches and the ledger; {known}", fontsize=11)
    return plot


def error_by_steps(figures: Figures) -> Figure:
    """Draw errors by number of evaluations: distance from a fine solution, and codes that differ."""
    plot, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    metrics = {"RMSE from 256 steps": "RMSE of x", "codes that differ": "% of codes that differ"}
    for axis, (metric, label) in zip(axes, metrics.items(), strict=True):
        axis.set_title(label, fontsize=10)
        rows = figures.by("steps", bench="distortion", metric=metric)
        for solver, colour in COLOURS.items():
            points = {int(row.steps.partition(":")[2]): row.value for row in rows if row.steps.startswith(solver)}
            x, y = np.array(sorted(points.items())).reshape(-1, 2).T
            axis.plot(x, y, "o-", color=colour, label=NAMES[solver])
        axis.set_xlabel("evaluations of the velocity")
        axis.set_xticks((2, 4, 7, 10, 16))
        axis.grid(alpha=0.3)
        if axis is axes[0] and len(x):  # x is empty before the first run, and a logarithmic axis needs a point
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    plot.suptitle("The demo voice: what fewer evaluations cost", fontsize=11)
    return plot


def resources(ledger: Sequence[LedgerRow]) -> Figure:
    """Draw the registers and the shared memory of every compiled launch, by architecture."""
    archs = list(dict.fromkeys(row.arch for row in ledger))
    plot, axes = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
    jitter = np.random.default_rng(0)
    for i, arch in enumerate(archs):
        rows = [row for row in ledger if row.arch == arch]
        x = i + jitter.uniform(-0.25, 0.25, len(rows))
        axes[0].plot(x, [row.registers for row in rows], ".", markersize=4, alpha=0.6)
        axes[1].plot(x, [100 * row.shared / row.limit for row in rows], ".", markersize=4, alpha=0.6)
    axes[0].axhline(255, color="k", linewidth=0.8, linestyle=":")
    axes[0].set_title("registers a thread (dotted: NVIDIA's most)", fontsize=10)
    axes[1].axhline(100, color="k", linewidth=0.8, linestyle=":")
    axes[1].set_title("shared memory, % of what a block may have", fontsize=10)
    for axis in axes:
        axis.set_xticks(range(len(archs)), archs, rotation=30)
        axis.grid(axis="y", alpha=0.3)
    n_spill = sum(row.spill > 0 for row in ledger)
    plot.suptitle(f"{len(ledger)} launches compiled ahead of time, {n_spill} of them spill registers", fontsize=11)
    return plot


def claim(figures: Figures) -> Figure:
    """Draw the weights, launches and measured time of a depth transformer and of the flow head."""
    rows = figures.by("subject", "steps", bench="depth", metric="launches")
    names = [f"{row.subject}\n{row.steps.replace(':', ' ')}" for row in rows]
    shapes = figures.values("shape", bench="depth", metric="time")[-1:]
    panels = [
        ("bytes of weights", 1e-9, "GB of weights a frame (counted)", ""),
        ("launches", 1, "launches (counted)", ""),
    ]
    panels += [("time", 1, f"ms on this CPU (measured, {shape.partition(' ')[2]})", shape) for shape in shapes]
    plot, axes = plt.subplots(1, len(panels), figsize=(11, 2.8), layout="constrained", sharey=True)
    for axis, (metric, scale, title, shape) in zip(axes, panels, strict=True):
        wanted = {"shape": shape} if shape else {}
        values = [
            _value(figures, bench="depth", metric=metric, subject=r.subject, steps=r.steps, **wanted) for r in rows
        ]
        colours = ["#c44e52" if "depth" in name else "#dd8452" for name in names]
        axis.barh(names, [scale * value for value in values], color=colours)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    plot.suptitle("36 codes in a row, or a few flow steps: one frame at equal width and layers, batch 1", fontsize=11)
    return plot


def spoken(samples: np.ndarray, rate: int, text: str) -> Figure:
    """Draw the waveform and the spectrogram of a sound, fp32 [n] at `rate` Hz, under the title `text`."""
    plot, (wave, spectrum) = plt.subplots(
        2, 1, figsize=(11, 3.6), layout="constrained", sharex=True, height_ratios=(1, 2)
    )
    wave.plot(np.arange(len(samples)) / rate, samples, linewidth=0.4)
    wave.set_ylim(-1, 1)
    wave.set_title(text, fontsize=10)
    spectrum.specgram(samples + 1e-6, NFFT=512, Fs=rate, noverlap=384, cmap="magma", vmin=-130)
    spectrum.set_ylim(0, 8000)
    spectrum.set_ylabel("Hz")
    spectrum.set_xlabel("seconds")
    return plot


def png(plot: Figure) -> bytes:
    """Return a picture as a PNG file's bytes, and close the picture."""
    file = io.BytesIO()
    plot.savefig(file, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(plot)
    return file.getvalue()


def _value(figures: Figures, **wanted: str) -> float:
    row = figures.one(**wanted)
    return 0.0 if row is None else row.value
