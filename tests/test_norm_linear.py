"""Tests of the operators in kernels/norm_linear.py; test_operators.py has the tests of every operator."""

from typing import Any

import pytest
import torch
from checks import assert_accurate, moved, own_or
from fresh_process import run_python
from plant import case_of, entry_of
from torch import Tensor

from bench.ops.norm_linear import norm_linear_inputs, norm_linear_reference
from bench.ops.registry import Case, TensorMaker
from voxkern.kernels import launch_config
from voxkern.kernels.norm_linear import NORM_LINEAR, norm_linear


class Sizes:
    M, N, K, max_rows = 19, 75, 150, 40


def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return norm_linear_inputs(Sizes, TensorMaker(dtype, str(device)))


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, arch: str, device: torch.device) -> None:
    args = inputs(device, dtype)
    with own_or(arch, device, first="interpreter"):
        whole = norm_linear(**args)
        for first, last in ((0, 1), (7, 8), (18, 19), (3, 19)):
            part = norm_linear(**(args | {"x": args["x"][first:last]}))
            assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("rows", [1, 6, 7, 48, 192])
@pytest.mark.parametrize("operator", ["norm_linear", "norm_qkv", "norm_swiglu", "linear"])
def test_right_for_these_rows(operator: str, rows: int, device: torch.device) -> None:
    """The flow head has 6 rows per request.

    So 6, 48 and 192 rows are 1, 8 and 32 requests. One row is a single token, and 7 rows are an odd number.
    """
    entry = entry_of(operator)
    sizes = {**case_of(entry, "odd").sizes, "M": rows, "max_rows": rows}
    with own_or("sm_90", device):
        assert_accurate(entry, Case(f"rows-{rows}", sizes), "bf16", device=device)


def test_fp16_normalises_before_the_cast(device: torch.device) -> None:
    args = inputs(device, torch.float16)
    args["x"], args["norm"] = args["x"] * 8000, args["norm"] * 30  # x * norm exceeds 65,504, the result does not
    args["weight"] = args["weight"] / 8
    out = norm_linear(**args)
    assert out.isfinite().all()
    torch.testing.assert_close(out, norm_linear_reference(**args), rtol=2e-2, atol=2e-2)


def test_a_row_of_zeros_stays_zero(device: torch.device) -> None:
    args = inputs(device)
    args["x"][5] = 0
    assert (norm_linear(**args)[5] == 0).all()


def test_a_lone_row_may_have_any_stride(device: torch.device) -> None:
    args = inputs(device)
    column = args["x"][0].clone().as_strided((1, 150), (1, 1))
    assert column.stride() == (1, 1)
    assert torch.equal(norm_linear(**(args | {"x": column})), norm_linear(**(args | {"x": args["x"][:1]})))


@pytest.mark.interpreter("the launch configs are those of named architectures")
def test_launch_config_is_chosen_by_max_rows() -> None:
    def choose(rows: int, arch: str = "sm_90", dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
        with launch_config.target_arch(arch):
            return NORM_LINEAR(N=4096, K=3072, dtype=dtype, rows=rows)

    assert choose(6)["BLOCK_M"] == 8
    assert choose(192)["ROW_TILES"] * choose(192)["BLOCK_M"] == 96
    assert choose(6) == choose(8) != choose(9)
    assert choose(6, "gfx942") != choose(6)
    with launch_config.override("norm_linear", num_stages=3):
        assert choose(6)["num_stages"] == 3
        with launch_config.override("norm_linear", num_stages=2):
            assert choose(6)["num_stages"] == 2
    assert choose(6)["num_stages"] == 6
    # sm_121 (GB10) has as little shared memory as sm_120
    assert choose(24, "sm_121") == choose(24, "sm_120") != choose(24)
    with pytest.raises(ValueError, match="no launch config of norm_linear for abacus"):
        choose(6, "abacus")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(19, 3, 50)}, ValueError, r"x is \[19, 3, 50\] but must be \[M, K\]"),
        ({"x": torch.ones(150, 19).t()}, ValueError, r"x .* last dimension must have stride 1"),
        ({"x": torch.ones(19, 150, dtype=torch.float64)}, TypeError, r"x is torch.float64 but must be"),
        ({"x": torch.ones(41, 150)}, ValueError, r"x has 41 rows but must have 1..40 \(max_rows\)"),
        ({"x": torch.ones(0, 150)}, ValueError, r"x has 0 rows"),
        ({"max_rows": 513}, ValueError, r"max_rows is 513 but must lie in 1..512"),
        ({"norm": torch.ones(149)}, ValueError, r"norm is \[149\] but must be \[150\]"),
        ({"weight": torch.ones(75, 149)}, ValueError, r"weight is \[75, 149\] but must be \[N, 150\]"),
        ({"weight": torch.ones(150, 75).t()}, ValueError, r"weight .* must be contiguous"),
        ({"weight": torch.ones(75, 150).bfloat16()}, TypeError, r"weight is torch.bfloat16 but must be torch.float32"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    change: dict[str, Tensor | int], error: type[Exception], message: str, device: torch.device
) -> None:
    with pytest.raises(error, match=message):
        norm_linear(**(inputs(device) | moved(change, device)))


def test_a_weight_on_another_device_is_refused(device: torch.device) -> None:
    weight = torch.ones(75, 150, device="meta")
    with pytest.raises(ValueError, match=f"weight is on meta but must be on {device}"):
        norm_linear(**(inputs(device) | {"weight": weight}))


def test_on_a_cpu_without_the_interpreter_the_way_out_is_named() -> None:
    code = (
        "import torch; from voxkern.kernels.norm_linear import norm_linear as f; x = torch.ones(2, 16)\n"
        "try: f(x, x[0], x, 1e-5, 2)\n"
        "except RuntimeError as error: print(error)"
    )
    answer = run_python("-c", code)
    assert "norm_linear: tensors are on the CPU" in answer
    assert "TRITON_INTERPRET=1" in answer
