"""Kernels run in Triton's interpreter here, fresh memory is never zero by luck, and tiny checkpoints are at hand."""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported; 0 for the tests marked gpu

import torch

import voxkern
from voxkern.checkpoint import read_checkpoint, read_params
from voxkern.random_checkpoint import make_checkpoint

torch.set_num_threads(1)  # what is computed here is tiny: a second thread costs more than it gives
logging.getLogger("voxkern").setLevel(logging.ERROR)

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
importlib.import_module("bench.interpreter").patch_once_per_launch()  # the tests take a quarter less


@pytest.fixture(autouse=True)
def fresh_memory() -> Iterator[None]:
    """``torch.empty`` and its kin give NaN, or the largest integer: an element never written cannot pass for one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in fp32, with the codec's encoder."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.float32, encoder=True)


@pytest.fixture(scope="session")
def mlp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a flow head whose velocity network is the residual MLP."""
    return make_checkpoint(tmp_path_factory.mktemp("mlp"), dtype=torch.float32, velocity_mlp=True)


@pytest.fixture(scope="session")
def tiny_params(tiny_folder: Path) -> dict:
    return read_params(tiny_folder)


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> voxkern.reference.VoxtralTTS:
    """Its model, fp32. Read only."""
    return read_checkpoint(tiny_folder).model


@pytest.fixture(scope="session")
def tiny_weights(tiny_model: voxkern.reference.VoxtralTTS) -> dict:
    """Its tensors as fp64 numpy arrays."""
    return {name: tensor.double().numpy() for name, tensor in tiny_model.state_dict().items()}
