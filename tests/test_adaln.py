"""Tests of the operators in kernels/adaln.py; test_operators.py has the checks that every operator must pass."""

from typing import Any

import pytest
import torch
from checks import CPU, assert_accurate, moved, own_or
from plant import case_of, entry_of
from torch import Tensor

from bench.ops import adaln as adaln_bench
from bench.ops.linear import own_rows
from bench.ops.registry import Case, TensorMaker, listed
from bench.static.counters import counting
from voxkern.fused.mlp_head import FusedMLPHead
from voxkern.kernels import adaln as kernels
from voxkern.kernels import launch_config
from voxkern.kernels.adaln import (
    ADALN_LINEAR_SILU,
    ADALN_MODULATION,
    adaln_linear_silu,
    adaln_modulation,
    launch_adaln_modulation,
)
from voxkern.random_checkpoint import tiny_params
from voxkern.reference import Config
from voxkern.reference.model import make_head
from voxkern.reference.solver import MAX_STEPS

NAN = float("nan")


def inputs(operator: str, device: torch.device, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Any]:
    entry = entry_of(operator)
    return entry.args(case_of(entry, "odd"), TensorMaker(dtype, str(device)), **sizes)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float32])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, arch: str, device: torch.device) -> None:
    """A row gives the same bits alone and in a batch of 19.

    In the batch, rows 0 to 8 have rows 1 to 9 of the modulation; rows 9 to 18 share row 0 of the modulation.
    """
    args = inputs("adaln_linear_silu", device, dtype)
    with own_or(arch, device, first="interpreter"):
        whole = adaln_linear_silu(**args)
        for i in (0, 5, 8, 9, 18):
            own = args["modulation"][[0, i + 1]] if i < 9 else args["modulation"][:1]
            assert torch.equal(
                adaln_linear_silu(**(args | {"x": args["x"][i : i + 1], "modulation": own}))[0], whole[i]
            )
        # 16 rows give tiles of 16 rows: in wider tiles, numpy's product rounds a row depending on its position
        args = inputs("adaln_modulation", device, dtype, S=3, max_rows=16)
        whole = adaln_modulation(**args)
        for i in (0, 2, 4):
            assert torch.equal(adaln_modulation(**(args | {"states": args["states"][i : i + 1]}))[:, 0], whole[:, i])
        for i in range(3):
            assert torch.equal(adaln_modulation(**(args | {"times": args["times"][i : i + 1]}))[0], whole[i])


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 64])
def test_right_for_these_rows(rows: int, device: torch.device) -> None:
    """The velocity MLP has two rows per request: these are 1, 8 and 32 requests, and odd numbers of rows."""
    entry = entry_of("adaln_linear_silu")
    sizes = {**case_of(entry, "odd").sizes, "M": rows, "max_rows": rows}
    with own_or("sm_90", device):
        assert_accurate(entry, Case(f"rows-{rows}", sizes), "bf16", device=device)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["adaln_modulation", "adaln_linear_silu"])
def test_right_at_the_width_of_mar_h(operator: str, device: torch.device) -> None:
    entry = entry_of(operator)
    sizes = dict(case_of(entry, "mar-b1").sizes)
    if operator == "adaln_modulation":
        sizes |= {"blocks": 1, "N": 200}  # a block's weight has 4608 rows, which take half a minute
    with own_or("sm_90", device):
        assert_accurate(entry, Case("mar", sizes), "bf16", device=device)


@pytest.mark.interpreter("bytes are counted by address")
@pytest.mark.parametrize("blocks", [1, 4])
def test_all_weights_are_read_once_in_one_launch(blocks: int) -> None:
    """7 steps of 32 requests are 224 rows, or 4 row tiles; three of the tiles find the weights in the L2 cache."""
    args = inputs(
        "adaln_modulation", CPU, torch.bfloat16, N=3 * 130, K=130, blocks=blocks, S=7, R=32, max_rows=32 * MAX_STEPS
    )
    with launch_config.target_arch("sm_90"), counting(whole=True, indirect=listed(args)) as launches:
        adaln_modulation(**args)
    (launch,) = launches
    for tensor in listed(args):
        traffic, least = launch.of(tensor), tensor.numel() * tensor.element_size()
        assert (traffic.dram, traffic.again) == (least, 3 * least)


def test_results_may_lie_apart_and_nothing_else_is_written(device: torch.device) -> None:
    args = inputs("adaln_modulation", device)
    out = torch.full((5, 9, 600), NAN, device=device)
    launch_adaln_modulation(out[:, 1:6], **args)
    assert torch.equal(out[:, 1:6], adaln_modulation(**args))
    assert out[:, 0].isnan().all()
    assert out[:, 6:].isnan().all()


def test_a_large_mean_does_not_cancel(device: torch.device) -> None:
    """In fp32, for rows of mean 3000 and deviation 1, a variance from sums of squares has a wrong first digit."""
    args = inputs("adaln_linear_silu", device)
    args["x"] = args["x"] + 3000
    exact = {name: a.double() if isinstance(a, Tensor) else a for name, a in args.items()}
    torch.testing.assert_close(
        adaln_linear_silu(**args).double(), adaln_bench.adaln_linear_silu_reference(**exact), rtol=1e-3, atol=1e-3
    )


def test_a_constant_row_is_its_shift(device: torch.device) -> None:
    args = inputs("adaln_linear_silu", device)
    args["x"][:] = 7.0
    shift = own_rows(args["modulation"], 19)[:, :150]
    expected = torch.nn.functional.silu(torch.nn.functional.linear(shift, args["weight"], args["bias"]))
    torch.testing.assert_close(adaln_linear_silu(**args), expected)


def test_fp16_normalises_before_the_cast(device: torch.device) -> None:
    args = inputs("adaln_linear_silu", device, torch.float16)
    args["x"] = args["x"] * 8000  # the squares of x exceed 65,504, the largest fp16 number
    out = adaln_linear_silu(**args)
    assert out.isfinite().all()
    exact = {name: a.double() if isinstance(a, Tensor) else a for name, a in args.items()}
    torch.testing.assert_close(out.double(), adaln_bench.adaln_linear_silu_reference(**exact), rtol=2e-2, atol=2e-2)


@pytest.mark.interpreter("the launch configs are those of named architectures")
def test_launch_config_is_chosen_by_max_rows() -> None:
    def choose(rows: int, arch: str = "sm_90") -> dict[str, Any]:
        with launch_config.target_arch(arch):
            return ADALN_LINEAR_SILU(N=1536, K=1536, dtype=torch.bfloat16, rows=rows)

    assert choose(2) == choose(8) != choose(9)
    assert choose(2)["num_stages"] > choose(2, "sm_89")["num_stages"]
    assert choose(2)["SPLIT"] == choose(2)["num_warps"]  # one warp computes each chain of sums


@pytest.mark.interpreter("the launch configs are those of named architectures")
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize("max_batch", [1, 8, 32])
def test_one_launch_config_serves_any_number_of_steps(
    max_batch: int, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch config that depended on the number of steps would compile another binary while requests run."""
    config, chosen = Config.from_params(tiny_params(velocity_mlp=True)), []

    def choose(**asked: Any) -> dict[str, Any]:
        chosen.append(ADALN_MODULATION(**asked))
        return dict(chosen[-1])

    monkeypatch.setattr(kernels, "ADALN_MODULATION", choose)
    head = make_head(config.acoustic_transformer, config.audio).bfloat16().requires_grad_(False)
    fused = FusedMLPHead(head, max_batch)
    with launch_config.target_arch(arch), counting(indirect=list(head.parameters())):
        for steps in (1, 2, 7, MAX_STEPS):
            projected, modulations = fused.step_tables("euler", steps).network
            states = torch.zeros(max_batch, config.acoustic_transformer.dim, dtype=torch.bfloat16)
            fused._modulate(projected, states, modulations[:, 1:])
    assert chosen == 8 * chosen[:1]
    assert chosen[0]["BLOCK_M"] == ({1: 16, 8: 64, 32: 64}[max_batch])


@pytest.mark.parametrize(
    ("operator", "change", "error", "message"),
    [
        (
            "adaln_linear_silu", {"x": torch.ones(21, 150)}, ValueError,
            r"x has 21 rows but must have 1..19 \(max_rows\)",
        ),
        (
            "adaln_linear_silu", {"modulation": torch.ones(21, 450)}, ValueError,
            r"modulation is \[21, 450\] but must have",
        ),
        ("adaln_linear_silu", {"modulation": torch.ones(5, 299)}, ValueError, "1..20 rows of 300 columns or more"),
        ("adaln_linear_silu", {"modulation": torch.ones(0, 300)}, ValueError, r"modulation is \[0, 300\]"),
        ("adaln_linear_silu", {"modulation": torch.ones(5, 300).half()}, TypeError, "modulation is torch.float16"),
        ("adaln_linear_silu", {"bias": torch.ones(74)}, ValueError, r"bias is \[74\] but must be \[75\]"),
        ("adaln_modulation", {"max_rows": 24}, ValueError, r"times and states make 5 x 5 rows but must make 1..24"),
        ("adaln_modulation", {"max_rows": 4097}, ValueError, r"max_rows is 4097 but must lie in 1..4096"),
        ("adaln_modulation", {"states": torch.ones(5, 74)}, ValueError, r"states is \[5, 74\] but must be \[R, 75\]"),
        ("adaln_modulation", {"weights": [torch.ones(225, 75)]}, ValueError, "weights and biases are 1 and 3"),
        ("adaln_modulation", {"weights": [torch.ones(n, 75) for n in (225, 224, 150)]}, ValueError, r"weights\[1\] is"),
        (
            "adaln_modulation", {"biases": [torch.ones(n) for n in (225, 225, 149)]}, ValueError,
            r"biases\[2\] is \[149\]",
        ),
        ("adaln_modulation", {"weights": [torch.ones(n, 75).half() for n in (225, 225, 150)]}, TypeError, "weights"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    operator: str, change: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    with pytest.raises(error, match=message):
        entry_of(operator).op(**(inputs(operator, device) | moved(change, device)))
