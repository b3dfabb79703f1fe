"""Tests of the ledger's arithmetic and verdicts; ``python -m bench ledger --check`` checks the kernels themselves."""

import dataclasses
import hashlib
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton
from fresh_process import run_python

from bench.ops.registry import entries
from bench.static import ledger, machine_code
from bench.static.machines import MACHINES
from voxkern.compile_only import Binary

ROW = ledger.LedgerRow(
    operator="norm_linear", case="q-b1", dtype="bf16", arch="sm_89", launch="0:_norm_linear_kernel",
    constants="K=3072 N=4096", binaries=1,
    grid="1x64x1", warps=4, stages=4, registers=113, spill=0, shared=101_376, limit=101_376, resident=1,
    in_flight=22_153, loads="LDGSTS.128", matrix="HMMA.16816.F32.BF16", step=130, code=7168,
    digest="0123456789abcdef", source="fedcba9876543211",
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shared": 101_377}, "needs 101,377 bytes of shared memory, sm_89 has 101,376"),
        ({"spill": 8}, "spills 8 bytes"),
        ({"binaries": 2}, "2 binaries"),
        ({"resident": 0}, "does not fit"),
        ({"dtype": "fp32"}, "as TF32"),
        ({"dtype": "fp32", "arch": "gfx942", "matrix": "v_mfma_f32_16x16x8_xf32"}, "as TF32"),
        ({"matrix": "-"}, "without a matrix instruction"),
    ],
)
def test_what_no_kernel_may_do(change: dict[str, object], fault: str) -> None:
    assert ROW.faults() == []
    (found,) = dataclasses.replace(ROW, **change).faults()
    assert fault in found


def test_amd_multiplies_fp32_as_fp32_on_its_matrix_units() -> None:
    row = dataclasses.replace(ROW, dtype="fp32", arch="gfx942", matrix="v_mfma_f32_16x16x4_f32")
    assert row.faults() == []


def test_amd_counts_both_kinds_of_vector_registers_once() -> None:
    listing = """
    .agpr_count:     105
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 0
    .vgpr_count:     233
    .vgpr_spill_count: 0
    ; codeLenInByte = 7168
"""
    code = machine_code._of_amd(listing)
    assert (code.registers, code.spill, code.size) == (233, 0, 7168)


def _listing(*lines: str) -> str:
    """Return disassembled machine code; an instruction has 16 bytes."""
    return "".join(f"        /*{16 * i:04x}*/                   {line} ;\n" for i, line in enumerate(lines))


def test_a_step_is_the_innermost_loop_that_multiplies() -> None:
    """The loop over tiles (0x10 to 0xa0) contains a loop without a product, and the loop over steps (0x60 to 0x90)."""
    lines = ["MOV R1", "ISETP P0", "LDG R2", "FADD R3", "@P0 BRA 0x20", "MOV R4", "LDS R5", "HMMA.16816.F32 R6", "NOP"]
    lines += ["@P1 BRA.U 0x60", "@!P2 BRA `(.L_x_1) 0x10", "EXIT"]
    sass = _listing(*lines)
    assert machine_code._step(sass) == 3  # NOP does not count
    assert machine_code._step(sass.replace("HMMA", "FFMA")) == 0
    amdgcn = """
.LBB0_1:
\tv_mov_b32 v1, v2
.LBB0_2:
\tds_read_b64 v[0:1]
\tv_cvt_f32_i32 v3, v3
\tv_mfma_f32_16x16x16_bf16 v[0:3]
\ts_cbranch_scc1 .LBB0_2
\ts_branch .LBB0_1
"""
    assert machine_code._step(amdgcn) == 2  # only vector instructions


def test_code_moved_to_the_end_adds_only_itself() -> None:
    """The step is 0x10 to 0x50. Its wait for a barrier goes on at 0x90, and returns to 0x30 by a jump back."""
    waiting = ("SYNCS P0", "@!P0 BRA 0x90", "BRA 0x30")
    lines = [
        "MOV R1",
        "LDGSTS R2",
        "@!P0 BRA 0x90",
        "UTCHMMA R3",
        "IADD R4",
        "@P1 BRA 0x10",
        "STG R5",
        "STG R6",
        "EXIT",
    ]
    assert machine_code._step(_listing(*lines, *waiting)) == 5 + len(waiting)
    lines[5] = "FADD R7"
    assert machine_code._step(_listing(*lines, *waiting)) == 0


def test_a_loop_that_stores_results_is_not_the_products() -> None:
    """The loop at 0x30 to 0x60 multiplies again, as attention after a product does, and stores its results."""
    after = ["HMMA R3", "FADD R4", "STG R5", "@P0 BRA 0x30", "EXIT"]
    assert machine_code._step(_listing("MOV R0", "HMMA R1", "@P0 BRA 0x10", *after)) == 2
    assert machine_code._step(_listing("MOV R0", "FADD R1", "@P0 BRA 0x10", *after)) == 4  # no other loop multiplies


def test_a_far_jump_is_a_call_that_never_returns() -> None:
    """The loop over steps, 0x20 to 0x50, is reached only by the call at 0x00. One step has two ways back to 0x20."""
    lines = ["@P6 CALL.REL.NOINC 0x20", "BRA 0x60", "HMMA R1", "@P0 BRA.U 0x20", "FADD R2", "BRA.U UP0, 0x20", "EXIT"]
    assert machine_code._step(_listing(*lines)) == 4


def test_a_subroutine_that_control_does_not_reach_is_no_loop() -> None:
    lines = ["MOV R1", "EXIT", "@P0 BRA 0x50", "HMMA R2", "MOV R3", "RET.REL.NODEC R4 0x0"]
    assert machine_code._step(_listing(*lines)) == 0


def test_the_first_instruction_of_a_loop_may_follow_its_body() -> None:
    """The loop begins at .LBB0_2, and the code before .LBB0_2 falls through to it. The loop's end has two labels."""
    amdgcn = """
\ts_branch .LBB0_2
.LBB0_1:
\tv_mfma_f32_16x16x16_bf16 v[0:3]
\tv_add_f32 v4, v5, v6
\ts_cbranch_scc0 .LBB0_3
.LBB0_2:
\tv_mov_b32 v1, v2
\ts_branch .LBB0_1
.LBB0_3:
.LBB0_4:
\tv_mov_b32 v7, v8
\ts_endpgm
"""
    assert machine_code._step(amdgcn) == 3


@pytest.mark.slow
def test_loops_are_those_that_the_compiler_names() -> None:
    """In AMD's assembly, LLVM writes "Loop Header" beside the first instruction of each loop."""
    code = """
from bench.ops.registry import TensorMaker, entries
from bench.static.machine_code import _amdgcn, _loops
from voxkern.compile_only import compiling_for
with compiling_for("gfx942") as launches:
    for entry in entries("gfx942"):
        case = next(case for case in entry.cases if case.public)
        entry.op.run(**entry.args(case, TensorMaker.of("bf16", "meta")))
    for listing in {one.binary.hash: one.binary.listing for one in launches}.values():
        print(listing.count("Loop Header"), len(_loops(_amdgcn(listing))))
"""
    pairs = [tuple(map(int, line.split())) for line in run_python("-c", code).splitlines()]
    assert len(pairs) > 20
    assert all(named == found for named, found in pairs)
    assert max(pairs) > (1, 1)


def test_a_change_of_machine_code_is_named() -> None:
    other = dataclasses.replace(ROW, case="q-b32")
    assert ledger.changes([ROW, other], [ROW, other]) == []
    (change,) = ledger.changes([ROW], [dataclasses.replace(ROW, registers=120, code=7200)])
    assert "registers 113 -> 120, code 7168 -> 7200" in change
    assert ledger.changes([ROW], []) == [f"{ROW.key}: no longer compiled"]
    assert ledger.changes([], [ROW]) == [f"{ROW.key}: not in the committed ledger"]
    assert ledger.changes([ROW], [dataclasses.replace(ROW, source="0" * 16)]) == []  # a comment was changed


def test_another_triton_is_held_to_the_limits_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ledger.csv"  # type: ignore[operator]
    file.write_text(ledger.write([ROW]))
    now = [dataclasses.replace(ROW, registers=120)]
    monkeypatch.setattr(ledger, "compute", lambda known, compile_all: now)
    assert "registers 113 -> 120" in ledger.check(file)[0]
    monkeypatch.setattr(triton, "__version__", "9.9.9")
    assert ledger.check(file) == []
    assert "changes of machine code were not" in capsys.readouterr().out
    now[0] = dataclasses.replace(ROW, spill=4)
    assert "spills 4 bytes" in ledger.check(file)[0]


def elf(**sections: bytes) -> bytes:
    """Return a 64-bit ELF file with these sections; an underscore in a name stands for a dot."""
    names = b"\0" + b"".join(name.replace("_", ".").encode() + b"\0" for name in sections)
    bodies, heads, at = b"", b"", 64
    for name, body in (*sections.items(), ("", names)):
        start = names.index(name.replace("_", ".").encode()) if name else 0
        heads += struct.pack("<I20xQQ24x", start, at + len(bodies), len(body))
        bodies += body
    end = struct.pack("<HHH", 64, len(sections) + 1, len(sections))  # size, number, and the section of names
    return struct.pack("<40xQ", at + len(bodies)) + bytes(10) + end + bodies + heads


def test_machine_code_with_a_known_digest_is_not_disassembled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "kernel.cubin"
    file.write_bytes(elf(_debug_line=b"somewhere", _text_kernel=b"instructions", _nv_info=b"more"))
    binary = Binary("kernel", "", "sm_90", shared=0, warps=4, stages=3, constants={}, files={"kernel.cubin": str(file)})
    asked: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command[1])
        return SimpleNamespace(stdout="REG:72 STACK:8 SHARED:1024\n  LDGSTS.E.128 R1;\n  HMMA.16816.F32 R2;\n")

    monkeypatch.setattr(subprocess, "run", run)
    code = machine_code.read(binary, {})
    digest = hashlib.sha256(b"instructions").hexdigest()[:16]
    assert code == machine_code.MachineCode(72, 8, 12, digest, ("LDGSTS.128", "HMMA.16816.F32", 0))
    assert asked == ["-res-usage", "-sass"]
    known = machine_code.read(binary, {digest: ("LDG.32", "-", 7)})
    assert known == dataclasses.replace(code, instructions=("LDG.32", "-", 7))
    assert asked == ["-res-usage", "-sass", "-res-usage"]
    other = machine_code.read(binary, {"another": ("LDG.32", "-", 7)})
    assert other == code


def test_the_committed_ledger_is_clean_and_whole() -> None:
    text = ledger.FILE.read_text()
    version, rows = ledger.read(text)
    assert ledger.faults(rows) == []
    wanted = {
        (entry.name, case.name, dtype, arch)
        for arch in MACHINES for entry in entries(arch) for case in entry.cases if case.public for dtype in case.dtypes
    }  # fmt: skip
    assert {(row.operator, row.case, row.dtype, row.arch) for row in rows} == wanted
    if version == triton.__version__:
        assert ledger.write(rows) == text


@pytest.mark.parametrize(
    ("operator", "case"),
    [
        ("norm_qkv", "b1"),
        ("token_attention_linear", "wo-b1"),
        ("norm_swiglu", "b1"),
        ("linear", "down-b1"),
        ("adaln_modulation", "mar-b1"),
        ("adaln_linear_silu", "mar-b1"),
        ("linear", "mar-b1"),
    ],
)
def test_the_flow_heads_products_keep_memory_busy(operator: str, case: str) -> None:
    """Except in fp32, at batch 1 on an H100, at least 32 KiB of weights are in flight per multiprocessor.

    Asynchronous copies of 16 bytes load the weights, and matrix units multiply them. Attention fused
    with wo has two stages of 16 KiB in flight with 8-bit weights, but only 96 blocks on 132 multiprocessors.
    """
    _, rows = ledger.read(ledger.FILE.read_text())
    found = [row for row in rows if (row.operator, row.case, row.arch) == (operator, case, "sm_90")]
    for row in found:
        if row.dtype != "fp32":
            is_small = operator == "token_attention_linear" and row.dtype in ("int8", "fp8")
            assert row.in_flight >= ((32 * 96 // 132) if is_small else 32) << 10
            assert "LDGSTS.128" in row.loads
            assert row.matrix != "-"
    assert "bf16" in {row.dtype for row in found}


def test_resident_blocks() -> None:
    h100 = MACHINES["sm_90"]
    assert h100.resident_blocks(warps=4, registers=56, shared=73_728) == 3  # limited by shared memory
    assert h100.resident_blocks(warps=4, registers=122, shared=20_864) == 4  # limited by registers
    assert h100.resident_blocks(warps=8, registers=32, shared=0) == 8  # limited by warps
    assert h100.resident_blocks(warps=1, registers=16, shared=0) == 32  # limited by blocks
    assert h100.resident_blocks(warps=32, registers=128, shared=0) == 0
    assert MACHINES["gfx942"].resident_blocks(warps=4, registers=102, shared=20_480) == 3
