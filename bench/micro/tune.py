"""Search launch configs for this machine's GPU, and write them into the tables in the kernels' files.

``python -m bench tune --op norm_linear`` prints a diff of ``kernels/norm_linear.py``, and ``--write`` writes it. The
search starts from the table. It halves and doubles one column after the other (stages: one more, one less) while that
gains at least 2 %. A candidate that spills, does not fit or gives wrong results is dropped before it is timed. The
search does not time operators that use the table of another operator, as norm_qkv uses norm_linear's: time these
afterwards. **The search has not been run on a GPU**, only with a simulated clock. ``--arch sm_90`` needs no GPU, and
only shows which candidates fit that architecture."""

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

from bench.command_line import parser_of
from bench.micro.providers import Trial, operator_trial
from bench.micro.timing import Clock, clock_of, copies_for, measure
from bench.ops.registry import ROOT, Case, Entry, TensorMaker, configs_of, entries
from voxkern.compile_only import ARCHITECTURES
from voxkern.kernels.launch_config import LaunchConfigs, architecture, override, target_arch

GAIN = 0.98  # highest new time / old time of a change: gains below 2 % may be noise, and do not justify another line
LaunchConfig = dict[str, int]
Fits = Callable[[LaunchConfig], str]


def file_of(entry: Entry) -> Path:
    """Return the file with the operator's kernels and their tables."""
    return ROOT / "kernels" / f"{entry.op.__module__.rpartition('.')[2]}.py"


def config_of(configs: LaunchConfigs, line: int) -> LaunchConfig:
    """Return the launch config in a line of the table."""
    return {name: int(configs.lines[line][name]) for name in configs.names}


def lines_of(entry: Entry, configs: LaunchConfigs) -> dict[int, list[tuple[Case, str]]]:
    """Return line of the table -> public shapes (case, dtype) that use this line on the current architecture."""
    found: dict[int, list[tuple[Case, str]]] = {}
    for case in entry.cases:
        for dtype in case.dtypes if case.public else ():
            with record_lookups(configs) as sizes:
                entry.op.run(**entry.args(case, TensorMaker.of(dtype, "meta")))
            found.setdefault(line_of(configs, sizes[0]), []).append((case, dtype))
    return found


@contextmanager
def record_lookups(configs: LaunchConfigs) -> Iterator[list[dict[str, Any]]]:
    """Record the first lookup of this table within the ``with`` block, and leave the block before the launch.

    The yielded list then holds the arguments of the lookup.
    """
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
    """Return the first line of the table that these sizes match, as a number from 0.

    Raises:
        ValueError: no line matches.
    """
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
    """Return the configs with the value `name` one step lower and one step higher, if that is in range."""
    value = config[name]
    steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    most = {"num_warps": 16, "num_stages": 10}.get(name, 1024)
    return [config | {name: step} for step in steps if 1 <= step <= most]


def search(start: LaunchConfig, seconds: Callable[[Sequence[LaunchConfig]], list[float]]) -> tuple[LaunchConfig, float]:
    """Search for a faster launch config by coordinate descent, one column after the other.

    Args:
        start: the config to start from.
        seconds: returns the times of several configs, measured in turn; infinite for invalid ones.

    Returns:
        The best config, and its time / the time of `start`.
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
    """Times candidates for one line of a table, over all the shapes that use the line.

    Attributes:
        kernel: name of the table.
        trials: one trial for each shape.
        clock: the GPU's clock.
        fits: function of a config that returns the reason why it does not fit, or an empty string.
        known: config as text -> the reason why it may not be timed, or an empty string, for the configs checked so far.
    """

    kernel: str
    trials: Sequence[Trial]
    clock: Clock
    fits: Fits
    known: dict[str, str] = field(default_factory=dict)

    def seconds(self, candidates: Sequence[LaunchConfig]) -> list[float]:
        """Return the geometric mean of each candidate's seconds over the shapes; inf if it may not be timed."""
        valid = {i: config for i, config in enumerate(candidates) if not self.complaint(config)}
        logs = [0.0 if i in valid else math.inf for i in range(len(candidates))]
        for trial in self.trials:
            copies = trial.copies(copies_for(self.clock, trial.nbytes, trial.held))
            variants = {str(i): [self._call(trial, valid[i], args) for args in copies] for i in valid}
            for i, timing in measure(self.clock, variants).items():
                logs[int(i)] += math.log(timing.median) / len(self.trials)
        return [math.exp(log) for log in logs]

    def complaint(self, config: LaunchConfig) -> str:
        """Return the reason why a config may not be timed (no fit, or a wrong result), or an empty string."""
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
    """Compile an operator with a config, and return the ledger's faults, joined by "; ", or an empty string.

    Call this function in a process that launches nothing on the GPU, see :func:`compiler`.
    """
    from bench.static.ledger import rows_of

    entry = next(entry for entry in entries() if entry.name == operator)
    shape = next(one for one in entry.cases if one.name == case)
    try:
        with override(operator, **config):
            rows = rows_of(entry, shape, dtype, arch)
    except Exception as error:  # the compiler raises various errors for tiles that it does not support
        return f"does not compile: {type(error).__name__}"
    return "; ".join(fault for row in rows for fault in row.faults(entry.uses_matrix_unit))


@contextmanager
def compiler(operator: str, arch: str) -> Iterator[Callable[[Sequence[tuple[Case, str]]], Fits]]:
    """Start a process that compiles, and yield a function of shapes (case, dtype) that returns a :data:`Fits`.

    :func:`faults_of` runs in that process, because it replaces Triton's driver by a stub. In this process Triton would
    then launch the stub's binaries on the GPU.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:

        def fits_all(shapes: Sequence[tuple[Case, str]]) -> Fits:
            def fits(config: LaunchConfig) -> str:
                asked = ((operator, case.name, dtype, arch, config) for case, dtype in shapes)
                return next(filter(None, (pool.submit(faults_of, *one).result() for one in asked)), "")

            return fits

        yield fits_all


def with_line(source: str, configs: LaunchConfigs, line: int, arch: str, config: LaunchConfig) -> str:
    """Return the source of a kernels' file with this config in its table.

    The config replaces the line if the line is for `arch` only. Otherwise a new line for `arch` is inserted above it.

    Args:
        source: the source of the file.
        configs: the table.
        line: number of the line, from 0.
        arch: the architecture that the config is for.
        config: the launch config.

    Raises:
        ValueError: the source does not contain the table.
    """
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
    """Tune all lines of an operator's table on this GPU, and return the kernels' file before and after.

    Raises:
        SystemExit: the GPU's architecture is not one that launch configs are compiled for.
    """
    before = after = file_of(entry).read_text()
    arch = architecture()
    if arch not in ARCHITECTURES:
        raise SystemExit(
            f"this GPU is {arch}, but launch configs can be compiled and tuned only for {', '.join(ARCHITECTURES)}"
        )
    with compiler(entry.name, arch) as fits:
        # from the last line to the first, because a new line changes the numbers of the lines below
        for line, shapes in sorted(lines_of(entry, configs).items(), reverse=True):
            trials = [operator_trial(entry, case, dtype, "cuda") for case, dtype in shapes]
            start = config_of(configs, line)
            best, ratio = search(start, Tuner(configs.kernel, trials, clock, fits(shapes)).seconds)
            print(f"{configs.kernel} {arch}, line {line + 1}: {start} -> {best}, {ratio:.3f} of the time", flush=True)
            if best != start:
                after = with_line(after, configs, line, arch, best)
    return before, after


def show(entry: Entry, configs: LaunchConfigs, arch: str) -> None:
    """Print which configs of the table, and which one step from them, the compiler accepts for `arch`."""
    with compiler(entry.name, arch) as fits, target_arch(arch):
        for line, shapes in lines_of(entry, configs).items():
            start, fault = config_of(configs, line), fits(shapes)
            print(f"{configs.kernel} {arch}, line {line + 1}, for {', '.join(f'{c.name} {d}' for c, d in shapes)}")
            for config in [start, *(one for name in start for one in neighbours(start, name))]:
                print(f"  {config}: {fault(config) or 'fits'}", flush=True)


@torch.inference_mode()
def main(arguments: Sequence[str]) -> int:
    """Tune the operators that the command line names, or with ``--arch`` show which configs fit."""
    parser = parser_of("tune", __doc__)
    known = {entry.name: (entry, configs) for entry in entries() if (configs := configs_of(entry)) is not None}
    parser.add_argument("--op", nargs="+", choices=known, metavar="NAME", help="default: all that run on the GPU")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="only show which configs fit ARCH; needs no GPU")
    parser.add_argument("--write", action="store_true", help="print the diff, and write the tables too")
    options = parser.parse_args(arguments)
    clock = None if options.arch else clock_of("cuda")
    arch = options.arch or architecture()
    names = options.op or [name for name, (entry, _) in known.items() if entry.runs_on(arch)]
    if clock is None:
        for name in names:
            show(*known[name], arch)
        return 0
    for name in names:
        before, after = tune(*known[name], clock)
        file = file_of(known[name][0])
        sys.stdout.writelines(
            difflib.unified_diff(before.splitlines(True), after.splitlines(True), str(file), f"{file}, tuned")
        )
        if options.write:
            file.write_text(after)
    return 0
