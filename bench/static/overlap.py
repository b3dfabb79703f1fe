"""Check in machine code that overlapping kernels touch no memory before they wait.

``python -m bench overlap`` compiles frames of the public model for the architectures on which launches can overlap
(voxkern/kernels/overlap.py): in bf16 at batch 1 and 32, and with 8-bit weights at batch 1. No kernel runs. A complaint
is printed for

- a launch of the frame that does not overlap,
- a kernel that does not wait, or waits under a condition,
- a kernel that loads from or stores to memory before its wait; prefetches are allowed,
- a kernel that ends before its wait, or jumps over it. If a kernel does neither, every block waits.

Both the PTX and the machine code that the assembler makes of it are checked, because the assembler may reorder
instructions. On sm_100, matrix products need tensor memory, which a kernel allocates before its wait.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import voxkern
from bench.command_line import parser_of
from bench.static.work import public
from voxkern.compile_only import OVERLAPPING, Binary, CompiledLaunch, compiling_for
from voxkern.engine.codec_runner import CodecRunner
from voxkern.engine.fused_runner import DecodeBatch
from voxkern.engine.kv_cache import PAGE_SIZE, KVCache
from voxkern.reference import Config
from voxkern.reference.model import model_without_memory
from voxkern.reference.quantized import FORMATS

FRAMES = ((1, None), (32, None), (1, "int8"), (1, "fp8"))  # batch and format of the large weights
# Instructions that access memory shared by all blocks, or end the kernel. LDC loads parameters, LDS and STS access a
# block's shared memory, LDL and STL a thread's own memory, and CCTL is the prefetch.
PTX = (
    r"cp\.(?!async\.(?:bulk\.)?(?:commit|wait))|(?:ld|st|atom|red|multimem|mbarrier)\.(?!param|shared|.*\.shared)"
    r"|(?:ret|exit|trap|call)\b"
)
SASS = r"(?:LDG|LD|STG|ST|ATOM|ATOMG|RED|REDG|LDGSTS|UBLK\w*|UTMA\w*|EXIT|RET|BPT)\b"
PTX_LINE = re.compile(r"^(\$\w+):|(?:^|(?<=[;{]))\s*(@!?%\w+\s+)?([a-z][\w.:]*)([^;]*);", re.MULTILINE)
SASS_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Line:
    """One line of PTX or machine code. A line of PTX is a label or an instruction.

    Attributes:
        label: the label, or the address in machine code.
        predicate: the condition under which a thread runs the instruction, or "".
        instruction: the instruction with its modifiers.
        operands: the rest of the line.
    """

    label: str
    predicate: str
    instruction: str
    operands: str


def faults(ptx: str, sass: str) -> list[str]:
    """Return a message for each way in which a kernel breaks the rule of overlap.

    Args:
        ptx: the PTX of one kernel.
        sass: the disassembled machine code of the same kernel.
    """
    _, _, text = ptx[ptx.index(".entry") :].partition("\n{\n")
    found = _faults("PTX", [Line(*line) for line in PTX_LINE.findall(text)], "griddepcontrol.wait", PTX)
    lines = [Line(f"0x{at.lstrip('0') or 0}", *rest) for at, *rest in SASS_LINE.findall(sass)]
    return found + _faults("machine code", lines, "ACQBULK", SASS)


def _faults(where: str, lines: Sequence[Line], wait: str, forbidden: str) -> list[str]:
    names = [line.instruction for line in lines]
    if wait not in names:
        return [f"{where}: never waits"]
    waits, before = lines[names.index(wait)], lines[: names.index(wait)]
    if waits.predicate:
        return [f"{where}: waits only under the condition {waits.predicate.strip()}"]
    labels = {line.label for line in (*before, waits)}
    wrong = [line.instruction for line in before if re.match(forbidden, line.instruction)]
    for line in before:
        if line.instruction.startswith("CALL"):
            wrong += [one for one in _called(lines, line) if re.match(f"{forbidden}|CALL|BRX|JM", one)]
        elif re.match(r"bra|BRA|brx|BRX|JM", line.instruction):
            jumps_over = labels.isdisjoint(line.operands.replace(",", " ").split())
            wrong += [line.instruction] if jumps_over else []
    return [f"{where}: {one} before the wait" for one in dict.fromkeys(wrong)]


def _called(lines: Sequence[Line], call: Line) -> list[str]:
    """Return the instructions of a subroutine, such as an integer division, from its start to its return.

    The result is the call itself, if its target is not known.
    """
    first = next((i for i, line in enumerate(lines) if line.label in call.operands.split()), None)
    if first is None:
        return [call.instruction]
    body = itertools.takewhile(lambda line: not line.instruction.startswith("RET"), lines[first:])
    return [line.instruction for line in body]


def faults_of(binary: Binary) -> list[str]:
    """Return :func:`faults` of a compiled kernel."""
    (ptx,) = (path for path in binary.files.values() if path.endswith(".ptx"))
    return [f"{binary.kernel}, {binary.arch}: {fault}" for fault in faults(Path(ptx).read_text(), binary.listing)]


def launches_of_frame(config: Config, arch: str, max_batch: int, format_: str | None = None) -> list[CompiledLaunch]:
    """Compile the frame of a model in bf16 for `arch`, with overlap, and return its launches in order.

    `format_` is the format of the large weights, "int8" or "fp8", or None for bf16.
    """
    with compiling_for(arch) as launches, torch.device("meta"), torch.inference_mode():
        model = model_without_memory(config, torch.bfloat16, None if format_ is None else FORMATS[format_])
        voxkern.accelerate(model, max_batch)
        kv_cache = KVCache(config.backbone, 2, torch.bfloat16, torch.device("meta"))
        # three steps, because the first and the last run other kernels than those between them
        codec = CodecRunner(model, max_batch)
        batch = DecodeBatch(model, max_batch, kv_cache, PAGE_SIZE, 3, "euler", codec, overlap=True)
        batch.launch(max_batch)  # also fills the step tables, by launches that are not part of a frame
        launches.clear()
        batch.launch(max_batch)
        return list(launches)


def complaints(launches: Iterable[CompiledLaunch]) -> list[str]:
    """Return a message for each kernel launched without overlap, and for each fault of the other kernels."""
    binaries = {launch.binary.hash: launch.binary for launch in launches}.values()
    found = [f"{one.kernel}, {one.arch}: launched without overlap" for one in binaries if not one.overlaps]
    return found + [fault for one in binaries if one.overlaps for fault in faults_of(one)]


def main(arguments: Sequence[str]) -> int:
    """Compile and check the frames, print the complaints, and return 1 if there is one, else 0."""
    parser_of("overlap", __doc__).parse_args(arguments)
    found = []
    for arch in OVERLAPPING:
        for B, format_ in FRAMES:
            launches = launches_of_frame(public(), arch, B, format_)
            kernels = len({launch.binary.hash for launch in launches})
            found += complaints(launches)
            print(f"{arch}, batch {B}, {format_ or 'bf16'}: {len(launches)} launches of {kernels} kernels", flush=True)
    print(*found, sep="\n", end="\n" if found else "")
    print(f"overlap: {len(found)} complaints")
    return 1 if found else 0
