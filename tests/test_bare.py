"""Tests that kernels, reference and fused modules work from a checkout that is not installed, with few packages."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ["numpy", "safetensors", "pytest"]  # besides torch and triton
NOT_NEEDED = ("mistral_common", "soundfile", "typer", "rich", "huggingface_hub", "hypothesis", "matplotlib", "soxr")
IMPORTS = (
    "import sys, voxkern, voxkern.kernels.norm_linear, voxkern.reference, voxkern.fused.backbone, "
    "voxkern.fused.codec, voxkern.fused.mlp_head, voxkern.fused.moe, voxkern.fused.transformer_head\n"
    f"print(sorted(sys.modules.keys() & set({NOT_NEEDED!r})))"
)


def run(python: Path | str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout's root, with nothing of this process's Python path."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [str(python), *arguments], cwd=ROOT, env=env | variables, capture_output=True, text=True, check=False
    )


def test_kernels_and_fused_modules_import_no_optional_package() -> None:
    done = run(sys.executable, "-c", IMPORTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_an_environment_with_five_packages_is_enough(tmp_path: Path) -> None:
    """GPU images often have torch and triton and no network. Installing the five packages here takes two minutes."""
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    versions = [f"torch=={torch.__version__.partition('+')[0]}", f"triton=={triton.__version__}"]
    installed = run(python, "-m", "pip", "install", "-q", *versions, *NEEDED)
    assert installed.returncode == 0, installed.stderr
    assert run(python, "-c", "import voxkern.kernels; import soundfile").returncode != 0  # it is not there
    for arguments in (
        ("-c", IMPORTS),
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_linear.py"),
        ("-m", "bench", "gpu", "--minutes", "1", "--dry-run"),
    ):
        done = run(python, *arguments, PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
