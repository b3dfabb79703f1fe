"""Fixtures of every room: tiny checkpoints of random weights."""

import logging
from pathlib import Path

import pytest
import torch

import voxkern
from voxkern.checkpoint import find_folder, read_checkpoint, read_params
from voxkern.maker import make_checkpoint

torch.set_num_threads(1)  # the models here are tiny: a second thread costs more than it gives
logging.getLogger("voxkern").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in fp32, with the codec's encoder."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), dtype=torch.float32, encoder=True)


@pytest.fixture(scope="session")
def tiny_params(tiny_folder: Path) -> dict:
    return read_params(find_folder(tiny_folder))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> voxkern.reference.VoxtralTTS:
    """Its model, fp32. Read only."""
    return read_checkpoint(tiny_folder).model


@pytest.fixture(scope="session")
def tiny_weights(tiny_model: voxkern.reference.VoxtralTTS) -> dict:
    """Its tensors as fp64 numpy arrays."""
    return {name: tensor.double().numpy() for name, tensor in tiny_model.state_dict().items()}
