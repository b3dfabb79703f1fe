"""Tests of bench/static/counters.py on launches small enough to count every block; test_ledger.py tests the ledger."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from plant import case_of, entry_of

from bench.ops.norm_linear import norm_linear_inputs
from bench.ops.registry import TensorMaker
from bench.static.counters import Traffic, counting, launches_only
from voxkern.kernels import launch_config
from voxkern.kernels.norm_linear import launch_norm_linear, norm_linear


@triton.jit
def _mixed_kernel(p_x, p_count, p_y, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    tl.atomic_add(p_count, 1)
    tl.atomic_cas(p_count, -1, 0)
    rows = tl.make_tensor_descriptor(p_x, [6, 16], [16, 1], [4, 16])
    tl.store(p_y + i * BLOCK + tl.arange(0, BLOCK), tl.sum(rows.load([4 * i, 0]), 0))


class Sizes:
    M, N, K, max_rows = 70, 250, 150, 100


@pytest.fixture(autouse=True)
def a_tile_for_each_block() -> Iterator[None]:
    with launch_config.override("norm_linear", SHARES=0, ROW_TILES=1):
        yield


def inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    return norm_linear_inputs(Sizes, TensorMaker(dtype))


def test_three_blocks_an_axis_tell_the_whole_launch() -> None:
    args = inputs()
    with counting(whole=True) as whole:
        out = norm_linear(**args)
    with counting() as few:
        norm_linear(**args)
    assert torch.equal(out, norm_linear(**args))  # counting does not change the result
    assert len(few[0].blocks) == 5 < len(whole[0].blocks) == 5 * 8
    assert few[0].traffic() == whole[0].traffic()
    traffic = whole[0].traffic()
    assert {name: t.dram for name, t in traffic.items()} == {
        "p_x": 70 * 150 * 2, "p_norm": 150 * 2, "p_w": 250 * 150 * 2, "p_y": 70 * 250 * 2
    }  # fmt: skip
    assert traffic["p_x"].again == 7 * 70 * 150 * 2  # eight column tiles read the same rows
    assert traffic["p_w"].again == 4 * 250 * 150 * 2  # five row tiles read the same weights
    assert traffic["p_y"].again == 0


def test_bytes_of_the_public_shape_are_the_fewest() -> None:
    entry = entry_of("norm_linear")
    case = case_of(entry, "q-b1")
    args = entry.args(case, TensorMaker(torch.bfloat16))
    with launch_config.target_arch("sm_90"), counting() as launches:
        norm_linear(**args)
    (launch,) = launches
    fewest = 2 * (6 * 3072 + 3072 + 4096 * 3072 + 6 * 4096)
    assert sum(t.dram for t in launch.traffic().values()) == fewest


def test_atomics_and_descriptors_are_counted() -> None:
    x, count, y = torch.ones(6, 16), torch.zeros(1, dtype=torch.int32), torch.empty(2, 16)
    with counting(whole=True) as launches:
        _mixed_kernel[(2,)](x, count, y, 16)
    assert count.item() == 2
    assert y.tolist() == [[4.0] * 16, [2.0] * 16]
    (launch,) = launches
    assert launch.of(x) == Traffic(dram=6 * 16 * 4, again=0)
    assert launch.of(count) == Traffic(dram=4, again=3 * 4)
    assert launch.of(y) == Traffic(dram=2 * 16 * 4, again=0)


def test_a_lane_outside_of_every_argument_is_an_error() -> None:
    args = inputs()
    short = torch.empty(0, dtype=torch.bfloat16).set_(args["norm"].untyped_storage(), 0, (149,))
    out = torch.empty(70, 250, dtype=torch.bfloat16)
    with counting(), pytest.raises(Exception, match="outside of every argument"):
        launch_norm_linear(out, **(args | {"norm": short}))


def test_a_frame_may_hold_launches_and_views_only() -> None:
    args = inputs()
    out, other = torch.empty(70, 250, dtype=torch.bfloat16), torch.empty(70, 250, dtype=torch.bfloat16)
    with launches_only() as launches:
        launch_norm_linear(out, **args)
        launch_norm_linear(other, **(args | {"x": args["x"][:16].view(16, 150)}))
    assert [launch.kernel for launch in launches] == ["_norm_linear_kernel"] * 2
    for work in (
        lambda: norm_linear(**args),  # the operator allocates
        lambda: torch.cat([out, other]),
        lambda: out.add_(1),
        lambda: torch.empty(3),
        lambda: out[0, 0].item(),
        lambda: out.tolist(),
        lambda: out.float(),
        lambda: out.view(torch.int16).numpy(),
        lambda: torch.tensor([1]),
        lambda: bool((out == out).all()),
    ):
        with pytest.raises(RuntimeError, match="only views and launches"), launches_only():
            work()
