"""The house's rules: what may be imported, from where, and by whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "reference": ("voxkern", "kernels", "tests", "bench", "triton"),
    "kernels": ("voxkern", "reference", "tests", "bench"),
    "voxkern": ("tests", "bench"),
    "bench": ("tests",),
}


def _imports(path: Path) -> set[str]:
    """Rooms that a file imports, by absolute name or out of its own folder."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.ImportFrom) and node.level > 1:
            names = ["voxkern"]
        for name in names:
            rooms.update(name.split(".")[:2] if name.startswith("voxkern.") else [name.split(".")[0]])
    return rooms


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = [path for path in (ROOT / room).glob("*.py") if not path.parent.is_symlink()]
    assert files
    for path in files:
        wrong = _imports(path) & set(FORBIDDEN[room])
        assert not wrong, f"{path.name} imports {wrong}"


@pytest.mark.parametrize("name", ["kernels", "reference", "bench", "tests"])
def test_no_bare_name_is_importable(name: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True)
    assert f"No module named '{name}'" in done.stderr


def test_import_needs_no_triton(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; import voxkern; voxkern.Config"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rooms_carry_no_bare_import_inside_the_wheel() -> None:
    for room in ("kernels", "reference"):
        link = ROOT / "voxkern" / room
        assert link.is_symlink()
        assert link.resolve() == ROOT / room
