"""Measure the most important figures in a few minutes on a GPU.

``python -m bench gpu --minutes 8`` runs its steps in the order of their importance until the time is up. The first
steps check the results of operators at public shapes. The next steps measure whole frames, the first sound and memory,
each operator, the codec, and then all other timings of ``python -m bench run``. The rows of a step are stored when the
step ends. A step that fails is listed at the end, and the next step runs. A table at the end has measured and predicted
times side by side.

This tool has not been run on a GPU. With ``--dry-run``, all measured values are invented, and the rows go to a
temporary file. A dry run needs no GPU.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import voxkern
from bench.command_line import parser_of
from bench.micro.modules import modules
from bench.micro.providers import operator_trial
from bench.micro.run import Selection, run
from bench.micro.timing import Clock, clock_of
from bench.ops.registry import Entry, TensorMaker, entries
from bench.results import FILE, ResultRow, provenance, store, with_provenance
from bench.static.roofline import GPU, GPUS, floor, predict
from bench.static.traffic import with_result
from bench.static.work import Work, frame, work_of
from voxkern.kernels.launch_config import architecture, target_arch

FRAMES = (1, 8, 32)  # batches of whole frames
PROVIDERS = ("voxkern", "torch")
TEXT = "seven three one"
COMMAND = "python -m bench gpu"


@dataclass
class Session:
    """Holds the time limit of a measurement, and the rows and failures so far.

    Attributes:
        minutes: minutes that the steps may take together. A step that has begun is not stopped.
        file: the table of results.
        where: provenance of the rows.
        clock: the clock of the timings; if None, nothing runs and all measured values are invented.
        now: returns the time in seconds.
        rows: the rows of all steps.
        failures: a message for each step, or provider, that failed.
        skipped: names of the steps for which no time was left.
    """

    minutes: float
    file: Path
    where: Mapping[str, str]
    clock: Clock | None
    now: Callable[[], float] = time.monotonic
    rows: list[ResultRow] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def run(self, steps: Iterator[tuple[str, Callable[["Session"], list[ResultRow]]]]) -> None:
        """Run the steps until the time is up. The rows of a step are stored when it ends; no error ends the run."""
        end = self.now() + 60 * self.minutes
        for name, step in steps:
            if self.now() >= end:
                self.skipped.append(name)
                continue
            print(f"== {name}, {end - self.now():.0f} s left", flush=True)
            try:
                made = step(self)
            except Exception as error:  # whatever fails, the other figures must still be measured
                self.failures.append(f"{name}: {type(error).__name__}: {error}")
                continue
            self.rows += made
            store(made, self.file)

    def timed(self, selection: Selection) -> list[ResultRow]:
        """Time a selection, and return its rows."""
        if self.clock is None:
            return with_provenance(_made_up(selection), self.where)
        rows, wrong = run(selection, self.clock, None, self.where)
        self.failures += wrong
        return rows


def steps(operators: Sequence[Entry]) -> Iterator[tuple[str, Callable[[Session], list[ResultRow]]]]:
    """Yield the name and the function of each step with these operators, the most important first."""
    for entry in operators:
        yield f"check of {entry.name}", partial(check, entry=entry)
    for B in FRAMES:
        providers = (*PROVIDERS, "voxkern-overlap")
        yield f"frame-b{B}", partial(_timed, subject="frame", shape=f"frame-b{B}", providers=providers)
    yield "first sound and memory", product
    for entry in operators:
        yield entry.name, partial(_timed, subject=entry.name, providers=PROVIDERS)
    yield "codec_chunk", partial(_timed, subject="codec_chunk", providers=PROVIDERS)
    for B in FRAMES:
        yield (
            f"frame-b{B}, compiled",
            partial(_timed, subject="frame", shape=f"frame-b{B}", providers=("voxkern", "torch.compile")),
        )
    for subject in dict.fromkeys(module.name for module in modules("cpu")):
        yield f"{subject}, all", partial(_timed, subject=subject, dtypes=())
    for entry in operators:
        yield f"{entry.name}, all", partial(_timed, subject=entry.name, dtypes=())


def _timed(
    session: Session, subject: str, shape: str = "", providers: Sequence[str] = (), dtypes: Sequence[str] = ("bf16",)
) -> list[ResultRow]:
    return session.timed(Selection((subject,), shape, tuple(dtypes), tuple(providers), "cuda"))


@torch.inference_mode()
def check(session: Session, entry: Entry) -> list[ResultRow]:
    """Compare an operator with fp64, and raise an error if it is wrong.

    The operator runs at its first public shape, in bf16 or, if that shape has no bf16, in the shape's first dtype.
    """
    if session.clock is None:
        return []
    case = next(case for case in entry.cases if case.public)
    dtype = "bf16" if "bf16" in case.dtypes else case.dtypes[0]
    if fault := operator_trial(entry, case, dtype, "cuda").fault("voxkern"):
        raise RuntimeError(fault)
    return []


def product(session: Session) -> list[ResultRow]:
    """Measure the demo voice's time to the first sound, its real-time factor, and the memory of 32 requests."""
    if session.clock is None:
        figures = {"first sound": (0.1, "s"), "real-time factor": (0.1, "1"), "peak memory": (1e9, "B")}
    else:
        tts = voxkern.load(device="cuda", max_batch=32)
        list(tts.stream(TEXT, seed=1))  # compiles, and captures the graphs
        first = next(iter(tts.stream(TEXT, seed=1))).timings.first_sound
        factor = tts.generate(TEXT, seed=1).real_time_factor
        torch.cuda.reset_peak_memory_stats()
        tts.generate([TEXT] * 32, seed=list(range(32)))
        peak = torch.cuda.max_memory_allocated()
        figures = {"first sound": (first, "s"), "real-time factor": (factor, "1"), "peak memory": (float(peak), "B")}
    rows = [
        ResultRow("gpu", "demo voice", metric, value, unit, "measured", COMMAND, "voxkern", "b32")
        for metric, (value, unit) in figures.items()
    ]
    return with_provenance(rows, session.where)


def _made_up(selection: Selection) -> Iterator[ResultRow]:
    """Yield a row with a time of 100 us for each selected subject, public shape, dtype and provider."""
    shapes = [
        (entry.name, case.name, dtype, "")
        for entry in entries() for case in entry.cases if case.public for dtype in case.dtypes
    ]  # fmt: skip
    shapes += [(module.name, module.shape, dtype, "euler:7") for module in modules("cpu") for dtype in module.dtypes]
    shapes += [("frame", f"frame-b{B}", "bf16", "euler:7") for B in FRAMES]
    for subject, shape, dtype, n_steps in shapes:
        if selection.takes(subject, shape, dtype):
            for provider in selection.providers or PROVIDERS:
                yield ResultRow(
                    "micro", subject, "time", 100.0, "us", "measured", COMMAND, provider, shape, dtype, n_steps
                )


def work_at(row: ResultRow, arch: str) -> list[Work]:
    """Return the launches of a row's operator or frame, and none for other subjects, such as the codec.

    Some operators' inputs depend on the tiles, which are those of the architecture `arch`.
    """
    if row.subject == "frame" and row.shape.startswith("frame-b"):
        parts = frame(int(row.shape.removeprefix("frame-b")), int(row.steps.partition(":")[2]))
        return [one for part in parts.values() for one in part]
    entry = next((entry for entry in entries(arch) if entry.name == row.subject), None)
    if entry is None:
        return []
    case = next(case for case in entry.cases if case.name == row.shape)
    device = "cpu" if "attention" in entry.name else "meta"  # attention's bytes depend on the lengths
    with target_arch(arch):
        args = entry.args(case, TensorMaker.of(row.dtype, device))
        return [work_of(entry.name, with_result(entry, args))]


def table(rows: Sequence[ResultRow], gpu: GPU | None) -> list[str]:
    """Return the lines of a table: a heading, and a line for each measured time of voxkern.

    Four columns are in microseconds: `measured`, `torch` (PyTorch at the same shape, dtype and solver), `predicted`,
    and `floor` (the fewest possible). The column `ratio` is measured / predicted. Only bf16 times of operators and
    frames on a known `gpu` have the last three columns.
    """
    plain = {_timing_key(row): row.value for row in rows if row.provider == "torch" and row.metric == "time"}
    lines = [f"{'':44s}{'measured':>11s}{'torch':>11s}{'predicted':>11s}{'floor':>11s}{'ratio':>8s}"]
    for row in dict.fromkeys(row for row in rows if row.provider == "voxkern" and row.unit == "us"):
        work = work_at(row, gpu.arch) if gpu is not None and row.dtype == "bf16" else []
        cells = [f"{row.value:11.2f}", f"{plain.get(_timing_key(row), float('nan')):11.2f}"]
        if gpu is not None and work:
            expected, least = 1e6 * predict(work, gpu), 1e6 * floor(work, gpu)
            cells += [f"{expected:11.2f}", f"{least:11.2f}", f"{row.value / expected:8.2f}"]
        lines.append(f"{' '.join(filter(None, _timing_key(row))):44s}" + "".join(cells))
    return lines


def _timing_key(row: ResultRow) -> tuple[str, str, str, str]:
    return row.subject, row.shape, row.dtype, row.steps


def main(arguments: Sequence[str]) -> int:
    """Measure until the time is up, print the table, and return 1 if a step failed, else 0."""
    parser = parser_of("gpu", __doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="minutes to use; a step that has begun runs to its end, even past this limit",
    )
    parser.add_argument(
        "--csv", type=Path, default=FILE, metavar="FILE", help=f"store the rows in FILE, not {FILE.name}"
    )
    parser.add_argument("--dry-run", action="store_true", help="invent all timings; needs no GPU, and keeps no rows")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.dry_run:
            file, where, clock = Path(folder) / "rows.csv", provenance("cpu"), None
        else:
            clock = clock_of("cuda")  # exits if torch finds no GPU
            file, where = options.csv, provenance("cuda")
        print(f"{where['device']}, {where['versions']}, commit {where['commit']}")
        session = Session(options.minutes, file, where, clock)
        session.run(steps(entries("*" if options.dry_run else architecture())))
        gpu = next((gpu for gpu in GPUS.values() if options.dry_run or gpu.device == where["device"]), None)
        print(*table(session.rows, gpu), sep="\n")
        print(f"{len(session.rows)} rows" + (", all invented" if options.dry_run else f" stored in {file}"))
    print(*(f"FAILED {failure}" for failure in session.failures), sep="\n", end="\n" if session.failures else "")
    if session.skipped:
        print(f"no time was left for {len(session.skipped)} steps: {', '.join(session.skipped)}")
    return 1 if session.failures else 0
