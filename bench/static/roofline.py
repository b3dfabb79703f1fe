"""A frame's bytes and multiply-adds, and the floor and prediction of its time, on GPUs that were not available.

``python -m bench roofline`` prints these figures for the public shapes in bf16, batch 1 to 64. With int8 weights, batch
1, 8 and 32 are printed for seven evaluations. No figure comes from a run on a GPU.

The work is a list of launches, computed from the config's shapes (bench/static/work.py). **The floor** is a lower
bound for these launches if their weights come from memory. The floor is the longer of two times. One is that of the
launches' weights, keys and values at the data sheet's bandwidth. The other is that of their multiply-adds at the data
sheet's dense bf16 rate. **The prediction** is the sum over the launches. The time of a launch is the sum of its start,
one latency that fills the pipeline, its waves, and the attention after a product in ``norm_qkv_attention``. A wave is a
set of blocks that run at once, by the ledger's occupancy. A wave takes the longest of five times:

- the wave's bytes from memory, at the share of the bandwidth that streaming reaches,
- the wave's bytes through L2, where tiles of rows read the weights again, and tiles of columns the activations,
- the bytes of one block, of which the ledger's bytes in flight arrive in each latency (Little's law),
- the wave's multiply-adds with the padding of tiles, at the share of the dense rate that thin tiles reach (see
  ``Work.padded_multiply_adds``),
- the wave's instructions; a multiprocessor issues four a clock, or one on AMD GPUs. The ledger counts the instructions
  of each step of a product, which include the widening of 8-bit weights.

**The bound** of a launch is what the best division into blocks could reach under these assumptions: its start, one
latency, and the longer of its bytes from memory and its multiply-adds, both spread evenly over the whole GPU.

The prediction does not include

- weights that stay in L2 from one evaluation to the next, and activations that do not,
- clocks that fall under load.

On GPUs on which launches can overlap (voxkern/kernels/overlap.py), a second prediction assumes 0.4 us between two
kernels instead of 1.5 us. With the latency of the first load, this is 1.1 us instead of 2.2 us.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.command_line import parser_of
from bench.results import FILE, ResultRow, newest
from bench.results import read as read_results
from bench.static.ledger import FILE as LEDGER
from bench.static.ledger import LedgerRow
from bench.static.ledger import read as read_ledger
from bench.static.machines import MACHINES
from bench.static.work import (
    CHUNK,
    CONTEXT,
    KernelLaunch,
    Work,
    dram_bytes,
    entry_of,
    frame,
    launches,
    total_multiply_adds,
)
from voxkern.compile_only import OVERLAPPING
from voxkern.reference.quantized import FORMATS

BATCHES = (1, 2, 4, 8, 16, 32, 64)
QUANTIZED_BATCHES = (1, 8, 32)  # batches for which a frame with int8 weights is also predicted
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
        l2_bandwidth: bytes/s from L2, measured or scaled from another GPU. For AMD GPUs, bytes/s from the last-level
            cache by the MI300X's data sheet.
        clock: clocks a second, those with which the data sheet computes `flops`.
        arch: the GPU's architecture in the ledger, such as ``sm_90``.
        device: the GPU's name in torch.
    """

    bandwidth: float
    flops: float
    multiprocessors: int
    l2: int
    l2_bandwidth: float
    clock: float
    arch: str
    device: str


# Bytes/s from L2 for each multiprocessor: an H200 with 132 reaches 9.7e12, an L40 with 142 reaches 5.2e12. These two
# and the A100's 5.4e12 are from the folder gpu-l2-cache of github.com/te42kyfo/gpu-benches, at 20 to 30 MB. The H100
# has the chip of the H200. No measurement was found for an L4, an RTX 5090 and a B200.
L2_HOPPER, L2_ADA = 9.7e12 / 132, 5.2e12 / 142
GPUS = {
    # NVIDIA L4 data sheet: 300 GB/s, 242 TFLOPS with sparsity; Ada whitepaper (AD104): 58 SMs, 48 MB
    "L4": GPU(0.300e12, 121e12, 58, 48 << 20, L2_ADA * 58, 2.04e9, "sm_89", "NVIDIA L4"),
    # NVIDIA A100 data sheet, 80GB SXM: 2,039 GB/s, 312 TFLOPS; Ampere whitepaper: 108 SMs, 40 MB
    "A100 80GB": GPU(2.039e12, 312e12, 108, 40 << 20, 5.4e12, 1.41e9, "sm_80", "NVIDIA A100-SXM4-80GB"),
    # NVIDIA H100 data sheet, SXM: 3.35 TB/s, 1,979 TFLOPS with sparsity; Hopper whitepaper: 132 SMs, 50 MB
    "H100 SXM": GPU(3.35e12, 989.5e12, 132, 50 << 20, 9.7e12, 1.83e9, "sm_90", "NVIDIA H100 80GB HBM3"),
    # NVIDIA H200 data sheet, SXM: 4.8 TB/s; the other figures are the H100's
    "H200": GPU(4.8e12, 989.5e12, 132, 50 << 20, 9.7e12, 1.83e9, "sm_90", "NVIDIA H200"),
    # NVIDIA Ada whitepaper, table of the RTX 4090: 1,008 GB/s, 165.2 TFLOPS bf16, 128 SMs, 72 MB; L2 at 4,903 GB/s:
    # analysis_RTX4090.md of github.com/smallscientist1/cuda_microbenchmark
    "RTX 4090": GPU(1.008e12, 165.2e12, 128, 72 << 20, 4.9e12, 2.52e9, "sm_89", "NVIDIA GeForce RTX 4090"),
    # NVIDIA RTX Blackwell whitepaper, table of the RTX 5090: 1,792 GB/s, 209.5 TFLOPS bf16, 170 SMs, 96 MB
    "RTX 5090": GPU(1.792e12, 209.5e12, 170, 96 << 20, L2_ADA * 170, 2.41e9, "sm_120", "NVIDIA GeForce RTX 5090"),
    # NVIDIA DGX B200 data sheet, an eighth of it: 64 TB/s, 36 PFLOPS with sparsity; 148 SMs; L2 as CUDA reports it
    "B200": GPU(8.0e12, 2250e12, 148, 126 << 20, L2_HOPPER * 148, 1.86e9, "sm_100", "NVIDIA B200"),
    # AMD Instinct MI300X data sheet: 5.3 TB/s, 1,307.4 TFLOPS, 304 CUs, 256 MB of last-level cache at 17.2 TB/s
    "MI300X": GPU(5.3e12, 1307.4e12, 304, 256 << 20, 17.2e12, 2.1e9, "gfx942", "AMD Instinct MI300X"),
    # AMD Instinct MI355X data sheet: 8 TB/s, 2,516.6 TFLOPS bf16, 256 CUs, 256 MB of last-level cache. No bandwidth of
    # that cache was found; it is taken to be the MI300X's.
    "MI355X": GPU(8.0e12, 2516.6e12, 256, 256 << 20, 17.2e12, 2.4e9, "gfx950", "AMD Instinct MI355X"),
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
OVERLAPPED = Assumptions(launch=0.4e-6)  # with the latency 1.1 us, half of the usual 2.2 us
OPTIMISTIC, PESSIMISTIC = Assumptions(0.5e-6, 0.95, 0.7, 1e-6), Assumptions(1e-6, 0.8, 0.3, 3e-6)


def frame_on(gpu: GPU, B: int, evaluations: int, format_: str | None = None) -> dict[str, list[Work]]:
    """Return the launches of each part of a frame, with the launch configs of `gpu`; `format_` is that of weights."""
    return frame(B, evaluations, arch=gpu.arch, multiprocessors=gpu.multiprocessors, format_=format_)


def floor(work: Sequence[Work], gpu: GPU) -> float:
    """Return the fewest seconds that the launches can take.

    Weights, keys and values come from memory. Of a launch's activations, only the bytes beyond the size of L2 do.
    """
    streamed = sum(one.times * (one.weights + one.cache + max(0, one.moved - gpu.l2)) for one in work)
    return max(streamed / gpu.bandwidth, 2 * total_multiply_adds(work) / gpu.flops)


def bound(work: Iterable[Work], gpu: GPU, assume: Assumptions = USUAL) -> float:
    """Return the seconds of the launches if each kept the whole GPU busy, see the file's docstring."""
    return sum(one.times * (assume.launch + assume.latency + _evenly(one, gpu, assume)) for one in work)


def predict(work: Iterable[Work], gpu: GPU, assume: Assumptions = USUAL, instructions: bool = True) -> float:
    """Return the predicted seconds of the launches, one after another.

    `instructions` is whether their instructions limit the time.
    """
    return sum(one.times * (assume.launch + assume.latency + _running(one, gpu, assume, instructions)) for one in work)


def _evenly(one: Work, gpu: GPU, assume: Assumptions) -> float:
    return max(one.dram / (gpu.bandwidth * assume.streaming), 2 * one.multiply_adds / (gpu.flops * assume.dense))


def _running(one: Work, gpu: GPU, assume: Assumptions, instructions: bool) -> float:
    row = one.kernel and binary(one.kernel, gpu.arch)
    if row is None:
        return _evenly(one, gpu, assume)
    return running(one, gpu, assume, row.resident, row.step if instructions else 0)


def running(one: Work, gpu: GPU, assume: Assumptions, resident: int, step: int = 0) -> float:
    """Return the seconds from a launch's first latency to its end.

    Args:
        one: the launch.
        gpu: the GPU.
        assume: figures that no data sheet has.
        resident: blocks that a multiprocessor holds at once.
        step: instructions of a warp in one step, or 0 if they are not known.
    """
    kernel = one.kernel
    assert kernel is not None
    flop_rate = gpu.flops * assume.dense / gpu.multiprocessors  # of one multiprocessor, 1/s
    blocks, row_tiles = kernel.blocks, kernel.grid[0]  # all kernels have tiles of rows, or requests, along x
    flops = 2 * one.padded_multiply_adds / blocks
    weights = one.weights * row_tiles * kernel.step_imbalance / blocks  # bytes, of the block with the most steps
    alone = (weights + (one.cache + one.moved) / blocks) / in_flight(one, gpu.arch) * assume.latency
    alone += (kernel.pieces[0] - 1) * assume.latency  # the pipeline fills again for each tile
    issue_rate = MACHINES[gpu.arch].issue_rate * gpu.clock
    instructions = kernel.warps * step * weights / max(stage_bytes(one), 1)  # of the same block
    alone = max(alone, instructions / min(kernel.warps / 4, 1) / issue_rate)  # a warp runs on one of four units
    # what all blocks take together, in proportion to their number
    dram = one.dram + parts_bytes(one)  # parts are written to memory, but read while they are still in L2
    shared = max(dram / (gpu.bandwidth * assume.streaming), l2_bytes(one) / gpu.l2_bandwidth) / blocks
    wave_size = resident * gpu.multiprocessors
    waves = [wave_size] * (blocks // wave_size) + [blocks % wave_size]
    last = attention_after_product(one, gpu, assume)
    return last + sum(
        max(alone, n * shared, math.ceil(n / gpu.multiprocessors) * max(flops / flop_rate, instructions / issue_rate))
        for n in waves
        if n
    )


def attention_after_product(one: Work, gpu: GPU, assume: Assumptions) -> float:
    """Return the seconds of attention that the last block of each key head computes, see norm_qkv_attention.py.

    These blocks run at once. A block waits one latency for its counter, and one for each group of steps with loads in
    flight together. The block's bytes move at a multiprocessor's share of the bandwidth of L2.
    """
    kernel = one.kernel
    assert kernel is not None
    pairs, tile = kernel.constant("PAIRS", 0), kernel.constant("BLOCK_M")
    if not pairs:
        return 0.0
    G = kernel.constant("N") // kernel.constant("N_KV")
    # rows of D columns for each pair: queries are read and results written; three keys and values are read
    rows = 2 * kernel.constant("N_TOKENS") * G + 6
    bytes_moved = 2 * tile * rows * kernel.constant("D")
    waits = 1 + -(-tile // (max(kernel.constant("PAIR_STAGES") - 1, 1) * pairs))
    return waits * assume.latency + bytes_moved / (gpu.l2_bandwidth / gpu.multiprocessors)


def l2_bytes(one: Work) -> int:
    """Return the bytes that a launch reads and writes through L2.

    Each tile of rows reads the weights, and each tile of columns its activations. Parts of tiles that blocks share are
    written and read.
    """
    kernel = one.kernel
    assert kernel is not None
    again = one.columns_read * (kernel.column_tiles - 1) if one.multiply_adds else 0
    return one.weights * kernel.grid[0] + one.cache + one.moved + again + 2 * parts_bytes(one)


def parts_bytes(one: Work) -> int:
    """Return the bytes of the parts of tiles that blocks share: fp32 numbers, each written once."""
    kernel = one.kernel
    assert kernel is not None
    products = 2 if one.operator == "norm_swiglu" else 1
    tile = products * kernel.constant("ROW_TILES") * kernel.constant("BLOCK_M") * kernel.constant("BLOCK_N")
    return 4 * tile * kernel.pieces[1]


def in_flight(one: Work, arch: str) -> float:
    """Return the bytes that one block has in flight: those of its stages, at least 16 for each thread.

    A kernel with n stages has n - 1 stages in flight, or fewer if shared memory holds fewer. A kernel with one stage
    has that stage in flight.
    """
    kernel = one.kernel
    assert kernel is not None
    stage = stage_bytes(one)
    row, ahead = binary(kernel, arch), max((kernel.stages or 1) - 1, 1) * stage
    if row and row.stages > 1:
        ahead = min(ahead, max(row.shared, stage))
    return max(ahead, 16 * MACHINES[arch].warp_size * kernel.warps)


def stage_bytes(one: Work) -> int:
    """Return the bytes of weights that a block loads in one step of its product."""
    assert one.kernel is not None
    elements = entry_of(one.operator.removeprefix("codec ")).stage(dict(one.kernel.constants))
    return elements * (2 if one.kernel.format is None else 1)


@functools.cache
def binary(kernel: KernelLaunch, arch: str) -> LedgerRow | None:
    """Return the ledger's row with the kernel's sizes and tiles, or one with the same tiles, or None."""
    wanted = {name: str(value) for name, value in kernel.constants}
    for names in (sorted(wanted), _tiles(wanted)):
        key = kernel.format or "bf16", kernel.kernel, arch, kernel.warps, kernel.stages
        found = _ledger().get((*key, *((n, wanted[n]) for n in names)))
        if found is not None:
            return found
    return None


def _tiles(constants: Iterable[str]) -> list[str]:
    """Return the names that are those of tiles, not of the model's sizes."""
    return sorted(name for name in constants if name.startswith("BLOCK_") or name in ("SPLIT", "SHARES", "ROW_TILES"))


@functools.cache
def _ledger() -> dict[tuple[object, ...], LedgerRow]:
    found: dict[tuple[object, ...], LedgerRow] = {}
    for row in read_ledger(LEDGER.read_text())[1]:
        if row.dtype in ("bf16", *FORMATS):
            constants = dict(one.split("=") for one in row.constants.split())
            kernel = row.dtype, row.launch.partition(":")[2], row.arch, row.warps
            for names, stages in itertools.product((sorted(constants), _tiles(constants)), (row.stages, None)):
                found.setdefault((*kernel, stages, *((name, constants[name]) for name in names)), row)
    return found


def rows() -> list[ResultRow]:
    """Return rows with a frame's counts, and with the frame's floor and predicted time on each GPU."""
    found = []
    for steps, B in itertools.product(SOLVERS, BATCHES):
        found += _rows(steps, B, None)
    for B in QUANTIZED_BATCHES:
        found += _rows("euler:7", B, "int8")
    return found


def _rows(steps: str, B: int, format_: str | None) -> list[ResultRow]:
    def row(subject: str, metric: str, value: float, unit: str, how: str) -> ResultRow:
        return ResultRow(
            "roofline", subject, metric, value, unit, how, COMMAND,
            provider="voxkern", shape=f"frame-b{B}", dtype=format_ or "bf16", steps=steps,
        )  # fmt: skip

    whole = _whole(frame(B, SOLVERS[steps], format_=format_))
    counts: dict[str, tuple[float, str]] = {
        "bytes": (dram_bytes(whole), "B"),
        "multiply-adds": (total_multiply_adds(whole), "1"),
        "launches": (launches(whole), "1"),
    }
    found = [row("frame", metric, value, unit, "counted") for metric, (value, unit) in counts.items()]
    for name, gpu in GPUS.items():
        parts = frame_on(gpu, B, SOLVERS[steps], format_)
        whole = _whole(parts)
        timed = {"floor": floor(whole, gpu), "bound": bound(whole, gpu), "time": predict(whole, gpu)}
        timed |= {f"time of the {part}": predict(work, gpu) for part, work in parts.items()}
        if gpu.arch in OVERLAPPING:
            timed["time with overlap"] = predict(whole, gpu, OVERLAPPED)
        found += [row(name, metric, 1e3 * seconds, "ms", "predicted") for metric, seconds in timed.items()]
        found += [row(name, f"launches of the {part}", launches(work), "1", "counted") for part, work in parts.items()]
    return found


def compare_with_measured(measured: Iterable[ResultRow]) -> list[tuple[ResultRow, float, float]]:
    """Find our frames measured on one of :data:`GPUS`, and return each with its floor and predicted time, in ms.

    A measured frame is the newest row with the provider ``voxkern``, the subject ``frame``, the metric ``time``, bf16
    and a shape ``frame-bN``.
    """
    found = []
    for row in newest(row for row in measured if _is_a_frame(row)):
        gpu = next(gpu for gpu in GPUS.values() if gpu.device == row.device)
        B, evaluations = int(row.shape.removeprefix("frame-b")), int(row.steps.partition(":")[2])
        whole = _whole(frame_on(gpu, B, evaluations))
        found.append((row, 1e3 * floor(whole, gpu), 1e3 * predict(whole, gpu)))
    return found


def _is_a_frame(row: ResultRow) -> bool:
    said = (row.how, row.subject, row.provider, row.metric, row.dtype)
    named = said == ("measured", "frame", "voxkern", "time", "bf16")
    sized = re.fullmatch(r"frame-b\d+", row.shape) and re.fullmatch(r"\w+:\d+", row.steps) and row.unit in SECONDS
    return bool(named and sized and any(gpu.device == row.device for gpu in GPUS.values()))


def main(arguments: Sequence[str]) -> int:
    """Print the work, the predictions and the measured frames."""
    parser_of("roofline", __doc__).parse_args(arguments)
    print(f"Public shapes, bf16 activations, {CONTEXT} tokens of context, codec in chunks of {CHUNK} frames.")
    print("PREDICTED, not measured: no figure here comes from a run on a GPU.")
    for steps in SOLVERS:
        _print_frames(steps, BATCHES, None)
    _print_frames("euler:7", QUANTIZED_BATCHES, "int8")
    pairs = compare_with_measured(read_results(FILE.read_text()) if FILE.exists() else [])
    print("\nMeasured frames" if pairs else "\nNo frame measured on one of these GPUs is in the table of results.")
    for row, least, expected in pairs:
        time = row.value * SECONDS[row.unit] * 1e3
        print(
            f"{row.device}  {row.shape}  {row.steps}  measured {time:.2f} ms, floor {least:.2f} ms, "
            f"predicted {expected:.2f} ms, measured / predicted {time / expected:.2f}"
        )
    return 0


def _print_frames(steps: str, batches: Sequence[int], format_: str | None) -> None:
    evaluations = SOLVERS[steps]
    work = {B: _whole(frame(B, evaluations, format_=format_)) for B in batches}
    print(f"\n{steps + ', ' + (format_ or 'bf16'):24s}" + "".join(f"{f'batch {B}':>10s}" for B in batches))
    print(f"{'launches':24s}" + "".join(f"{launches(w):10.1f}" for w in work.values()))
    print(f"{'GB':24s}" + "".join(f"{dram_bytes(w) / 1e9:10.2f}" for w in work.values()))
    print(f"{'multiply-adds, G':24s}" + "".join(f"{total_multiply_adds(w) / 1e9:10.1f}" for w in work.values()))
    for name, gpu in GPUS.items():
        work = {B: _whole(frame_on(gpu, B, evaluations, format_)) for B in batches}
        print(f"{name + ': floor, ms':24s}" + "".join(f"{1e3 * floor(w, gpu):10.2f}" for w in work.values()))
        print(f"{'  bound, ms':24s}" + "".join(f"{1e3 * bound(w, gpu):10.2f}" for w in work.values()))
        sets = {"predicted, ms": USUAL, "optimistic": OPTIMISTIC, "pessimistic": PESSIMISTIC}
        if gpu.arch in OVERLAPPING:
            sets["with overlap"] = OVERLAPPED
        for label, assume in sets.items():
            print(f"{'  ' + label:24s}" + "".join(f"{1e3 * predict(w, gpu, assume):10.2f}" for w in work.values()))


def _whole(parts: Mapping[str, Sequence[Work]]) -> list[Work]:
    return [one for work in parts.values() for one in work]
