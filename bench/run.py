"""Microbenchmarks: operators at the public shapes, whole frames and single modules, by everybody who can compute them.

``python -m bench run`` prints a line a timing and appends rows to ``bench/results.csv``. On a CPU the torch providers
are timed, which says nothing about the kernels. The GPU's path has been run with a made-up clock only: there has been
no GPU to run it on.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.compare import compare
from bench.modules import BenchPoint, modules
from bench.providers import PROVIDERS, Trial, missing, operator_trial
from bench.registry import DTYPES, Case, Entry, TensorMaker, entries, listed
from bench.results import FILE, Provenance, ResultRow, append, provenance, with_provenance
from bench.timing import Call, Clock, Copy, Measured, clock_of, copies_for, measure
from voxkern.kernels import launch_config

ROOF = "copy"  # the variant that moves bytes and computes nothing
# On a CPU torch.compile takes some ten seconds of a C++ compiler a shape: there it is timed where it is asked for.
ON_CPU = tuple(name for name in PROVIDERS if name != "torch.compile")
# bytes of arguments: of the 2 GB of 64 experts, copies and an fp64 truth would be 15 GB
MOST_ON_CPU = 512 << 20


@dataclass(frozen=True)
class Selection:
    """What to time.

    Attributes:
        subjects: operators and modules; none = all.
        shape: part of the shape's name.
        dtypes: none = all that a case has.
        providers: none = all that are here, but torch.compile on a CPU.
        device: ``cpu``, which leaves out shapes of more than 512 MiB, or ``cuda``.
        quick: the first public case of an operator, no module of gigabytes, and no fp16.
    """

    subjects: tuple[str, ...] = ()
    shape: str = ""
    dtypes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    device: str = "cpu"
    quick: bool = False

    @property
    def on_gpu(self) -> bool:
        """Where kernels run."""
        return self.device.startswith("cuda")

    @property
    def timed(self) -> list[str]:
        """Providers that are asked for and here."""
        asked = self.providers or (tuple(PROVIDERS) if self.on_gpu else ON_CPU)
        absent = missing(self.device)
        return [name for name in asked if name not in absent]

    def takes(self, subject: str, shape: str, dtype: str) -> bool:
        """Whether a case is asked for."""
        return (
            (not self.subjects or subject in self.subjects)
            and self.shape in shape
            and (dtype in self.dtypes if self.dtypes else not (self.quick and dtype == "fp16"))
        )

    def command(self, trial: Trial, provider: str) -> str:
        """That times this one again."""
        parts = ["--op", trial.subject, "--shape", trial.shape, "--dtype", trial.dtype, "--device", self.device]
        if provider != ROOF:
            parts += ["--provider", provider]
        return " ".join(("python -m bench run", *parts))


def subjects(device: str) -> list[str]:
    """Names of all operators and modules."""
    return list(dict.fromkeys([entry.name for entry in entries()] + [module.name for module in modules(device)]))


def trials(selection: Selection) -> Iterator[Trial]:
    """All that is asked for, operators first; each is made when it is its turn, and can be forgotten after it."""
    for entry in entries():
        for case in _public(entry, selection.quick):
            for dtype in case.dtypes:
                if selection.takes(entry.name, case.name, dtype) and (
                    selection.on_gpu or _fits_cpu(entry, case, dtype)
                ):
                    yield operator_trial(entry, case, dtype, selection.device)
    for module in modules(selection.device):
        for dtype in module.dtypes:
            if selection.takes(module.name, module.shape, dtype) and not (selection.quick and module.large):
                yield module.build(BenchPoint(module.name, module.shape, dtype, selection.device))


def _fits_cpu(entry: Entry, case: Case, dtype: str) -> bool:
    args = entry.args(case, TensorMaker(DTYPES[dtype], "meta"))
    tensors = [arg for arg in (*args.values(), *listed(args)) if isinstance(arg, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= MOST_ON_CPU


def _public(entry: Entry, quick: bool) -> list[Case]:
    public = [case for case in entry.cases if case.public]
    return public[:1] if quick else public


def time_trial(trial: Trial, clock: Clock, roof: Copy | None) -> tuple[dict[str, Measured], list[str]]:
    """Time the providers of a trial that are right, and beside them a copy.

    Returns:
        What was measured by provider, and what is wrong with the others.
    """
    faults = {name: trial.fault(name) for name in trial.variants}
    right = [name for name, fault in faults.items() if not fault]
    n = copies_for(clock, trial.nbytes, trial.held) if trial.rotates else 1
    copies = trial.copies(n)  # the same for all: between two calls on one of them lie the others
    variants: dict[str, list[Call]] = {
        name: [partial(trial.variants[name], **args) for args in copies] for name in right
    }
    if roof is not None and right:
        variants[ROOF] = [roof.call]
    return measure(clock, variants), list(filter(None, faults.values()))


def rows_of(
    trial: Trial, found: Mapping[str, Measured], roof: Copy | None, selection: Selection, where: Provenance
) -> list[ResultRow]:
    """A row for the time of each provider; where there is a roof, its bytes per second and what part of it that is."""
    rows = []
    for provider, measured in found.items():
        t = measured.timing
        values = {("time", "us"): [1e6 * seconds for seconds in (t.median, t.low, t.high)]}
        nbytes = roof.nbytes if roof and provider == ROOF else trial.nbytes
        if roof and nbytes:
            rate = [nbytes / seconds / 1e9 for seconds in (t.median, t.high, t.low)]
            highest = roof.nbytes / found[ROOF].timing.median / 1e9
            values["bandwidth", "GB/s"] = rate
            values["of the copy roof", "%"] = [100 * one / highest for one in rate]
        for (metric, unit), value in values.items():
            median, low, high = (float(f"{one:.5g}") for one in value)
            row = ResultRow(
                "micro", trial.subject, metric + (", no graph" if measured.rounds == "no graph" else ""), median, unit,
                "measured", selection.command(trial, provider), provider, trial.shape, trial.dtype, trial.steps, low,
                high,
            )  # fmt: skip
            rows.append(with_provenance(row, where))
    return rows


@torch.inference_mode()
def run(selection: Selection, clock: Clock, file: Path | None, where: Provenance) -> tuple[list[ResultRow], list[str]]:
    """Time all that is asked for: lines and rows for each as it comes.

    Returns:
        The rows, and what is wrong with the providers that were not timed.
    """
    rows, wrong, roof = list[ResultRow](), list[str](), clock.copy()
    for trial in trials(selection):
        torch._dynamo.reset()  # it compiles a function for 8 shapes, and runs it as it is for more
        found, faults = time_trial(trial.only(selection.timed), clock, roof)
        made = rows_of(trial, found, roof, selection, where)
        del trial  # before the next is made: a public model and its fp64 copy are 48 GB
        for line in [*map(line_of, made), *(f"WRONG, not timed: {fault}" for fault in faults)]:
            print(line, flush=True)
        if file is not None:
            append(made, file)
        rows, wrong = rows + made, wrong + faults
    return rows, wrong


def line_of(row: ResultRow) -> str:
    """A figure for people."""
    name = f"{row.subject} {row.shape} {row.dtype} {row.steps}"
    spread = f"({row.low:.6g} to {row.high:.6g})"
    return f"{name:42s} {row.provider:13s} {row.metric:17s} {row.value:9.6g} {row.unit:5s} {spread}"


def selection_of(arguments: Sequence[str]) -> tuple[Selection, argparse.Namespace]:
    """What a command line asks for, and the rest of it.

    Raises:
        SystemExit: it names a subject, a provider or a dtype that is not known.
    """
    parser = argparse.ArgumentParser(prog="python -m bench run", description=__doc__)
    parser.add_argument("--op", nargs="+", default=(), metavar="NAME", help="operators and modules; without it, all")
    parser.add_argument("--shape", default="", metavar="PART", help="only shapes whose name has this in it")
    parser.add_argument("--dtype", nargs="+", default=(), choices=DTYPES, help="without it, all that a shape has")
    parser.add_argument("--provider", nargs="+", default=(), choices=PROVIDERS, help="without it, all that are here")
    devices = ("cpu", "cuda")
    parser.add_argument("--device", default="cpu", choices=devices, help="cpu: the torch providers; cuda: kernels too")
    parser.add_argument("--quick", action="store_true", help="one shape an operator, none of gigabytes, no fp16")
    parser.add_argument("--csv", default=str(FILE), metavar="FILE", help="where rows are appended; - for nowhere")
    parser.add_argument("--compare", metavar="REV", help="measure the git revision REV as well: old, new, ratio")
    options = parser.parse_args(arguments)
    clock_of(options.device)  # ends here where there is no such device
    known = subjects(options.device)
    if unknown := sorted(set(options.op) - set(known)):
        parser.error(f"--op: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    selection = Selection(
        tuple(options.op), options.shape, tuple(options.dtype), tuple(options.provider), options.device, options.quick
    )
    return selection, options


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks; 1 where a provider is wrong, or the operators' tests are red."""
    selection, options = selection_of(arguments)
    clock, absent = clock_of(selection.device), missing(selection.device)
    if absent:
        print("not here: " + "; ".join(f"{name} ({what})" for name, what in absent.items()), flush=True)
    if not selection.timed:
        raise SystemExit(f"none of the providers {', '.join(selection.providers)} is here")
    file = None if options.csv == "-" else Path(options.csv)
    if options.compare:
        return compare(options.compare, selection.subjects, arguments, file)
    # operators whose tiles are among their inputs ask for the architecture, and a processor has none
    with nullcontext() if selection.on_gpu else launch_config.target_arch("sm_90"):
        rows, wrong = run(selection, clock, file, provenance(selection.device))
    print(f"{len(rows)} rows" + (f" appended to {file}" if file else ", written nowhere"))
    return 1 if wrong else 0
