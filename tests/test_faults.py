"""Tests of the checks: each fault planted in a kernel must be caught by the check that is made for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import assert_accurate, assert_bytes_once, assert_within
from plant import Edit, case_of, entry_of, plant

from bench.ops.registry import ROOT, TensorMaker
from bench.static import frame as costs
from bench.static.counters import launches_only
from voxkern.kernels.norm_linear import launch_norm_linear

DOT = "b_acc = dot(b_w, tl.trans(b_a), b_acc)"
LOAD = "b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)"
STORE = "mask=m_m[None, :] & m_n[:, None])"
JIT = '@triton.jit(do_not_specialize=["M"])\ndef _norm_linear_kernel'
NORM_LINEAR = entry_of("norm_linear")
ODD, PUBLIC = case_of(NORM_LINEAR, "odd"), case_of(NORM_LINEAR, "q-b1")


@pytest.mark.parametrize(
    ("dtype", "edit"),
    [
        pytest.param("bf16", (DOT, f"{DOT}.to(tl.bfloat16).to(tl.float32)"), id="summed in bf16"),
        pytest.param("fp32", (LOAD, LOAD.replace(" & m_k[None, :]", "")), id="no mask on the weight's last columns"),
        pytest.param("fp32", (STORE, "mask=m_m[None, :])"), id="no mask on the output's last columns"),
        pytest.param("fp32", (STORE, "mask=m_n[:, None])"), id="no mask on the output's last rows"),
        pytest.param("fp32", (STORE, "mask=m_m[None, :] & (o_n < N - 1)[:, None])"), id="a column never written"),
    ],
)
def test_a_wrong_result_is_caught(dtype: str, edit: Edit) -> None:
    with pytest.raises(AssertionError):
        assert_accurate(plant(NORM_LINEAR, edit), ODD, dtype)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(("length == 0 or semantic == END_AUDIO:", "length == 0 or semantic == -7:"), id="END is not seen"),
        pytest.param(("tl.where(is_last, 0, length + 1)", "length + 1"), id="no limit"),
        pytest.param(("if length == 0 or", "if length == -7 or"), id="a request that is not there goes on"),
    ],
)
def test_a_wrong_count_is_caught(edit: Edit) -> None:
    entry = entry_of("update_decode_state")
    with pytest.raises(AssertionError):
        assert_accurate(plant(entry, edit), case_of(entry, "odd-codes"), "bf16")


def test_a_block_per_query_head_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted kernel gives the right result with the same DRAM bytes: only the repeated loads reveal the fault."""
    attention = entry_of("paged_attention")
    first = "i_s, i_kv, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)"
    blocks = "grid = (min(spans, triton.cdiv(block_table.shape[1] * PAGE, SPAN)), HKV, B)"
    planted = plant(attention, (first, f"{first} // 4"), (blocks, blocks.replace("HKV", "4 * HKV")))
    assert_accurate(planted, case_of(attention, "odd-one"), "fp32")
    right = costs.cache_traffic(64)
    monkeypatch.setattr(costs, "launch_paged_attention", planted.op.launch)
    wrong = costs.cache_traffic(64)
    assert wrong.kv == right.kv
    assert (right.again, wrong.again) == (0, 3 * right.kv)


def test_a_forgotten_mask_without_a_wrong_result_is_caught() -> None:
    strays = plant(NORM_LINEAR, (LOAD, LOAD.replace("m_n[:, None] & ", "")))
    assert_accurate(strays, ODD, "fp32")  # values read past the weight's last rows are never stored
    with pytest.raises(Exception, match="outside of every argument"):
        assert_within(strays, ODD)


def test_a_weight_tile_loaded_twice_is_caught() -> None:
    twice = plant(NORM_LINEAR, (LOAD, f"{LOAD}\n        b_w = 0.5 * (b_w + {LOAD[6:]}).to(b_w.dtype)"))
    with pytest.raises(AssertionError, match="weight is loaded more than once"):
        assert_bytes_once(twice, PUBLIC, "fp32", "sm_90")


def test_a_cat_between_two_launches_is_caught() -> None:
    args = NORM_LINEAR.args(ODD, TensorMaker())
    out = torch.empty(19, 75)

    def frame() -> None:
        launch_norm_linear(out, **args)
        both = torch.cat([args["x"], args["x"]], 1)[:, :150]
        launch_norm_linear(out, **(args | {"x": both}))

    with pytest.raises(RuntimeError, match=r"aten.cat.default is called inside a frame"), launches_only():
        frame()


@pytest.fixture(scope="module")
def complaints() -> dict[str, list[str]]:
    """Return the faults that the ledger finds in planted kernels, by the name of the planted fault.

    Another process compiles the kernels, because these faults are not visible in the interpreter.
    """
    plants: dict[str, tuple[str, str, list[Edit]]] = {
        "nothing": ("sm_89", "bf16", []),
        "shared": ("sm_89", "bf16", [("128      8          6", "128      8          7")]),
        "binaries": ("sm_89", "bf16", [(JIT, "@triton.jit\ndef _norm_linear_kernel")]),
        "TF32 on sm_80": ("sm_80", "fp32", [(DOT, "b_acc = tl.dot(b_w, tl.trans(b_a), b_acc)")]),
        "TF32 on sm_90": ("sm_90", "fp32", [(DOT, "b_acc = tl.dot(b_w, tl.trans(b_a), b_acc)")]),
    }
    queries = [
        {"operator": "norm_linear", "case": "q-b1", "arch": arch, "dtype": dtype, "edits": edits}
        for arch, dtype, edits in plants.values()
    ]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    answer = subprocess.run(
        [sys.executable, Path(__file__).with_name("plant.py")],
        input=json.dumps(queries), capture_output=True, text=True, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return dict(zip(plants, json.loads(answer.stdout), strict=True))


def test_the_kernel_as_it_is_has_no_complaints(complaints: dict[str, list[str]]) -> None:
    assert complaints["nothing"] == []


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ("shared", "bytes of shared memory, sm_89 has 101,376"),
        ("binaries", "binaries where only one is allowed"),
        ("TF32 on sm_80", "multiplies fp32 as TF32"),
        ("TF32 on sm_90", "multiplies fp32 as TF32"),
    ],
)
def test_a_fault_of_the_machine_code_is_caught(complaints: dict[str, list[str]], planted: str, complaint: str) -> None:
    assert len(complaints[planted]) == 1
    assert complaint in complaints[planted][0]
