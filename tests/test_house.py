"""Who may import whom, and under which names."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("voxkern", "kernels", "reference", "tests", "bench")
MAY_IMPORT = {
    "voxkern": {"voxkern", "kernels", "reference"},
    "kernels": {"kernels"},
    "reference": {"reference"},
    "tests": set(ROOMS),
    "bench": {"bench", "voxkern", "kernels", "reference"},
}


def room_of(module: str) -> str | None:
    """The room that an absolute name leads to."""
    parts = module.split(".")
    if parts[0] == "voxkern" and len(parts) > 1 and parts[1] in ("kernels", "reference"):
        return parts[1]
    return parts[0] if parts[0] in ROOMS else None


def imports(file: Path, package: str) -> list[str]:
    """Absolute names of what a file imports; `package` is its own, with dots."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def files(room: str) -> list[Path]:
    links = {ROOT / "voxkern" / "kernels", ROOT / "voxkern" / "reference"}
    return [file for file in sorted((ROOT / room).rglob("*.py")) if not links & set(file.parents)]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    prefix = f"voxkern.{room}" if room in ("kernels", "reference") else room
    for file in files(room):
        package = ".".join([prefix, *file.relative_to(ROOT / room).parent.parts])
        for name in imports(file, package):
            to = room_of(name)
            assert to is None or to in MAY_IMPORT[room], f"{file.relative_to(ROOT)} imports {name}"


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("from .. import reference\nfrom ..reference.linear import wide\nimport bench.registry\n")
    assert [room_of(name) for name in imports(file, "voxkern.kernels")] == ["reference", "reference", "bench"]


def python(code: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=env)


def test_rooms_are_not_importable_under_bare_names() -> None:
    code = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) for n in ('kernels', 'reference', 'tests')))"
    assert python(code).returncode == 0
    assert str(ROOT) not in sys.path


def test_voxkern_imports_without_triton() -> None:
    answer = python("import sys; sys.modules['triton'] = None; import voxkern, voxkern.reference; print('ok')")
    assert answer.stdout.strip() == "ok", answer.stderr
