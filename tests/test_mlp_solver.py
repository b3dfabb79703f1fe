"""Tests of mlp_start, mlp_step and mlp_finish; tests/test_operators.py has the tests that every operator must pass."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import assert_accurate
from plant import case_of, entry_of
from test_flow_head_kernels import run
from torch import Tensor

from bench import mlp_solver
from bench.counters import launches_only
from bench.registry import TensorMaker
from voxkern.kernels import launch_config
from voxkern.kernels.mlp_solver import launch_mlp_start, launch_mlp_step, mlp_finish, mlp_start, mlp_step
from voxkern.reference.noise import noise, quantile_table, seed_tensor

NAN = float("nan")
INPUTS = {
    mlp_start: mlp_solver.mlp_start_inputs,
    mlp_step: mlp_solver.mlp_step_inputs,
    mlp_finish: mlp_solver.mlp_finish_inputs,
}
OWN = ("seed", "frame", "cfg_alpha", "x", "v_last", "semantic")  # these arguments have one row per request


def inputs(op: Any, dtype: torch.dtype = torch.float32, **other: Any) -> dict[str, Any]:
    """Return the arguments of `op` for 5 requests, prepared for 7; `other` replaces sizes."""
    return INPUTS[op](SimpleNamespace(**{**mlp_solver.ODD, **other}), TensorMaker(dtype))


def of_requests(args: dict[str, Any], i: list[int]) -> dict[str, Any]:
    """Return the arguments of the requests with the indices `i`, out of the five.

    `stream` has five rows with the condition and then five rows without it. Row 0 of `modulation` belongs to all rows
    without the condition, and rows 1 to 5 belong to the requests.
    """
    mine = {name: args[name][i] for name in OWN if name in args}
    mine["stream"] = args["stream"][i + [5 + b for b in i]]
    if "modulation" in args:
        mine["modulation"] = args["modulation"][[0] + [1 + b for b in i]]
    return args | mine


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.name)
def test_a_request_does_not_depend_on_the_others(op: Any, dtype: torch.dtype, arch: str) -> None:
    args = inputs(op, dtype)
    with launch_config.target_arch(arch):
        whole = run(op, args)
        for some in ([0], [2], [4], [4, 0, 1]):
            for one, all_ in zip(run(op, of_requests(args, some)), whole, strict=True):
                rows = some + [5 + b for b in some] if len(all_) == 10 else some
                assert torch.equal(one, all_[rows])


@pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.name)
def test_right_at_the_width_of_mar_h(op: Any) -> None:
    entry = entry_of(op.name)
    with launch_config.target_arch("sm_90"):
        assert_accurate(entry, case_of(entry, "frame-b1"), "bf16")


@pytest.mark.parametrize("K", [1, 5, 36, 37])
def test_noise_is_the_reference_s_to_the_bit(K: int) -> None:
    seed = seed_tensor([0, 1, 2**31, 2**32 + 7, 2**63 - 1, 2**64 - 1])
    frame = torch.tensor([0, 1, 2, 2047, 2**31, 2**32 - 1])
    x, stream = torch.empty(6, K), torch.empty(12, 40)
    mlp_start(seed, frame, None, quantile_table(), torch.ones(40, K), torch.full((40,), 3.0), x, stream, 6)
    assert torch.equal(x, noise(seed, frame, K))
    torch.testing.assert_close(stream, (x.sum(1) + 3)[:, None].expand(6, 40).repeat(2, 1))


@pytest.mark.parametrize("op", [mlp_step, mlp_finish], ids=lambda op: op.name)
def test_guidance_of_one_reads_the_condition_alone_and_of_zero_the_other(op: Any) -> None:
    args = inputs(op)
    for alpha, other, rows in ((1.0, slice(5, 10), slice(0, 1)), (0.0, slice(0, 5), slice(1, 6))):
        args["cfg_alpha"] = torch.full((5,), alpha)
        expected = run(op, args)
        stream, modulation = args["stream"].clone(), args["modulation"].clone()
        stream[other], modulation[rows] = 123.0, 7.0
        assert all(map(torch.equal, run(op, args | {"stream": stream, "modulation": modulation}), expected))


def test_a_first_step_does_not_read_the_last_velocity() -> None:
    args = inputs(mlp_step)
    assert args["ab2_ratio"] == 0
    expected = run(mlp_step, args)
    assert all(map(torch.equal, run(mlp_step, args | {"v_last": torch.full_like(args["x"], NAN)}), expected))


def test_a_stream_of_one_value_gives_its_shift_s_velocity() -> None:
    """A row of equal values has variance 0: the normalised row must be zero, without a division by zero."""
    args = inputs(mlp_finish, **{"K": 36})
    args["stream"][:] = 9.0
    shift = args["modulation"][:, :150]
    v = torch.nn.functional.linear(shift, args["w_out"], args["b_out"])
    alpha = args["cfg_alpha"][:, None]
    *_, v_last = run(mlp_finish, args)
    torch.testing.assert_close(v_last, alpha * v[1:] + (1 - alpha) * v[0])


def test_fp16_does_not_overflow_inside() -> None:
    args = inputs(mlp_step, torch.float16)
    args["stream"] = (args["stream"] * 12000).clamp(-60000, 60000)
    assert all(result.isfinite().all() for result in run(mlp_step, args))


def test_end_gives_codes_of_two_and_nan_has_levels() -> None:
    args = inputs(mlp_finish)
    args["x"][3, 0] = NAN
    codes, _, x, _ = run(mlp_finish, args)
    assert codes[1].tolist() == [1] + [2] * 37
    assert codes[3, 1] == 2
    assert (codes[0, 1:] != 2).any()
    assert x[0].abs().max() > 1  # the state itself is not clamped


def test_launchers_are_launches_alone() -> None:
    start, step = inputs(mlp_start), inputs(mlp_step)
    with launches_only() as launches:
        launch_mlp_start(**start)
        launch_mlp_step(**step)
    assert len(launches) == 2


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        (mlp_start, {"max_batch": 65}, ValueError, r"max_batch is 65 but must lie in 1..64"),
        (mlp_start, {"stream": torch.ones(9, 150)}, ValueError, r"stream is \[9, 150\] but must be \[10, 150\]"),
        (mlp_start, {"b_in": torch.ones(149)}, ValueError, r"b_in is \[149\] but must be \[150\]"),
        (mlp_start, {"noise": torch.ones(5, 36)}, ValueError, r"noise is \[5, 36\] but must be \[5, 37\]"),
        (mlp_step, {"modulation": torch.ones(5, 300)}, ValueError, r"modulation is \[5, 300\] but must be \[6, 300\]"),
        (mlp_step, {"w_out": torch.ones(37, 149)}, ValueError, r"w_out is \[37, 149\] but must be \[K, 150\]"),
        (mlp_step, {"b_out": torch.ones(37).half()}, TypeError, "b_out is torch.float16"),
        (mlp_step, {"v_last": torch.ones(5, 37).half()}, TypeError, "v_last is torch.float16"),
        (mlp_finish, {"stream": torch.ones(12, 150)}, ValueError, r"stream is \[12, 150\] but must be \[10, 150\]"),
        (mlp_finish, {"levels": 1}, ValueError, "levels"),
        (mlp_finish, {"embeddings": torch.ones(9, 129)}, ValueError, "embeddings has 9 rows but must have 903 or more"),
    ],
)
def test_errors_name_the_argument(op: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        op(**(inputs(op) | change))


def test_results_do_not_hang_on_the_memory_they_are_written_to() -> None:
    args = inputs(mlp_start)
    expected: list[Tensor] = run(mlp_start, args)
    dirty = args | {"x": torch.full_like(args["x"], NAN), "stream": torch.full_like(args["stream"], NAN)}
    assert all(map(torch.equal, run(mlp_start, dirty), expected))
