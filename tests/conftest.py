"""Set-up of all tests: Triton's interpreter, NaN in uninitialised memory, and tiny checkpoints."""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported; tests marked gpu need 0

import torch

import voxkern
from voxkern.checkpoint import read_checkpoint, read_params
from voxkern.random_checkpoint import make_checkpoint

torch.set_num_threads(1)  # the tests compute little: a second thread costs more time than it saves
logging.getLogger("voxkern").setLevel(logging.ERROR)

ROOT = Path(__file__).resolve().parent.parent


def _load_bench() -> None:
    # bench is not installed, and the root on sys.path would make bare `kernels` and `reference` importable
    path = ROOT / "bench" / "__init__.py"
    spec = importlib.util.spec_from_file_location("bench", path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["bench"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])


_load_bench()
importlib.import_module("bench.static.interpreter").patch_once_per_launch()  # saves a quarter of the tests' time


@pytest.fixture(autouse=True)
def fresh_memory() -> Iterator[None]:
    """Fill new uninitialised tensors with NaN, or with the largest integer, so that unwritten elements are noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny fp32 checkpoint with the codec's encoder, and return its folder."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.float32, encoder=True)


@pytest.fixture(scope="session")
def mlp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny fp32 checkpoint with the residual MLP as velocity network, and return its folder."""
    return make_checkpoint(tmp_path_factory.mktemp("mlp"), dtype=torch.float32, velocity_mlp=True)


@pytest.fixture(scope="session")
def tiny_params(tiny_folder: Path) -> dict:
    return read_params(tiny_folder)


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> voxkern.reference.VoxtralTTS:
    """Return the model of `tiny_folder`, in fp32. Tests must not change this model."""
    return read_checkpoint(tiny_folder).model


@pytest.fixture(scope="session")
def tiny_weights(tiny_model: voxkern.reference.VoxtralTTS) -> dict:
    """Return the tensors of `tiny_model` by name, as fp64 numpy arrays."""
    return {name: tensor.double().numpy() for name, tensor in tiny_model.state_dict().items()}
