"""Read what a compiled kernel's machine code uses: registers, stack, and kinds of instructions."""

import hashlib
import re
import struct
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from voxkern.compile_only import TOOLS, Binary

MATRIX = r"\b(?:HMMA|HGMMA|IMMA|QGMMA|UTC\w?MMA)[\w.]*|v_s?mfma_\w+|v_wmma_\w+"
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

    If there are several such loops, the longest counts. The result is 0 if there is none. For AMD, only vector
    instructions count, because the others run beside them.
    """
    code, backwards = (_sass if "/*0000*/" in listing else _amdgcn)(listing)
    bodies = {(first, last): [text for at, text in code if first <= at <= last] for first, last in set(backwards)}
    products = {loop: len(body) for loop, body in bodies.items() if re.search(MATRIX, " ".join(body))}
    return max((n for loop, n in products.items() if not any(_contains(loop, other) for other in products)), default=0)


def _contains(outer: tuple[int, int], inner: tuple[int, int]) -> bool:
    return outer != inner and outer[0] <= inner[0] and inner[1] <= outer[1]


Code = tuple[list[tuple[int, str]], list[tuple[int, int]]]  # (place, instruction), and (target, place) of jumps back


def _sass(listing: str) -> Code:
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.MULTILINE)
    jumps = [(at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in lines]
    backwards = [(int(jump[1], 16), int(at, 16)) for at, jump in jumps if jump and int(jump[1], 16) <= int(at, 16)]
    return [(int(at, 16), text) for at, text in lines if not text.startswith("NOP")], backwards


def _amdgcn(listing: str) -> Code:
    lines = listing.splitlines()
    found = [(re.match(r"(\.LBB\w+):", line), at) for at, line in enumerate(lines)]
    labels = {label[1]: at for label, at in found if label}
    jumps = [(at, re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)) for at, line in enumerate(lines)]
    backwards = [(labels[jump[1]], at) for at, jump in jumps if jump and labels.get(jump[1], at + 1) <= at]
    return [(at, line) for at, line in enumerate(lines) if line.startswith("\tv_")], backwards


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
