"""Tests of the launch that computes q, k and v of the flow head's tokens, and attention over the tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import GuardedMemory, assert_accurate, assert_bands, assert_no_races, guarded, own_or
from plant import case_of, entry_of, plant
from torch import Tensor

from bench.ops.norm_qkv_attention import norm_qkv_attention_inputs, norm_qkv_attention_reference
from bench.ops.registry import Case, Entry, TensorMaker, to_dtype
from bench.static.machines import MACHINES
from voxkern.kernels.launch_config import architecture, override, target_arch
from voxkern.kernels.norm_qkv_attention import (
    can_fuse_attention,
    launch_norm_qkv_attention,
    norm_qkv_attention,
    norm_qkv_attention_shares,
)
from voxkern.kernels.shares import Scratch, new_scratch

pytestmark = pytest.mark.skipif(
    not entry_of("norm_qkv_attention").runs_on(architecture()), reason="this GPU has no launch configs"
)
NAN = float("nan")
B, MAX_BATCH = 9, 10  # with tiles of 16 rows: 18 pairs are two tiles of rows
SIZES = {"B": B, "max_batch": MAX_BATCH, "n_tokens": 3, "H": 4, "HKV": 2, "D": 64, "K": 150}


def inputs(**other: Any) -> dict[str, Any]:
    return norm_qkv_attention_inputs(SimpleNamespace(**{**SIZES, **other}), TensorMaker(torch.bfloat16))


def rows_of(i: list[int], n_tokens: int = 3) -> list[int]:
    """Return the numbers of the rows of the requests `i`, in both branches."""
    return [part * B + b for part in range(2 * n_tokens) for b in i]


@pytest.mark.interpreter("the number of blocks is set, and the interpreter's tiles")
@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("blocks", [2, 6, 10, 48, 66])
def test_any_number_of_blocks_gives_the_right_result(blocks: int, n_tokens: int) -> None:
    """Each of the two tiles of rows has 32 tiles of weights with 3 steps. A block has 32 tiles to less than one."""
    args = inputs(n_tokens=n_tokens)
    wide = to_dtype(args, torch.float64)
    expected = norm_qkv_attention_reference(**wide)
    out = guarded(torch.empty(2 * n_tokens * B, 256).bfloat16())
    args["qkv"] = guarded(args["qkv"])
    with target_arch("interpreter", blocks), GuardedMemory():
        shares = norm_qkv_attention_shares(args["wq"], args["wk"], torch.bfloat16, 2, MAX_BATCH)
        made = new_scratch(out, [shares])
        scratch = Scratch(guarded(made.parts), guarded(made.arrived))
        for _ in range(2):  # the second launch finds the counters as the first one left them
            launch_norm_qkv_attention(out, **args, scratch=scratch)
    for tensor in (out, args["qkv"], scratch.parts, scratch.arrived):
        assert_bands(tensor)
    assert scratch.arrived.eq(0).all()
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(args["qkv"].double(), wide["qkv"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("arch", ["interpreter", "sm_90", "sm_80", "sm_89"])
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_a_request_does_not_depend_on_the_others(n_tokens: int, arch: str, device: torch.device) -> None:
    made = inputs(n_tokens=n_tokens, D=128 if arch.startswith("sm_8") else 64)  # a multiple of BLOCK_N
    args = {name: arg.to(device) if isinstance(arg, Tensor) else arg for name, arg in made.items()}
    with own_or(arch, device, first="interpreter"):
        whole = norm_qkv_attention(**args)
        for part in ([0], [B // 2], [B - 1, 0, 1]):
            mine = {name: args[name][rows_of(part)] for name in ("qkv", "x")}
            assert torch.equal(norm_qkv_attention(**args | mine), whole[rows_of(part, n_tokens)])


def test_a_request_of_nan_stays_alone(device: torch.device) -> None:
    args = {name: arg.to(device) if isinstance(arg, Tensor) else arg for name, arg in inputs().items()}
    expected = norm_qkv_attention(**args)
    args["x"][[2, 3 * B + 4], 7] = NAN  # the x token of request 2 in branch 0, the t token of request 4 in branch 1
    result = norm_qkv_attention(**args)
    own = [part * 2 * B + row for part in range(3) for row in (2, B + 4)]
    others = [row for row in range(6 * B) if row not in own]
    assert result[own].isnan().all()
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("kv_cost", [1, 3])
def test_queries_that_are_not_needed_are_left_unchanged(kv_cost: int, device: torch.device) -> None:
    args = {name: arg.to(device) if isinstance(arg, Tensor) else arg for name, arg in inputs(n_tokens=1).items()}
    args["qkv"] = torch.full_like(args["qkv"], 7.0)
    with override("norm_qkv_attention", KV_COST=kv_cost):
        norm_qkv_attention(**args)
    is_old = args["qkv"].eq(7.0)
    assert is_old[2 * B :, :256].all()
    assert not is_old[: 2 * B].any()
    assert not is_old[:, 256:].any()


@pytest.mark.interpreter("the launch configs are those of named architectures")
def test_which_sizes_fit_one_launch() -> None:
    def fits(
        dim: int = 4096, dtype: torch.dtype = torch.bfloat16, heads: int = 32, kv: int = 8, batch: int = 32
    ) -> bool:
        return can_fuse_attention(torch.empty(dim, 3072, dtype=dtype, device="meta"), torch.bfloat16, heads, kv, batch)

    with target_arch("sm_90"):
        assert fits()
        assert fits(dtype=torch.float16)
        assert not fits(dtype=torch.int8)
        assert not fits(kv=4)  # 24 queries of a pair share a key head
        assert not fits(heads=16, kv=8)  # heads of 256 columns
        assert not fits(heads=64, kv=16)  # heads of 64 columns, and tiles of 128 rows of the weight
        assert fits(heads=64, kv=16, batch=16)  # tiles of 64
        assert not can_fuse_attention(torch.empty(4096, 3072, device="meta"), torch.float32, 32, 8, 32)
    for arch in MACHINES:
        with target_arch(arch):
            is_listed = arch in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
            assert fits() == is_listed == entry_of("norm_qkv_attention").runs_on(arch)


@pytest.mark.interpreter("accesses of each block are recorded")
@pytest.mark.parametrize(
    ("edit", "case_name"),
    [
        pytest.param(
            (", CHEAP_STEPS, KV_COST\n    )", "\n    )"), "odd-last", id="add_parts takes all steps to cost 1"
        ),
        pytest.param(
            ("(which == 0) & (KV_COST > 1)", "(which >= 0) & (KV_COST > 1)"), "odd-last", id="only x tokens have keys"
        ),
        pytest.param(
            ("(D // BLOCK_N) - 1:", "(D // BLOCK_N) - 2:"), "odd", id="a block does not wait for the last tile"
        ),
        pytest.param(('sem="acq_rel"', 'sem="relaxed"'), "odd", id="the atomic orders nothing"),
        pytest.param(("tl.debug_barrier()  # as in", "pass  # as in"), "odd", id="no barrier before the atomic"),
        pytest.param(("+ i_m * HKV + i_kv", "+ i_kv"), "odd", id="one counter for all tiles of rows"),
        pytest.param(("tl.load(p_k + HKV * D,", "tl.load(p_k,"), "odd", id="keys in place of values"),
        pytest.param(("ROWS)[None, None, :] < 3", "ROWS)[None, None, :] < 4"), "odd", id="a key of padding"),
        pytest.param(("tl.store(p_counter, 0)", "pass"), "odd", id="the counter is not reset"),
    ],
)
def test_a_planted_fault_is_caught(edit: tuple[str, str], case_name: str) -> None:
    entry = plant(entry_of("norm_qkv_attention"), edit)
    case = case_of(entry, case_name)
    with pytest.raises((RuntimeError, AssertionError)):
        assert_right(entry, case)


@pytest.mark.interpreter("accesses of each block are recorded")
@pytest.mark.parametrize("case_name", ["odd", "odd-last"])
@pytest.mark.parametrize("kv_cost", [1, 2, 3])
def test_the_kernel_as_it_is_passes_the_checks(kv_cost: int, case_name: str) -> None:
    with override("norm_qkv_attention", KV_COST=kv_cost):
        assert_right(entry_of("norm_qkv_attention"), case_of(entry_of("norm_qkv_attention"), case_name))


def assert_right(entry: Entry, case: Case) -> None:
    """Check one case for races and accuracy, and that all counters are zero after a launch."""
    assert_no_races(entry, case)
    assert_accurate(entry, case, "bf16")
    op, args, size = entry.op, entry.args(case, TensorMaker(torch.bfloat16)), 1 << 20
    out = op.declare(**args)
    scratch = Scratch(torch.empty(size), torch.zeros(size, dtype=torch.int32))
    op.launch(out, **args, scratch=scratch)
    assert scratch.arrived.eq(0).all()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("n_tokens", 2, ValueError, "n_tokens is 2 but must be 3, or 1"),
        ("n_heads", 3, ValueError, r"qkv has 512 columns, which do not split into 3 \+ 2 \* 2 heads"),
        ("n_heads", 12, ValueError, r"wq has 256 rows but must have 384, for 12 heads of 32 \(n_heads\)"),
        ("max_batch", 8, ValueError, "x has 54 rows but must have 6 per request, for 1..8 requests"),
        ("qkv", torch.empty(54, 500).bfloat16(), ValueError, r"qkv is \[54, 500\] but must be \[54, 512\]"),
        ("wq", torch.empty(256, 150), TypeError, "wq is torch.float32 but must be torch.bfloat16"),
    ],
)
def test_errors(name: str, value: object, error: type[Exception], message: str, device: torch.device) -> None:
    args = {key: arg.to(device) if isinstance(arg, Tensor) else arg for key, arg in (inputs() | {name: value}).items()}
    with pytest.raises(error, match=message):
        norm_qkv_attention(**args)


def test_sizes_that_do_not_fit_one_launch_are_refused() -> None:
    with pytest.raises(ValueError, match=r"wq has 8 heads of 64 columns for each key head, but may have 5 of 128"):
        norm_qkv_attention(**inputs(H=8, HKV=1))
    with pytest.raises(ValueError, match=r"wq has heads of 24 columns, but .* must be a multiple of 16"):
        norm_qkv_attention(**inputs(D=24))
    with pytest.raises(ValueError, match=r"no launch config of norm_qkv_attention for .* fp32"):
        norm_qkv_attention(**norm_qkv_attention_inputs(SimpleNamespace(**SIZES), TensorMaker()))
