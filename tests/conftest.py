"""Set-up of all tests: the device, NaN in uninitialised memory, and tiny checkpoints.

Without options, kernels run in Triton's interpreter on the CPU. ``pytest --device cuda`` runs the tests that take the
fixture `device` on a GPU, with the GPU's own launch configs, and skips the others.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from unittest.mock import MagicMock

import pytest
import torch

import voxkern
from voxkern.checkpoint import read_checkpoint, read_params
from voxkern.random_checkpoint import make_checkpoint

if TYPE_CHECKING:
    from bench.static.stand_in_gpu import StandInGPU

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

if importlib.util.find_spec("hypothesis") is None:  # a bare machine runs all tests but the property tests
    for name in ("hypothesis", "hypothesis.strategies"):
        stand_in = ModuleType(name)
        stand_in.__spec__ = ModuleSpec(name, None)  # torch.compile looks for it
        vars(stand_in)["__getattr__"] = lambda _: MagicMock()
        sys.modules[name] = stand_in
    vars(sys.modules["hypothesis"]).update(
        strategies=sys.modules["hypothesis.strategies"],
        given=lambda *_, **__: pytest.mark.skip(reason="needs hypothesis"),
        settings=lambda *_, **__: lambda test: test,
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the tests that take a device")


def pytest_configure(config: pytest.Config) -> None:
    on_gpu = config.getoption("--device") == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    os.environ["TRITON_INTERPRET"] = "0" if on_gpu else "1"  # read when triton is imported, which is later than this
    if on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode warns without it
        torch.backends.cudnn.allow_tf32 = False  # the reference's convolutions would use TF32 in fp32
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a test that names no device must not use a GPU
        # halves the time of the tests
        importlib.import_module("bench.static.interpreter").speed_up()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give the argument `tiles` the architectures that a test takes launch configs from; see ``checks.tiles_of``."""
    if "tiles" in metafunc.fixturenames:
        on_gpu = metafunc.config.getoption("--device") == "cuda"
        metafunc.parametrize("tiles", ["own"] if on_gpu else ["interpreter", "sm_90", "gfx942"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU, skip tests that take no device; on a CPU, deselect tests that are for a GPU only."""
    if config.getoption("--device") == "cuda":
        for item in items:
            marker = item.get_closest_marker("interpreter")
            if marker is not None:
                item.add_marker(pytest.mark.skip(reason=f"only in Triton's interpreter: {marker.args[0]}"))
            elif "device" not in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="takes no device"))
        return
    dropped = [item for item in items if item.get_closest_marker("only_gpu") is not None]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return the device of the option ``--device``."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def stand_in() -> "Iterator[StandInGPU]":
    """Replace the GPU by a stand-in, and return its state."""
    from bench.static.stand_in_gpu import stand_in_gpu  # needs Triton

    with stand_in_gpu() as gpu:
        yield gpu


@pytest.fixture
def gpu(request: pytest.FixtureRequest, device: torch.device) -> torch.device:
    """Return a GPU: the machine's with ``--device cuda``, and a stand-in otherwise."""
    if device.type == "cpu":
        request.getfixturevalue("stand_in")
    return torch.device("cuda:0")


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
