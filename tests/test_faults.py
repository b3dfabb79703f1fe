"""Tests of the checks: each fault planted in a kernel must be caught by the check that is made for it."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from checks import assert_accurate, assert_bytes_once, assert_no_races
from fresh_process import run_python
from plant import Edit, case_of, entry_of, plant

from bench.ops.registry import Case, Entry, TensorMaker
from bench.static import frame as costs
from bench.static.counters import launches_only
from voxkern.kernels.norm_linear import launch_norm_linear

DOT = "dot(b_w, b_a, products[r])"
LOAD = "b_w = tl.load(p_w + o_n[:, None] * K + (k + o_k)[None, :], mask=m_w, other=0)"
MASK = "m_w = m_n[:, None] & m_k[None, :]"
STORE = "mask=(o_m < M)[None, :] & (o_n < N)[:, None])"
JIT = '@triton.jit(do_not_specialize=["M"])\ndef _norm_linear_kernel'
WAIT = "if arrived == n_spans - 1:"
NORM_LINEAR = entry_of("norm_linear")
ATTENTION = entry_of("paged_attention")
THREE_SPANS = Case(
    "three-spans", {"B": 1, "H": 2, "HKV": 1, "D": 20, "PAGE": 16, "length": 600, "window": 0, "max_seq_len": 640}
)
ODD, PUBLIC = case_of(NORM_LINEAR, "odd"), case_of(NORM_LINEAR, "q-b1")


def line_of(planted: Entry, text: str) -> str:
    """Return FILE:LINE of the only line with this text in the planted kernel's file, as a regular expression."""
    file = Path(inspect.getfile(planted.op.declare))
    (line,) = (i for i, source in enumerate(file.read_text().splitlines(), 1) if text in source)
    return re.escape(f"{file}:{line}")


@pytest.mark.parametrize(
    ("dtype", "edit"),
    [
        pytest.param("bf16", (DOT, f"{DOT}.to(tl.bfloat16).to(tl.float32)"), id="summed in bf16"),
        pytest.param("fp32", (MASK, "m_w = m_n[:, None]"), id="no mask on the weight's last columns"),
        pytest.param("fp32", (STORE, "mask=(o_m < M)[None, :])"), id="no mask on the output's last columns"),
        pytest.param("fp32", (STORE, "mask=(o_n < N)[:, None])"), id="no mask on the output's last rows"),
        pytest.param("fp32", (STORE, "mask=(o_m < M)[None, :] & (o_n < N - 1)[:, None])"), id="a column never written"),
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
    strays = plant(NORM_LINEAR, (MASK, "m_w = m_k[None, :]"))
    assert_accurate(strays, ODD, "fp32")  # values read past the weight's last rows are never stored
    line = line_of(strays, "b_w = tl.load(p_w + o_n")
    first = (
        r"_norm_linear_kernel: block \(0, 2, 0\) reads \d+ lanes outside of every argument, the first at p_w\[11250\]"
    )
    with pytest.raises(Exception, match=rf"{first}, at {line}"):  # 11250 = N * K
        assert_no_races(strays, ODD)


def test_overlapping_tiles_are_caught() -> None:
    """The planted kernel gives the right result: both blocks write the same value to the column that they share."""
    tiles, grid = "tl.program_id(1).to(tl.int64) * ", 'shares.grid(constants, M, triton.cdiv(N, constants["BLOCK_N"])'
    overlapping = plant(NORM_LINEAR, (f"{tiles}BLOCK_N", f"{tiles}(BLOCK_N - 1)"), (grid, f"{grid} + 1"))
    assert_accurate(overlapping, ODD, "fp32")
    line = line_of(overlapping, "tl.store(p_tile")
    first, second = r"block \(0, 0, 0\) writes p_y\[31\]", r"block \(0, 1, 0\) writes it"  # BLOCK_N is 32
    message = f"_norm_linear_kernel: {first} at {line}, {second} at {line}, and no declared atomic orders them"
    with pytest.raises(RuntimeError, match=message):
        assert_no_races(overlapping, ODD)


def test_three_spans_are_added_up_without_a_race() -> None:
    assert_no_races(ATTENTION, THREE_SPANS)


@pytest.mark.parametrize(
    ("edit", "reads_first"),
    [
        pytest.param((WAIT, "if i_s == n_spans - 1:"), True, id="the last span does not wait"),
        pytest.param((WAIT, "if arrived == n_spans - 2:"), True, id="waits for one block too few"),
        pytest.param(('sem="acq_rel"', 'sem="relaxed"'), False, id="the atomic orders nothing"),
        pytest.param(('scope="gpu"', 'scope="cta"'), False, id="the atomic is for one block"),
        pytest.param(
            ("tl.debug_barrier()  # the stores", "pass  # the stores"), False, id="no barrier before the atomic"
        ),
    ],
)
def test_a_last_block_that_does_not_wait_is_caught(edit: Edit, reads_first: bool) -> None:
    planted = plant(ATTENTION, edit)
    read = "reads {} at " + line_of(planted, "b_o = tl.load(p_part")
    write = "writes {} at " + line_of(planted, "tl.store(p_part[None, :]")
    first, second = (read, write) if reads_first else (write, read)
    message = f"_paged_attention_kernel: block .* {first}, block .* {second}, and no declared atomic orders them"
    with pytest.raises(RuntimeError, match=message.format(r"p_partial\[\d+\]", "it")):
        assert_no_races(planted, THREE_SPANS)


def test_a_last_span_that_does_not_wait_gives_the_right_result_in_the_interpreter() -> None:
    """Only the reverse order of blocks reveals the fault, because the interpreter runs the last span's block last."""
    assert_accurate(plant(ATTENTION, (WAIT, "if i_s == n_spans - 1:")), THREE_SPANS, "fp32")


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
        "shared": (
            "sm_89",
            "bf16",
            [("8        64       128      8          6", "8        64       128      8          7")],
        ),
        "binaries": ("sm_89", "bf16", [(JIT, "@triton.jit\ndef _norm_linear_kernel")]),
        "TF32 on sm_80": ("sm_80", "fp32", [(DOT, "tl.dot(b_w, b_a, products[r])")]),
        "TF32 on sm_90": ("sm_90", "fp32", [(DOT, "tl.dot(b_w, b_a, products[r])")]),
    }
    queries = [
        {"operator": "norm_linear", "case": "q-b1", "arch": arch, "dtype": dtype, "edits": edits}
        for arch, dtype, edits in plants.values()
    ]
    answer = run_python(str(Path(__file__).with_name("plant.py")), stdin=json.dumps(queries))
    return dict(zip(plants, json.loads(answer), strict=True))


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
