"""The table of all figures, ``bench/results.csv``.

Each row has a figure's value, whether it was measured, counted or predicted, on which device, and by which command. The
table has one row for each figure, device and set of versions: the newest one. A cell that does not apply is empty.
"""

import csv
import datetime
import fcntl
import io
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".csv")
HOW = ("measured", "counted", "predicted")
WITH_BF16 = " with bf16 instructions"  # is appended to the name of a processor with these


@dataclass(frozen=True)
class ResultRow:
    """One row of the table: the value of a figure, and how it was found.

    Attributes:
        bench: the benchmark that made the figure, such as ``micro`` or ``roofline``.
        subject: what the figure describes: an operator, a module, a GPU.
        metric: what the value is, such as ``time``, ``bytes`` or ``launches``.
        value: the figure's value; the median if `low` and `high` are given.
        unit: the unit of `value`, `low` and `high`.
        how: measured, counted (in the interpreter, or by arithmetic on shapes), or predicted (by the stated model).
        command: the command that makes the row again.
        provider: the implementation: ``voxkern``, ``torch``, ``torch.compile``, or a public peer.
        shape: the case, such as ``frame-b32``.
        dtype: bf16, fp16 or fp32.
        steps: solver and evaluations of the velocity, such as ``euler:7``.
        low: the 20th percentile.
        high: the 80th percentile.
        date: UTC date and time in ISO format, to the second.
        commit: short hash of the working tree's commit, with ``+`` if code or the demo voice had uncommitted changes.
        device: the GPU's name; or the processor's name, whether it has bf16 instructions, and the number of threads.
        versions: versions of Python, torch and triton.
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
        if self.how not in HOW:
            raise ValueError(f"how must be one of {', '.join(HOW)}, not {self.how!r}")

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that identify the figure. Rows with equal keys are values of one figure from different times.

        The device counts for measured figures only.
        """
        what = (self.bench, self.subject, self.provider, self.shape, self.dtype, self.steps, self.metric, self.how)
        return (*what, self.device if self.how == "measured" else "")


def provenance(device: str = "cpu") -> dict[str, str]:
    """Return where and when figures are made that are made now on this machine's `device`, ``cpu`` or ``cuda``.

    Returns:
        The columns `date`, `commit`, `device` and `versions` of :class:`ResultRow`.
    """
    import torch
    import triton

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        from voxkern.packed.weights import has_bf16_instructions

        instructions = WITH_BF16 if has_bf16_instructions() else ""
        threads = torch.get_num_threads()
        name = f"{_processor()}{instructions}, {threads} thread{'s' if threads > 1 else ''}"
    versions = f"python {platform.python_version()} torch {torch.__version__} triton {triton.__version__}"
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return {"date": now.isoformat(), "commit": _commit(), "device": name, "versions": versions}


def with_provenance(rows: Iterable[ResultRow], where: Mapping[str, Any] | None = None) -> list[ResultRow]:
    """Return the rows with the columns `where`, by default those of :func:`provenance`. A row with a date stays."""
    where = where or provenance()
    return [row if row.date else replace(row, **where) for row in rows]


def store(rows: Iterable[ResultRow], file: Path = FILE) -> None:
    """Write rows to `file`, which is created if it does not exist.

    A row replaces the row with the same figure, device and versions, in its place; other new rows follow at the end.
    The table is written to a temporary file and renamed, so an interrupted call leaves the old table. A lock lets
    several processes store rows at the same time.

    Raises:
        ValueError: the file does not have the columns of :class:`ResultRow`.
    """
    names = [field.name for field in fields(ResultRow)]
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = file.read_text() if file.exists() else ",".join(names)
        if (found := next(csv.reader(text.splitlines()))) != names:
            raise ValueError(f"{file} has the columns {found}, but must have {names}")
        table: dict[tuple[tuple[str, ...], str], ResultRow] = {}
        for row in (*read(text), *rows):
            known = table.get((row.key, row.versions), row)
            table[row.key, row.versions] = row if row.date >= known.date else known
        lines = io.StringIO()
        writer = csv.DictWriter(lines, names, lineterminator="\n")
        writer.writeheader()
        # numbers that were read are floats: an integer is written as one too, or the next call would change its text
        writer.writerows({**asdict(row), "value": float(row.value)} for row in table.values())
        new = file.with_suffix(".new")
        new.write_text(lines.getvalue())
        new.replace(file)


def read(text: str) -> list[ResultRow]:
    """Return the rows of a table's text, in the order of the text."""
    return [_row(line) for line in csv.DictReader(io.StringIO(text))]


def newest(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Return the row with the latest date of each figure, in the order in which the figures first occur."""
    found: dict[tuple[str, ...], ResultRow] = {}
    for row in rows:
        if row.key not in found or row.date >= found[row.key].date:
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
