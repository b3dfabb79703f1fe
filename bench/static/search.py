"""Search for the tiles with the shortest predicted time, and compare them with the launch configs.

``python -m bench search`` prints, for each GPU, the predicted time of a frame with the launch configs, and with the
best tiles that the search finds for the products of the flow head and the backbone. A tile counts as valid if its
stages fit into shared memory, and its sums into the registers. Some such tiles do not compile without spills, so the
best time is a lower limit of what other launch configs could reach. Both times ignore the limit of instructions,
because their number is unknown for tiles that were not compiled.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from bench.command_line import parser_of
from bench.static.machines import MACHINES
from bench.static.roofline import GPU, GPUS, USUAL, frame_on, predict, running
from bench.static.work import KernelLaunch, Work

NAMES = ("H100 SXM", "H200", "B200", "A100 80GB", "RTX 4090", "RTX 5090")
ROW_TILES, BLOCK_M, BLOCK_N, BLOCK_K = (1, 2, 3, 4), (8, 16, 32, 64, 128), (16, 32, 64, 128, 256), (32, 64, 128)
STAGES, WARPS, SHARES = range(2, 9), (4, 8), (0, 1, 2)
SUMS = 128  # registers of a thread that may hold sums; the other operands need the rest
OTHER_REGISTERS = 48


def best(one: Work, gpu: GPU) -> float:
    """Return the shortest predicted seconds of a product over all tiles that fit, from its first byte to its end."""
    return min((running(tiled, gpu, USUAL, resident) for tiled, resident in _tilings(one, gpu)), default=float("inf"))


def frame_times(B: int, gpu: GPU) -> tuple[float, float]:
    """Return the predicted seconds of a frame with the launch configs, and with the best tiles of its products."""
    ours, fastest = 0.0, 0.0
    for one in [one for part in frame_on(gpu, B, 7).values() for one in part]:
        time = predict([one], gpu, instructions=False)
        ours += time
        if one.kernel is not None and one.kernel.constant("ROW_TILES", 0) and not one.operator.startswith("codec"):
            time = min(time, one.times * (USUAL.launch + USUAL.latency + best(one, gpu)))
        fastest += time
    return ours, fastest


def _tilings(one: Work, gpu: GPU) -> Iterator[tuple[Work, int]]:
    """Yield the work in other tiles, and how many blocks with them a multiprocessor holds at once."""
    kernel, machine = one.kernel, MACHINES[gpu.arch]
    assert kernel is not None
    products, rows = 2 if one.operator == "norm_swiglu" else 1, one.rows
    for row_tiles, m, n, k, warps in itertools.product(ROW_TILES, BLOCK_M, BLOCK_N, BLOCK_K, WARPS):
        sums = products * row_tiles * m * n // (32 * warps)
        if sums > SUMS or (row_tiles * m >= 2 * rows and m > 8) or k >= 32 * warps:
            continue
        attends = kernel.constant("PAIRS", 0) > 0  # attention after the product needs all tokens of a pair in one tile
        if attends and (row_tiles != kernel.constant("ROW_TILES") or kernel.constant("D") % n):
            continue
        for stages, shares in itertools.product(STAGES, SHARES):
            shared = stages * 2 * k * (products * n + row_tiles * m)
            resident = machine.resident_blocks(warps, sums + OTHER_REGISTERS, shared)
            if shared <= machine.block_shared and resident and (shares or not attends):
                tiles = {"ROW_TILES": row_tiles, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SHARES": shares, "SPLIT": 1}
                yield _tiled(one, kernel, gpu, tiles, warps, stages), resident


def _tiled(one: Work, kernel: KernelLaunch, gpu: GPU, tiles: dict[str, int], warps: int, stages: int) -> Work:
    constants = tuple(sorted({**dict(kernel.constants), **tiles}.items()))
    height = tiles["ROW_TILES"] * tiles["BLOCK_M"]
    row_tiles = -(-one.rows // height)
    shared_by = max(tiles["SHARES"] * gpu.multiprocessors // row_tiles, 1)
    made = KernelLaunch(kernel.kernel, (row_tiles, shared_by, 1), constants, warps, stages)
    if not tiles["SHARES"]:
        made = replace(made, grid=(row_tiles, made.weight_tiles, 1))
    of_a_row = one.padded_multiply_adds / kernel.multiply_adds_factor / kernel.padded_rows
    padded = round(of_a_row * made.padded_rows * made.multiply_adds_factor)
    return replace(one, kernel=made, padded_multiply_adds=padded)


def main(arguments: Sequence[str]) -> int:
    """Print the times at each batch."""
    parser = parser_of("search", __doc__)
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 32], help="numbers of requests")
    options = parser.parse_args(arguments)
    print("PREDICTED, not measured. Milliseconds of a frame, public shapes, bf16, 7 evaluations.")
    for name in NAMES:
        for B in options.batch:
            ours, fastest = (1e3 * seconds for seconds in frame_times(B, GPUS[name]))
            print(f"{name:12s} batch {B:2d}  ours {ours:6.2f}  best found {fastest:6.2f}  {ours / fastest:.3f}")
    return 0
