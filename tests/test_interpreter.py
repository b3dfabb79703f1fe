"""Tests of the patches that make Triton's interpreter faster (bench/static/interpreter.py)."""

import itertools
import math
import operator
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
    patched: list[object] = []
    patch = interpreter._patch_builtin

    def record(package: object, builder: object, scope: object) -> None:
        patched.append(package)
        patch(package, builder, scope)

    monkeypatch.setattr(interpreter, "_patch_builtin", record)
    before = tl.load, tl.tensor.__add__
    for n in (1, 5, 5):
        patched.clear()
        x = torch.ones(1)
        _doubling_kernel[(1,)](x, N=n)
        assert x.item() == 2**n
        assert patched.count(tl) == 1
        assert (tl.load, tl.tensor.__add__) == before


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


OPERATORS = [
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod),
    *(operator.and_, operator.or_, operator.xor, operator.lt, operator.le, operator.eq, operator.ne, operator.gt),
    *(tl.minimum, tl.maximum, lambda x, y: tl.where(x < y, x, y)),
]
NUMBERS = [0, 3, -2, True, 2**40, 0.0, -0.0, 2.5, float("nan"), float("inf")]
PAIRS = [
    *((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)),
    *((torch.int32, torch.int32), (torch.int32, torch.int64), (torch.uint8, torch.int32), (torch.int8, torch.float32)),
]
RESULTS: list[tuple[object, ...]] = []


@triton.jit
def _every_operation_kernel(p_x, p_y, n, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_x = tl.load(p_x + o_n)
    b_y = tl.load(p_y + o_n)
    note(o_n, b_x, b_y, n, tl.load(p_x + 1), p_x)


def note(o_n: tl.tensor, b_x: tl.tensor, b_y: tl.tensor, n: tl.tensor, x: tl.tensor, p_x: tl.tensor) -> None:
    """Append the type, the values and the error of each operation on blocks, scalars, numbers and addresses."""
    tensors = [b_x, b_x[:, None], b_y, b_y[None, :], n, x, o_n, b_x < 2]
    operands = [*itertools.product(tensors, tensors + NUMBERS), *itertools.product(NUMBERS, tensors)]
    RESULTS.extend(result(op, *pair) for op, pair in itertools.product(OPERATORS, operands))
    RESULTS.extend(result(_bytes_after, p_x + o_n, offset) for offset in [o_n, o_n[:, None], n, 5, 2.5, b_x])


def _bytes_after(p: tl.tensor, offset: tl.tensor) -> tl.tensor:
    return (p + offset).to(tl.int64) - p.to(tl.int64)


def result(op: Callable, x: object, y: object) -> tuple[object, ...]:
    """Return an operation's type, shape and values, or its error."""
    try:
        value = op(x, y)
    except Exception as error:
        return type(error).__name__, str(error)
    return str(value.type), value.handle.data.shape, str(value.handle.data.dtype), value.handle.data.tobytes()


def every_result() -> list[tuple[object, ...]]:
    """Return the results of every operation for each pair of dtypes."""
    RESULTS.clear()
    x = torch.tensor([0, 1, 2, 3, -4, 5, 100, 7])
    for one, other in PAIRS:
        _every_operation_kernel[(1,)](x.to(one), x.flip(0).to(other), 3, N=8)
    return list(RESULTS)


@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow")
def test_every_operation_gives_tritons_own_result(tmp_path: Path) -> None:
    code = "import pickle, sys, test_interpreter as t; pickle.dump(t.every_result(), open(sys.argv[1], 'wb'))"
    path = tmp_path / "results"
    folder = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=True,
        cwd=folder,
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": f"{folder.parent}:{folder}", "PATH": ""},
    )
    results, own = every_result(), pickle.loads(path.read_bytes())
    assert len(results) == len(own) > 10_000
    assert results == own
