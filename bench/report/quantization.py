"""The tables and the picture of what 8-bit weights do to the sound."""

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bench.report.figures import Figures, ReportTable
from voxkern.reference.quantized import FORMATS

COMMAND = "python -m bench quantization"
PROVIDERS = {"torch": "PyTorch", "voxkern": "kernels"}
# scheme -> place of its name beside its point, in points
NAMED = {
    "bf16": (4, 4), "int8": (4, 4), "fp8": (-26, -4), "fp8, by tensor": (6, 2), "int4, groups of 32": (6, -3),
    "int8, backbone": (-30, -12), "int8, flow head": (4, 4),
}  # fmt: skip


def given(figures: Figures) -> ReportTable:
    """Make the table of each scheme's errors with teacher forcing, and of its bytes."""
    lines = []
    for row in figures.by("subject", "provider", bench="quantization", metric="RMSE of latents"):
        wanted = {"bench": "quantization", "subject": row.subject}
        here = wanted | {"provider": row.provider}
        lines.append([
            row.subject, PROVIDERS[row.provider],
            figures.value(".2f", 1e-9, **wanted, metric="bytes of the public model"),
            figures.value(".2f", 1e-9, **wanted, metric="bytes of a frame"),
            figures.value(".2f", **here, metric="acoustic codes flipped"),
            figures.value(".2f", **here, metric="acoustic codes flipped by more than 1 level"),
            figures.value(".2f", **here, metric="semantic codes flipped"),
            figures.value(".4f", **here, metric="RMSE of latents"),
            figures.value(".1f", **here, metric="SNR of the sound"),
        ])  # fmt: skip
    head = (
        "large weights", "run by", "GB of the public model", "GB of its frame", "acoustic codes flipped, %",
        "by more than 1 level, %", "semantic, %", "RMSE of latents", "SNR, dB",
    )  # fmt: skip
    wanted = {"bench": "quantization", "metric": "error in the worst 1 % of rows"}
    worst = [figures.value(".0f", **wanted, subject=name) for name in FORMATS]
    compared = figures.value(".0f", bench="quantization", subject="bf16", metric="acoustic codes compared")
    semantic = figures.value(".0f", bench="quantization", subject="bf16", metric="semantic codes compared")
    note = (
        f"The demo voice against fp64, with teacher forcing: {compared} acoustic and {semantic} semantic codes, 7 "
        "evaluations. GB are counted, for the public model: memory of all weights, and bytes of a frame of one "
        f"request. Kernels run in the interpreter. The worst 1 % of rows have {worst[0]} % of the squared error of "
        f"int8, and {worst[1]} % of that of fp8."
    )
    return ReportTable("Errors of 8-bit weights, with teacher forcing", note, COMMAND, head, lines)


def free(figures: Figures) -> ReportTable:
    """Make the table of the words and lengths of schemes that run free."""
    lines = []
    for row in figures.by("subject", "dtype", "steps", bench="quantization", metric="words recognised"):
        wanted = {"bench": "quantization", "subject": row.subject, "dtype": row.dtype, "steps": row.steps}
        lines.append([
            row.subject, row.dtype, row.steps.replace(":", " "),
            figures.value(".1f", **wanted, metric="words recognised"),
            figures.value(".1f", **wanted, metric="ended by itself"),
            figures.value(".1f", **wanted, metric="texts of another length"),
            figures.value(".3f", **wanted, metric="mean length"),
            figures.value(".2f", **wanted, metric="greatest length"),
        ])  # fmt: skip
    head = (
        "large weights", "computes in", "solver", "words recognised, %", "ended by itself, %",
        "texts of another length, %", "mean length", "greatest length",
    )  # fmt: skip
    words = figures.value(".0f", bench="quantization", subject="bf16", metric="words")
    note = (
        f"The demo voice generates {words} words in 140 texts on its own past. A speech recogniser counts the words. "
        "Lengths are relative to 16-bit weights in fp32 with the same solver. PyTorch, on a CPU."
    )
    return ReportTable("Speech with 8-bit weights", note, COMMAND, head, lines)


def on_cpus(figures: Figures) -> ReportTable:
    """Make the table of the flow head's time on each kind of CPU, with the weights in each format."""
    lines, wanted = [], {"bench": "micro", "subject": "flow_head", "shape": "public-b1", "metric": "time"}
    for with_bf16 in (False, True):
        of_kind = figures.on_cpus(with_bf16)
        for dtype in ("bf16", *FORMATS):
            here = wanted | {"dtype": dtype}
            if torch_row := of_kind.one(**here, provider="torch"):
                packed = of_kind.value(".2f", 1e-6, **here, provider="voxkern-packed", device=torch_row.device)
                lines.append([torch_row.device, dtype, f"{1e-6 * torch_row.value:.2f}", packed])
    note = "Seconds of a frame: flow head of the public sizes, one request, 7 evaluations."
    command = "python -m bench run --op flow_head --shape public-b1 --provider torch voxkern-packed"
    return ReportTable("8-bit weights on a CPU", note, command, ("CPU", "weights", "torch, s", "packed, s"), lines)


def errors_by_bytes(figures: Figures) -> Figure:
    """Draw the RMSE of the latents and the share of codes flipped by each scheme, over the bytes of a frame."""
    plot, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    panels = {"RMSE of latents": "RMSE of the latents", "acoustic codes flipped": "% of acoustic codes flipped"}
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        for name, place in NAMED.items():
            error = figures.one(bench="quantization", subject=name, provider="torch", metric=metric)
            size = figures.one(bench="quantization", subject=name, metric="bytes of a frame")
            if error and size:
                axis.plot(1e-9 * size.value, error.value, "o", color="#4c72b0")
                axis.annotate(name, (1e-9 * size.value, error.value), place, textcoords="offset points", fontsize=8)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("GB that a frame of one request reads, public model")
        axis.set_xlim(2, 13.5)
        axis.set_yscale("log")
        axis.margins(y=0.15)
        axis.grid(alpha=0.3)
    plot.suptitle("The demo voice against fp64, with teacher forcing: error over bytes", fontsize=11)
    return plot
