"""A frame's bytes and multiply-adds, and the floor and prediction of its time, on GPUs that were not available.

``python -m bench roofline`` prints these figures for the public shapes in bf16, batch 1 to 64. No figure comes from a
run on a GPU.

The work is a list of launches, computed from the config's shapes (bench/static/work.py). **The floor** is a time that
no implementation can beat if it reads every weight once an evaluation. The floor is the longer of two times: weights,
keys and values at the data sheet's bandwidth, or multiply-adds at the data sheet's dense bf16 rate. **The prediction**
is the sum over the launches. The time of a launch is the sum of its start, one latency that fills the pipeline, and its
waves. A wave is a set of blocks that run at once, by the ledger's occupancy. A wave takes the longest of three times:

- the wave's bytes, at the share of the bandwidth that streaming reaches,
- the bytes of one block, of which the ledger's bytes in flight arrive in each latency (Little's law),
- the wave's multiply-adds, at the share of the dense rate that thin tiles reach.

The prediction does not include

- activations that blocks read again from L2, and weights that stay in L2 from one evaluation to the next,
- padding rows of tiles, and clocks that fall under load,
- the overlap of one launch's end with the start of the next launch.
"""

import argparse
import functools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.results import FILE, ResultRow, newest
from bench.results import read as read_results
from bench.static.ledger import FILE as LEDGER
from bench.static.ledger import LedgerRow
from bench.static.ledger import read as read_ledger
from bench.static.machines import MACHINES
from bench.static.work import CHUNK, CONTEXT, Work, dram_bytes, frame, launches, total_multiply_adds

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SOLVERS = {"euler:7": 7, "ab2:4": 4}  # evaluations of the velocity
COMMAND = "python -m bench roofline"
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class GPU:
    """One GPU, with the figures of its maker's data sheet.

    Attributes:
        bandwidth: bandwidth of the GPU's memory, bytes/s.
        flops: dense bf16 operations with fp32 sums, 1/s. Some data sheets print twice that number, with sparsity.
        multiprocessors: number of SMs, or of AMD's compute units.
        l2: bytes of the L2 cache, or of AMD's last-level cache.
        arch: the GPU's architecture in the ledger, such as ``sm_90``.
        device: the GPU's name in torch.
    """

    bandwidth: float
    flops: float
    multiprocessors: int
    l2: int
    arch: str
    device: str


GPUS = {
    # NVIDIA L4 data sheet: 300 GB/s, 242 TFLOPS with sparsity; Ada whitepaper (AD104): 58 SMs, 48 MB
    "L4": GPU(0.300e12, 121e12, 58, 48 << 20, "sm_89", "NVIDIA L4"),
    # NVIDIA A100 data sheet, 80GB SXM: 2,039 GB/s, 312 TFLOPS; Ampere whitepaper: 108 SMs, 40 MB
    "A100 80GB": GPU(2.039e12, 312e12, 108, 40 << 20, "sm_80", "NVIDIA A100-SXM4-80GB"),
    # NVIDIA H100 data sheet, SXM: 3.35 TB/s, 1,979 TFLOPS with sparsity; Hopper whitepaper: 132 SMs, 50 MB
    "H100 SXM": GPU(3.35e12, 989.5e12, 132, 50 << 20, "sm_90", "NVIDIA H100 80GB HBM3"),
    # NVIDIA H200 data sheet, SXM: 4.8 TB/s; the other figures are the H100's
    "H200": GPU(4.8e12, 989.5e12, 132, 50 << 20, "sm_90", "NVIDIA H200"),
    # NVIDIA Ada whitepaper, table of the RTX 4090: 1,008 GB/s, 165.2 TFLOPS bf16, 128 SMs, 72 MB
    "RTX 4090": GPU(1.008e12, 165.2e12, 128, 72 << 20, "sm_89", "NVIDIA GeForce RTX 4090"),
    # NVIDIA RTX Blackwell whitepaper, table of the RTX 5090: 1,792 GB/s, 209.5 TFLOPS bf16, 170 SMs, 96 MB
    "RTX 5090": GPU(1.792e12, 209.5e12, 170, 96 << 20, "sm_120", "NVIDIA GeForce RTX 5090"),
    # NVIDIA DGX B200 data sheet, an eighth of it: 64 TB/s, 36 PFLOPS with sparsity; 148 SMs; L2 as CUDA reports it
    "B200": GPU(8.0e12, 2250e12, 148, 126 << 20, "sm_100", "NVIDIA B200"),
    # AMD Instinct MI300X data sheet: 5.3 TB/s, 1,307.4 TFLOPS, 304 CUs, 256 MB of last-level cache
    "MI300X": GPU(5.3e12, 1307.4e12, 304, 256 << 20, "gfx942", "AMD Instinct MI300X"),
}


@dataclass(frozen=True)
class Assumptions:
    """Figures that no data sheet has. They are round numbers known from streaming kernels, not fitted to measurements.

    Attributes:
        latency: seconds of a load from busy memory; about 0.7 us on data-centre GPUs.
        streaming: share of the bandwidth that long copies reach.
        dense: share of the dense rate that tiles of 8 to 64 rows reach.
        launch: seconds from a kernel's end to the start of the next kernel inside a CUDA graph.
    """

    latency: float = 0.7e-6
    streaming: float = 0.9
    dense: float = 0.5
    launch: float = 1.5e-6


USUAL = Assumptions()
OPTIMISTIC, PESSIMISTIC = Assumptions(0.5e-6, 0.95, 0.7, 1e-6), Assumptions(1e-6, 0.8, 0.3, 3e-6)


def floor(work: Sequence[Work], gpu: GPU) -> float:
    """Return the fewest seconds that the launches can take.

    Weights, keys and values come from memory. Of a launch's activations, only the bytes beyond the size of L2 do.
    """
    streamed = sum(one.times * (one.weights + one.cache + max(0, one.moved - gpu.l2)) for one in work)
    return max(streamed / gpu.bandwidth, 2 * total_multiply_adds(work) / gpu.flops)


def predict(work: Iterable[Work], gpu: GPU, assume: Assumptions = USUAL) -> float:
    """Return the predicted seconds of the launches, one after another."""
    return sum(one.times * (assume.launch + assume.latency + _running(one, gpu, assume)) for one in work)


def _running(one: Work, gpu: GPU, assume: Assumptions) -> float:
    row, dram_rate = _binary(one, gpu.arch), gpu.bandwidth * assume.streaming
    flop_rate = gpu.flops * assume.dense / gpu.multiprocessors  # of one multiprocessor, 1/s
    if row is None:
        return max(one.dram / dram_rate, 2 * one.multiply_adds / flop_rate / gpu.multiprocessors)
    shared_by = -(-one.rows // 64) if one.tiled else one.rows  # tiles have up to 64 rows
    blocks, in_flight = _blocks(one, row), _in_flight(row)
    dram, flops_per_block = one.dram / blocks, 2 * one.multiply_adds / blocks
    alone = (one.weights * shared_by + one.cache + one.moved) / blocks / in_flight * assume.latency
    wave_size = row.resident * gpu.multiprocessors
    waves = [wave_size] * (blocks // wave_size) + [blocks % wave_size]
    return sum(
        max(alone, n * dram / dram_rate, math.ceil(n / gpu.multiprocessors) * flops_per_block / flop_rate)
        for n in waves
        if n
    )


def _blocks(one: Work, row: LedgerRow) -> int:
    x, y, z = map(int, row.grid.split("x"))
    if one.tiled:
        return -(-one.rows // 64) * y
    return max(1, x * y * z * one.rows // int(row.case.rpartition("b")[2]))


def _in_flight(row: LedgerRow) -> float:
    """Return the bytes that one block has in flight: those of the weights' stages, but at least 16 for each thread."""
    machine, (x, y, z) = MACHINES[row.arch], map(int, row.grid.split("x"))
    staged = row.in_flight / min(row.resident, x * y * z / machine.multiprocessors)
    return max(staged, 16 * row.warps * machine.warp_size)


def _binary(one: Work, arch: str) -> LedgerRow | None:
    """Return the ledger's row with the launch config of `one`, or None if the ledger does not have the operator.

    Launch configs change at 8, 16 and 32 rows. The flow head has 6 rows a request, so b1, b2 and b4 are cases with 6,
    12 and 24 rows.
    """
    n = one.prepared
    names = ("b1",) if n <= 8 else ("b2", "b1") if n <= 16 else ("b4", "b32") if n <= 32 else ()
    found = (_ledger().get((one.operator, one.case + name, arch, one.launch)) for name in (*names, "b32"))
    return next((row for row in found if row is not None), None)


@functools.cache
def _ledger() -> dict[tuple[str, str, str, int], LedgerRow]:
    rows = read_ledger(LEDGER.read_text())[1]
    return {(r.operator, r.case, r.arch, int(r.launch.partition(":")[0])): r for r in rows if r.dtype == "bf16"}


def rows() -> list[ResultRow]:
    """Return rows with a frame's counts, and with the frame's floor and predicted time on each GPU."""
    found = []
    for steps, evaluations in SOLVERS.items():
        for B in BATCHES:
            parts = frame(B, evaluations)
            whole = [one for work in parts.values() for one in work]
            counts: dict[str, tuple[float, str]] = {
                "bytes": (dram_bytes(whole), "B"),
                "multiply-adds": (total_multiply_adds(whole), "1"),
            }
            counts["launches"] = (launches(whole), "1")
            counts |= {f"launches of the {part}": (launches(work), "1") for part, work in parts.items()}
            for metric, (value, unit) in counts.items():
                found.append(_row("frame", metric, value, unit, "counted", B, steps))
            for name, gpu in GPUS.items():
                timed = {"floor": floor(whole, gpu), "time": predict(whole, gpu)}
                timed |= {f"time of the {part}": predict(work, gpu) for part, work in parts.items()}
                for metric, seconds in timed.items():
                    found.append(_row(name, metric, 1e3 * seconds, "ms", "predicted", B, steps))
    return found


def _row(subject: str, metric: str, value: float, unit: str, how: str, B: int, steps: str) -> ResultRow:
    return ResultRow(
        "roofline", subject, metric, value, unit, how, COMMAND,
        provider="voxkern", shape=f"frame-b{B}", dtype="bf16", steps=steps,
    )  # fmt: skip


def compare_with_measured(measured: Iterable[ResultRow]) -> list[tuple[ResultRow, float, float]]:
    """Find our frames measured on one of :data:`GPUS`, and return each with its floor and predicted time, in ms.

    A measured frame is the newest row with the provider ``voxkern``, the subject ``frame``, the metric ``time``, bf16
    and a shape ``frame-bN``.
    """
    found = []
    for row in newest(row for row in measured if _is_a_frame(row)):
        gpu = next(gpu for gpu in GPUS.values() if gpu.device == row.device)
        parts = frame(int(row.shape.removeprefix("frame-b")), int(row.steps.partition(":")[2]))
        whole = [one for work in parts.values() for one in work]
        found.append((row, 1e3 * floor(whole, gpu), 1e3 * predict(whole, gpu)))
    return found


def _is_a_frame(row: ResultRow) -> bool:
    said = (row.how, row.subject, row.provider, row.metric, row.dtype)
    named = said == ("measured", "frame", "voxkern", "time", "bf16")
    sized = re.fullmatch(r"frame-b\d+", row.shape) and re.fullmatch(r"\w+:\d+", row.steps) and row.unit in SECONDS
    return bool(named and sized and any(gpu.device == row.device for gpu in GPUS.values()))


def main(arguments: Sequence[str]) -> int:
    """Print the work, the predictions and the measured frames."""
    argparse.ArgumentParser(prog="python -m bench roofline", description=__doc__).parse_args(arguments)
    print(f"Public shapes, bf16, {CONTEXT} tokens of context, codec in chunks of {CHUNK} frames.")
    print("PREDICTED, not measured: no figure here comes from a run on a GPU.")
    for steps, evaluations in SOLVERS.items():
        _print_solver(steps, evaluations)
    pairs = compare_with_measured(read_results(FILE.read_text()) if FILE.exists() else [])
    print("\nMeasured frames" if pairs else "\nNo frame measured on one of these GPUs is in the table of results.")
    for row, least, expected in pairs:
        time = row.value * SECONDS[row.unit] * 1e3
        print(
            f"{row.device}  {row.shape}  {row.steps}  measured {time:.2f} ms, floor {least:.2f} ms, "
            f"predicted {expected:.2f} ms, measured / predicted {time / expected:.2f}"
        )
    return 0


def _print_solver(steps: str, evaluations: int) -> None:
    work = {B: [one for part in frame(B, evaluations).values() for one in part] for B in BATCHES}
    print(f"\n{steps:24s}" + "".join(f"{f'batch {B}':>10s}" for B in BATCHES))
    print(f"{'launches':24s}" + "".join(f"{launches(w):10.1f}" for w in work.values()))
    print(f"{'GB':24s}" + "".join(f"{dram_bytes(w) / 1e9:10.2f}" for w in work.values()))
    print(f"{'multiply-adds, G':24s}" + "".join(f"{total_multiply_adds(w) / 1e9:10.1f}" for w in work.values()))
    for name, gpu in GPUS.items():
        print(f"{name + ': floor, ms':24s}" + "".join(f"{1e3 * floor(w, gpu):10.2f}" for w in work.values()))
        for label, assume in (("predicted, ms", USUAL), ("optimistic", OPTIMISTIC), ("pessimistic", PESSIMISTIC)):
            print(f"{'  ' + label:24s}" + "".join(f"{1e3 * predict(w, gpu, assume):10.2f}" for w in work.values()))
