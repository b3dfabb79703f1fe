"""Search launch configs for the GPU at hand, and write them into the tables that stand beside the kernels.

``python -m bench tune --op norm_linear`` prints a diff of ``kernels/linear.py``, ``--write`` writes it. From what the
table has, one column after the other is halved and doubled (stages: one more, one less) for as long as that gains 2
%. A candidate that spills, does not fit or computes something else is dropped before it is timed. Operators that use
another one's table, as norm_qkv does norm_linear's, are not timed: look at them after. **It has not been run on a
GPU**, only with a made-up clock; ``--arch sm_90`` shows without one which candidates fit that architecture.
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
from bench.registry import DTYPES, ROOT, Case, Entry, TensorMaker, entries
from bench.timing import Clock, clock_of, copies_for, measure
from voxkern.compile_only import ARCHITECTURES
from voxkern.kernels.launch_config import LaunchConfigs, architecture, override, target_arch

GAIN = 0.98  # of the time: less than 2 % may be noise, and a table's lines are worth keeping few
LaunchConfig = dict[str, int]
Fits = Callable[[LaunchConfig], str]


def configs_of(entry: Entry) -> LaunchConfigs | None:
    """The operator's own table, if it has one that can tell architectures apart."""
    module = vars(sys.modules[entry.op.__module__])
    found = [value for value in module.values() if isinstance(value, LaunchConfigs) and value.kernel == entry.name]
    return next((configs for configs in found if "arch" in configs.conditions), None)


def file_of(entry: Entry) -> Path:
    """Where the operator's kernels and their tables stand."""
    return ROOT / "kernels" / f"{entry.op.__module__.rpartition('.')[2]}.py"


def config_of(configs: LaunchConfigs, line: int) -> LaunchConfig:
    """What a line of the table says."""
    return {name: int(configs.lines[line][name]) for name in configs.names}


def lines_of(entry: Entry, configs: LaunchConfigs) -> dict[int, list[tuple[Case, str]]]:
    """Lines of the table that public shapes take on the current architecture, and which shapes those are."""
    found: dict[int, list[tuple[Case, str]]] = {}
    for case in entry.cases:
        for dtype in case.dtypes if case.public else ():
            with record_lookups(configs) as sizes:
                entry.op.run(**entry.args(case, TensorMaker(DTYPES[dtype], "meta")))
            found.setdefault(line_of(configs, sizes[0]), []).append((case, dtype))
    return found


@contextmanager
def record_lookups(configs: LaunchConfigs) -> Iterator[list[dict[str, Any]]]:
    """Within the block, nothing is launched that asks this table; what it was asked is in the list."""
    found: list[dict[str, Any]] = []

    class LookupRecorded(Exception):
        pass

    def record_lookup(self: LaunchConfigs, **sizes: Any) -> dict[str, Any]:
        if self is not configs:
            return original_call(self, **sizes)
        found.append(sizes)
        raise LookupRecorded

    original_call = LaunchConfigs.__call__
    with mock.patch.object(LaunchConfigs, "__call__", record_lookup):
        try:
            yield found
        except LookupRecorded:
            return


def line_of(configs: LaunchConfigs, sizes: Mapping[str, Any]) -> int:
    """The first line that these sizes match."""
    for i in range(len(configs.lines)):
        upper = copy.copy(configs)
        upper.lines = configs.lines[: i + 1]
        try:
            upper(**sizes)
        except ValueError:
            continue
        return i
    raise ValueError(f"no line of {configs.kernel} matches {dict(sizes)}")


def neighbours(config: LaunchConfig, name: str) -> list[LaunchConfig]:
    """The config with one value a step up and a step down."""
    value = config[name]
    steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    most = {"num_warps": 16, "num_stages": 10}.get(name, 1024)
    return [config | {name: step} for step in steps if 1 <= step <= most]


def search(start: LaunchConfig, seconds: Callable[[Sequence[LaunchConfig]], list[float]]) -> tuple[LaunchConfig, float]:
    """Descend along one column after the other.

    Args:
        start: where to begin.
        seconds: times of several settings, measured beside each other; infinite for those that may not be.

    Returns:
        The best config, and its time over that of `start`.
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
        fits: what the compiler has against a config, or nothing.
        known: complaints about the settings seen so far.
    """

    kernel: str
    trials: Sequence[Trial]
    clock: Clock
    fits: Fits
    known: dict[str, str] = field(default_factory=dict)

    def seconds(self, candidates: Sequence[LaunchConfig]) -> list[float]:
        """Geometric means over the shapes; infinite where a config does not fit or a result is wrong."""
        valid = {i: config for i, config in enumerate(candidates) if not self.complaint(config)}
        logs = [0.0 if i in valid else math.inf for i in range(len(candidates))]
        for trial in self.trials:
            copies = trial.copies(copies_for(self.clock, trial.nbytes, trial.held))
            variants = {str(i): [self._call(trial, valid[i], args) for args in copies] for i in valid}
            for i, measured in measure(self.clock, variants).items():
                logs[int(i)] += math.log(measured.timing.median) / len(self.trials)
        return [math.exp(log) for log in logs]

    def complaint(self, config: LaunchConfig) -> str:
        """Why a config may not be timed."""
        key = str(config)
        if key not in self.known:
            self.known[key] = self.fits(config)
        if not self.known[key]:
            with override(self.kernel, **config):
                self.known[key] = next(filter(None, (trial.fault("voxkern") for trial in self.trials)), "")
        return self.known[key]

    def _call(self, trial: Trial, config: LaunchConfig, args: dict[str, Any]) -> Callable[[], None]:
        def call() -> None:
            with override(self.kernel, **config):
                trial.variants["voxkern"](**args)

        return call


def faults_of(operator: str, case: str, dtype: str, arch: str, config: LaunchConfig) -> str:
    """What the ledger has against a config: compiled, not run. For a process of its own, see :func:`compiler`."""
    from bench.ledger import rows_of

    entry = next(entry for entry in entries() if entry.name == operator)
    shape = next(one for one in entry.cases if one.name == case)
    try:
        with override(operator, **config):
            rows = rows_of(entry, shape, dtype, arch)
    except Exception as error:  # whatever the compiler says of tiles that it cannot do
        return f"does not compile: {type(error).__name__}"
    return "; ".join(fault for row in rows for fault in row.faults(entry.uses_matrix_unit))


@contextmanager
def compiler(operator: str, arch: str) -> Iterator[Callable[[Sequence[tuple[Case, str]]], Fits]]:
    """Asks :func:`faults_of` in another process: where a stub compiles, Triton would launch its binaries for real."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:

        def fits_all(shapes: Sequence[tuple[Case, str]]) -> Fits:
            def fits(config: LaunchConfig) -> str:
                asked = ((operator, case.name, dtype, arch, config) for case, dtype in shapes)
                return next(filter(None, (pool.submit(faults_of, *one).result() for one in asked)), "")

            return fits

        yield fits_all


def with_line(source: str, configs: LaunchConfigs, line: int, arch: str, config: LaunchConfig) -> str:
    """A kernels' file whose table has this config: in that line, or above it where it is for other GPUs as well."""
    found = re.search(rf'LaunchConfigs\(\s*"{configs.kernel}",\s*"""\n(.*?)"""', source, re.DOTALL)
    if found is None:
        raise ValueError(f"no table {configs.kernel} in the source")
    lines = found[1].splitlines(keepends=True)
    written = [i for i, text in enumerate(lines) if text.strip()]
    head, place, old = lines[written[0]], written[line + 1], configs.lines[line]
    values = {**old, "arch": arch, **{name: str(value) for name, value in config.items()}, "|": "|"}
    text = ""
    for column in re.finditer(r"\S+", head):
        text = text.ljust(column.start()) + values[column[0]] + " "
    lines[place : place + (old["arch"] == arch)] = [text.rstrip() + "\n"]
    return source[: found.start(1)] + "".join(lines) + source[found.end(1) :]


def tune(entry: Entry, configs: LaunchConfigs, clock: Clock) -> tuple[str, str]:
    """The kernels' file before and after."""
    before = after = file_of(entry).read_text()
    arch = architecture()
    if arch not in ARCHITECTURES:
        raise SystemExit(
            f"this GPU is {arch}, and launch configs are compiled ahead for {', '.join(ARCHITECTURES)} only"
        )
    with compiler(entry.name, arch) as fits:
        # from the last line up: a line that is put in moves those below it
        for line, shapes in sorted(lines_of(entry, configs).items(), reverse=True):
            trials = [operator_trial(entry, case, dtype, "cuda") for case, dtype in shapes]
            start = config_of(configs, line)
            best, ratio = search(start, Tuner(configs.kernel, trials, clock, fits(shapes)).seconds)
            print(f"{configs.kernel} {arch}, line {line + 1}: {start} -> {best}, {ratio:.3f} of the time", flush=True)
            if best != start:
                after = with_line(after, configs, line, arch, best)
    return before, after


def show(entry: Entry, configs: LaunchConfigs, arch: str) -> None:
    """Which candidates a step from the table's settings the compiler takes for `arch`; nothing is timed."""
    with compiler(entry.name, arch) as fits, target_arch(arch):
        for line, shapes in lines_of(entry, configs).items():
            start, fault = config_of(configs, line), fits(shapes)
            print(f"{configs.kernel} {arch}, line {line + 1}, for {', '.join(f'{c.name} {d}' for c, d in shapes)}")
            for config in [start, *(one for name in start for one in neighbours(start, name))]:
                print(f"  {config}: {fault(config) or 'fits'}", flush=True)


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    known = {entry.name: (entry, configs) for entry in entries() if (configs := configs_of(entry)) is not None}
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
