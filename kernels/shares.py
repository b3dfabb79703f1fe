"""Divide the tiles of a product evenly among blocks, also where there are too few tiles for all multiprocessors.

Usually a block computes one tile of the result. With shares, the steps along K of all tiles are numbered one after the
other, and each of G blocks computes an equal share of them. 3 tiles of 4 steps for 5 blocks a to e::

    tile      0  0  0  0  1  1  1  1  2  2  2  2
    block     a  a  b  b  c  c  c  d  d  e  e  e      block i has the steps  12 i / 5  to  12 (i + 1) / 5

A tile that several blocks share is the sum of their parts. Each of these blocks stores its part, and then adds its
steps to the tile's counter. The block that completes the counter adds up the parts in the order of K, whichever block
that is. So the result does not depend on the order in which blocks run. The result depends on G.

The steps of some tiles may take longer than others. Then each of the first CHEAP_STEPS steps costs 1, and each later
step costs COST. Blocks get equal shares of the total cost. With CHEAP_STEPS = 4 and COST = 2, the total cost of the
tiles above is 4 + 8 * 2 = 20, and the cost of a block is 4::

    tile      0  0  0  0  1  1  1  1  2  2  2  2
    block     a  a  a  a  b  b  c  c  d  d  e  e

This is the "stream-K" of Osama et al., arXiv 2301.03598.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import with_block
from .launch_config import multiprocessors

__all__ = ["Scratch", "Shares", "new_scratch"]

NO_CHEAP_STEPS, EQUAL_COST = tl.constexpr(0), tl.constexpr(1)  # the defaults: every step costs 1


@dataclass(frozen=True)
class Scratch:
    """Memory that launches with shares need, and may use one after the other.

    Attributes:
        parts: fp32 [n], the parts of tiles that blocks share.
        arrived: int32 [m], the steps of each tile that are stored in `parts`. Zero before and after every launch.
    """

    parts: Tensor
    arrived: Tensor


@triton.jit
def _first_step(i_block, TOTAL: tl.constexpr, CHEAP_STEPS: tl.constexpr, COST: tl.constexpr):
    """Return the first of TOTAL steps that block `i_block` computes, or TOTAL if `i_block` is the number of blocks."""
    cost_before = (TOTAL + (TOTAL - CHEAP_STEPS) * (COST - 1)) * i_block // tl.num_programs(1)
    if COST == 1:
        return cost_before
    return tl.where(cost_before < CHEAP_STEPS, cost_before, CHEAP_STEPS + (cost_before - CHEAP_STEPS) // COST)


@triton.jit
def block_of_step(step, TOTAL: tl.constexpr, CHEAP_STEPS: tl.constexpr, COST: tl.constexpr):
    """Return the block that computes a step: the last block with a first step of at most `step`."""
    cost = step + 1  # of all steps up to this one
    if COST > 1:
        cost += tl.maximum(cost - CHEAP_STEPS, 0) * (COST - 1)
    return (cost * tl.num_programs(1) - 1) // (TOTAL + (TOTAL - CHEAP_STEPS) * (COST - 1))


@triton.jit
def share_of_block(
    TOTAL: tl.constexpr, CHEAP_STEPS: tl.constexpr = NO_CHEAP_STEPS, COST: tl.constexpr = EQUAL_COST
):  # fmt: skip
    """Return the first of TOTAL steps that this block computes, and the step after its last.

    Each of the first CHEAP_STEPS steps costs 1, and each later step costs COST.
    """
    i_block = tl.program_id(1)
    return _first_step(i_block, TOTAL, CHEAP_STEPS, COST), _first_step(i_block + 1, TOTAL, CHEAP_STEPS, COST)


@triton.jit
def _part(p_parts, i_block, is_first, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Return where block `i_block` stores its part of a tile.

    A block stores at most two parts: one that begins with its tile's first step (`is_first`), and one that does not.
    """
    i_row_tile, n_blocks = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    return p_parts + ((i_row_tile * n_blocks + i_block) * 2 + tl.where(is_first, 1, 0)) * (COUNT * SIZE)


@triton.jit
def _offsets(b_v):
    """Return the offsets of the elements of an array with two dimensions, row by row."""
    ROWS: tl.constexpr = b_v.shape[0]
    COLUMNS: tl.constexpr = b_v.shape[1]
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def add_parts(
    blocks, p_parts, p_arrived, i_tile, first, end,
    TILES: tl.constexpr, STEPS: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr,
    CHEAP_STEPS: tl.constexpr = NO_CHEAP_STEPS, COST: tl.constexpr = EQUAL_COST,
):  # fmt: skip
    """Complete a tile, if this block has all its steps or is the last block to add its part.

    Args:
        blocks: fp32 arrays with two dimensions, this block's sums over the steps `first` to `end` of the tile.
        p_parts: memory for the parts, see :class:`Scratch`.
        p_arrived: counters of the tiles' steps.
        i_tile: the tile.
        first: the first step of this block's part, 0..STEPS - 1.
        end: the step after the part's last.
        TILES: number of tiles.
        STEPS: number of steps of a tile.
        COUNT: the largest number of arrays in `blocks`, over all tiles of the launch.
        SIZE: the most elements of one array.
        CHEAP_STEPS: number of steps that cost 1, see :func:`share_of_block`.
        COST: the cost of each later step.

    Returns:
        The arrays and a bool. If it is true, the arrays are the sums over all steps; if false, they have no meaning.
    """
    is_whole = end - first == STEPS
    p_counter = p_arrived + tl.program_id(0) * TILES + i_tile
    arrived = end - first
    if not is_whole:
        p_part = _part(p_parts, tl.program_id(1), first == 0, COUNT, SIZE)
        for i in tl.static_range(len(blocks)):
            tl.store(p_part + i * SIZE + _offsets(blocks[i]), blocks[i])
        tl.debug_barrier()  # the stores of all threads must come before the atomic add, which one thread does
        arrived += tl.atomic_add(p_counter, end - first, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
    start = i_tile * STEPS
    is_last = (arrived == STEPS) & (end - first < STEPS)
    # the blocks that have the tile's first step and its last; for a whole tile, no part is read
    i_first = block_of_step(start, TILES * STEPS, CHEAP_STEPS, COST)
    i_end = tl.where(is_last, block_of_step(start + STEPS - 1, TILES * STEPS, CHEAP_STEPS, COST) + 1, i_first)
    sums = ()
    for i in tl.static_range(len(blocks)):
        sums = with_block(sums, tl.where(is_whole, blocks[i], 0.0))
    for j in range(i_first, i_end):
        p_part = _part(p_parts, j, _first_step(j, TILES * STEPS, CHEAP_STEPS, COST) <= start, COUNT, SIZE)
        added = ()
        for i in tl.static_range(len(blocks)):
            # .cg bypasses the L1 cache, which may hold values from before the stores of other multiprocessors
            added = with_block(added, sums[i] + tl.load(p_part + i * SIZE + _offsets(blocks[i]), cache_modifier=".cg"))
        sums = added
    if is_last:
        tl.store(p_counter, 0)  # the next launch counts from zero
    return sums, is_whole | is_last


@dataclass(frozen=True)
class Shares:
    """Holds how a launch divides the tiles of its product among blocks.

    Attributes:
        blocks: blocks for each tile of rows, or 0 if each block computes one tile.
        row_tiles: tiles of the rows that the launch is prepared for.
        floats: number of fp32 elements that the parts take in scratch memory.
        counters: number of int32 counters. Each tile has one. In norm_qkv_attention, each key head of each tile of rows
            has one too.
    """

    blocks: int
    row_tiles: int
    floats: int
    counters: int

    @classmethod
    def of(
        cls, constants: Mapping[str, int], max_rows: int, tiles: int, count: int, cheap_tiles: int = 0, cost: int = 1
    ) -> "Shares":
        """Return the division of a launch.

        Args:
            constants: the launch config, and K. SHARES are blocks per multiprocessor, or 0 for one tile in each block.
            max_rows: the rows that the launch is prepared for.
            tiles: tiles of the weight's rows.
            count: the largest number of arrays in one part of a tile.
            cheap_tiles: number of tiles, from the first on, with steps that cost 1.
            cost: the cost of each step of the other tiles.
        """
        if not constants["SHARES"]:
            return cls(0, 0, 0, 0)
        row_tiles = triton.cdiv(max_rows, constants["BLOCK_M"] * constants["ROW_TILES"])
        # A share costs at least `cost`, so each block has a step. A block without steps would store a part, and add 0
        # to the tile's counter. Another block could then read the part before it is stored.
        total_cost = (tiles + (tiles - cheap_tiles) * (cost - 1)) * triton.cdiv(constants["K"], constants["BLOCK_K"])
        blocks = min(max(constants["SHARES"] * multiprocessors() // row_tiles, 1), total_cost // cost)
        size = count * constants["BLOCK_M"] * constants["BLOCK_N"]
        return cls(blocks, row_tiles, row_tiles * blocks * 2 * size, row_tiles * tiles)

    def grid(self, constants: Mapping[str, int], rows: int, tiles: int) -> tuple[int, int]:
        """Return the grid of a launch with `rows` rows of activations.

        Raises:
            ValueError: there are more rows than the launch is prepared for.
        """
        row_tiles = triton.cdiv(rows, constants["BLOCK_M"] * constants["ROW_TILES"])
        if self.blocks and row_tiles > self.row_tiles:
            raise ValueError(f"a launch has {rows} rows, but is prepared for {self.row_tiles} tiles of rows")
        return row_tiles, self.blocks or tiles

    def scratch(self, given: Scratch | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the memory for parts and for counters: `given`, or new memory on the device of `like` if that is None.

        Raises:
            ValueError: `given` is too small.
        """
        if not self.blocks:
            return None, None
        scratch = new_scratch(like, [self]) if given is None else given
        if scratch.parts.numel() < self.floats or scratch.arrived.numel() < self.counters:
            raise ValueError(
                f"scratch has {scratch.parts.numel()} numbers and {scratch.arrived.numel()} counters "
                f"but must have {self.floats} and {self.counters}"
            )
        return scratch.parts, scratch.arrived


def new_scratch(like: Tensor, launches: Sequence[Shares]) -> Scratch:
    """Allocate memory that is enough for each of `launches`, on the device of `like`."""
    floats, counters = max(one.floats for one in launches), max(one.counters for one in launches)
    return Scratch(like.new_empty(floats, dtype=torch.float32), like.new_zeros(counters, dtype=torch.int32))
