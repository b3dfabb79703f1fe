"""Tests of launches that overlap: the rule in every kernel's source and machine code, and the way to ask for overlap.

Kernels are compiled in processes of their own, because the tests run in Triton's interpreter, which compiles nothing.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import voxkern
from voxkern.kernels.launch_config import launch_options, overlapped
from voxkern.validation import require_overlap

ROOT = Path(__file__).resolve().parents[1]
ACCESSES = {"load", "store", "atomic_add", "atomic_max", "atomic_cas", "atomic_xchg"}


def run(*arguments: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


def kernels() -> list[tuple[str, ast.FunctionDef]]:
    """Return each kernel of the package, with its file's name."""
    files = sorted((ROOT / "kernels").glob("*.py"))
    functions = [(file.name, node) for file in files for node in ast.parse(file.read_text()).body]
    return [
        (name, node) for name, node in functions if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    ]


def calls_in_order(nodes: list[ast.stmt]) -> list[str]:
    """Return the names of the functions that statements call, and "return", in the order of the source."""
    found = [node for one in nodes for node in ast.walk(one) if isinstance(node, ast.Call | ast.Return)]
    found.sort(key=lambda node: (node.lineno, node.col_offset))
    return ["return" if isinstance(node, ast.Return) else ast.unparse(node.func).split(".")[-1] for node in found]


def test_every_kernel_waits_before_it_touches_memory() -> None:
    """In the source, each kernel calls wait_for_launches before it loads, stores or returns, on every path."""
    found = kernels()
    assert len(found) >= 26
    for name, node in found:
        assert node.args.args[-1].arg == "OVERLAP", f"{name}: {node.name}"
        paths = [node.body]
        branch = next((one for one in node.body if isinstance(one, ast.If) and "SHARES" in ast.unparse(one.test)), None)
        if branch is not None:  # both ways of dividing tiles wait for themselves
            before = node.body[: node.body.index(branch)]
            paths = [before + branch.body, before + branch.orelse]
        for path in paths:
            calls = calls_in_order(path)
            assert calls.count("wait_for_launches") == 1, f"{name}: {node.name}"
            first = calls[: calls.index("wait_for_launches")]
            assert not ACCESSES.intersection(first), f"{name}: {node.name}"
            assert "return" not in first, f"{name}: {node.name}"


def test_faults_in_machine_code_are_found() -> None:
    found = json.loads(run("tests/overlapping_kernels.py"))
    assert found.pop("_right") == []
    expected = {
        "_loads_early": {"PTX: ld.global.b32 before the wait"},
        "_stores_early": {"PTX: st.global.b32 before the wait"},
        "_ends_early": {"PTX: bra before the wait"},
        "_waits_in_some_blocks": {"PTX: bra before the wait"},
        "_never_waits": {"PTX: never waits", "machine code: never waits"},
    }
    assert found.keys() == expected.keys()
    for kernel, messages in expected.items():
        texts = {message.partition("sm_90: ")[2] for message in found[kernel]}
        assert messages <= texts, (kernel, texts)
        assert any(text.startswith("machine code: ") for text in texts), (kernel, texts)


FRAME = """
import sys
from bench.static.overlap import complaints, launches_of_frame
from voxkern.random_checkpoint import TINY_MOE, tiny_params
from voxkern.reference import Config
arch, kind = sys.argv[1:]
params = tiny_params(velocity_mlp=kind == "mlp") | ({"moe": TINY_MOE} if kind == "experts" else {})
launches = launches_of_frame(Config.from_params(params), arch, 2)
print(len(launches), *complaints(launches), sep="\\n")
"""


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("sm_90", "dense"),
        pytest.param("sm_90", "experts", marks=pytest.mark.slow),
        pytest.param("sm_90", "mlp", marks=pytest.mark.slow),
        pytest.param("sm_100", "dense", marks=pytest.mark.slow),
        pytest.param("sm_120", "dense", marks=pytest.mark.slow),
    ],
)
def test_every_launch_of_a_frame_overlaps(arch: str, kind: str) -> None:
    n, *found = run("-c", FRAME, arch, kind).splitlines()
    assert int(n) > 20
    assert found == []


def test_overlap_is_an_option_of_launches() -> None:
    assert "OVERLAP" not in launch_options()
    with overlapped():
        assert launch_options()["OVERLAP"]
        assert launch_options()["launch_pdl"]
        with overlapped(False):
            assert "launch_pdl" not in launch_options()
    assert "OVERLAP" not in launch_options()


def test_overlap_where_it_cannot_run(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="overlap is True, but device is 'cpu'"):
        voxkern.load(tiny_folder, device="cpu", overlap=True, backend="triton")
    with pytest.raises(ValueError, match="without kernels no launches overlap"):
        voxkern.load(tiny_folder, device="cpu", overlap=True, backend="torch")
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, is_right in (((8, 9), False), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if is_right:
            require_overlap(cuda, True)
        else:
            with pytest.raises(ValueError, match=r"compute capability 9\.0 or newer"):
                require_overlap(cuda, True)
