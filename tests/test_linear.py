"""Tests of kernels/linear.py; tests/test_operators.py has the tests that every operator must pass."""

from typing import Any

import pytest
import torch
from checks import assert_accurate, moved, own_or
from plant import case_of, entry_of

from bench.ops.registry import Case, TensorMaker
from voxkern.kernels.linear import linear


def inputs(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    entry = entry_of("linear")
    return entry.args(case_of(entry, "odd"), TensorMaker(dtype, str(device)))


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, arch: str, device: torch.device) -> None:
    """A row gives the same bits alone and in a batch of 19.

    In the batch, rows 0 to 8 have rows 1 to 9 of the gate; rows 9 to 18 share row 0 of the gate.
    """
    args = inputs(device, dtype)
    with own_or(arch, device, first="interpreter"):
        whole = linear(**args)
        for i in (0, 5, 8, 9, 18):
            own = args["gate"][[0, i + 1]] if i < 9 else args["gate"][:1]
            mine = {"x": args["x"][i : i + 1], "gate": own, "residual": args["residual"][i : i + 1]}
            assert torch.equal(linear(**(args | mine))[0], whole[i])


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 64])
def test_a_gate_is_right_for_these_rows(rows: int, device: torch.device) -> None:
    """The velocity MLP has two rows per request: these are 1, 8 and 32 requests, and odd numbers of rows."""
    entry = entry_of("linear")
    sizes = {**case_of(entry, "odd").sizes, "M": rows, "max_rows": rows}
    with own_or("sm_90", device):
        assert_accurate(entry, Case(f"rows-{rows}", sizes), "bf16", device=device)


def test_right_at_the_width_of_mar_h(device: torch.device) -> None:
    entry = entry_of("linear")
    with own_or("sm_90", device):
        assert_accurate(entry, case_of(entry, "mar-b1"), "bf16", device=device)


def test_gates_of_zero_leave_the_stream_alone(device: torch.device) -> None:
    """MAR's training begins with modulations of zero."""
    args = inputs(device)
    args["gate"] = torch.zeros_like(args["gate"])
    assert torch.equal(linear(**args), args["residual"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": torch.ones(5, 74)}, ValueError, r"gate is \[5, 74\]"),
        ({"gate": torch.ones(21, 75)}, ValueError, r"gate is \[21, 75\] but must have 1..20 rows"),
        ({"residual": torch.ones(19, 74)}, ValueError, r"residual is \[19, 74\] but must be"),
        ({"weight": torch.ones(75, 149)}, ValueError, r"weight is \[75, 149\] but must be \[N, 150\]"),
        ({"bias": torch.ones(74)}, ValueError, r"bias is \[74\] but must be \[75\]"),
        ({"phase": "train"}, ValueError, "phase is 'train' but must be 'decode', 'prefill' or 'codec'"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    change: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    with pytest.raises(error, match=message):
        linear(**(inputs(device) | moved(change, device)))
