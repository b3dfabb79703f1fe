"""Test that a new operator takes one file in kernels/, one in bench/ops/, and no edit elsewhere.

The new operator is a toy that writes to its argument.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from checks import assert_accurate, assert_bytes_once, assert_no_races
from plant import case_of, entry_of

import bench.ops
import voxkern.kernels
from bench.ops import registry

KERNEL = '''
import torch
import triton
import triton.language as tl
from torch import Tensor

from voxkern.kernels.common import cast
from voxkern.kernels.launch_config import LaunchConfigs
from voxkern.kernels.operator import expect, operator

ADD_BIAS = LaunchConfigs("toy_add_bias", """
    arch | BLOCK_M BLOCK_N num_warps
    *    | 4       16      4
""")


@triton.jit(do_not_specialize=["M"])
def _add_bias_kernel(p_x, p_bias, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    i_m, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (o_m < M)[:, None] & (o_n < N)[None, :]
    p_tile = p_x + o_m[:, None] * N + o_n[None, :]
    b_bias = tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)
    b_x = tl.load(p_tile, mask=m, other=0.0).to(tl.float32) + b_bias[None, :]
    tl.store(p_tile, cast(b_x, p_x.dtype.element_ty), mask=m)


def launch_add_bias(x: Tensor, bias: Tensor) -> None:
    M, N = x.shape
    constants = ADD_BIAS(N=N, K=1, dtype=x.dtype, rows=M) | {"N": N}
    grid = (triton.cdiv(M, constants["BLOCK_M"]), triton.cdiv(N, constants["BLOCK_N"]))
    _add_bias_kernel[grid](x, bias, M, **constants)


@operator(launch_add_bias, mutates=("x",))
def toy_add_bias(x: Tensor, bias: Tensor) -> None:
    """x += bias, in place."""
    M, N = expect("x", x, ("M", "N"))
    expect("bias", bias, (N,), like=x)
'''
BENCH = """
from bench.ops.registry import Case, Entry
from voxkern.kernels.toy import toy_add_bias



def add_bias(x, bias):
    x += bias


ENTRIES = [
    Entry(
        op=toy_add_bias,
        reference=add_bias,
        inputs=lambda s, make: {"x": make(s.M, s.N), "bias": make(s.N)},
        cases=(Case("odd", {"M": 9, "N": 37}), Case("public-b1", {"M": 8, "N": 64}, public=True)),
        read_once=("bias",),
        uses_matrix_unit=False,
    )
]
"""


@pytest.fixture
def toy_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, text in (("kernels", KERNEL), ("bench", BENCH)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "toy.py").write_text(text)
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    monkeypatch.setattr(bench.ops, "__path__", [str(tmp_path / "bench")])
    monkeypatch.setattr(voxkern.kernels, "__path__", [*voxkern.kernels.__path__, str(tmp_path / "kernels")])
    importlib.invalidate_caches()
    for name in ("bench.ops.toy", "voxkern.kernels.toy"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("toy_operator")
def test_a_new_operator_is_found_and_held_to_everything() -> None:
    assert [entry.name for entry in registry.entries()] == ["toy_add_bias"]
    entry = entry_of("toy_add_bias")
    odd, public = entry.cases
    for dtype in registry.FLOATS:
        assert_accurate(entry, odd, dtype)
    assert_no_races(entry, odd)
    assert_bytes_once(entry, public, "bf16", "sm_90")
    assert case_of(entry, "odd") is odd
    args = entry.args(odd, registry.TensorMaker())
    torch.library.opcheck(entry.op.op, (), args)
    with pytest.raises(RuntimeError, match="requires gradients"):
        entry.op(args["x"], args["bias"].clone().requires_grad_())
    x = args["x"].clone()
    assert torch.ops.voxkern.toy_add_bias(**args) is None
    torch.testing.assert_close(args["x"], x + args["bias"])
