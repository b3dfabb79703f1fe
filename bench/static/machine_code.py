"""Read what a compiled kernel's machine code uses: registers, stack, and kinds of instructions."""

import hashlib
import re
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxkern.compile_only import TOOLS, Binary

MATRIX = r"\b(?:HMMA|HGMMA|IMMA|QGMMA|UTC\w?MMA)[\w.]*|v_s?mfma_\w+|v_wmma_\w+"
# instructions that a step does not count: NOP, and on AMD GPUs all but vector instructions
UNCOUNTED = r"NOP|[a-uw-z]\w*_"
STORES = r"\bSTG\b|\b(?:global|buffer)_store_"  # stores of results
# kinds of loads, matrix instructions, and instructions of a step, as in the ledger's columns
Instructions = tuple[str, str, int]


@dataclass(frozen=True)
class MachineCode:
    """Holds the resources that the machine code of one kernel uses.

    Attributes:
        registers: 32-bit registers of a thread.
        spill: bytes of registers that a thread keeps in memory.
        size: bytes of machine code.
        digest: the first 16 digits of the SHA-256 of the machine code, or ``-`` for AMD.
        instructions: kinds of loads, matrix instructions, and instructions of a step, see :func:`_step`.
    """

    registers: int
    spill: int
    size: int
    digest: str
    instructions: Instructions


def read(binary: Binary, known: Mapping[str, Instructions]) -> MachineCode:
    """Return what a binary's machine code uses.

    Args:
        binary: the binary.
        known: digest -> instructions. Machine code with a known digest is not disassembled, which would take 0.7 s.
    """
    if not binary.arch.startswith("sm_"):
        return _of_amd(binary.listing)
    (cubin,) = (path for path in binary.files.values() if path.endswith(".cubin"))
    code = text_section(Path(cubin).read_bytes())
    digest = hashlib.sha256(code).hexdigest()[:16]
    command = [str(TOOLS / "cuobjdump"), "-res-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used is not None
    instructions = known[digest] if digest in known else _instructions(binary.listing)
    return MachineCode(int(used[1]), int(used[2]), len(code), digest, instructions)


def text_section(elf: bytes) -> bytes:
    """Return the machine code of a cubin with one kernel: the section ``.text.KERNEL`` of a 64-bit ELF file."""
    at, size, count, i_names = *struct.unpack_from("<Q", elf, 0x28), *struct.unpack_from("<HHH", elf, 0x3A)
    # each tuple holds a section's offset in the section of names, its offset in the file, and its size
    sections = [struct.unpack_from("<I20xQQ", elf, at + i * size) for i in range(count)]
    names = sections[i_names][1]
    (code,) = (
        elf[start : start + length] for name, start, length in sections if elf.startswith(b".text.", names + name)
    )
    return code


def _of_amd(listing: str) -> MachineCode:
    number = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", listing, re.MULTILINE)}
    length = re.search(r"codeLenInByte = (\d+)", listing)
    assert length is not None
    # vgpr_count is the sum of both kinds of vector registers; agpr_count is the share of one kind
    spill = number["private_segment_fixed_size"] + 4 * (number["vgpr_spill_count"] + number["sgpr_spill_count"])
    return MachineCode(number["vgpr_count"], spill, int(length[1]), "-", _instructions(listing))


def _instructions(listing: str) -> Instructions:
    return _loads(listing), " ".join(sorted(set(re.findall(MATRIX, listing)))) or "-", _step(listing)


def _step(listing: str) -> int:
    """Count a warp's instructions in one pass of the innermost loop that has matrix instructions.

    A loop that stores results, such as attention after a product, counts only if all such loops store. Of several
    loops, the longest counts. The result is 0 if there is no loop. For AMD, only vector instructions count, because the
    others run beside them.
    """
    program = (_sass if "/*0000*/" in listing else _amdgcn)(listing)
    products = [body for body in _loops(program) if any(re.search(MATRIX, program[i].text) for i in body)]
    innermost = [body for body in products if not any(other < body for other in products)]
    without_stores = [body for body in innermost if not any(re.search(STORES, program[i].text) for i in body)]
    bodies = without_stores or innermost
    return max((sum(not re.match(UNCOUNTED, program[i].text) for i in body) for body in bodies), default=0)


@dataclass(frozen=True)
class _Instruction:
    """An instruction's text, and the indices of the instructions that may run next."""

    text: str
    successors: tuple[int, ...]


def _loops(program: Sequence[_Instruction]) -> list[set[int]]:
    """Return the instructions of each natural loop: its header, and those that reach its back edges without it.

    A jump to an instruction is a back edge only if that instruction dominates the jump: every path to the jump passes
    it. For example, the compiler moves the wait for an incomplete barrier to the kernel's end. The jump that returns
    from there is no back edge, because the wait can be reached before the jump's target. Back edges to the same
    header make one loop.
    """
    if not program:
        return []
    successors = [instruction.successors for instruction in program]
    predecessors: list[list[int]] = [[] for _ in program]
    for i in _reached([0], successors):
        for j in successors[i]:
            predecessors[j].append(i)
    loops = []
    for header in [i for i, found in enumerate(predecessors) if len(found) > 1]:
        not_dominated = _reached([0], successors, without=header)
        back = [i for i in predecessors[header] if i not in not_dominated]
        if back:
            loops.append(_reached(back, predecessors, without=header) | {header})
    return loops


def _reached(start: Sequence[int], edges: Sequence[Sequence[int]], without: int | None = None) -> set[int]:
    """Return the instructions that are reached along `edges` from those of `start`, never through `without`."""
    reached, rest = set(), [i for i in start if i != without]
    while rest:
        i = rest.pop()
        if i not in reached:
            reached.add(i)
            rest += [j for j in edges[i] if j != without]
    return reached


def _program(texts: Sequence[str], places: Mapping[str, int], jump: str, always: str, end: str) -> list[_Instruction]:
    """Return the instructions with their successors.

    Args:
        texts: the instructions.
        places: address or label -> the index of its instruction.
        jump: a pattern of jumps, in which group 1 is the place of the target.
        always: a pattern of jumps without a condition.
        end: a pattern of instructions that end the kernel or a subroutine.
    """
    found = []
    for i, text in enumerate(texts):
        target = re.search(jump, text)
        is_last = i + 1 == len(texts) or re.match(f"{always}|{end}", text)
        successors = () if is_last else (i + 1,)
        found.append(_Instruction(text, (*successors, places[target[1]]) if target else successors))
    return found


def _sass(listing: str) -> list[_Instruction]:
    lines = re.findall(r"^\s+/\*0*([0-9a-f]+)\*/\s+(.*?)\s*;", listing, re.MULTILINE)
    places = {address: i for i, (address, _) in enumerate(lines)}
    # a CALL may return, but the assembler also uses it for jumps that are too far for BRA
    jump = r"\b(?:BRA|CALL)\b.*?0x0*([0-9a-f]+)"
    return _program([text for _, text in lines], places, jump, r"BRA(?:\.\w+)* 0x", "EXIT|RET")


def _amdgcn(listing: str) -> list[_Instruction]:
    texts: list[str] = []
    places: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            places[label[1]] = len(texts)
        elif line.startswith("\t") and not line.startswith(("\t.", "\t;")):
            texts.append(line.strip())
    return _program(texts, places, r"^s_c?branch\w* (\.LBB\w+)", "s_branch", "s_endpgm|s_setpc")


def _loads(listing: str) -> str:
    """Return the kinds of loads with widths in bits, such as "LDGSTS.128"; the kind with the most bytes is first."""
    carried: dict[str, int] = {}
    for name in re.findall(r"\bLDG(?:STS)?\.[\w.]+|\b(?:global|buffer)_load_\w+", listing):
        words = re.search(r"dword(?:x([234]))?", name)
        bits = re.search(r"\.U?(8|16|64|128)\b|_[us]?(?:byte|short)", name)
        width = 32 * int(words[1] or 1) if words else int(bits[1] or 16) if bits else 32
        kind = f"{re.split('[.]|_load', name)[0]}.{width}"
        carried[kind] = carried.get(kind, 0) + width
    return " ".join(sorted(carried, key=lambda kind: -carried[kind])) or "-"
