"""Figures as rows of one table, ``bench/results.csv``: what was found, how, where, by which command.

Rows are only ever appended; a figure's current value is its newest row. A cell that does not apply is empty.
"""

import csv
import datetime
import io
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".csv")
HOW = ("measured", "counted", "predicted")


@dataclass(frozen=True)
class Provenance:
    """Where and when figures come from.

    Attributes:
        date: UTC, to the second.
        commit: of the working tree, ``+`` behind it where code or the demo voice had been changed.
        device: the GPU's name, or the processor's with the number of threads.
        versions: of Python, torch and triton.
    """

    date: str
    commit: str
    device: str
    versions: str


@dataclass(frozen=True)
class ResultRow:
    """One figure.

    Attributes:
        bench: which benchmark it comes from, such as ``micro`` or ``roofline``.
        subject: what it is of: an operator, a module, a GPU.
        provider: who computed it: ``voxkern``, ``torch``, ``torch.compile``, a public peer.
        shape: the case, such as ``frame-b32``.
        dtype: bf16, fp16 or fp32.
        steps: evaluations of the velocity with their solver, such as ``euler:7``.
        metric: what the value is: ``time``, ``bytes``, ``codes flipped``.
        value: the median where `low` and `high` are given, the 20th and the 80th percentile.
        unit: of all three.
        how: measured, counted (in the interpreter, or by arithmetic on shapes), or predicted (by the stated model).
        command: that makes the row again.
    """

    bench: str
    subject: str
    metric: str
    value: float
    unit: str
    how: str
    command: str
    provider: str = ""
    shape: str = ""
    dtype: str = ""
    steps: str = ""
    low: float | None = None
    high: float | None = None
    date: str = ""
    commit: str = ""
    device: str = ""
    versions: str = ""

    def __post_init__(self) -> None:
        """Refuse a row that does not say how it was found."""
        if self.how not in HOW:
            raise ValueError(f"how must be one of {', '.join(HOW)}, not {self.how!r}")

    @property
    def key(self) -> tuple[str, ...]:
        """What names the figure; two rows of one key are the same figure at two times."""
        what = (self.bench, self.subject, self.provider, self.shape, self.dtype, self.steps, self.metric, self.how)
        return (*what, self.device)


def provenance(device: str = "cpu") -> Provenance:
    """This machine, now."""
    import torch
    import triton

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    versions = f"python {platform.python_version()} torch {torch.__version__} triton {triton.__version__}"
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return Provenance(now.isoformat(), _commit(), name, versions)


def with_provenance(row: ResultRow, where: Provenance) -> ResultRow:
    """The row with its place."""
    return ResultRow(**{**asdict(row), **asdict(where)})


def append(rows: Iterable[ResultRow], file: Path = FILE) -> None:
    """Write rows behind those that are there.

    Raises:
        ValueError: the file's columns are others.
    """
    names = [field.name for field in fields(ResultRow)]
    if not file.exists():
        file.write_text(",".join(names) + "\n")
    with file.open(newline="") as text:
        if (found := next(csv.reader(text))) != names:
            raise ValueError(f"{file} has the columns {found}, must have {names}")
    lines = io.StringIO()
    csv.DictWriter(lines, names, lineterminator="\n").writerows(asdict(row) for row in rows)
    with file.open("a", newline="") as text:  # in one piece: another process may append as well
        text.write(lines.getvalue())


def read(text: str) -> list[ResultRow]:
    """Rows of a written table, oldest first."""
    return [_row(line) for line in csv.DictReader(io.StringIO(text))]


def newest(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Each figure's last row, in the order in which the figures first came."""
    found: dict[tuple[str, ...], ResultRow] = {}
    for row in rows:
        found[row.key] = row
    return list(found.values())


def _row(line: dict[str, str]) -> ResultRow:
    numbers: dict[str, Any] = {"value": float(line["value"])}
    numbers |= {name: float(line[name]) if line[name] else None for name in ("low", "high")}
    return ResultRow(**{**line, **numbers})


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=FILE.parent, capture_output=True, text=True, check=False
        ).stdout.strip()

    found, what = git("rev-parse", "--short", "HEAD"), (":/*.py", ":/voxkern/demo")
    return found + ("+" if git("status", "--porcelain", "--", *what) else "") if found else "unknown"
