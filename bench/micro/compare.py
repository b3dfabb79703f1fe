"""Timings of this tree beside those of a git revision, on one machine.

The revision is checked out into a temporary worktree, and this tree's timer times the revision's operators there. The
trees are measured in the order old, new, new, old, each time in a new process. The lower one of a tree's two medians
counts, because other work on the machine only adds time. As in every run, results are compared with fp64 before they
are timed. A wrong result ends the comparison, because a fast wrong kernel is no gain.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.ops.registry import ROOT
from bench.results import ResultRow, read, store

# The files of bench/ that measure, which replace the revision's. The registry and the entries are not replaced, because
# the revision's operators may have other names and arguments.
TIMER = ("__main__.py", "results.py", "micro/*.py", "ops/accuracy.py", "static/traffic.py")
Measure = Callable[[Path, Sequence[str]], list[ResultRow]]


def compare(rev: str, arguments: Sequence[str], file: Path | None) -> None:
    """Print old, new and new / old for each timing, and append the new rows to `file`.

    Args:
        rev: the git revision to compare with.
        arguments: the command line of ``python -m bench run``.
        file: the table of results; None writes nothing.
    """
    with worktree(rev) as old:
        rows = measure_interleaved({"old": old, "new": ROOT}, arguments, measure)
    for line in table(rev, rows):
        print(line)
    if file is not None:
        store(rows["new"], file)


@contextmanager
def worktree(rev: str) -> Iterator[Path]:
    """Check `rev` out into a temporary folder, copy this tree's timer into it, and remove the folder afterwards.

    Raises:
        SystemExit: git has no revision `rev`, or the revision's bench/ has another layout.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        made = subprocess.run([*git, "add", "--detach", str(folder), rev], capture_output=True, text=True, check=False)
        if made.returncode:
            raise SystemExit(f"--compare {rev}: {made.stderr.strip()}")
        try:
            if not (folder / "bench" / "micro").is_dir():
                raise SystemExit(f"--compare {rev}: this revision has no bench/micro, so its operators cannot be timed")
            for file in (file for pattern in TIMER for file in (ROOT / "bench").glob(pattern)):
                shutil.copy(file, folder / file.relative_to(ROOT))
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True, check=True)


def measure_interleaved(
    trees: Mapping[str, Path], asked: Sequence[str], measure: Measure
) -> dict[str, list[ResultRow]]:
    """Measure two trees in the order first, second, second, first, and keep each figure's better value.

    Args:
        trees: name -> folder of the two trees.
        asked: the command line of ``python -m bench run``.
        measure: takes a tree's folder and `asked`, returns rows.

    Returns:
        Name of the tree -> its rows.
    """
    first, second = trees
    found: dict[str, list[list[ResultRow]]] = {first: [], second: []}
    for name in (first, second, second, first):
        found[name].append(measure(trees[name], asked))
    return {name: list(map(faster, *twice)) for name, twice in found.items()}


def faster(one: ResultRow, other: ResultRow) -> ResultRow:
    """Return the better one of two measurements of a figure: the lower time, or the higher bandwidth.

    Raises:
        ValueError: the rows belong to different figures.
    """
    if one.key != other.key:
        raise ValueError(f"two runs of one tree differ in their figures: {one.key} was measured, and then {other.key}")
    return min(one, other, key=lambda row: row.value if row.unit == "us" else -row.value)


def measure(tree: Path, asked: Sequence[str]) -> list[ResultRow]:
    """Run the timer in `tree`, and return the rows.

    Raises:
        SystemExit: the timer failed, or a provider's results were wrong.
    """
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.csv"
        # the last value of an option counts: the process compares nothing, and writes to `file`
        command = [sys.executable, "-m", "bench", "run", *asked, "--compare", "", "--csv", str(file)]
        # PYTHONPATH precedes installed packages, so that voxkern, kernels and reference are imported from the tree
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, env=environment)
        if done.returncode or not file.exists():
            raise SystemExit(f"measuring in {tree} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return read(file.read_text())


def table(rev: str, rows: Mapping[str, Sequence[ResultRow]]) -> list[str]:
    """Return the lines to print: a head, and one line for each time that was measured in both trees."""
    old = {row.key: row for row in rows["old"] if row.unit == "us"}
    lines = [f"{'us':52s} {rev[:12]:>12s} {'this tree':>12s}  new / old"]
    for row in rows["new"]:
        if row.key in old:
            name = f"{row.subject} {row.shape} {row.dtype} {row.provider}"
            lines.append(
                f"{name:52s} {old[row.key].value:12.6g} {row.value:12.6g}  {row.value / old[row.key].value:.3f}"
            )
    return lines
