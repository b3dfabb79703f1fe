"""Tests of bench/static/races.py and watch.py on small kernels; test_faults.py plants faults in voxkern's kernels."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.static.races import Order, assert_decided, backward, forward, ordered_launches, shuffled

pytestmark = pytest.mark.interpreter("the accesses of each block are recorded")


@triton.jit
def _tiles_kernel(p_y, step, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    tl.store(p_y + i * step + tl.arange(0, BLOCK), i)


@triton.jit
def _neighbour_kernel(p_x, p_y):
    i = tl.program_id(0)
    tl.store(p_y + i, tl.load(p_x + i + 1))
    tl.store(p_x + i, 0)


@triton.jit
def _sum_kernel(p_x, p_y):
    tl.atomic_add(p_y, tl.load(p_x + tl.program_id(0)))


@triton.jit
def _last_block_kernel(p_x, p_arrived, p_y, SEM: tl.constexpr, BARRIERS: tl.constexpr):
    i, n = tl.program_id(0), tl.num_programs(0)
    tl.store(p_x + i, i)
    if BARRIERS:
        tl.debug_barrier()
    arrived = tl.atomic_add(p_arrived, 1, sem=SEM)
    if arrived == n - 1:
        if BARRIERS:
            tl.debug_barrier()
        b_sum = 0
        for j in range(0, n):
            b_sum += tl.load(p_x + j)
        tl.store(p_y, b_sum)
        tl.store(p_arrived, 0)


@triton.jit
def _chain_kernel(p_x, p_links, STEP: tl.constexpr):
    i = tl.program_id(0)
    tl.store(p_x + i, i)
    tl.debug_barrier()
    tl.atomic_add(p_links + STEP * i, 1)
    tl.atomic_add(p_links + STEP * i + 1, 1)
    tl.debug_barrier()
    tl.load(p_x)


@triton.jit
def _turns_kernel(p_turn, p_x):
    tl.atomic_add(p_turn, 1)
    tl.debug_barrier()
    tl.store(p_x, tl.program_id(0))
    tl.debug_barrier()
    tl.atomic_add(p_turn, 1)


@triton.jit
def _rows_kernel(p_x, p_y, stride, COLUMNS: tl.constexpr):
    o_m, o_n = tl.arange(0, 4), tl.arange(0, COLUMNS)
    tl.store(p_y + o_m, tl.sum(tl.load(p_x + o_m[:, None] * stride + o_n[None, :]), 1))


@triton.jit
def _halves_kernel(p_y):
    tl.store(p_y + tl.arange(0, 8) // 2, 1)


@triton.jit
def _bytes_kernel(p_x, p_y):
    tl.store(p_y, tl.load(p_x.to(tl.pointer_type(tl.int8)) + 1))


@triton.jit
def _reads_kernel(p_x, READ: tl.constexpr):
    if READ:
        tl.load(p_x)


@triton.jit
def _copy_kernel(p_x, p_y):
    i = tl.program_id(0)
    tl.store(p_y + i, tl.load(p_x + i) + 1)


def at(kernel: Any, text: str) -> str:
    """Return FILE:LINE of the only line of `kernel` with this text."""
    lines, first = inspect.getsourcelines(kernel.fn)
    (line,) = (i for i, source in enumerate(lines, first) if text in source)
    return f"tests/test_races.py:{line}"


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def run_in_orders(launch: Callable[[], object], ordered_by: tuple[str, ...] = ()) -> None:
    runs = []
    for order in (forward, backward, shuffled):
        with ordered_launches(order, ordered_by) as launches:
            launch()
        runs.append(launches)
    assert_decided(runs)


def race(launch: Callable[[], object], order: Order = forward, ordered_by: tuple[str, ...] = ()) -> str:
    with pytest.raises(RuntimeError) as error, ordered_launches(order, ordered_by):
        launch()
    return str(error.value)


def test_tiles_that_overlap_are_named_with_their_blocks_element_and_line() -> None:
    store = at(_tiles_kernel, "tl.store")
    run_in_orders(lambda: _tiles_kernel[(3,)](zeros(12), 4, 4))
    assert race(lambda: _tiles_kernel[(3,)](zeros(12), 3, 4)) == (
        f"_tiles_kernel: block (0, 0, 0) writes p_y[3] at {store}, block (1, 0, 0) writes it at {store}, and no "
        "declared atomic orders them"
    )


def test_a_read_before_the_write_of_another_block_is_a_race_and_so_is_a_read_after_it() -> None:
    load, store = at(_neighbour_kernel, "tl.load"), at(_neighbour_kernel, "p_x + i, 0")
    message = (
        "_neighbour_kernel: block (0, 0, 0) {} at {}, block (1, 0, 0) {} it at {}, and no declared atomic orders them"
    )

    def launch() -> None:
        _neighbour_kernel[(2,)](zeros(3), zeros(2))

    assert race(launch) == message.format("reads p_x[1]", load, "writes", store)
    swapped = message.replace("(0,", "(2,").replace("(1,", "(0,").replace("(2,", "(1,")
    assert race(launch, backward) == swapped.format("writes p_x[1]", store, "reads", load)


def test_an_atomic_is_a_race_unless_it_is_declared() -> None:
    update = at(_sum_kernel, "tl.atomic_add")
    assert race(lambda: _sum_kernel[(2,)](zeros(2), zeros(1))) == (
        f"_sum_kernel: block (0, 0, 0) updates p_y[0] at {update}, block (1, 0, 0) updates it at {update}, and no "
        "declared atomic orders them"
    )
    run_in_orders(lambda: _sum_kernel[(2,)](zeros(2), zeros(1)), ("p_y",))


def test_a_last_block_that_waits_reads_what_the_others_wrote() -> None:
    y = zeros(1)
    run_in_orders(lambda: _last_block_kernel[(5,)](zeros(5), zeros(1), y, "acq_rel", True), ("p_arrived",))
    assert y.item() == 10


@pytest.mark.parametrize(
    ("sem", "barriers", "declared"),
    [
        ("relaxed", True, ("p_arrived",)),
        ("acquire", True, ("p_arrived",)),
        ("release", True, ("p_arrived",)),
        ("acq_rel", False, ("p_arrived",)),
        ("acq_rel", True, ()),
        ("acq_rel", True, ("p_x",)),
    ],
)
def test_an_atomic_without_order_barriers_or_declaration_orders_nothing(
    sem: str, barriers: bool, declared: tuple[str, ...]
) -> None:
    message = race(lambda: _last_block_kernel[(3,)](zeros(3), zeros(1), zeros(1), sem, barriers), ordered_by=declared)
    assert message.endswith("and no declared atomic orders them")
    assert ("updates p_arrived[0]" if "p_arrived" not in declared else "writes p_x[0]") in message


def test_order_passes_through_a_chain_of_blocks() -> None:
    with ordered_launches(forward, ("p_links",)):
        _chain_kernel[(3,)](zeros(3), zeros(4), 1)
    load = at(_chain_kernel, "tl.load")
    message = race(lambda: _chain_kernel[(3,)](zeros(3), zeros(6), 2), ordered_by=("p_links",))
    assert message.startswith("_chain_kernel: block (0, 0, 0) writes p_x[0] at ")
    assert f"block (1, 0, 0) reads it at {load}" in message


def test_blocks_that_take_turns_in_any_order_are_found_by_comparing_two_orders() -> None:
    store = at(_turns_kernel, "tl.store")
    for order in (forward, backward):
        with ordered_launches(order, ("p_turn",)):
            _turns_kernel[(2,)](zeros(1), zeros(1))
    with pytest.raises(RuntimeError) as error:
        run_in_orders(lambda: _turns_kernel[(2,)](zeros(1), zeros(1)), ("p_turn",))
    assert str(error.value) == (
        f"_turns_kernel: the access of block (0, 0, 0) at {store} comes before or after that of block (1, 0, 0) at "
        f"{store}, and no result of an atomic decides which"
    )


def test_a_launch_that_writes_nothing_has_no_races() -> None:
    run_in_orders(lambda: _reads_kernel[(3,)](zeros(3), True))
    run_in_orders(lambda: _reads_kernel[(3,)](zeros(3), False))


def test_two_launches_are_ordered_by_the_stream() -> None:
    def launch() -> None:
        x, y = zeros(3), zeros(3)
        _copy_kernel[(3,)](x, y)
        _copy_kernel[(3,)](y, x)
        assert x.tolist() == [2, 2, 2]

    run_in_orders(launch)


def test_lanes_of_one_store_that_share_an_element_are_found() -> None:
    store = at(_halves_kernel, "tl.store")
    message = f"_halves_kernel: lanes of one store in block (0, 0, 0) share p_y[0], at {store}"
    with pytest.raises(Exception, match=re.escape(message)), ordered_launches():
        _halves_kernel[(1,)](zeros(4))


def test_the_gap_between_the_rows_of_a_view_is_outside() -> None:
    x = zeros(4, 12)[:, :8]
    with ordered_launches():
        _rows_kernel[(1,)](x, zeros(4), 12, 8)
    message = "_rows_kernel: block (0, 0, 0) reads 20 lanes outside of every argument, the first at p_x[8], at "
    with pytest.raises(Exception, match=re.escape(message + at(_rows_kernel, "tl.load"))), ordered_launches():
        _rows_kernel[(1,)](x, zeros(4), 12, 16)


def test_an_access_of_another_size_than_the_element_is_refused() -> None:
    load = at(_bytes_kernel, "tl.load")
    message = f"p_x is accessed by 1 bytes but its elements have 4, at {load}: such accesses cannot be watched"
    with pytest.raises(Exception, match=re.escape(message)), ordered_launches():
        _bytes_kernel[(1,)](zeros(2), zeros(1))
