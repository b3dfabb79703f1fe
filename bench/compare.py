"""Two states of the code beside each other: this tree and a git revision, measured in turn on one machine.

The revision is checked out into a temporary worktree, and its operators are timed there by this tree's timer: old,
new, new, old, a fresh process each. Of each side's two medians the lower one counts: other work only adds to it.
Nothing is measured while tests of the operators are red: a fast wrong kernel is no gain.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bench.registry import ROOT
from bench.results import ResultRow, append, read

# what of bench/ measures; what says which operators there are, and how they are called, is the revision's own
TIMER = ("__init__", "__main__", "run", "compare", "timing", "providers", "modules", "traffic", "results", "accuracy")
PYTEST = Path(sys.executable).with_name("pytest")
# modules that are timed -> the tests that hold them; an operator's name is in its tests' names
OF_MODULES = {
    "frame": "test_frame or test_generate", "flow_head": "test_flow", "backbone": "test_backbone",
    "codec_chunk": "test_codec", "moe_block": "test_moe",
}  # fmt: skip
# operators by the names that they had in revisions without kernels/launch_config.py
OLD_NAMES = {
    "update_decode_state": "advance", "codec_update_state": "codec_advance", "adaln_modulation": "modulations",
    "adaln_linear_silu": "modulated_silu", "moe_route": "route", "moe_experts_up": "experts_up",
    "moe_experts_down": "experts_down", "moe_combine": "combine", "semantic_argmax": "semantic_codes",
}  # fmt: skip
Measure = Callable[[Path, Sequence[str]], list[ResultRow]]


def compare(rev: str, subjects: Sequence[str], arguments: Sequence[str], file: Path | None) -> int:
    """Print old, new and new / old for each timing, and append the new rows to `file`; 1 where that is refused.

    Args:
        rev: a git revision.
        subjects: the operators and modules that `arguments` name; none = all.
        arguments: of ``python -m bench run``.
        file: of the table of results, or None.
    """
    asked = without(arguments, "--compare", "--csv")
    complaint = failing_tests(subjects)
    if complaint:
        print(complaint)
        return 1
    with worktree(rev) as old:
        rows = measure_interleaved({"old": old, "new": ROOT}, asked, measure)
    for line in table(rev, rows):
        print(line)
    if file is not None:
        append(rows["new"], file)
    return 0


def failing_tests(names: Sequence[str]) -> str:
    """Why nothing is to be measured: the tests that name one of these operators, or all tests, do not pass."""
    chosen = ["-k", " or ".join(OF_MODULES.get(name, name) for name in names)] if names else []
    command = [str(PYTEST), "-q", "-x", "tests", *chosen]
    # the tests run kernels in the interpreter, and find the bench by themselves
    hidden = {"PYTHONPATH", "TRITON_INTERPRET"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == 0:
        return ""
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    what = "there are no tests of" if done.returncode == 5 else "tests are red of"
    of = ", ".join(names) or "the operators"
    return f"nothing is measured: {what} {of} (pytest {shlex.join(command[1:])}: {' '.join(last)})"


@contextmanager
def worktree(rev: str) -> Iterator[Path]:
    """A checkout of `rev` with this tree's timer in it; removed afterwards.

    A revision in which operators have their old names keeps its own timer, which calls them so.

    Raises:
        SystemExit: git knows no such revision.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        made = subprocess.run([*git, "add", "--detach", str(folder), rev], capture_output=True, text=True, check=False)
        if made.returncode:
            raise SystemExit(f"--compare {rev}: {made.stderr.strip()}")
        try:
            for module in () if has_old_names(folder) else TIMER:
                shutil.copy(ROOT / "bench" / f"{module}.py", folder / "bench")
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], capture_output=True, check=True)


def has_old_names(tree: Path) -> bool:
    """Whether operators have the names of :data:`OLD_NAMES` in a checkout."""
    return not (tree / "kernels" / "launch_config.py").exists()


def measure_interleaved(
    trees: Mapping[str, Path], asked: Sequence[str], measure: Measure
) -> dict[str, list[ResultRow]]:
    """Rows of each tree: the lower one of two medians."""
    first, second = trees
    found: dict[str, list[list[ResultRow]]] = {first: [], second: []}
    for name in (first, second, second, first):
        found[name].append(measure(trees[name], asked))
    return {name: list(map(faster, *twice)) for name, twice in found.items()}


def faster(one: ResultRow, other: ResultRow) -> ResultRow:
    """The better one of two measurements of the same figure: the lower, of bandwidths the higher."""
    if one.key != other.key:
        raise ValueError(f"{one.key} was measured, and then {other.key}")
    return min(one, other, key=lambda row: row.value if row.unit == "us" else -row.value)


def measure(tree: Path, asked: Sequence[str]) -> list[ResultRow]:
    """Run the timer in `tree`; rows have the operators' present names.

    Raises:
        SystemExit: it failed, or a provider was wrong.
    """
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.csv"
        old_names = OLD_NAMES if has_old_names(tree) else {}
        words = [old_names.get(word, word) for word in asked]
        command = [sys.executable, "-m", "bench", "run", *words, "--csv", str(file)]
        # the tree before anything installed: its voxkern, kernels and reference
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, env=environment)
        if done.returncode or not file.exists():
            raise SystemExit(f"measuring in {tree} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        names = {old: new for new, old in old_names.items()}
        return [
            replace(
                row,
                subject=names.get(row.subject, row.subject),
                command=" ".join(names.get(word, word) for word in row.command.split(" ")),
            )
            for row in read(file.read_text())
        ]


def table(rev: str, rows: Mapping[str, Sequence[ResultRow]]) -> list[str]:
    """A line for each time that both have."""
    old = {row.key: row for row in rows["old"] if row.unit == "us"}
    lines = [f"{'us':52s} {rev[:12]:>12s} {'this tree':>12s}  new / old"]
    for row in rows["new"]:
        if row.key in old:
            name = f"{row.subject} {row.shape} {row.dtype} {row.provider}"
            lines.append(
                f"{name:52s} {old[row.key].value:12.6g} {row.value:12.6g}  {row.value / old[row.key].value:.3f}"
            )
    return lines


def without(arguments: Sequence[str], *options: str) -> list[str]:
    """A command line without some options and their values."""
    kept, skip = [], False
    for word in arguments:
        if skip or word.partition("=")[0] in options:
            skip = not skip and word in options
        else:
            kept.append(word)
    return kept
