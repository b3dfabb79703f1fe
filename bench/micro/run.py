"""Microbenchmarks of operators at the public shapes, of whole frames and of single modules, for every provider.

``python -m bench run`` prints a line for each timing, and appends rows to ``bench/results.csv``. On a CPU, only the
providers that need no GPU are timed, and their times do not apply to the kernels. The timing on a GPU has been tested
only with a simulated clock, because no GPU was available.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.command_line import parser_of
from bench.micro.compare import compare
from bench.micro.modules import BenchPoint, modules
from bench.micro.providers import PROVIDERS, Trial, missing, operator_trial
from bench.micro.timing import Call, Clock, Copy, Timing, clock_of, copies_for, measure
from bench.ops.registry import DTYPES, Case, Entry, TensorMaker, entries, listed
from bench.results import FILE, ResultRow, provenance, store, with_provenance
from voxkern.kernels import launch_config

ROOF = "copy"  # the variant that moves bytes and computes nothing
# On a CPU torch.compile runs a C++ compiler for about ten seconds a shape, so it is timed only if --provider names it.
ON_CPU = tuple(name for name in PROVIDERS if name != "torch.compile")
# The most bytes of arguments on a CPU. The weights of 64 experts are 2 GB; with copies and an fp64 truth they would
# take 15 GB.
MOST_ON_CPU = 512 << 20


@dataclass(frozen=True)
class Selection:
    """What to time.

    Attributes:
        subjects: names of operators and modules; empty means all.
        shape: text that a shape's name must contain.
        dtypes: names of dtypes; empty means all that a case has.
        providers: names of providers; empty means all that are available, without torch.compile on a CPU.
        device: ``cpu``, which leaves out shapes of more than 512 MiB, or ``cuda``.
        quick: time only the first public case of each operator, no module of gigabytes, and no fp16 unless `dtypes`
            names it.
    """

    subjects: tuple[str, ...] = ()
    shape: str = ""
    dtypes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    device: str = "cpu"
    quick: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU, where kernels run."""
        return self.device.startswith("cuda")

    @property
    def timed(self) -> list[str]:
        """The selected providers that are available."""
        asked = self.providers or (tuple(PROVIDERS) if self.on_gpu else ON_CPU)
        absent = missing(self.device)
        return [name for name in asked if name not in absent]

    def takes(self, subject: str, shape: str, dtype: str) -> bool:
        """Return whether this subject, shape and dtype is selected."""
        return (
            (not self.subjects or subject in self.subjects)
            and self.shape in shape
            and (dtype in self.dtypes if self.dtypes else not (self.quick and dtype == "fp16"))
        )

    def command(self, trial: Trial, provider: str) -> str:
        """Return the command that times this trial and provider again."""
        parts = ["--op", trial.subject, "--shape", trial.shape, "--dtype", trial.dtype, "--device", self.device]
        if provider != ROOF:
            parts += ["--provider", provider]
        return " ".join(("python -m bench run", *parts))


def subjects(device: str) -> list[str]:
    """Return the names of all operators and modules."""
    return list(dict.fromkeys([entry.name for entry in entries()] + [module.name for module in modules(device)]))


def trials(selection: Selection) -> Iterator[Trial]:
    """Yield the selected trials, operators first. Each trial is made when it is reached, so only one takes memory."""
    for entry in entries(launch_config.architecture() if selection.on_gpu else "*"):
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
    args = entry.args(case, TensorMaker.of(dtype, "meta"))
    tensors = [arg for arg in (*args.values(), *listed(args)) if isinstance(arg, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= MOST_ON_CPU


def _public(entry: Entry, quick: bool) -> list[Case]:
    public = [case for case in entry.cases if case.public]
    return public[:1] if quick else public


def time_trial(trial: Trial, clock: Clock, roof: Copy | None) -> tuple[dict[str, Timing], list[str]]:
    """Time the providers of a trial that give right results, in turn with a large copy within memory.

    Args:
        trial: the trial. Each provider is run once, and is timed if the results are right.
        clock: measures the time.
        roof: the large copy, or None without one.

    Returns:
        Provider -> its timing, and a message for each provider that was not timed.
    """
    faults = {name: trial.fault(name) for name in trial.variants}
    right = [name for name, fault in faults.items() if not fault]
    n = copies_for(clock, trial.nbytes, trial.held) if trial.rotates else 1
    copies = trial.copies(n)  # shared by all providers: between two calls on one copy, all other copies are used
    variants: dict[str, list[Call]] = {
        name: [partial(trial.variants[name], **args) for args in copies] for name in right
    }
    if roof is not None and right:
        variants[ROOF] = [roof.call]
    return measure(clock, variants), list(filter(None, faults.values()))


def rows_of(
    trial: Trial, found: Mapping[str, Timing], roof: Copy | None, selection: Selection, where: Mapping[str, str]
) -> list[ResultRow]:
    """Return rows of each provider's time. With a roof, also return rows of bytes per second and of the roof's share.

    Args:
        trial: the trial that was timed.
        found: provider -> its timing.
        roof: the large copy that was timed too, or None.
        selection: gives the command in the rows.
        where: the provenance of the rows.
    """
    rows = []
    for provider, t in found.items():
        values = {("time", "us"): [1e6 * seconds for seconds in (t.median, t.low, t.high)]}
        nbytes = roof.nbytes if roof and provider == ROOF else trial.nbytes
        if roof and nbytes:
            rate = [nbytes / seconds / 1e9 for seconds in (t.median, t.high, t.low)]
            highest = roof.nbytes / found[ROOF].median / 1e9
            values["bandwidth", "GB/s"] = rate
            values["of the copy roof", "%"] = [100 * one / highest for one in rate]
        for (metric, unit), value in values.items():
            median, low, high = (float(f"{one:.5g}") for one in value)
            rows.append(ResultRow(
                "micro", trial.subject, metric + (", no graph" if t.rounds == "no graph" else ""), median, unit,
                "measured", selection.command(trial, provider), provider, trial.shape, trial.dtype, trial.steps, low,
                high,
            ))  # fmt: skip
    return with_provenance(rows, where)


@torch.inference_mode()
def run(
    selection: Selection, clock: Clock, file: Path | None, where: Mapping[str, str]
) -> tuple[list[ResultRow], list[str]]:
    """Time the selection. Each trial's rows are printed, and appended to `file`, when it has been timed.

    Args:
        selection: what to time.
        clock: measures the time.
        file: the table of results; None writes nothing.
        where: the provenance of the rows.

    Returns:
        The rows, and a message for each provider that was not timed.
    """
    rows, wrong, roof = list[ResultRow](), list[str](), clock.copy()
    for trial in trials(selection):
        torch._dynamo.reset()  # torch.compile compiles a function for at most 8 shapes, and runs others uncompiled
        found, faults = time_trial(trial.only(selection.timed), clock, roof)
        made = rows_of(trial, found, roof, selection, where)
        del trial  # frees memory before the next trial is made: a public model and its fp64 copy are 48 GB
        for line in [*map(line_of, made), *(f"WRONG, not timed: {fault}" for fault in faults)]:
            print(line, flush=True)
        if file is not None:
            store(made, file)
        rows, wrong = rows + made, wrong + faults
    return rows, wrong


def line_of(row: ResultRow) -> str:
    """Return a row as a line to print."""
    name = f"{row.subject} {row.shape} {row.dtype} {row.steps}"
    spread = f"({row.low:.6g} to {row.high:.6g})"
    return f"{name:42s} {row.provider:13s} {row.metric:17s} {row.value:9.6g} {row.unit:5s} {spread}"


def selection_of(arguments: Sequence[str]) -> tuple[Selection, argparse.Namespace]:
    """Parse the command line of ``python -m bench run``.

    Returns:
        What to time, and all parsed options.

    Raises:
        SystemExit: a subject, provider or dtype is not known, or the device is not available.
    """
    parser = parser_of("run", __doc__)
    parser.add_argument("--op", nargs="+", default=(), metavar="NAME", help="operators and modules (default: all)")
    parser.add_argument("--shape", default="", metavar="PART", help="only shapes with PART in their name")
    parser.add_argument("--dtype", nargs="+", default=(), choices=DTYPES, help="default: all that a shape has")
    parser.add_argument("--provider", nargs="+", default=(), choices=PROVIDERS, help="default: all that are available")
    devices = ("cpu", "cuda")
    parser.add_argument("--device", default="cpu", choices=devices, help="cpu: torch providers; cuda: kernels too")
    parser.add_argument("--quick", action="store_true", help="one shape per operator, no module of gigabytes, no fp16")
    parser.add_argument("--csv", default=str(FILE), metavar="FILE", help="store the rows in FILE; - writes none")
    parser.add_argument("--compare", metavar="REV", help="also time the git revision REV, and print the ratio")
    options = parser.parse_args(arguments)
    clock_of(options.device)  # exits if the device is not available
    known = subjects(options.device)
    if unknown := sorted(set(options.op) - set(known)):
        parser.error(f"--op: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    selection = Selection(
        tuple(options.op), options.shape, tuple(options.dtype), tuple(options.provider), options.device, options.quick
    )
    return selection, options


def main(arguments: Sequence[str]) -> int:
    """Run the microbenchmarks, and return 1 if a provider fails or is wrong, else 0."""
    selection, options = selection_of(arguments)
    clock, absent = clock_of(selection.device), missing(selection.device)
    if absent:
        print("not available: " + "; ".join(f"{name} ({what})" for name, what in absent.items()), flush=True)
    if not selection.timed:
        raise SystemExit(f"none of the providers {', '.join(selection.providers)} is available here")
    file = None if options.csv == "-" else Path(options.csv)
    if options.compare:
        compare(options.compare, arguments, file)
        return 0
    # Some operators' inputs depend on the tiles, and tiles depend on the GPU's architecture. A CPU uses those of sm_90.
    with nullcontext() if selection.on_gpu else launch_config.target_arch("sm_90"):
        rows, wrong = run(selection, clock, file, provenance(selection.device))
    print(f"{len(rows)} rows" + (f" appended to {file}" if file else ", written nowhere"))
    return 1 if wrong else 0
