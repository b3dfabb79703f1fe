"""The rows that a report reads, and the form of its tables."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.results import WITH_BF16, ResultRow, newest


@dataclass(frozen=True)
class ReportTable:
    """A table and the command that makes its figures again.

    Attributes:
        title: title of the table.
        note: the conditions under which the figures hold.
        command: command that makes the rows.
        head: titles of the columns.
        lines: the cells of each line.
    """

    title: str
    note: str
    command: str
    head: Sequence[str]
    lines: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.lines]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Figures:
    """Finds rows by the values of their columns. Of several rows of one figure, the newest counts.

    In the methods, ``wanted`` is column -> value, and a row fits if it has all these values.
    """

    def __init__(self, rows: Iterable[ResultRow]) -> None:
        self.rows = list(rows)

    def all(self, **wanted: str) -> list[ResultRow]:
        """Return the newest row that fits, of every figure. A figure on several devices counts as one."""
        found: dict[tuple[str, ...], ResultRow] = {}
        for row in self.rows:
            figure = row.key[:-1]  # without the device
            if fits(row, wanted) and (figure not in found or row.date >= found[figure].date):
                found[figure] = row
        return list(found.values())

    def by(self, *names: str, **wanted: str) -> list[ResultRow]:
        """Return the newest row that fits, for each combination of values of the columns `names`."""
        found: dict[tuple[str, ...], ResultRow] = {}
        for row in self.all(**wanted):
            key = tuple(getattr(row, name) for name in names)
            if key not in found or row.date >= found[key].date:
                found[key] = row
        return list(found.values())

    def on_each_device(self, **wanted: str) -> list[ResultRow]:
        """Return the newest row that fits, of every figure on each device."""
        return newest(row for row in self.rows if fits(row, wanted))

    def on_cpus(self, with_bf16: bool) -> "Figures":
        """Return the figures of CPUs with instructions for bf16, or of those without."""
        return Figures(row for row in self.rows if on_cpu(row) and (WITH_BF16 in row.device) == with_bf16)

    def one(self, **wanted: str) -> ResultRow | None:
        """Return the newest row that fits, or None."""
        found = [row for row in self.rows if fits(row, wanted)]
        return max(reversed(found), key=lambda row: row.date, default=None)

    def value(self, form: str, scale: float = 1.0, **wanted: str) -> str:
        """Return the value of the newest row that fits, times `scale`, as a cell in the format `form`, or a dash."""
        row = self.one(**wanted)
        return "-" if row is None else format(row.value * scale, form)

    def values(self, name: str, **wanted: str) -> list[str]:
        """Return the distinct values of the column `name` in the rows that fit, in the rows' order."""
        return list(dict.fromkeys(getattr(row, name) for row in self.all(**wanted)))


def fits(row: ResultRow, wanted: Mapping[str, str]) -> bool:
    """Return whether a row has all values in `wanted`, which is column -> value."""
    return all(getattr(row, name) == value for name, value in wanted.items())


def on_cpu(row: ResultRow) -> bool:
    """Return whether a row's device is a CPU, which is named with its number of threads."""
    return "thread" in row.device
