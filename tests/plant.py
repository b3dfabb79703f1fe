"""Operators with planted faults: our own kernel source with some text replaced, loaded under another name.

Run as a program, this file compiles planted kernels, which a process that uses Triton's interpreter cannot do. The
program reads a list of plants as JSON, and writes the faults that the ledger finds in each plant.
"""

import dataclasses
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path

from bench.ops import registry
from bench.ops.registry import Case, Entry

FOLDER = Path(tempfile.mkdtemp())
Edit = tuple[str, str]


def entry_of(operator: str) -> Entry:
    """Return the registry's entry of an operator, by the operator's name."""
    return next(entry for entry in registry.entries() if entry.name == operator)


def case_of(entry: Entry, name: str) -> Case:
    """Return the case of `entry` with this name."""
    return next(case for case in entry.cases if case.name == name)


def plant(entry: Entry, *edits: Edit) -> Entry:
    """Return `entry` with an operator made from the edited source of its kernel file.

    Each edit is (old text, new text). The old text must occur exactly once in the file.
    """
    name = entry.op.__module__.rpartition(".")[2]
    source = (registry.ROOT / "kernels" / f"{name}.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"planted text occurs {source.count(old)} times in kernels/{name}.py: {old}"
        source = source.replace(old, new)
    mark = hashlib.sha256(source.encode()).hexdigest()[:8]
    source = re.sub(r"(@operator\(.*\)\ndef \w+)", rf"\1_{mark}", source)
    file = FOLDER / f"{name}_{mark}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(f"voxkern.kernels.{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return dataclasses.replace(entry, op=getattr(module, f"{entry.name}_{mark}"))


def main() -> None:
    """Read a list of {operator, case, dtype, arch, edits} from stdin; write a list of faults for each to stdout."""
    from bench.static.ledger import rows_of

    answers = []
    for ask in json.load(sys.stdin):
        entry = plant(entry_of(ask["operator"]), *map(tuple, ask["edits"]))
        rows = rows_of(entry, case_of(entry, ask["case"]), ask["dtype"], ask["arch"])
        answers.append([fault for row in rows for fault in row.faults(entry.uses_matrix_unit)])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
