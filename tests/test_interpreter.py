"""Tests of the patches that make Triton's interpreter faster (bench/static/interpreter.py)."""

import inspect
import math

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from bench.static.interpreter import speed_up


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _outer_sum_kernel(p_out, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_sum = o_n[:, None] * 2 + o_n[None, :] + tl.zeros([N, 1], tl.int32) + 1
    tl.store(p_out + o_n[:, None] * N + o_n[None, :], b_sum.to(tl.float32))


@triton.jit
def _doubling_kernel(p_x, N: tl.constexpr):
    for _ in range(N):
        tl.store(p_x, _twice(tl.load(p_x)))


def test_a_launch_patches_the_language_once_and_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []

    def getmembers(module: object) -> list:
        looked.append(module)
        return inspect.getmembers(module)

    monkeypatch.setattr(interpreter, "inspect", _Inspect(getmembers))
    before = tl.load
    for n in (1, 5, 5):
        looked.clear()
        x = torch.ones(1)
        _doubling_kernel[(1,)](x, N=n)
        assert x.item() == 2**n
        assert looked.count(tl) == 1
        assert tl.load is before


class _Inspect:
    """Replaces the ``inspect`` module, with a ``getmembers`` that records the modules that the interpreter patches."""

    def __init__(self, getmembers: object) -> None:
        self.getmembers = getmembers

    def __getattr__(self, name: str) -> object:
        return getattr(inspect, name)


def test_asking_twice_changes_nothing() -> None:
    before = interpreter._patch_lang, interpreter.GridExecutor.__call__
    speed_up()
    assert (interpreter._patch_lang, interpreter.GridExecutor.__call__) == before


@pytest.mark.parametrize("shape", [[16], [1, 64], [2, 4, 8]])
@pytest.mark.parametrize("element_ty", [tl.float32, tl.int1, tl.pointer_type(tl.bfloat16)])
def test_a_types_parts_are_tritons(shape: list[int], element_ty: tl.dtype) -> None:
    for _ in range(2):  # the second type takes the parts of the first
        one = tl.block_type(element_ty, shape)
        assert list(one.shape) == list(shape)
        assert one.numel == math.prod(shape)
        assert one.name == f"<{list(map(str, shape))}, {element_ty}>"
        assert one == tl.block_type(element_ty, [tl.constexpr(size) for size in shape])
        value = tl.tensor(None, one)
        assert [size.value for size in value.shape] == list(shape)
        assert (value.numel.value, value.dtype, value.type) == (math.prod(shape), element_ty, one)
    assert tl.block_type(element_ty, [16]) != tl.block_type(element_ty, [1, 16])


def test_wrong_shapes_are_still_named() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.float32, [12])
        with pytest.raises(TypeError, match="0d"):
            tl.block_type(tl.float32, [])


def test_blocks_of_several_shapes_are_broadcast() -> None:
    for N in (4, 16, 4):
        out = torch.empty(N, N)
        _outer_sum_kernel[(1,)](out, N=N)
        assert torch.equal(out, torch.arange(N)[:, None] * 2.0 + torch.arange(N) + 1)
