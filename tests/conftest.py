"""Kernels run in Triton's interpreter here, and fresh memory is never zero by luck."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported; 0 for the tests marked gpu

import torch

ROOT = Path(__file__).resolve().parent.parent


def _load_bench() -> None:
    # bench is not installed, and with the root on sys.path bare `kernels` and `reference` would be importable
    path = ROOT / "bench" / "__init__.py"
    spec = importlib.util.spec_from_file_location("bench", path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])


_load_bench()


@pytest.fixture(autouse=True)
def fresh_memory() -> Iterator[None]:
    """``torch.empty`` and its kin give NaN, or the largest integer: an element never written cannot pass for one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
