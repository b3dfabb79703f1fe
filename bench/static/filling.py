"""How well each launch of a frame fills a GPU, by the model of bench/static/roofline.py.

``python -m bench filling`` prints a line for each GPU and each launch with many weights, for 32 requests at the public
shapes. A line has

- how often the launch runs in a frame,
- its blocks, the multiprocessors that are busy, and the bytes in flight on each of them,
- three times: of its bytes from memory, of its bytes through L2, and of its multiply-adds,
- its predicted time divided by its bound.
"""

from collections.abc import Iterator, Sequence

from bench.command_line import parser_of
from bench.results import ResultRow
from bench.static.roofline import GPU, GPUS, USUAL, binary, bound, frame_on, in_flight, l2_bytes, parts_bytes, predict
from bench.static.work import Work

NAMES = ("H100 SXM", "H200", "B200", "A100 80GB", "RTX 4090", "RTX 5090", "MI300X", "MI355X")
BATCH, EVALUATIONS = 32, 7
LEAST_WEIGHTS = 8 << 20  # bytes of weights of the launches in the table
COMMAND = "python -m bench filling"
# metric -> unit and format; each metric is a column
METRICS = {
    "launches": ("1", ".0f"), "blocks": ("1", ".0f"), "multiprocessors": ("1", ".0f"), "in flight": ("B", ".0f"),
    "DRAM": ("us", ".1f"), "L2": ("us", ".1f"), "products": ("us", ".1f"), "over the bound": ("1", ".2f"),
}  # fmt: skip


def name_of(one: Work) -> str:
    """Return a launch's operator with the weight's sizes and the rows of activations."""
    assert one.kernel is not None
    N, K = one.kernel.constant("N"), one.kernel.constant("K")
    return f"{one.operator} {N} x {K}, {one.rows} rows"


def figures(one: Work, gpu: GPU) -> dict[str, float]:
    """Return the values of METRICS for a launch."""
    kernel = one.kernel
    assert kernel is not None
    row = binary(kernel, gpu.arch)
    assert row is not None
    busy = min(kernel.blocks, gpu.multiprocessors)
    at_once = min(row.resident, kernel.blocks / gpu.multiprocessors) if kernel.blocks > gpu.multiprocessors else 1
    return {
        "launches": one.times,
        "blocks": kernel.blocks,
        "multiprocessors": busy,
        "in flight": in_flight(one, gpu.arch) * at_once,
        "DRAM": 1e6 * (one.dram + parts_bytes(one)) / (gpu.bandwidth * USUAL.streaming),
        "L2": 1e6 * l2_bytes(one) / gpu.l2_bandwidth,
        "products": 1e6 * 2 * one.padded_multiply_adds / (gpu.flops * USUAL.dense),
        "over the bound": predict([one], gpu) / bound([one], gpu),
    }


def table() -> Iterator[tuple[str, str, dict[str, float]]]:
    """Yield the GPU, the launch, and its values, for each line of the table."""
    for name in NAMES:
        parts = frame_on(GPUS[name], BATCH, EVALUATIONS)
        works = [one for part in ("flow head", "backbone") for one in parts[part] if one.weights >= LEAST_WEIGHTS]
        merged: dict[tuple[object, ...], tuple[str, dict[str, float]]] = {}
        for one in works:
            values = figures(one, GPUS[name])
            times = values.pop("launches")
            key = (name_of(one), *values.values())
            known = merged.get(key, ("", {"launches": 0.0}))[1]["launches"]
            merged[key] = name_of(one), {"launches": known + times} | values
        for launch, values in merged.values():
            yield name, launch, values


def rows() -> list[ResultRow]:
    """Return a row for each value of the table. Launches of one name that differ in other bytes are numbered."""
    found: dict[tuple[str, str], ResultRow] = {}
    for gpu, launch, values in table():
        same = sum(1 for name, metric in found if name == gpu and metric.startswith(f"{launch}") and "blocks" in metric)
        label = launch if not same else f"{launch} ({same + 1})"
        for metric, value in values.items():
            row = ResultRow(
                "filling", gpu, f"{label}: {metric}", value, METRICS[metric][0], "predicted", COMMAND,
                provider="voxkern", shape=f"frame-b{BATCH}", dtype="bf16", steps=f"euler:{EVALUATIONS}",
            )  # fmt: skip
            found[gpu, row.metric] = row
    return list(found.values())


def heading(metric: str) -> str:
    """Return the heading of a metric's column, with its unit if it has one."""
    unit, _ = METRICS[metric]
    return metric if unit == "1" else f"{metric}, {unit}"


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    parser_of("filling", __doc__).parse_args(arguments)
    print("PREDICTED, not measured. Bytes in flight are those of one multiprocessor.")
    print(f"{'GPU':12s}{'launch':40s}" + "".join(f"{heading(metric):>16s}" for metric in METRICS))
    for gpu, launch, values in table():
        cells = "".join(f"{values[metric]:16{form}}" for metric, (_, form) in METRICS.items())
        print(f"{gpu:12s}{launch:40s}{cells}")
    return 0
