"""Tests of the patch that makes Triton's interpreter faster (bench/static/interpreter.py)."""

import inspect

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from bench.static.interpreter import patch_once_per_launch


@triton.jit
def _twice(x):
    return x + x


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
    patch_once_per_launch()
    assert (interpreter._patch_lang, interpreter.GridExecutor.__call__) == before
