"""Kernels with a fault planted: our own source with a line changed, under another name.

As a program it compiles planted kernels, which the interpreter's process cannot: it reads a list of plants as JSON and
answers with the ledger's complaints about each.
"""

import dataclasses
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path

from bench import registry
from bench.registry import Case, Entry

FOLDER = Path(tempfile.mkdtemp())
Edit = tuple[str, str]


def entry_of(operator: str) -> Entry:
    """The registry's entry of that name."""
    return next(entry for entry in registry.entries() if entry.name == operator)


def case_of(entry: Entry, name: str) -> Case:
    """The entry's case of that name."""
    return next(case for case in entry.cases if case.name == name)


def plant(entry: Entry, *edits: Edit) -> Entry:
    """The entry with an operator made from its file's source, in which each edit's old text stands exactly once."""
    name = entry.op.__module__.rpartition(".")[2]
    source = (registry.ROOT / "kernels" / f"{name}.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"planted text stands {source.count(old)} times in kernels/{name}.py: {old}"
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
    """[{operator, case, dtype, arch, edits}, ...] on stdin; on stdout a list of complaints about each."""
    from bench.ledger import rows_of

    answers = []
    for ask in json.load(sys.stdin):
        entry = plant(entry_of(ask["operator"]), *map(tuple, ask["edits"]))
        rows = rows_of(entry, case_of(entry, ask["case"]), ask["dtype"], ask["arch"])
        answers.append([fault for row in rows for fault in row.faults(entry.uses_matrix_unit)])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
