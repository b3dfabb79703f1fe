"""Tests of launches that divide the tiles of a product evenly among blocks."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from checks import GuardedMemory, assert_accurate, assert_bands, assert_no_races, guarded
from plant import case_of, entry_of
from torch import Tensor

from bench.ops.registry import ROOT, TensorMaker
from bench.static.work import pieces_of_shares
from voxkern.kernels.launch_config import override, target_arch
from voxkern.kernels.linear import launch_linear, linear, linear_shares
from voxkern.kernels.norm_linear import launch_norm_swiglu, norm_swiglu_shares
from voxkern.kernels.qkv import launch_norm_qkv, norm_qkv_shares
from voxkern.kernels.shares import Scratch, Shares, block_of_step, new_scratch, share_of_block

TABLES = ("linear", "norm_linear", "norm_swiglu")
M, N, K = 37, 75, 150  # with tiles of 16 rows, 32 weights and 32 columns: 1 tile of 3 x 16 rows, 3 tiles, 5 steps each


@contextmanager
def divided(blocks: int, row_tiles: int = 3) -> Iterator[None]:
    """Divide each tile of `row_tiles` x 16 rows among so many blocks."""
    with ExitStack() as stack:
        stack.enter_context(target_arch("interpreter", blocks))
        for table in TABLES:
            values = {"SHARES": 1, "ROW_TILES": row_tiles, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
            stack.enter_context(override(table, **values | ({"SPLIT": 1} if table == "linear" else {})))
        yield


def run(blocks: int, rows: int = M, row_tiles: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of the three operators with shares, for the first `rows` of M rows."""
    make = TensorMaker(torch.bfloat16)
    x, w, up, norm = make(M, K)[:rows], make(N, K, std=K**-0.5), make(N, K, std=K**-0.5), make(K, mean=1.0, std=0.1)
    wk, residual = make(40, K, std=K**-0.5), make(M, N)[:rows]
    with divided(blocks, row_tiles):
        shares = [linear_shares(w, x.dtype, M), norm_swiglu_shares(w, x.dtype, M), norm_qkv_shares(w, wk, x.dtype, M)]
        made = new_scratch(x, shares)
        scratch = Scratch(guarded(made.parts), guarded(made.arrived))
        y, gated, qkv = (guarded(x.new_empty(rows, n)) for n in (N, N, N + 80))
        with GuardedMemory():
            for _ in range(2):  # the second launch finds the counters as the first one left them
                launch_linear(y, x, w, None, None, residual, M, scratch=scratch)
                launch_norm_swiglu(gated, x, norm, w, up, 1e-5, M, scratch=scratch)
                launch_norm_qkv(qkv, x, norm, w, wk, wk, 1e-5, rows, M, scratch=scratch)
    for tensor in (scratch.parts, scratch.arrived, y, gated, qkv):
        assert_bands(tensor)
    assert scratch.arrived.eq(0).all()
    return y, gated, qkv


def expected() -> tuple[Tensor, Tensor, Tensor]:
    make = TensorMaker(torch.bfloat16)
    x, w, up, norm, wk, residual = (
        part.double()
        for part in (
            make(M, K), make(N, K, std=K**-0.5), make(N, K, std=K**-0.5), make(K, mean=1.0, std=0.1),
            make(40, K, std=K**-0.5), make(M, N),
        )
    )  # fmt: skip
    n = x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt() * norm
    gated = F.silu(n @ w.T) * (n @ up.T)
    return residual + x @ w.T, gated, torch.cat((n @ w.T, n @ wk.T, n @ wk.T), 1)


@pytest.mark.interpreter("the number of blocks is set, and the interpreter's tiles")
@pytest.mark.parametrize(
    ("blocks", "row_tiles"),
    [
        (1, 3),  # one block computes all tiles
        (2, 3),  # a block ends within a tile
        (3, 3),  # whole tiles
        (4, 3),
        (7, 3),  # most tiles are shared by three blocks or more
        (15, 3),  # one step each
        (40, 3),  # more multiprocessors than steps
        (7, 1),  # three tiles of rows, each divided among two blocks
        (24, 1),  # each divided among eight blocks
    ],
)  # fmt: skip
def test_any_number_of_blocks_gives_the_right_result(blocks: int, row_tiles: int) -> None:
    for found, right in zip(run(blocks, row_tiles=row_tiles), expected(), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.interpreter("the number of blocks is set, and the interpreter's tiles")
@pytest.mark.parametrize("row_tiles", [1, 3])
def test_a_rows_bits_do_not_depend_on_the_number_of_rows(row_tiles: int) -> None:
    for few, many in zip(run(7, 17, row_tiles), run(7, M, row_tiles), strict=True):
        assert torch.equal(few, many[:17])


@triton.jit
def record_kernel(p_bounds, p_owners, TOTAL: tl.constexpr, CHEAP_STEPS: tl.constexpr, COST: tl.constexpr):
    start, stop = share_of_block(TOTAL, CHEAP_STEPS, COST)
    tl.store(p_bounds + 2 * tl.program_id(1), start)
    tl.store(p_bounds + 2 * tl.program_id(1) + 1, stop)
    for step in range(start, stop):
        tl.store(p_owners + step, block_of_step(step, TOTAL, CHEAP_STEPS, COST))


def shares_of(
    blocks: int, total: int, cheap_steps: int, cost: int, device: torch.device
) -> tuple[list[list[int]], Tensor]:
    """Return each block's first step and end, and the block that `block_of_step` gives for each step."""
    bounds = torch.full((blocks, 2), -1, dtype=torch.int32, device=device)
    owners = torch.full((total,), -1, dtype=torch.int32, device=device)
    record_kernel[(1, blocks)](bounds, owners, TOTAL=total, CHEAP_STEPS=cheap_steps, COST=cost)
    return bounds.tolist(), owners


def test_steps_of_unequal_cost_by_hand(device: torch.device) -> None:
    """The example in shares.py: 4 steps cost 1 and 8 steps cost 2, so each of 5 blocks has a cost of 4."""
    bounds, owners = shares_of(5, 12, 4, 2, device)
    assert bounds == [[0, 4], [4, 6], [6, 8], [8, 10], [10, 12]]
    assert owners.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("total", "cheap_steps", "cost"),
    [(1, 0, 1), (12, 0, 1), (12, 4, 2), (13, 5, 3), (30, 29, 3), (30, 0, 3), (17, 17, 2)],
)
def test_every_step_has_one_block(total: int, cheap_steps: int, cost: int, device: torch.device) -> None:
    """Shares are contiguous and not empty. Each share's cost differs from the mean by less than 2 * cost."""
    total_cost = total + (total - cheap_steps) * (cost - 1)
    for blocks in range(1, total_cost // cost + 1):
        bounds, owners = shares_of(blocks, total, cheap_steps, cost, device)
        assert [start for start, _ in bounds] + [total] == [0] + [stop for _, stop in bounds]
        for i, (start, stop) in enumerate(bounds):
            assert start < stop
            assert owners[start:stop].eq(i).all()
            mine = sum(1 if step < cheap_steps else cost for step in range(start, stop))
            assert abs(mine - total_cost / blocks) < 2 * cost


@pytest.mark.parametrize(("n_tiles", "steps", "cheap_tiles", "cost"), [(3, 4, 0, 1), (3, 4, 1, 2), (12, 6, 8, 3)])
def test_the_model_divides_tiles_as_the_kernels_do(
    n_tiles: int, steps: int, cheap_tiles: int, cost: int, device: torch.device
) -> None:
    for blocks in (1, 2, 3, 5, 7):
        bounds, _ = shares_of(blocks, n_tiles * steps, cheap_tiles * steps, cost, device)
        shares = [[step // steps for step in range(start, stop)] for start, stop in bounds]  # the tile of each step
        most = max(len(set(share)) for share in shares)
        parts = sum(0 < share.count(tile) < steps for share in shares for tile in range(n_tiles))
        assert pieces_of_shares(blocks, n_tiles, steps, cheap_tiles, cost) == (most, parts)


@pytest.mark.interpreter("the number of blocks is set")
def test_sizes_by_hand() -> None:
    """100 rows are 3 tiles of 48 rows. Each is divided among a third of the 50 blocks of 25 multiprocessors."""
    constants = {"SHARES": 2, "ROW_TILES": 3, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "K": 150}
    with target_arch("sm_90", 25):
        shares = Shares.of(constants, 100, 7, 5)
        assert Shares.of(constants | {"K": 60}, 100, 7, 5).blocks == 14  # 2 steps of each of 7 tiles
        # 2 steps of each of 4 tiles cost 1, and of each of 3 tiles 3: the total is 26, and 26 // 3 = 8
        assert Shares.of(constants | {"K": 60}, 100, 7, 5, cheap_tiles=4, cost=3).blocks == 8
    assert shares == Shares(blocks=16, row_tiles=3, floats=3 * 16 * 2 * 5 * 16 * 32, counters=21)
    assert shares.grid(constants, 49, 7) == (2, 16)
    with pytest.raises(ValueError, match="has 145 rows, but is prepared for 3 tiles"):
        shares.grid(constants, 145, 7)
    none = Shares.of(constants | {"SHARES": 0}, 100, 7, 5)
    assert none.grid(constants, 145, 7) == (4, 7)
    assert none.scratch(None, torch.empty(1)) == (None, None)


@pytest.mark.interpreter("the number of blocks is set, and the interpreter's tiles")
@pytest.mark.parametrize("small", ["parts", "arrived"])
def test_scratch_that_is_too_small_is_refused(small: str) -> None:
    x, w = torch.ones(M, K).bfloat16(), torch.ones(N, K).bfloat16()
    with divided(7):
        scratch = new_scratch(x, [linear_shares(w, x.dtype, M)])
        sizes: dict[str, Any] = {"parts": scratch.parts, "arrived": scratch.arrived}
        sizes[small] = sizes[small][1:]
        with pytest.raises(ValueError, match=r"scratch has .* but must have"):
            launch_linear(x.new_empty(M, N), x, w, None, None, None, M, scratch=Scratch(**sizes))


def test_nothing_is_left_over_from_an_earlier_call(device: torch.device) -> None:
    x, w = (tensor.to(device) for tensor in (torch.randn(70, 150).bfloat16(), torch.randn(75, 150).bfloat16()))
    assert torch.equal(linear(x, w, None, None, None, 100), linear(x, w, None, None, None, 100))


def check_linear() -> None:
    entry = entry_of("linear")
    assert_no_races(entry, case_of(entry, "odd-residual"))
    assert_accurate(entry, case_of(entry, "odd-residual"), "fp32")


@pytest.mark.interpreter("accesses of each block are recorded")
def test_the_kernel_as_it_is_passes_the_checks() -> None:
    check_linear()


@pytest.mark.interpreter("accesses of each block are recorded")
def test_no_blocks_race_with_more_multiprocessors_than_steps() -> None:
    """A block without steps would add 0 to a tile's counter, so its part could be read before it is stored."""
    entry = entry_of("norm_qkv_attention")
    with target_arch("sm_90", 132):
        assert_no_races(entry, case_of(entry, "odd-last"))


@pytest.mark.interpreter("accesses of each block are recorded")
@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("(arrived == STEPS) &", "(arrived == end - first) &"), id="the first block does not wait"),
        pytest.param(('sem="acq_rel"', 'sem="relaxed"'), id="the atomic orders nothing"),
        pytest.param(("tl.debug_barrier()  # the stores", "pass  # the stores"), id="no barrier before the atomic"),
        pytest.param(("* 2 + tl.where(is_first, 1, 0)", "* 1"), id="one place for both of a block's parts"),
    ],
)
def test_a_planted_fault_is_caught(edit: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "kernels" / "shares.py").read_text()
    assert source.count(edit[0]) == 1
    file = tmp_path / "planted_shares.py"
    file.write_text(source.replace(*edit))
    spec = importlib.util.spec_from_file_location("voxkern.kernels.planted_shares", file)
    assert spec is not None
    assert spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, planted)
    spec.loader.exec_module(planted)
    monkeypatch.setattr(importlib.import_module("voxkern.kernels.linear"), "add_parts", planted.add_parts)
    with pytest.raises((RuntimeError, AssertionError)):
        check_linear()
