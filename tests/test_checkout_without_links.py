"""Test of a checkout in which Git has written text files instead of symbolic links, as on Windows."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "voxkern"


@pytest.mark.parametrize("link", ["kernels", "reference"])
def test_the_error_names_the_setting_of_git(tmp_path: Path, link: str) -> None:
    folder = tmp_path / "voxkern"
    ignored = shutil.ignore_patterns("__pycache__", "demo")
    shutil.copytree(PACKAGE, folder, symlinks=True, ignore=ignored)
    for name in ("kernels", "reference"):
        shutil.copytree(PACKAGE / name, tmp_path / name, ignore=ignored)
    command = [sys.executable, "-c", "import voxkern; print(voxkern.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(folder / "__init__.py")  # the copy works as long as it has the links
    (folder / link).unlink()
    (folder / link).write_text(f"../{link}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: voxkern/kernels and voxkern/reference must be symbolic links")
    assert "git config core.symlinks true" in last
    assert "circular" not in done.stderr
