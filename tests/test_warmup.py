"""Tests of ``voxkern warmup`` for a GPU that need not be present.

The command runs in a process of its own, because the tests run in Triton's interpreter, which compiles nothing.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from voxkern.checkpoint import quantize_checkpoint


def _warm_up(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from voxkern.cli import app; app(sys.argv[1:])"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, "warmup", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env | {"TRITON_CACHE_DIR": str(cache)})


@pytest.mark.slow
def test_what_load_quantises_or_overlaps(tiny_folder: Path, tmp_path: Path) -> None:
    """`--quantize` compiles the kernels of a checkpoint in 8 bits, and `--overlap` those of a frame once more."""
    quantize_checkpoint(tiny_folder, tmp_path / "quantized", "int8")
    assert "kernels are ready" in _warm_up(tmp_path / "cache", str(tmp_path / "quantized"), "--arch", "sm_90").stderr
    made = set((tmp_path / "cache").rglob("*.cubin"))
    assert (
        "kernels are ready"
        in _warm_up(tmp_path / "cache", str(tiny_folder), "--arch", "sm_90", "--quantize", "int8").stderr
    )
    assert set((tmp_path / "cache").rglob("*.cubin")) == made
    _warm_up(tmp_path / "cache", str(tiny_folder), "--arch", "sm_90", "--quantize", "int8", "--overlap")
    more = {path.stem for path in set((tmp_path / "cache").rglob("*.cubin")) - made}
    assert "_linear_kernel" in more
    assert "_prefill_attention_kernel" not in more


@pytest.mark.slow
@pytest.mark.parametrize("format_", [None, "int8"])
def test_compiles_once(tiny_folder: Path, tmp_path: Path, format_: str | None) -> None:
    """The first run writes a binary of every launched kernel to the cache on disk; a second run adds none."""
    folder = tiny_folder
    if format_ is not None:
        folder = tmp_path / "quantized"
        quantize_checkpoint(tiny_folder, folder, format_)
    arguments = (str(folder), "--arch", "sm_90", "--max-batch", "2")
    first = _warm_up(tmp_path, *arguments)
    assert "kernels are ready for sm_90, max_batch 2, bfloat16" in first.stderr, first.stderr
    made = sorted(tmp_path.rglob("*.cubin"))
    assert len(made) == int(first.stderr.split()[0])
    names = {path.stem for path in made}
    assert {
        "_update_decode_state_kernel",
        "_prefill_attention_kernel",
        "_flow_finish_kernel",
        "_rms_norm_kernel",
    } <= names
    assert _warm_up(tmp_path, *arguments).stderr == first.stderr
    assert sorted(tmp_path.rglob("*.cubin")) == made


def test_errors(tmp_path: Path) -> None:
    unknown = _warm_up(tmp_path, "--arch", "sm_75")
    assert unknown.returncode == 1
    assert "arch must be one of sm_80" in unknown.stderr
    assert "name one with --arch" in _warm_up(tmp_path).stderr
    old = _warm_up(tmp_path, "--arch", "sm_80", "--overlap")
    assert "overlap needs one of the architectures sm_90, sm_100, sm_120, got 'sm_80'" in " ".join(old.stderr.split())
