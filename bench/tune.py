"""Search launch settings for the GPU at hand, and write them into the tables that stand beside the kernels.

``python -m bench tune --op norm_linear`` prints a diff of ``kernels/linear.py``, ``--write`` writes it. From what the
table has, one column after the other is halved and doubled (stages: one more, one less) for as long as that gains 2 %.
A candidate that spills, does not fit or computes something else is dropped before it is timed. Operators that use
another one's table, as norm_qkv does norm_linear's, are not timed: look at them after. **It has not been run
on a GPU**, only with a made-up clock; ``--arch sm_90`` shows without one which candidates fit that architecture.
"""

import argparse
import copy
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.providers import Trial, operator_trial
from bench.registry import DTYPES, ROOT, Case, Entry, Maker, entries
from bench.timing import Clock, clock_of, copies_for, measure
from voxkern.kernels.settings import Table, architecture, override, pretend
from voxkern.stub import ARCHITECTURES

GAIN = 0.98  # of the time: less than 2 % may be noise, and a table's lines are worth keeping few
Setting = dict[str, int]
Fits = Callable[[Setting], str]


def table_of(entry: Entry) -> Table | None:
    """The operator's own table, if it has one that can tell architectures apart."""
    room = vars(sys.modules[entry.op.__module__])
    tables = [value for value in room.values() if isinstance(value, Table) and value.kernel == entry.name]
    return next((table for table in tables if "arch" in table.conditions), None)


def file_of(entry: Entry) -> Path:
    """Where the operator's kernels and their tables stand."""
    return ROOT / "kernels" / f"{entry.op.__module__.rpartition('.')[2]}.py"


def setting_of(table: Table, line: int) -> Setting:
    """What a line of the table says."""
    return {name: int(table.rows[line][name]) for name in table.names}


def lines_of(entry: Entry, table: Table) -> dict[int, list[tuple[Case, str]]]:
    """Lines of the table that public shapes take on the current architecture, and which shapes those are."""
    found: dict[int, list[tuple[Case, str]]] = {}
    for case in entry.cases:
        for dtype in case.dtypes if case.public else ():
            with asked_of(table) as sizes:
                entry.op.run(**entry.args(case, Maker(DTYPES[dtype], "meta")))
            found.setdefault(line_of(table, sizes[0]), []).append((case, dtype))
    return found


@contextmanager
def asked_of(table: Table) -> Iterator[list[dict[str, Any]]]:
    """Within the block, nothing is launched that asks this table; what it was asked is in the list."""
    found: list[dict[str, Any]] = []

    class Asked(Exception):
        pass

    def ask(self: Table, **sizes: Any) -> dict[str, Any]:
        if self is not table:
            return answer(self, **sizes)
        found.append(sizes)
        raise Asked

    answer = Table.__call__
    with mock.patch.object(Table, "__call__", ask):
        try:
            yield found
        except Asked:
            return


def line_of(table: Table, sizes: Mapping[str, Any]) -> int:
    """The first line that these sizes match."""
    for i in range(len(table.rows)):
        upper = copy.copy(table)
        upper.rows = table.rows[: i + 1]
        try:
            upper(**sizes)
        except ValueError:
            continue
        return i
    raise ValueError(f"no line of {table.kernel} matches {dict(sizes)}")


def neighbours(setting: Setting, name: str) -> list[Setting]:
    """The setting with one value a step up and a step down."""
    value = setting[name]
    steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    most = {"num_warps": 16, "num_stages": 10}.get(name, 1024)
    return [setting | {name: step} for step in steps if 1 <= step <= most]


def search(start: Setting, seconds: Callable[[Sequence[Setting]], list[float]]) -> tuple[Setting, float]:
    """Descend along one column after the other.

    Args:
        start: where to begin.
        seconds: times of several settings, measured beside each other; infinite for those that may not be.

    Returns:
        The best setting, and its time over that of `start`.
    """
    best, moved = start, True
    while moved:
        moved = False
        for name in start:
            around = [best, *neighbours(best, name)]
            times = seconds(around)
            fastest = min(range(len(around)), key=times.__getitem__)
            if times[fastest] < GAIN * times[0]:
                best, moved = around[fastest], True
    if best == start:
        return start, 1.0
    before, after = seconds([start, best])
    return best, after / before


@dataclass
class Tuner:
    """Times settings of one line of a table over all the shapes that take it.

    Attributes:
        kernel: name of the table.
        trials: the shapes.
        clock: the GPU's.
        fits: what the compiler has against a setting, or nothing.
        known: complaints about the settings seen so far.
    """

    kernel: str
    trials: Sequence[Trial]
    clock: Clock
    fits: Fits
    known: dict[str, str] = field(default_factory=dict)

    def seconds(self, settings: Sequence[Setting]) -> list[float]:
        """Geometric means over the shapes; infinite where a setting does not fit or a result is wrong."""
        valid = {i: setting for i, setting in enumerate(settings) if not self.complaint(setting)}
        logs = [0.0 if i in valid else math.inf for i in range(len(settings))]
        for trial in self.trials:
            copies = trial.copies(copies_for(self.clock, trial.nbytes, trial.held))
            variants = {str(i): [self._call(trial, valid[i], args) for args in copies] for i in valid}
            for i, measured in measure(self.clock, variants).items():
                logs[int(i)] += math.log(measured.timing.median) / len(self.trials)
        return [math.exp(log) for log in logs]

    def complaint(self, setting: Setting) -> str:
        """Why a setting may not be timed."""
        key = str(setting)
        if key not in self.known:
            self.known[key] = self.fits(setting)
        if not self.known[key]:
            with override(self.kernel, **setting):
                self.known[key] = next(filter(None, (trial.fault("voxkern") for trial in self.trials)), "")
        return self.known[key]

    def _call(self, trial: Trial, setting: Setting, args: dict[str, Any]) -> Callable[[], None]:
        def call() -> None:
            with override(self.kernel, **setting):
                trial.variants["voxkern"](**args)

        return call


def faults_of(operator: str, case: str, dtype: str, arch: str, setting: Setting) -> str:
    """What the ledger has against a setting: compiled, not run. For a process of its own, see :func:`compiler`."""
    from bench.ledger import rows_of

    entry = next(entry for entry in entries() if entry.name == operator)
    shape = next(one for one in entry.cases if one.name == case)
    try:
        with override(operator, **setting):
            rows = rows_of(entry, shape, dtype, arch)
    except Exception as error:  # whatever the compiler says of tiles that it cannot do
        return f"does not compile: {type(error).__name__}"
    return "; ".join(fault for row in rows for fault in row.faults(entry.product))


@contextmanager
def compiler(operator: str, arch: str) -> Iterator[Callable[[Sequence[tuple[Case, str]]], Fits]]:
    """Asks :func:`faults_of` in another process: where a stub compiles, Triton would launch its binaries for real."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:

        def fits_all(shapes: Sequence[tuple[Case, str]]) -> Fits:
            def fits(setting: Setting) -> str:
                asked = ((operator, case.name, dtype, arch, setting) for case, dtype in shapes)
                return next(filter(None, (pool.submit(faults_of, *one).result() for one in asked)), "")

            return fits

        yield fits_all


def with_line(source: str, table: Table, line: int, arch: str, setting: Setting) -> str:
    """A kernels' file whose table has this setting: in that line, or above it where it is for other GPUs as well."""
    found = re.search(rf'Table\(\s*"{table.kernel}",\s*"""\n(.*?)"""', source, re.DOTALL)
    if found is None:
        raise ValueError(f"no table {table.kernel} in the source")
    lines = found[1].splitlines(keepends=True)
    written = [i for i, text in enumerate(lines) if text.strip()]
    head, place, old = lines[written[0]], written[line + 1], table.rows[line]
    values = {**old, "arch": arch, **{name: str(value) for name, value in setting.items()}, "|": "|"}
    text = ""
    for column in re.finditer(r"\S+", head):
        text = text.ljust(column.start()) + values[column[0]] + " "
    lines[place : place + (old["arch"] == arch)] = [text.rstrip() + "\n"]
    return source[: found.start(1)] + "".join(lines) + source[found.end(1) :]


def tune(entry: Entry, table: Table, clock: Clock) -> tuple[str, str]:
    """The kernels' file before and after."""
    before = after = file_of(entry).read_text()
    arch = architecture()
    if arch not in ARCHITECTURES:
        raise SystemExit(f"this GPU is {arch}, and settings are compiled ahead for {', '.join(ARCHITECTURES)} only")
    with compiler(entry.name, arch) as fits:
        # from the last line up: a line that is put in moves those below it
        for line, shapes in sorted(lines_of(entry, table).items(), reverse=True):
            trials = [operator_trial(entry, case, dtype, "cuda") for case, dtype in shapes]
            start = setting_of(table, line)
            best, ratio = search(start, Tuner(table.kernel, trials, clock, fits(shapes)).seconds)
            print(f"{table.kernel} {arch}, line {line + 1}: {start} -> {best}, {ratio:.3f} of the time", flush=True)
            if best != start:
                after = with_line(after, table, line, arch, best)
    return before, after


def show(entry: Entry, table: Table, arch: str) -> None:
    """Which candidates a step from the table's settings the compiler takes for `arch`; nothing is timed."""
    with compiler(entry.name, arch) as fits, pretend(arch):
        for line, shapes in lines_of(entry, table).items():
            start, fault = setting_of(table, line), fits(shapes)
            print(f"{table.kernel} {arch}, line {line + 1}, for {', '.join(f'{c.name} {d}' for c, d in shapes)}")
            for setting in [start, *(one for name in start for one in neighbours(start, name))]:
                print(f"  {setting}: {fault(setting) or 'fits'}", flush=True)


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    known = {entry.name: (entry, table) for entry in entries() if (table := table_of(entry)) is not None}
    parser.add_argument("--op", nargs="+", default=list(known), choices=known, metavar="NAME", help="without it, all")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="only show what fits it, without a GPU")
    parser.add_argument("--write", action="store_true", help="write the tables instead of printing a diff only")
    options = parser.parse_args(arguments)
    if options.arch:
        for name in options.op:
            show(*known[name], options.arch)
        return 0
    clock = clock_of("cuda")
    for name in options.op:
        before, after = tune(*known[name], clock)
        file = file_of(known[name][0])
        sys.stdout.writelines(
            difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(file), f"{file}, tuned")
        )
        if options.write:
            file.write_text(after)
    return 0
