"""Tests of flow_start, flow_step and flow_finish: noise, END, guidance, ties, NaN.

A parameter `mlp` of 0 chooses the arguments of a transformer, RMSNorm and a time token; 1 chooses those of an MLP,
modulated layer norm and biases. tests/test_operators.py has the tests that every operator must pass.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import CPU, assert_accurate, moved, own_or
from plant import case_of, entry_of
from poison import assert_bands, guarded
from torch import Tensor

from bench.ops import flow as flow_bench
from bench.ops.registry import TensorMaker
from bench.static.counters import launches_only
from voxkern.kernels.flow import (
    flow_finish,
    flow_start,
    flow_step,
    launch_flow_finish,
    launch_flow_start,
    launch_flow_step,
)
from voxkern.reference.flow_head import quantise
from voxkern.reference.noise import noise, quantile_table, seed_tensor

NAN = float("nan")
INPUTS = {
    flow_start: flow_bench.flow_start_inputs,
    flow_step: flow_bench.flow_step_inputs,
    flow_finish: flow_bench.flow_finish_inputs,
}
OWN = ("seed", "frame", "cfg_alpha", "x", "v_last", "semantic", "y", "tokens")  # have rows of each request
BOTH_NETWORKS = pytest.mark.parametrize("mlp", [0, 1], ids=["transformer", "mlp"])
EACH_OPERATOR = pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.name)
EACH_STEP = pytest.mark.parametrize("op", [flow_step, flow_finish], ids=lambda op: op.name)


def inputs(op: Any, mlp: int, device: torch.device, dtype: torch.dtype = torch.float32, **other: Any) -> dict[str, Any]:
    """Return the arguments of `op` for 5 requests, prepared for 7; `other` replaces sizes."""
    sizes = flow_bench.ODD_MLP if mlp else flow_bench.ODD
    return INPUTS[op](SimpleNamespace(**{**sizes, **other}), TensorMaker(dtype, str(device)))


def rows_of(i: list[int], n: int) -> list[int]:
    """Return the numbers of the rows that belong to the requests `i`, out of n rows: 1, 2 or 6 parts of 5 rows each."""
    return [part * 5 + b for part in range(n // 5) for b in i]


def of_requests(args: dict[str, Any], i: list[int]) -> dict[str, Any]:
    """Return the arguments of the requests with the indices `i`, out of the five.

    Row 0 of `modulation` belongs to all rows without the hidden state, and rows 1 to 5 belong to the requests.
    """
    mine = {name: args[name][rows_of(i, len(args[name]))] for name in OWN if name in args}
    if args.get("modulation") is not None:
        mine["modulation"] = args["modulation"][[0] + [1 + b for b in i]]
    return args | mine


def run(op: Any, args: dict[str, Any]) -> list[Tensor]:
    """Run `op` on copies of its arguments; return the results, then the arguments that `op` writes to."""
    args = {name: arg.clone() if isinstance(arg, Tensor) else arg for name, arg in args.items()}
    return [*(op(**args) or ()), *(args[name] for name in op.mutates)]


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow), torch.float32])
@BOTH_NETWORKS
@EACH_OPERATOR
def test_a_request_does_not_depend_on_the_others(
    op: Any, mlp: int, dtype: torch.dtype, arch: str, device: torch.device
) -> None:
    args = inputs(op, mlp, device, dtype)
    with own_or(arch, device, first="interpreter"):
        whole = run(op, args)
        for some in ([0], [2], [4], [4, 0, 1]):
            for one, all_ in zip(run(op, of_requests(args, some)), whole, strict=True):
                assert torch.equal(one, all_[rows_of(some, len(all_))])


@EACH_OPERATOR
def test_right_at_the_width_of_mar_h(op: Any, device: torch.device) -> None:
    entry = entry_of(op.name)
    with own_or("sm_90", device):
        assert_accurate(entry, case_of(entry, "mlp-b1"), "bf16", device=device)


@pytest.mark.parametrize("K", [1, 5, 36, 37])
def test_noise_is_the_reference_s_to_the_bit(K: int, device: torch.device) -> None:
    """The reference's noise is drawn on the CPU, and has the same bits on a GPU."""
    seed = seed_tensor([0, 1, 2**31, 2**32 + 7, 2**63 - 1, 2**64 - 1])
    frame = torch.tensor([0, 1, 2, 2047, 2**31, 2**32 - 1])
    expected = noise(seed, frame, K)
    seed, frame, table = seed.to(device), frame.to(device), quantile_table().to(device)
    empty = partial(torch.empty, device=device)
    x, written = empty(6, K), empty(36, 40)
    w_in, time = torch.ones(40, K, device=device), torch.zeros(40, device=device)
    flow_start(seed, frame, None, table, w_in, None, time, x, written, 6)
    assert torch.equal(x.cpu(), expected)
    given, again = empty(6, K), empty(36, 40)
    flow_start(seed + 1, frame, x, table, w_in, None, time, given, again, 6)
    assert torch.equal(given, x)
    assert torch.equal(again[:24], written[:24])
    assert again[24:].isnan().all()  # this kernel does not write the hidden state's rows
    of_mlp, stream = empty(6, K), empty(12, 40)
    flow_start(seed, frame, None, table, w_in, torch.full((40,), 3.0, device=device), None, of_mlp, stream, 6)
    assert torch.equal(of_mlp, x)
    torch.testing.assert_close(stream, (x.sum(1) + 3)[:, None].expand(6, 40).repeat(2, 1))


@BOTH_NETWORKS
@EACH_STEP
def test_guidance_of_one_reads_the_condition_alone_and_of_zero_the_other(
    op: Any, mlp: int, device: torch.device
) -> None:
    args = inputs(op, mlp, device)
    for alpha, other, rows in ((1.0, slice(5, 10), slice(0, 1)), (0.0, slice(0, 5), slice(1, 6))):
        args["cfg_alpha"] = torch.full((5,), alpha, device=device)
        expected = run(op, args)
        spoilt = {"y": args["y"].clone()}
        spoilt["y"][other] = 123.0
        spoilt["y"][10:] = NAN  # the rows of the t and h tokens
        if mlp:
            spoilt["modulation"] = args["modulation"].clone()
            spoilt["modulation"][rows] = 7.0
        assert all(map(torch.equal, run(op, args | spoilt), expected))


@BOTH_NETWORKS
def test_a_first_step_does_not_read_the_last_velocity(mlp: int, device: torch.device) -> None:
    args = inputs(flow_step, mlp, device)
    assert args["ab2_ratio"] == 0
    expected = run(flow_step, args)
    assert all(map(torch.equal, run(flow_step, args | {"v_last": torch.full_like(args["x"], NAN)}), expected))


def test_the_tokens_of_an_mlp_may_be_the_output_itself(device: torch.device) -> None:
    args = inputs(flow_step, 1, device)
    x, v_last, tokens = run(flow_step, args)
    stream, mine = args["y"].clone(), {name: args[name].clone() for name in ("x", "v_last")}
    flow_step(**(args | mine | {"y": stream, "tokens": stream}))
    assert torch.equal(stream, tokens)
    assert torch.equal(mine["x"], x)
    assert torch.equal(mine["v_last"], v_last)


def test_a_stream_of_one_value_gives_its_shift_s_velocity(device: torch.device) -> None:
    """A row of equal values has variance 0: the normalised row must be zero, without a division by zero."""
    args = inputs(flow_finish, 1, device, K=36)
    args["y"][:] = 9.0
    shift = args["modulation"][:, :150]
    v = torch.nn.functional.linear(shift, args["w_out"], args["b_out"])
    alpha = args["cfg_alpha"][:, None]
    *_, v_last = run(flow_finish, args)
    torch.testing.assert_close(v_last, alpha * v[1:] + (1 - alpha) * v[0])


@BOTH_NETWORKS
def test_end_gives_codes_of_two_and_their_embeddings(mlp: int, device: torch.device) -> None:
    args = inputs(flow_finish, mlp, device)
    args["x"][3, 0] = NAN
    codes, next_embedding, x, _ = run(flow_finish, args)
    assert args["semantic"].tolist()[1] == 1
    assert codes[1].tolist() == [1] + [2] * 37
    assert codes[3, 1] == 2  # NaN is level 0
    rows = torch.tensor([1] + [52 + 23 * j + 2 for j in range(37)], device=device)
    torch.testing.assert_close(next_embedding[1], args["embeddings"][rows].sum(0))
    assert (codes[0, 1:] != 2).any()
    assert x[0].abs().max() > 1  # the state in x is not clamped


def finish_at(x: Tensor, levels: int) -> Tensor:
    """Return the acoustic levels of the state `x`, after a step of length 0 that leaves `x` as it is."""
    args = inputs(flow_finish, 0, x.device, B=1, max_batch=1, K=x.shape[1], levels=levels)
    codes, _, left, _ = run(flow_finish, args | {"x": x, "dt": 0.0})
    assert torch.equal(left.nan_to_num(7.0), x.nan_to_num(7.0))
    return codes[:, 1:] - 2


@pytest.mark.parametrize("levels", [2, 8, 21])
def test_levels_are_the_reference_s_on_ties_and_beyond_the_ends(levels: int, device: torch.device) -> None:
    ties = (torch.arange(levels - 1) + 0.5) * 2 / (levels - 1) - 1
    near = torch.cat([ties, ties.nextafter(torch.tensor(9.0)), ties.nextafter(torch.tensor(-9.0))])
    x = torch.cat([near, torch.tensor([-1, 1, -1.5, 1.5, 1e30, -1e30, 0.0, -0.0])])[None].to(device)
    assert torch.equal(finish_at(x, levels), quantise(x, levels))


def test_a_state_of_nan_or_infinity_has_levels(device: torch.device) -> None:
    x = torch.tensor([[NAN, float("inf"), -float("inf"), 0.0, NAN]], device=device)
    assert finish_at(x, 21).tolist() == [[0, 20, 0, 10, 0]]


@BOTH_NETWORKS
def test_fp16_does_not_overflow_inside(mlp: int, device: torch.device) -> None:
    args = inputs(flow_step, mlp, device, torch.float16)
    args["y"] = (args["y"] * 12000).clamp(-60000, 60000)
    if not mlp:
        args["norm"] = args["norm"] * 30
    x, v_last, written = run(flow_step, args)
    assert all(result.isfinite().all() for result in (x, v_last, written))
    expected = args["x"].clone()
    names = ("norm", "modulation", "w_out", "b_out", "eps", "cfg_alpha", "dt", "ab2_ratio")
    flow_bench.solver_step(args["y"], *(args[name] for name in names), expected, args["v_last"].clone())
    torch.testing.assert_close(x, expected)


@BOTH_NETWORKS
def test_results_do_not_depend_on_the_memory_they_are_written_to(mlp: int, device: torch.device) -> None:
    args = inputs(flow_start, mlp, device)
    x, tokens = run(flow_start, args)
    dirty = {name: torch.full_like(args[name], NAN) for name in ("x", "tokens")}
    again, written = run(flow_start, args | dirty)
    assert torch.equal(again, x)
    assert torch.equal(written[:10], tokens[:10])


@pytest.mark.interpreter("launches are recorded, and other work is refused")
@BOTH_NETWORKS
def test_launchers_are_launches_alone(mlp: int) -> None:
    start, step, finish = (inputs(op, mlp, CPU, torch.bfloat16) for op in INPUTS)
    frame = guarded(torch.empty(5, 38, dtype=torch.int64)), guarded(torch.empty(5, 129).bfloat16())
    with launches_only() as launches:
        launch_flow_start(**start)
        launch_flow_step(**step)
        launch_flow_finish(frame, **finish)
    assert len(launches) == 3
    for tensor in frame:
        assert_bands(tensor)


@pytest.mark.parametrize(
    ("op", "mlp", "change", "error", "message"),
    [
        (flow_start, 0, {"max_batch": 65}, ValueError, r"max_batch is 65 but must lie in 1..64"),
        (flow_start, 0, {"seed": torch.zeros(5).int()}, TypeError, r"seed is torch.int32 but must be torch.int64"),
        (flow_start, 0, {"noise": torch.ones(5, 36)}, ValueError, r"noise is \[5, 36\] but must be \[5, 37\]"),
        (flow_start, 0, {"quantiles": torch.ones(9)}, ValueError, r"quantiles is \[9\] but must be \[65536\]"),
        (flow_start, 0, {"tokens": torch.ones(29, 150)}, ValueError, r"tokens is \[29, 150\] but must be \[30, 150\]"),
        (flow_start, 1, {"tokens": torch.ones(9, 150)}, ValueError, r"tokens is \[9, 150\] but must be \[10, 150\]"),
        (flow_start, 1, {"b_in": torch.ones(149)}, ValueError, r"b_in is \[149\] but must be \[150\]"),
        (flow_start, 0, {"time": torch.ones(149)}, ValueError, r"time is \[149\] but must be \[150\]"),
        (flow_step, 0, {"x": torch.ones(5, 37).half()}, TypeError, r"x is torch.float16 but must be torch.float32"),
        (flow_step, 0, {"y": torch.ones(9, 150)}, ValueError, r"y has 9 rows but must have 2B = 10 or more"),
        (flow_step, 0, {"w_out": torch.ones(37, 151)[:, 1:]}, ValueError, r"w_out .* must be contiguous"),
        (flow_step, 0, {"cfg_alpha": torch.ones(4)}, ValueError, r"cfg_alpha is \[4\] but must be \[5\]"),
        (flow_step, 0, {"norm": None}, ValueError, "norm and modulation are both given or both None"),
        (flow_step, 1, {"norm": torch.ones(150)}, ValueError, "norm and modulation are both given or both None"),
        (flow_step, 1, {"modulation": torch.ones(5, 300)}, ValueError, r"modulation is \[5, 300\] but must be \[6, "),
        (flow_step, 1, {"y": torch.ones(10, 149)}, ValueError, r"y is \[10, 149\] but must be \[rows, 150\]"),
        (flow_step, 1, {"b_out": torch.ones(37).half()}, TypeError, "b_out is torch.float16"),
        (flow_step, 1, {"v_last": torch.ones(5, 37).half()}, TypeError, "v_last is torch.float16"),
        (flow_finish, 0, {"semantic": torch.ones(5)}, TypeError, r"semantic is torch.float32 but must be torch.int64"),
        (flow_finish, 0, {"embeddings": torch.ones(902, 129)}, ValueError,
         r"902 rows but must have 903 or more: semantic_size \+ 2 = 52 .* K \* \(levels \+ 2\) = 851 for"),
        (flow_finish, 1, {"levels": 1}, ValueError, "levels"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    op: Any, mlp: int, change: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    with pytest.raises(error, match=message):
        op(**(inputs(op, mlp, device) | moved(change, device)))
