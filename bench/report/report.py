"""The report of all figures: ``python -m bench report`` measures on this machine, and writes the page and pictures.

Every part runs in its own process and stores its rows in ``bench/results.csv``. Then ``bench/report.html``,
``bench/plots/*.png`` and the tables between the markers in README.md and docs/ are made from the newest rows
and the ledger. With ``--no-measure`` nothing is measured. ``quantization`` takes 13 minutes, and is measured only with
``--only quantization``.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import voxkern
from bench import results
from bench.__main__ import TOOLS
from bench.command_line import parser_of
from bench.report import cpu, page, plots, quantization
from bench.report.figures import Figures, ReportTable
from bench.report.tables import tables
from bench.results import ResultRow
from bench.static import ledger

ROOT = Path(__file__).resolve().parents[2]
PAGE, PLOTS = ROOT / "bench" / "report.html", ROOT / "bench" / "plots"
DOCS = ROOT / "docs"
# pages with tables between markers
MARKED_FILES = (ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("figures", "quantization", "serving", "cpu")))
# two of these run at once, because none measures time
COUNTED = ("recognition", "distortion", "frame", "errors", "server_cost", "roofline", "filling")
TIMED = ("depth", "host", "engine", "serve", "run")  # one runs at a time, because another would slow it down
PARTS = (*COUNTED, *TIMED)  # modules of bench/; each except `run` has a function `rows()`
LONG = ("quantization",)  # measured only if `--only` names it
SAID = "seven three one"  # text that the demo voice speaks, for the README's picture
INTERPRETED = ("frame", "host")  # these need Triton's interpreter, which is chosen when Triton is imported
MARKED = re.compile(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def main(arguments: Sequence[str]) -> int:
    """Measure the parts, write the report, and return the exit status: 1 if a part failed, else 0."""
    parser = parser_of("report", __doc__)
    parser.add_argument("--no-measure", action="store_true", help="measure nothing; write the page from existing rows")
    parser.add_argument("--only", choices=(*PARTS, *LONG), nargs="+", default=PARTS, help="measure only these parts")
    parser.add_argument("--part", choices=(*PARTS, *LONG), help=argparse.SUPPRESS)  # starts the process of one part
    options = parser.parse_args(arguments)
    if options.part:
        rows = import_module(f"bench.{TOOLS[options.part][0]}.{options.part}").rows()
        results.store(results.with_provenance(rows))
        return 0
    start = time.perf_counter()
    failed = [] if options.no_measure else failures(options.only)
    if not options.no_measure and not failed and options.only == PARTS:
        seconds = round(time.perf_counter() - start)
        whole = ResultRow("report", "all parts", "time", seconds, "s", "measured", "python -m bench report")
        results.store(results.with_provenance([whole]))
    write()
    names = ", ".join(str(path.relative_to(ROOT)) for path in (PAGE, PLOTS, *MARKED_FILES))
    print(f"wrote {names}")
    if failed:
        print(f"FAILED, so the page has their older rows: {', '.join(failed)}")
    return 1 if failed else 0


def failures(parts: Sequence[str]) -> list[str]:
    """Run the parts, and return the names of those that failed."""
    counted, timed = ([part for part in group if part in parts] for group in (COUNTED, (*TIMED, *LONG)))
    with ThreadPoolExecutor(2) as two:
        well = [*two.map(measured, counted)]
    well += map(measured, timed)
    return [part for part, went_well in zip((*counted, *timed), well, strict=True) if not went_well]


def measured(part: str) -> bool:
    """Run a part in a new process, print its time or its output, and return whether it succeeded."""
    command = ["run", "--quick"] if part == "run" else ["report", "--part", part]
    start = time.perf_counter()
    env = {**os.environ, "TRITON_INTERPRET": str(int(part in INTERPRETED))}
    if part in COUNTED:  # two of these parts run at once: with two threads each, they would mostly wait for cores
        env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, "-m", "bench", *command], cwd=ROOT, env=env, capture_output=True, text=True)
    said = done.stdout[-2000:] + done.stderr[-2000:]
    outcome = f"failed:\n{said}" if done.returncode else f"{time.perf_counter() - start:.0f} s"
    print(f"{part}: {outcome}", flush=True)
    return done.returncode == 0


def write() -> None:
    """Write the page, the pictures and the marked tables from the committed rows and ledger."""
    figures = Figures(results.read(results.FILE.read_text()))
    version, compiled = ledger.read(ledger.FILE.read_text())
    pictures = {
        "frame": plots.png(plots.frame_times(figures)), "claim": plots.png(plots.claim(figures)),
        "steps": plots.png(plots.error_by_steps(figures)), "resources": plots.png(plots.resources(compiled)),
        "quantization": plots.png(quantization.errors_by_bytes(figures)), "cpu": plots.png(cpu.head_times(figures)),
    }  # fmt: skip
    said = voxkern.load(backend="torch").generate(SAID, voice="slt", seed=7)
    title = f'voxkern say "{SAID}" --seed 7'
    pictures["spoken"] = plots.png(plots.spoken(said.samples, said.sampling_rate, title))
    PLOTS.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        (PLOTS / f"{name}.png").write_bytes(picture)
    made = tables(figures, compiled)
    PAGE.write_text(page.html(made, pictures, figures, version))
    for file in MARKED_FILES:
        file.write_text(with_tables(file.read_text(), made))


def with_tables(text: str, made: dict[str, ReportTable]) -> str:
    """Return `text` with each table between markers replaced by the new table.

    Args:
        text: the text of one of :data:`MARKED_FILES`.
        made: the new tables by name.

    Raises:
        ValueError: the text marks a table that `made` does not have.
    """

    def replace(found: re.Match[str]) -> str:
        if found[1] not in made:
            raise ValueError(f"the text marks the table {found[1]!r}, but the tables are {', '.join(made)}")
        table = made[found[1]]
        return f"<!-- figures: {found[1]} -->\n{table.markdown()}\n\n`{table.command}`. {table.note}\n<!-- end -->"

    return MARKED.sub(replace, text)
