"""Tests of launches that overlap: the rule in every kernel's source and machine code, and the option for it.

Kernels are compiled in processes of their own, because the tests run in Triton's interpreter, which compiles nothing.
"""

import ast
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from checks import stand_in_for_overlap
from fresh_process import run_python
from triton.runtime import interpreter

import voxkern
from bench.ops.registry import Entry, TensorMaker, entries
from bench.static.overlap import faults
from voxkern import tts as tts_module
from voxkern.engine import fused_runner
from voxkern.kernels.launch_config import launch_options, overlapped
from voxkern.kernels.overlap import wait_for_launches
from voxkern.validation import require_overlap

ROOT = Path(__file__).resolve().parents[1]
ACCESS = r"create_(?:masked_)?(?:load|store)|create_atomic_\w+|create_descriptor_(?:load|store|gather|scatter)"
# what a kernel may call before it waits; arithmetic is allowed too
HARMLESS = {
    "program_id", "num_programs", "arange", "to", "cdiv", "minimum", "maximum", "where", "len", "next_power_of_2",
    "weight_of_tile", "share_of_block", "prefetch_rows",
}  # fmt: skip


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
        if branch is not None:  # each branch must wait itself
            before = node.body[: node.body.index(branch)]
            paths = [before + branch.body, before + branch.orelse]
        for path in paths:
            calls = calls_in_order(path)
            assert calls.count("wait_for_launches") == 1, f"{name}: {node.name}"
            assert set(calls[: calls.index("wait_for_launches")]) <= HARMLESS, f"{name}: {node.name}"
            assert "wait_for_launches(OVERLAP)" in map(ast.unparse, path), (
                f"{name}: {node.name} waits under a condition"
            )


def test_faults_in_machine_code_are_found() -> None:
    found = json.loads(run_python("tests/overlapping_kernels.py"))
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


RIGHT_PTX = """
.visible .entry kernel(.param .u64 p)
{
	ld.param.b64 %rd1, [p];
	{ prefetch.global.L2 [%rd1]; mov.b32 %r1, 0; }
	griddepcontrol.wait;
	@%p1 bra $L1;
	ld.global.b32 %r2, [%rd1];
$L1:
	ret;
}
"""
RIGHT_SASS = """
	/*0000*/                   LDC R1, c[0x0][0x28] ;
	/*0010*/                   CALL.REL.NOINC 0x70 ;
	/*0020*/              @!P0 BRA 0x40 ;
	/*0030*/                   CCTL.E.PF2 [R2] ;
	/*0040*/                   ACQBULK ;
	/*0050*/                   LDG.E R4, desc[UR4][R2.64] ;
	/*0060*/                   EXIT ;
	/*0070*/                   I2F.U16 R5, R4 ;
	/*0080*/                   RET.REL.NODEC R6 0x0 ;
"""
WAIT, ACQUIRE = "\tgriddepcontrol.wait;", "\t/*0040*/                   ACQBULK ;"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (WAIT, "", "PTX: never waits"),
        (WAIT, "\t@%p1 griddepcontrol.wait;", "PTX: waits only under the condition @%p1"),
        (WAIT, f"\t@%p1 bra $L1;\n{WAIT}", "PTX: bra before the wait"),
        (WAIT, f"\tst.global.b32 [%rd1], %r1;\n{WAIT}", "PTX: st.global.b32 before the wait"),
        (WAIT, f"\tcp.async.cg.shared.global [%r1], [%rd1];\n{WAIT}", "PTX: cp.async.cg.shared.global before the wait"),
        ("mov.b32 %r1, 0;", "ld.global.b32 %r1, [%rd1];", "PTX: ld.global.b32 before the wait"),
        (ACQUIRE, "", "machine code: never waits"),
        (ACQUIRE, "\t/*0040*/               @P0 ACQBULK ;", "machine code: waits only under the condition @P0"),
        ("CCTL.E.PF2 [R2]", "LDGSTS.E.128 [R3], desc[UR4][R2.64]", "machine code: LDGSTS.E.128 before the wait"),
        ("CCTL.E.PF2 [R2]", "EXIT", "machine code: EXIT before the wait"),
        ("BRA 0x40", "BRA 0x50", "machine code: BRA before the wait"),
        ("I2F.U16 R5, R4", "LDG.E R5, desc[UR4][R2.64]", "machine code: LDG.E before the wait"),
        ("CALL.REL.NOINC 0x70", "CALL.ABS.NOINC R8", "machine code: CALL.ABS.NOINC before the wait"),
    ],
)  # fmt: skip
def test_each_fault_is_named(old: str, new: str, message: str) -> None:
    assert faults(RIGHT_PTX, RIGHT_SASS) == []
    assert old in RIGHT_PTX + RIGHT_SASS
    assert faults(RIGHT_PTX.replace(old, new), RIGHT_SASS.replace(old, new)) == [message]


FRAME = """
import sys
from bench.static.overlap import complaints, launches_of_frame
from voxkern.random_checkpoint import TINY_MOE, tiny_params
from voxkern.reference import Config
arch, kind, batch = sys.argv[1:]
params = tiny_params(velocity_mlp=kind == "mlp") | ({"moe": TINY_MOE} if kind == "experts" else {})
launches = launches_of_frame(Config.from_params(params), arch, int(batch))
print(len(launches), *complaints(launches), sep="\\n")
"""


@pytest.mark.parametrize(
    ("arch", "kind", "batch"),
    [
        ("sm_90", "dense", 1),
        pytest.param("sm_90", "dense", 2, marks=pytest.mark.slow),
        pytest.param("sm_90", "experts", 2, marks=pytest.mark.slow),
        pytest.param("sm_90", "mlp", 2, marks=pytest.mark.slow),
        pytest.param("sm_100", "dense", 2, marks=pytest.mark.slow),
        pytest.param("sm_120", "dense", 2, marks=pytest.mark.slow),
    ],
)
def test_every_launch_of_a_frame_overlaps(arch: str, kind: str, batch: int) -> None:
    n, *found = run_python("-c", FRAME, arch, kind, str(batch)).splitlines()
    assert int(n) > 20
    assert found == []


def test_the_launches_of_a_loaded_model_overlap(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """load(overlap=True) overlaps the launches of frames. The interpreter cannot, so the setting is only recorded."""
    seen: list[bool] = []

    def record(overlap: bool = True) -> contextlib.AbstractContextManager[None]:
        seen.append(overlap)
        return contextlib.nullcontext()

    monkeypatch.setattr(tts_module, "require_overlap", lambda device, backend: None)
    monkeypatch.setattr(fused_runner, "overlapped", record)
    for overlap in (True, False):
        seen.clear()
        voxkern.load(tiny_folder, backend="triton", overlap=overlap).generate("a", seed=1, max_frames=2, steps=1)
        assert set(seen) == {overlap}


@contextlib.contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Record the starts, waits and accesses of all programs, in order, in Triton's interpreter."""
    builder, events = interpreter.InterpreterBuilder, list[str]()

    def note(name: str, event: str) -> None:
        original = getattr(builder, name)

        def run(self: Any, *args: Any, **named: Any) -> Any:
            events.append(event)
            return original(self, *args, **named)

        patch.setattr(builder, name, run)

    with monkeypatch.context() as patch, overlapped():
        for name in filter(re.compile(ACCESS).fullmatch, dir(builder)):
            note(name, name)
        note("set_grid_idx", "start")
        stand_in_for_overlap(patch, wait=lambda: events.append("wait"))
        yield events


def programs(events: list[str]) -> list[list[str]]:
    """Return the events of each program, without its start."""
    starts = [i for i, event in enumerate(events) if event == "start"]
    return [events[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(events)], strict=True)]


def results(op: Any, args: dict[str, Any]) -> list[torch.Tensor]:
    """Run an operator, and return its results and the arguments that it writes to."""
    out = op(**args)
    returned = [] if out is None else [out] if isinstance(out, torch.Tensor) else list(out)
    return returned + [args[name] for name in op.mutates]


@pytest.mark.interpreter("the order of accesses is recorded in the interpreter")
@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_no_program_touches_memory_before_it_waits(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program of every operator waits once, before all else, and gives the usual result."""
    case = entry.cases[0]
    args = [entry.args(case, TensorMaker.of(case.float_dtype)) for _ in range(2)]
    expected = results(entry.op, args[0])
    with recording(monkeypatch) as events:
        found = results(entry.op, args[1])
    assert programs(events)
    for program in programs(events):
        assert program[0] == "wait"
        assert program.count("wait") == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _loads_early(p_x, p_y, OVERLAP: tl.constexpr):
    x = tl.load(p_x + tl.program_id(0))
    wait_for_launches(OVERLAP)
    tl.store(p_y + tl.program_id(0), x)


@triton.jit
def _ends_early(p_x, p_y, OVERLAP: tl.constexpr):
    if tl.program_id(0) > 0:
        return
    wait_for_launches(OVERLAP)
    tl.store(p_y, tl.load(p_x))


@pytest.mark.interpreter("the order of accesses is recorded in the interpreter")
def test_programs_that_do_not_wait_first_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.ones(2), torch.zeros(2)
    with recording(monkeypatch) as events:
        _loads_early[(2,)](x, y, OVERLAP=True)
    assert [program[0] for program in programs(events)] == ["create_load"] * 2
    with recording(monkeypatch) as events:
        _ends_early[(2,)](x, y, OVERLAP=True)
    assert [program[:1] for program in programs(events)] == [["wait"], []]


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
            require_overlap(cuda, "triton")
        else:
            with pytest.raises(ValueError, match=r"compute capability 9\.0 or newer"):
                require_overlap(cuda, "triton")
