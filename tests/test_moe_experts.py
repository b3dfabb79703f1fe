"""Tests of the experts' kernels; tests/test_operators.py has the tests that every operator must pass."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import CPU, assert_accurate, moved, own_or
from plant import entry_of
from torch import Tensor

from bench.ops.moe_experts import moe_experts_down_inputs, moe_experts_up_inputs
from bench.ops.registry import Case, TensorMaker, listed
from bench.static import ledger
from bench.static.counters import counting
from voxkern.fused.moe import FusedMoE
from voxkern.kernels import launch_config
from voxkern.kernels.moe_experts import moe_combine, moe_experts_down, moe_experts_up, pointer_table
from voxkern.kernels.moe_routing import choose_tile_rows, moe_route
from voxkern.reference.config import MoEConfig
from voxkern.reference.moe import MoEBlock

SIZES = {"M": 7, "E": 5, "top_k": 2, "n_shared": 1, "max_rows": 8, "decode": 1, "N": 75, "K": 150}


def up(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return moe_experts_up_inputs(SimpleNamespace(**SIZES), TensorMaker(dtype, str(device)))


def down(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return moe_experts_down_inputs(SimpleNamespace(**SIZES), TensorMaker(dtype, str(device)))


@pytest.mark.parametrize("operator", ["moe_experts_up", "moe_experts_down"])
@pytest.mark.parametrize(("rows", "decode"), [(1, 1), (8, 1), (32, 1), (300, 0)])
def test_right_for_these_rows(operator: str, rows: int, decode: int, device: torch.device) -> None:
    sizes = {**SIZES, "M": rows, "max_rows": rows, "decode": decode, "N": 97}
    with own_or("sm_90", device):
        assert_accurate(entry_of(operator), Case(f"rows-{rows}", sizes), "bf16", device=device)


def zeros(*shape: int, n: int) -> list[Tensor]:
    """Return zero weights for `n` experts in bf16, which take no memory until they are written."""
    return [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(n)]


@pytest.mark.interpreter("bytes are counted by address")
@pytest.mark.parametrize(("M", "n_hit"), [(1, 5), pytest.param(8, 32, marks=pytest.mark.slow)])
def test_bytes_of_the_experts_that_are_hit(M: int, n_hit: int) -> None:
    """Each expert that a token uses is loaded once, and the other experts are not loaded.

    The sizes are those of Mistral Small 4: 128 experts and a shared one. The weights have only the rows of two blocks
    per launch, because more blocks would do the same on rows of their own.
    """
    logits = torch.randn(M, 128, generator=torch.Generator().manual_seed(1))
    x, norm = torch.randn(M, 4096).bfloat16(), torch.ones(4096).bfloat16()
    with launch_config.target_arch("sm_90"):
        rows = choose_tile_rows(128, 4, torch.bfloat16, M, "decode")
        ids, weights, pairs, tiles = moe_route(logits, None, 4, 1, "softmax", 1, 1, True, 1.0, rows, M)
        experts = [zeros(64, 4096, n=129), zeros(64, 4096, n=129), zeros(128, 2048, n=129)]
        gated = torch.zeros(len(pairs), 2048, dtype=torch.bfloat16)
        with counting(whole=True, indirect=[*experts[0], *experts[1], *experts[2]]) as launches:
            moe_experts_up.run(x, norm, experts[0], experts[1], pairs, tiles, 1e-5, rows)
            moe_experts_down.run(gated, experts[2], weights, pairs, tiles, rows)
    assert [launch.grid[1] for launch in launches] == [2, 2]
    hit = ids.unique().tolist()
    assert len(hit) == n_hit
    traffic = [t for launch in launches for name, t in launch.traffic().items() if name.startswith("indirect")]
    assert sum(t.dram for t in traffic) == sum(one[i].nbytes for one in experts for i in hit)
    assert sum(t.again for t in traffic) == 0


@pytest.mark.slow
@pytest.mark.interpreter("bytes are counted by address")
def test_bytes_of_a_whole_layer() -> None:
    """Over all blocks of a layer, each expert that a token uses is loaded once, and the other experts are not loaded.

    FusedMoE runs one token in 5 launches, which load 252 MB of weights.
    """
    with torch.device("meta"):
        layer = MoEBlock(4096, MoEConfig(128, 4, 2048, num_shared_experts=1), 32, 32, 128, 1e-6).bfloat16()
    state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    layer.requires_grad_(False)
    layer.gate.weight.copy_(torch.randn(128, 4096))
    experts = [*layer.experts.parameters(), *layer.shared_experts.parameters()]
    with launch_config.target_arch("sm_90"), counting(whole=True, indirect=experts) as launches:
        FusedMoE(layer, 1).run(torch.randn(1, 4096).bfloat16())
    traffic = [t for launch in launches for name, t in launch.traffic().items() if name.startswith("indirect")]
    assert sum(t.dram for t in traffic) == 5 * 3 * 4096 * 2048 * 2
    assert sum(t.again for t in traffic) == 0
    assert len(launches) == 5


@pytest.mark.parametrize("operator", ["moe_experts_up", "moe_experts_down"])
def test_memory_is_kept_busy(operator: str) -> None:
    """For one token on an H100, at least 32 KiB of weights are in flight per multiprocessor.

    Asynchronous copies of 16 bytes load the weights.
    """
    _, rows = ledger.read(ledger.FILE.read_text())
    found = [row for row in rows if (row.operator, row.case, row.arch) == (operator, "small-4-b1", "sm_90")]
    assert {row.dtype for row in found} == {"bf16", "int8", "fp8"}
    for row in found:
        assert row.in_flight >= 32 << 10
        assert "LDGSTS.128" in row.loads
        assert row.matrix != "-"


def test_weights_that_begin_anywhere(device: torch.device) -> None:
    """The kernel is right for weights that are not aligned to 16 bytes, as in a memory-mapped file."""
    args = up(device, torch.bfloat16)
    expected = moe_experts_up(**args)
    moved = [torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape) for w in args["w1"]]
    assert moved[0].data_ptr() % 16
    assert not pointer_table(moved).aligned
    assert torch.equal(moe_experts_up(**(args | {"w1": moved})), expected)
    aligned = [torch.zeros(8, 64, dtype=torch.bfloat16, device=device) for _ in range(3)]
    assert pointer_table(aligned).aligned
    odd_stride = torch.zeros(8, 65, dtype=torch.bfloat16, device=device)[:, :64]
    assert not pointer_table([*aligned, odd_stride]).aligned


def test_addresses_are_those_of_now(device: torch.device) -> None:
    one, other = torch.ones(3, 4, device=device), torch.ones(3, 4, device=device)
    assert pointer_table([one, other]).table.tolist() == [[one.data_ptr(), 4, 0], [other.data_ptr(), 4, 0]]
    assert pointer_table([one, other]) is pointer_table([one, other])
    other.data = torch.ones(3, 4, device=device)
    assert pointer_table([one, other]).table[1, 0] == other.data_ptr()


@pytest.mark.interpreter("the check of a tile's expert would wait for a GPU: the kernel skips the tile instead")
@pytest.mark.parametrize("bad", [-2, 6])
def test_an_expert_out_of_range_is_named(bad: int) -> None:
    for operator, args in ((moe_experts_up, up(CPU)), (moe_experts_down, down(CPU))):
        args["tiles"] = args["tiles"].clone()
        args["tiles"][1, 0] = bad
        with pytest.raises(ValueError, match=rf"tiles has expert {bad} but must have -1..5"):
            operator(**args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(7, 149)}, ValueError, r"norm is \[150\] but must be \[149\]"),
        ({"w1": []}, ValueError, r"w1 is empty"),
        ({"w1": [torch.ones(75, 149)]}, ValueError, r"w1\[0\] is \[75, 149\] but must be \[75, 150\]"),
        ({"w3": [torch.ones(75, 150)] * 5}, ValueError, r"w3 must be 6 experts of \[75, 150\]"),
        ({"w3": [torch.ones(75, 150).bfloat16()] * 6}, TypeError, r"w3\[0\] is torch.bfloat16"),
        ({"pairs": torch.zeros(8, dtype=torch.int32)}, ValueError, r"pairs has 8 rows but must have a multiple of 7"),
        ({"pairs": torch.zeros(21)}, TypeError, r"pairs is torch.float32 but must be torch.int32"),
        ({"tiles": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, r"tiles is \[3, 2\] but must be \[T, 3\]"),
    ],
)
def test_errors_of_up(change: dict[str, Any], error: type[Exception], message: str, device: torch.device) -> None:
    with pytest.raises(error, match=message):
        moe_experts_up(**(up(device) | moved(change, device)))


def test_errors_of_down_and_combine(device: torch.device) -> None:
    ones = partial(torch.ones, device=device)
    with pytest.raises(ValueError, match=r"weights is \[6, 3\] but x has 21 rows"):
        moe_experts_down(**(down(device) | {"weights": ones(6, 3)}))
    with pytest.raises(TypeError, match=r"weights is torch.bfloat16 but must be torch.float32"):
        moe_experts_down(**(down(device) | {"weights": ones(7, 3).bfloat16()}))
    with pytest.raises(ValueError, match=r"parts has 5 rows but must have a multiple of 2"):
        moe_combine(ones(2, 8), ones(5, 8))


def test_gradients_of_an_expert_are_refused(device: torch.device) -> None:
    args = up(device)
    args["w1"][3].requires_grad_()
    with pytest.raises(RuntimeError, match="moe_experts_up: an argument requires gradients"):
        moe_experts_up(**args)


@pytest.mark.interpreter("bytes are counted by address")
def test_lists_are_counted_like_arguments() -> None:
    args = up(CPU)
    with counting(whole=True, indirect=listed(args)) as launches:
        moe_experts_up.run(**args)
    (launch,) = launches
    used: list[Tensor] = [args["w1"][i] for i in {int(e) for e in args["tiles"][:, 0] if e >= 0}]
    assert all(launch.of(w).dram == w.nbytes for w in used)
    with pytest.raises(Exception, match="outside of every argument"), counting(whole=True, indirect=listed(args)[1:]):
        moe_experts_up.run(**args)
