"""Tests of imports: they go one way between and inside packages, without cycles, and use only installed names."""

import ast
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import voxkern
import voxkern.kernels
from voxkern.kernels.operator import Operator

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("voxkern", "kernels", "reference", "tests", "bench")
MAY_IMPORT = {
    "voxkern": {"voxkern", "kernels", "reference"},
    "kernels": {"kernels"},
    "reference": {"reference"},
    "tests": set(PACKAGES),
    "bench": {"bench", "voxkern", "kernels", "reference"},
}
# part of voxkern -> parts of voxkern that it may not import; the direction is tts -> engine -> fused
MAY_NOT_IMPORT = {
    "fused": ("tts", "engine", "integrations", "accelerate", "serve"),
    "engine": ("tts", "integrations", "accelerate", "serve"),
    "integrations": ("tts", "engine", "serve"),
}


def package_of(module: str) -> str | None:
    """Return which of `PACKAGES` contains the module with this absolute name, or None."""
    parts = module.split(".")
    if parts[0] == "voxkern" and len(parts) > 1 and parts[1] in ("kernels", "reference"):
        return parts[1]
    return parts[0] if parts[0] in PACKAGES else None


def imports(source: str, package: str) -> list[str]:
    """Return the absolute names that a file imports, also inside functions.

    Args:
        source: the file's text.
        package: the dotted name of the package that contains the file.
    """
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def files(package: str) -> dict[str, tuple[Path, str]]:
    """Return a package's modules: dotted name -> (file, dotted name of the containing package)."""
    links = {ROOT / "voxkern" / "kernels", ROOT / "voxkern" / "reference"}
    prefix = f"voxkern.{package}" if package in ("kernels", "reference") else package
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        if not links & set(file.parents):
            parts = [prefix, *file.relative_to(ROOT / package).with_suffix("").parts]
            own = ".".join(parts[:-1])
            found[own if parts[-1] == "__init__" else ".".join(parts)] = (file, own)
    return found


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of one import cycle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Return, for every module, the modules that it imports, also inside functions and for type checking."""
    modules = {name: found for package in PACKAGES for name, found in files(package).items()}
    graph: dict[str, set[str]] = {}
    for name, (file, package) in modules.items():
        imported = imports(file.read_text(), package)
        # `from package import x` is an import of the module x, or of a name that the module `package` defines
        graph[name] = {one if one in modules else one.rpartition(".")[0] for one in imported} & modules.keys() - {name}
    return graph


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package: str) -> None:
    for name, (file, own) in files(package).items():
        for imported in imports(file.read_text(), own):
            to = package_of(imported)
            assert to is None or to in MAY_IMPORT[package], f"{name} imports {imported}"


@pytest.mark.parametrize("part", MAY_NOT_IMPORT)
def test_imports_inside_voxkern_go_one_way(part: str) -> None:
    for name, imported in import_graph().items():
        if name.startswith(f"voxkern.{part}"):
            upward = [one for one in imported if one.startswith(tuple(f"voxkern.{to}" for to in MAY_NOT_IMPORT[part]))]
            assert not upward, f"{name} imports {', '.join(upward)}"


def test_there_are_no_import_cycles() -> None:
    assert cycle(import_graph()) == []


def test_a_cycle_is_seen() -> None:
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


def test_a_forbidden_import_is_seen() -> None:
    source = "from .. import reference\nfrom ..reference.layers import upcast\ndef f():\n    import bench.results\n"
    assert [package_of(name) for name in imports(source, "voxkern.kernels")] == ["reference", "reference", "bench"]


def python(code: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=env)


def test_public_names_are_those_of_all() -> None:
    public = {name: importlib.import_module(f"voxkern.kernels.{name}") for name in voxkern.kernels.__all__}
    assert public.keys() == {file.stem for file in (ROOT / "kernels").glob("*.py")} - {"__init__"}
    for module in (voxkern, voxkern.reference, *public.values()):
        assert all(hasattr(module, name) for name in module.__all__)
    for module in public.values():
        operators = {name for name, value in vars(module).items() if isinstance(value, Operator)}
        own = {name for name in operators if getattr(module, name).__module__ == module.__name__}
        assert own <= set(module.__all__)


def test_packages_are_not_importable_under_bare_names() -> None:
    code = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) for n in ('kernels', 'reference', 'tests')))"
    assert python(code).returncode == 0
    assert str(ROOT) not in sys.path


def test_voxkern_imports_without_triton() -> None:
    answer = python("import sys; sys.modules['triton'] = None; import voxkern, voxkern.reference; print('ok')")
    assert answer.stdout.strip() == "ok", answer.stderr
