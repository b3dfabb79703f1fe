"""The ledger: registers, shared memory and instructions of every kernel, compiled without a GPU for 8 architectures.

Each operator's own launcher runs at its public shapes on a stub driver (``voxkern/compile_only.py``). The ledger has a
row for each launch and architecture. ``python -m bench ledger --check`` computes the ledger again, and compares it with
the committed ``bench/ledger.csv``. A change of machine code is therefore in the diff of the commit that causes it.

Kernels with the same source, constants, options and compilers as in the committed ledger are not compiled again, except
one in 16 (bench/static/known_kernels.py). ``--all`` compiles every kernel.
"""

import csv
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from torch import Tensor

from bench.command_line import parser_of
from bench.ops.registry import DTYPES, Case, Entry, TensorMaker, entries
from bench.static import known_kernels, machine_code
from bench.static.machine_code import Instructions, MachineCode
from bench.static.machines import MACHINES
from voxkern.compile_only import CompiledLaunch, compiling_for
from voxkern.reference.quantized import FORMATS

FILE = Path(__file__).resolve().parents[1] / "ledger.csv"


@dataclass(frozen=True)
class LedgerRow:
    """One launch of one operator, compiled for one architecture.

    Attributes:
        operator: name of the operator.
        case: name of the operator's case (its shapes) in the registry.
        dtype: bf16, fp16 or fp32, or int8 or fp8 for weights in 8 bits and activations in bf16.
        arch: the architecture that the launch is compiled for, such as ``sm_90``.
        launch: "i:kernel", the launch's index among those of one call, and the kernel's name.
        constants: the kernel's sizes and tiles, "NAME=value", with spaces between.
        binaries: number of different binaries that calls with different numbers of rows, up to the case's, compile for
            this launch.
        grid: blocks along x, y and z.
        warps: warps of a block.
        stages: stages of the software pipeline.
        registers: 32-bit registers of a thread.
        spill: bytes of registers that a thread keeps in memory.
        shared: bytes of shared memory of a block.
        limit: bytes of shared memory that a block may have.
        resident: blocks that a multiprocessor holds at once.
        in_flight: bytes of weights in flight per multiprocessor, min(resident, grid / multiprocessors) x (stages - 1) x
            bytes a stage.
        loads: kinds of loads from memory with their widths in bits; the kind that loads the most bytes is first. LDGSTS
            is the asynchronous copy. A narrow LDG in a loop with LDGSTS stalls the loop.
        matrix: the matrix instructions, or ``-``.
        step: instructions of a warp in one step of the product, or 0 if no loop has matrix instructions, for example
            because the compiler unrolled it. For AMD, only vector instructions count.
        code: bytes of machine code.
        digest: the first digits of the SHA-256 of the machine code, for NVIDIA; ``-`` for AMD.
        source: the first digits of Triton's hash of source, constants, options and compilers, see
            :mod:`bench.static.known_kernels`. It may change while the machine code stays.
    """

    operator: str
    case: str
    dtype: str
    arch: str
    launch: str
    constants: str
    binaries: int
    grid: str
    warps: int
    stages: int
    registers: int
    spill: int
    shared: int
    limit: int
    resident: int
    in_flight: int
    loads: str
    matrix: str
    step: int
    code: int
    digest: str
    source: str

    @property
    def key(self) -> str:
        """The columns that identify the row: operator, case, dtype, architecture and launch, with spaces between."""
        return " ".join((self.operator, self.case, self.dtype, self.arch, self.launch))

    def faults(self, uses_matrix_unit: bool = True) -> list[str]:
        """Return a message for each of the kernels' rules that this launch breaks.

        Args:
            uses_matrix_unit: whether the operator's first launch must use matrix instructions in bf16 and fp16.
        """
        found = []
        if self.spill:
            found.append(f"spills {self.spill} bytes of registers")
        if self.shared > self.limit:
            found.append(f"needs {self.shared:,} bytes of shared memory, {self.arch} has {self.limit:,}")
        if self.resident == 0 and self.shared <= self.limit:
            found.append(f"does not fit: {self.warps} warps of {self.registers} registers")
        if self.binaries != 1:
            found.append(f"{self.binaries} binaries where only one is allowed: Triton specialised on an argument")
        nvidia = self.arch.startswith("sm_")
        if self.dtype == "fp32" and (self.matrix != "-" if nvidia else "xf32" in self.matrix):
            found.append(f"multiplies fp32 as TF32 ({self.matrix})")  # NVIDIA's matrix units take fp32 only as TF32
        if self.dtype != "fp32" and uses_matrix_unit and self.launch.startswith("0:") and self.matrix == "-":
            found.append("multiplies without a matrix instruction")
        return found


@dataclass(frozen=True)
class Known:
    """Holds what an earlier ledger says about compiled kernels.

    Attributes:
        rows: source -> a row with it. Such a kernel is not compiled.
        instructions: digest -> kinds of loads, and matrix instructions. Machine code with such a digest is not
            disassembled, because disassembly takes longer than compilation.
    """

    rows: Mapping[str, LedgerRow]
    instructions: Mapping[str, Instructions]


def rows_of(entry: Entry, case: Case, dtype: str, arch: str, known: Known | None = None) -> list[LedgerRow]:
    """Compile an operator's launches, and return a row for each launch.

    The rows describe the call with the most rows. Their column `binaries` also covers calls with fewer rows.

    Args:
        entry: the operator.
        case: the operator's shapes.
        dtype: see :class:`LedgerRow`.
        arch: the architecture.
        known: what an earlier ledger says, or None for nothing.
    """
    most = case.sizes[entry.rows]
    with compiling_for(arch) as launches:
        made: dict[int, set[str]] = {}
        for n in sorted({n for n in (1, 2, 3, 7, 16, most) if n <= most}):
            args = entry.args(case, TensorMaker.of(dtype, "meta"), **{entry.rows: n})
            for some in (args, {name: _second_request(arg, n) for name, arg in args.items()}):
                launches.clear()
                entry.op.run(**some)
                for i, launch in enumerate(launches):
                    made.setdefault(i, set()).add(launch.binary.hash)
        known = known or Known({}, {})
        return [
            _row(entry, case, dtype, arch, f"{i}:{launch.binary.kernel}", launch, len(made[i]), known)
            for i, launch in enumerate(launches)
        ]


def compute(
    archs: Iterable[str] = MACHINES, processes: int = 2, known: Iterable[LedgerRow] = (), compile_all: bool = False
) -> list[LedgerRow]:
    """Compute the whole ledger: all operators, public cases and dtypes in the registry's order, each for all `archs`.

    Args:
        archs: architectures to compile for.
        processes: the most processes that compile at once.
        known: rows of an earlier ledger; see :class:`Known`.
        compile_all: compile every kernel, also those with the source of a row in `known`.
    """
    archs, rows = list(archs), list(known)
    instructions = {} if compile_all else {row.digest: (row.loads, row.matrix, row.step) for row in rows}
    sources = {} if compile_all else {row.source: row for row in rows}
    knowns = [Known(sources, instructions)] * len(archs)
    with ProcessPoolExecutor(min(processes, len(archs)), mp_context=get_context("spawn")) as pool:
        found = [row for part in pool.map(_of_arch, archs, knowns) for row in part]
    order = [(entry.name, case.name, dtype) for entry in entries() for case in entry.cases for dtype in case.dtypes]
    return sorted(found, key=lambda row: order.index((row.operator, row.case, row.dtype)))


def written(constants: Mapping[str, Any]) -> str:
    """Return a kernel's sizes and tiles, which have names in upper case, as the ledger writes them.

    OVERLAP is left out, because launches in the ledger do not overlap.
    """
    return " ".join(f"{name}={constants[name]}" for name in sorted(constants) if name.isupper() and name != "OVERLAP")


def faults(rows: Iterable[LedgerRow]) -> list[str]:
    """Return a message for each rule that a row breaks, see :meth:`LedgerRow.faults`."""
    uses_matrix_unit = {entry.name: entry.uses_matrix_unit for entry in entries()}
    return [f"{row.key}: {fault}" for row in rows for fault in row.faults(uses_matrix_unit.get(row.operator, True))]


def changes(committed: Iterable[LedgerRow], rows: Iterable[LedgerRow]) -> list[str]:
    """Return a message for each row that differs between the committed ledger and `rows` in more than its source."""
    old, new = ({row.key: row for row in part} for part in (committed, rows))
    found = [f"{key}: no longer compiled" for key in old if key not in new]
    for key, row in new.items():
        if key not in old:
            found.append(f"{key}: not in the committed ledger")
            continue
        was, now = asdict(old[key]), asdict(row)
        parts = [f"{name} {was[name]} -> {now[name]}" for name in now if name != "source" and was[name] != now[name]]
        if parts:
            found.append(f"{key}: " + ", ".join(parts))
    return found


def write(rows: Iterable[LedgerRow]) -> str:
    """Return the ledger as text: a line with Triton's version, then a CSV table."""
    text = io.StringIO()
    text.write(f"# triton {triton.__version__}; compiled, not run: python -m bench ledger\n")
    table = csv.DictWriter(text, [field.name for field in fields(LedgerRow)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(row) for row in rows)
    return text.getvalue()


def read(text: str) -> tuple[str, list[LedgerRow]]:
    """Return the version of Triton and the rows of a ledger's text."""
    head, _, table = text.partition("\n")
    numbers = {field.name for field in fields(LedgerRow) if field.type is int}
    rows = [
        LedgerRow(**{name: int(value) if name in numbers else value for name, value in line.items()})
        for line in csv.DictReader(io.StringIO(table))
    ]
    return head.split()[2].rstrip(";"), rows


def check(file: Path = FILE, compile_all: bool = False) -> list[str]:
    """Compute the ledger again, and return a message for each broken rule and each difference from `file`.

    Differences are left out if `file` was made with another version of Triton.

    Args:
        file: the committed ledger.
        compile_all: compile every kernel, also those with the source of a row in `file`.
    """
    version, committed = read(file.read_text())
    rows = compute(known=committed, compile_all=compile_all)
    found = faults(rows)
    if version != triton.__version__:
        print(
            f"The committed ledger was made by triton {version} and this is {triton.__version__}: "
            "spills, limits, binaries and TF32 were checked, changes of machine code were not."
        )
        return found
    return found + [f"{change} (if meant, run python -m bench ledger)" for change in changes(committed, rows)]


def _of_arch(arch: str, known: Known) -> list[LedgerRow]:
    all_entries = entries(arch)  # imports the kernels, so that `skipping` can set their line numbers to 0
    with known_kernels.skipping(known.rows):
        return [
            row
            for entry in all_entries
            for case in entry.cases
            if case.public
            for dtype in case.dtypes
            for row in rows_of(entry, case, dtype, arch, known)
        ]


def _second_request(arg: Any, n: int) -> Any:
    """Return a tensor with a number for each of `n` requests at an address not aligned to 16 bytes.

    Any other argument is returned unchanged. In memory, the number of a second request has such an address. It must not
    need another binary.
    """
    if isinstance(arg, Tensor) and arg.ndim == 1 and len(arg) in (n, n + 1):
        return arg.new_empty(len(arg) + 1)[1:]
    return arg


def _row(
    entry: Entry,
    case: Case,
    dtype: str,
    arch: str,
    name: str,
    launch: CompiledLaunch,
    binaries: int,
    known: Known,
) -> LedgerRow:
    binary, machine, source = launch.binary, MACHINES[arch], known_kernels.key(launch.binary.hash)
    if binary.files:
        code = machine_code.read(binary, known.instructions)
    else:
        row = known.rows[source]
        code = MachineCode(row.registers, row.spill, row.code, row.digest, (row.loads, row.matrix, row.step))
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    resident = machine.resident_blocks(binary.warps, code.registers, binary.shared)
    stage = entry.stage(binary.constants) * (1 if dtype in FORMATS else DTYPES[dtype].itemsize)
    in_flight = min(resident, blocks / machine.multiprocessors) * (binary.stages - 1) * stage
    return LedgerRow(
        entry.name, case.name, dtype, arch, name, written(binary.constants), binaries,
        "x".join(map(str, launch.grid)), binary.warps,
        binary.stages, code.registers, code.spill, binary.shared, machine.block_shared, resident, round(in_flight),
        *code.instructions, code.size, code.digest, source,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Write bench/ledger.csv, or compare with it; print the complaints, and return 1 if there is one, else 0."""
    parser = parser_of("ledger", __doc__)
    parser.add_argument("--check", action="store_true", help="compare with bench/ledger.csv instead of writing it")
    parser.add_argument("--all", action="store_true", help="compile also kernels that the ledger has")
    options, start = parser.parse_args(arguments), time.perf_counter()
    if options.check:
        found = check(compile_all=options.all)
    else:
        rows = compute(known=read(FILE.read_text())[1], compile_all=options.all)
        FILE.write_text(write(rows))
        found = faults(rows)
    print(*found, sep="\n", end="\n" if found else "")
    print(f"ledger: {len(found)} complaints, {time.perf_counter() - start:.0f} s")
    return 1 if found else 0
