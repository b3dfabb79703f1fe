"""Tests that the bytes and multiply-adds that the operators' entries state agree with independent counts.

Bytes are counted in Triton's interpreter, by addresses. Multiply-adds are counted by PyTorch, in the references.
"""

from dataclasses import replace

import pytest
from plant import case_of, entry_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.ops.registry import Case, Entry, TensorMaker, entries, listed
from bench.static.counters import counting
from bench.static.traffic import fewest_bytes

ODD = [(entry, case) for entry in entries() for case in entry.cases if not case.public]
# Operators that may move fewer bytes than the entry states. The entry also counts bytes that some calls do not need: of
# frames without codes, of requests that have ended, and of rows of embeddings that are read more than once.
FEWER = {
    "codec_dequantise", "codec_attention", "codec_conv", "update_decode_state", "flow_finish", "rope_append",
    "norm_qkv_append", "prefill_attention",
}  # fmt: skip
# Operators that also move bytes that the entry leaves out. In this order: quantiles of the noise, the ids that the
# second launch of the routing reads again, the largest logit of each tile of codes, and the partial results of spans.
MORE = {
    "flow_start": 1.09,
    "moe_route": 1.13,
    "semantic_argmax": 1.04,
    "paged_attention": 1.02,
}
# Kernels that multiply less than the reference: guidance combines both branches before the projection.
HALVED = {"flow_step": 1.5, "flow_finish": 2.0}


def counted_bytes(entry: Entry, case: Case) -> int:
    """Count the DRAM bytes of arguments and results, without scratch memory."""
    args = entry.args(case, TensorMaker.of(case.dtypes[0]))
    with counting(whole=True, indirect=listed(args)) as launches:
        entry.op.run(**args)
    dram = sum(traffic.dram for launch in launches for traffic in launch.traffic().values())
    return dram - sum(launch.scratch() for launch in launches)


def assert_bytes(entry: Entry, case: Case) -> None:
    stated = fewest_bytes(entry, entry.args(case, TensorMaker.of(case.dtypes[0])))
    ratio = counted_bytes(entry, case) / stated
    assert ratio <= MORE.get(entry.name, 1.002), f"{entry.name} {case.name} moves {ratio:.3f} x the stated bytes"
    assert ratio >= (0.4 if entry.name in FEWER else 0.98), f"{entry.name} {case.name} moves only {ratio:.3f} x"


def reference_products(entry: Entry, case: Case) -> int:
    args = entry.args(case, TensorMaker.of(case.dtypes[0]))
    copies = {name: arg.clone() if isinstance(arg, Tensor) else arg for name, arg in args.items()}
    with FlopCounterMode(display=False) as counter:
        entry.reference(**copies)
    return counter.get_total_flops() // 2


def assert_products(entry: Entry, case: Case) -> None:
    args = entry.args(case, TensorMaker.of(case.dtypes[0]))
    stated = entry.multiply_adds(args)
    assert reference_products(entry, case) == stated * HALVED.get(entry.name, 1), f"{entry.name} {case.name}"


@pytest.mark.parametrize(("entry", "case"), ODD, ids=lambda one: one.name)
def test_stated_bytes_are_those_counted(entry: Entry, case: Case) -> None:
    assert_bytes(entry, case)


@pytest.mark.parametrize(("entry", "case"), ODD, ids=lambda one: one.name)
def test_stated_products_are_the_reference_s(entry: Entry, case: Case) -> None:
    if entry.name == "paged_attention" or (entry.name, case.name) in {
        ("norm_qkv", "odd-some-queries"),  # the reference computes all queries
        ("norm_qkv_attention", "odd-last"),  # the reference computes all queries
        ("semantic_argmax", "odd"),  # the reference multiplies the padding too
    }:
        pytest.skip("the kernel multiplies less than the reference")
    assert_products(entry, case)


def test_attention_s_products_by_hand() -> None:
    entry = entry_of("paged_attention")
    args = entry.args(case_of(entry, "odd"), TensorMaker())
    assert entry.multiply_adds(args) == int(args["lengths"].sum()) * 2 * 6 * 20
    windowed = entry.args(case_of(entry, "odd-six"), TensorMaker())
    assert entry.multiply_adds(windowed) == int(windowed["lengths"].clamp(max=7).sum()) * 2 * 6 * 24


def test_a_wrong_formula_is_caught() -> None:
    entry = entry_of("norm_linear")
    case = case_of(entry, "odd")
    with pytest.raises(AssertionError, match="norm_linear odd"):
        assert_products(replace(entry, multiply_adds=lambda args: args["weight"].numel()), case)
    for elements in (0, 2 * 75 * 150):
        with pytest.raises(AssertionError, match="norm_linear odd moves"):
            assert_bytes(replace(entry, partly={"weight": lambda args, n=elements: n}), case)
