"""Tests of token attention and the semantic argmax; test_operators.py has the tests that every operator must pass."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import own_or
from poison import assert_bands, guarded
from torch import Tensor

from bench.ops import semantic_argmax as argmax_bench
from bench.ops import token_attention as attention_bench
from bench.ops.registry import TensorMaker
from bench.static.counters import counting, launches_only
from voxkern.kernels import launch_config
from voxkern.kernels.semantic_argmax import (
    SEMANTIC_ARGMAX,
    launch_semantic_argmax,
    semantic_argmax,
    semantic_argmax_scratch,
)
from voxkern.kernels.token_attention import launch_token_attention, token_attention, token_attention_linear
from voxkern.reference.config import NOT_FINITE

NAN = float("nan")


def token_sizes(**other: Any) -> SimpleNamespace:
    wanted = {"B": 5, "max_batch": 6, "n_tokens": 3, "H": 4, "HKV": 2, "D": 16}
    return SimpleNamespace(**{**wanted, **other})


def semantic_sizes(**other: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"B": 19, "rows": 90, "K": 130, "N": 83, "max_batch": 20, **other})


def rows_of(i: list[int], B: int, n: int) -> list[int]:
    """Return the numbers of the rows that belong to the requests `i`, out of an argument's n rows.

    All requests share the row of an argument with one row. Other arguments have 1, 2, 4 or 6 parts of B rows, and each
    part has one row per request.
    """
    return [0] if n == 1 else [part * B + b for part in range(n // B) for b in i]


# by name: an operator, the function that makes its arguments, and the arguments that have rows for each request
CASES: dict[str, tuple[Any, Callable[[TensorMaker], dict[str, Any]], tuple[str, ...]]] = {
    "tokens": (token_attention, lambda make: attention_bench.token_attention_inputs(token_sizes(), make), ("qkv",)),
    "tokens-last": (token_attention, lambda make: attention_bench.token_attention_inputs(token_sizes(n_tokens=1), make),
                    ("qkv",)),
    "semantic": (semantic_argmax, lambda make: argmax_bench.semantic_argmax_inputs(semantic_sizes(), make), ("h",)),
}  # fmt: skip


def run(op: Any, args: dict[str, Any]) -> list[Tensor]:
    """Run `op` on copies of its arguments; return the results, then the arguments that `op` writes to."""
    args = {name: arg.clone() if isinstance(arg, Tensor) else arg for name, arg in args.items()}
    out = op(**args)
    returned = [] if out is None else [out] if isinstance(out, Tensor) else list(out)
    return returned + [args[name] for name in op.mutates]


@pytest.mark.parametrize("arch", ["interpreter", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_a_request_does_not_depend_on_the_others(
    name: str, dtype: torch.dtype, arch: str, device: torch.device
) -> None:
    op, inputs, own = CASES[name]
    args = inputs(TensorMaker(dtype, str(device)))
    B = {"semantic": 19}.get(name, 5)
    with own_or(arch, device, first="interpreter"):
        whole = run(op, args)
        for part in ([0], [B // 2], [B - 1], [B - 1, 0, 1]):
            mine = {n: args[n][rows_of(part, B, len(args[n]))] for n in own}
            for one, all_ in zip(run(op, args | mine), whole, strict=True):
                assert torch.equal(one, all_[rows_of(part, B, len(all_))])


def test_heads_that_do_not_fit_into_shared_memory() -> None:
    sizes = SimpleNamespace(B=1, max_batch=1, n_tokens=3, N=40, H=8, HKV=1, D=128)
    args = attention_bench.token_attention_linear_inputs(sizes, TensorMaker(torch.bfloat16))
    with pytest.raises(ValueError, match=r"have 1024 columns .* but may have 512"):
        token_attention_linear(**args)


@pytest.mark.interpreter("loads are counted by address")
def test_attention_loads_each_element_in_one_block() -> None:
    args = attention_bench.token_attention_inputs(token_sizes(), TensorMaker())
    with counting(whole=True) as launches:
        token_attention(**args)
    (launch,) = launches
    blocks = [block.distinct("p_qkv") for block in launch.blocks.values()]
    assert sum(map(len, blocks)) == args["qkv"].numel()


def codes_of(h: Tensor, weight: Tensor, n_codes: int) -> list[int]:
    return semantic_argmax(h, weight, n_codes, len(h)).tolist()  # type: ignore[no-any-return]


def test_ties_go_to_the_lowest_index(device: torch.device) -> None:
    weight = torch.zeros(90, 70, device=device)
    weight[[0, 5, 40, 41, 84, 85]] = 3.0  # row 0 is EMPTY, row 85 is padding, and a tile has 32 rows
    weight[[7, 40, 84]] += 1.0
    h, ones = torch.ones(4, 70, device=device), torch.ones(1, 70, device=device)
    h[1], h[2] = 0.0, -0.0  # all logits are zeros, of either sign
    h[3] = -1.0
    assert codes_of(h, weight, 85) == [40, 1, 1, 1]
    weight[1:40] = -1.0
    weight[44:] = -1.0
    assert codes_of(ones, -weight.abs(), 85) == [42]
    weight[[42, 43]] = torch.tensor([[-0.0], [0.0]], device=device)
    assert codes_of(ones, -weight.abs(), 85) == [42]


def test_the_best_code_at_either_end_and_never_a_masked_one(device: torch.device) -> None:
    weight = torch.randn(90, 70).to(device)
    for best in (1, 31, 32, 84):
        h = weight[best] + 0.0
        weight[[0, 85, 89]] = 10 * h
        assert codes_of(h[None] / h.norm(), weight, 85) == [best]


def test_infinite_and_undefined_logits(device: torch.device) -> None:
    weight = torch.ones(90, 70, device=device)
    h = torch.stack([torch.full((70,), v, device=device) for v in (NAN, 1.0, float("inf"), -float("inf"))])
    assert codes_of(h, weight, 85) == [NOT_FINITE, 1, NOT_FINITE, NOT_FINITE]  # the second request is unaffected
    weight[50] = 2.0
    assert codes_of(h[1:2], weight, 85) == [50]
    weight[9, 3] = NAN
    assert codes_of(h[1:2], weight, 85) == [NOT_FINITE]


@pytest.mark.interpreter("bytes are counted by address")
def test_the_semantic_head_reads_what_counts_once_and_leaves_no_logits() -> None:
    case = next(case for case in argmax_bench.ENTRIES[0].cases if case.name == "frame-b32")
    args = argmax_bench.ENTRIES[0].args(case, TensorMaker(torch.bfloat16))
    with launch_config.target_arch("sm_90"), counting() as launches:
        semantic_argmax(**args)
    assert len(launches) == 1
    weight = launches[0].of(args["weight"])
    assert (weight.dram, weight.again) == (8194 * 3072 * 2, 0)
    assert launches[0].constants["TILES"] == 129


@pytest.mark.interpreter("the launch configs are those of named architectures")
def test_launch_config_is_chosen_by_max_batch() -> None:
    def choose(rows: int) -> dict[str, Any]:
        return SEMANTIC_ARGMAX(N=8194, K=3072, dtype=torch.bfloat16, rows=rows)

    with launch_config.target_arch("sm_90"):
        assert choose(1) == choose(8) != choose(9)
        assert choose(64)["BLOCK_B"] == 32


@pytest.mark.interpreter("launches are recorded, and other work is refused")
def test_launchers_are_launches_alone() -> None:
    make = TensorMaker(torch.bfloat16)
    attend = attention_bench.token_attention_inputs(token_sizes(), make)
    head = argmax_bench.semantic_argmax_inputs(semantic_sizes(), make)
    out, codes = guarded(torch.empty(30, 64).bfloat16()), guarded(torch.empty(19, dtype=torch.int64))
    best, arrived = semantic_argmax_scratch(head["weight"], torch.bfloat16, head["n_codes"], head["max_batch"])
    scratch = guarded(best), guarded(arrived)
    with launches_only() as launches:
        launch_token_attention(out, **attend)
        launch_semantic_argmax(codes, **head, scratch=scratch)
    assert len(launches) == 2
    for tensor in (out, codes, *scratch):
        assert_bands(tensor)
    assert scratch[1].eq(0).all()  # the next launch counts from zero
    assert torch.equal(codes, semantic_argmax(**head))


def wrong(base: str, device: torch.device, **change: Any) -> dict[str, Any]:
    _, inputs, _ = CASES[base]
    args = inputs(TensorMaker(device=str(device)))
    return args | {name: value(args[name]) if callable(value) else value for name, value in change.items()}


@pytest.mark.parametrize(
    ("base", "change", "error", "message"),
    [
        ("tokens", {"n_heads": 3}, ValueError, r"qkv has 128 columns, which do not split into 3 \+ 2 \* 2 heads"),
        ("tokens", {"n_tokens": 2}, ValueError, r"n_tokens is 2 but must be 3, or 1"),
        ("tokens", {"qkv": lambda t: t[:27]}, ValueError, r"qkv has 27 rows but must have 6 per request, for 1..6"),
        ("tokens", {"qkv": lambda t: t.double()}, TypeError, r"qkv is torch.float64 but must be torch.float32 or"),
        ("tokens", {"max_batch": 4}, ValueError, r"qkv has 30 rows but .* 1..4 requests \(max_batch\)"),
        ("semantic", {"n_codes": 91}, ValueError, r"n_codes is 91 but must lie in 2..90"),
        ("semantic", {"weight": lambda t: t[:, 1:]}, ValueError, r"weight is \[90, 129\] but must be \[N, 130\]"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(
    base: str, change: dict[str, Any], error: type[Exception], message: str, device: torch.device
) -> None:
    with pytest.raises(error, match=message):
        CASES[base][0](**wrong(base, device, **change))
