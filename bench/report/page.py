"""The report as one HTML file, with its style and pictures inside."""

import base64
import html as escape
from collections.abc import Mapping

from bench.report.figures import Figures, ReportTable, on_cpu

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1.2rem; }
table { border-collapse: collapse; font-size: 0.85rem; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #e4e4e4; text-align: left; vertical-align: top; }
th { background: #f5f5f5; } td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; } .note { color: #555; font-size: 0.9rem; } code { background: #f3f3f3; padding: 0 0.2rem; }
.warning { background: #fff4d6; border-left: 4px solid #e0a800; padding: 0.6rem 1rem; }
details > summary { cursor: pointer; color: #335; }
"""

INTRODUCTION = """
<p>voxkern speaks text with models like Mistral's Voxtral TTS. Every 80 ms of sound, a <b>frame</b>, come about in
three parts: a language model (the <b>backbone</b>) says one token, a small network (the <b>flow head</b>) turns noise
into 36 codes by solving a differential equation in a few <b>evaluations</b>, and a <b>codec</b> turns codes into sound.
At small batches all of it is bound by how fast weights stream from memory, so this page counts bytes and launches
first, then says what time they should take, and what rounding and fewer evaluations do to the result.</p>
"""
NOT_RUN = """
<p class="warning"><b>Nothing on this page was run on a GPU.</b> Bytes and launches are counted in Triton's interpreter
or by arithmetic that tests hold to that count; machine code is compiled, not run; times on GPUs are <b>predictions</b>
of a stated model. Times that are measured are PyTorch's, on the CPU named below.</p>
"""
RUN = "<p>Times on GPUs that are marked as measured come from: {}. All others are <b>predictions</b>.</p>"
SECTIONS = (
    (
        "Where a frame's time should go",
        ("roofline", "batches", "bounds", "quantized", "overlapped", "filling", "work", "launches", "frame", "cache"),
        "frame",
    ),
    ("Why a flow head: against a depth transformer", ("claim",), "claim"),
    ("Beside the public server", ("server",), None),
    ("Errors, in the model's own currency", ("errors", "distortion", "recognition"), "steps"),
    (
        "What 8-bit weights do to the sound",
        ("quantization_given", "quantization_free", "quantization_cpu"),
        "quantization",
    ),
    ("What the compiler makes of it", ("resources",), "resources"),
    ("Measured on a GPU", ("gpu",), None),
    ("Packed weights on a CPU", ("cpu",), "cpu"),
    ("Measured on a CPU", ("engine", "served", "host", "micro"), None),
)


def html(tables: Mapping[str, ReportTable], pictures: Mapping[str, bytes], figures: Figures, triton: str) -> str:
    """Return the page as HTML.

    Args:
        tables: the report's tables by name. Sections leave out tables that are missing here.
        pictures: PNG files by the names in :data:`SECTIONS`.
        figures: all rows, for the devices and the list of sources.
        triton: version of Triton that made the ledger.
    """
    gpus = [row.device for row in figures.on_each_device(how="measured") if not on_cpu(row)]
    parts = [INTRODUCTION, RUN.format(escape.escape(", ".join(dict.fromkeys(gpus)))) if gpus else NOT_RUN]
    for title, names, picture in SECTIONS:
        if not tables.keys() & set(names):
            continue
        parts.append(f"<h2>{title}</h2>")
        if picture is not None:
            data = base64.b64encode(pictures[picture]).decode()
            parts.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
        parts += [_table(tables[name]) for name in names if name in tables]
    parts.append(_places(figures, triton))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>voxkern: the figures</title>'
        f"<style>{STYLE}</style></head><body><h1>voxkern: the figures</h1>{''.join(parts)}</body></html>\n"
    )


def _table(table: ReportTable) -> str:
    head = "".join(f"<th>{escape.escape(cell)}</th>" for cell in table.head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape.escape(cell)}</td>" for cell in line) + "</tr>" for line in table.lines
    )
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    note = f'<p class="note">{escape.escape(table.note)} Again: <code>{escape.escape(table.command)}</code></p>'
    if len(table.lines) > 40:
        body = f"<details><summary>{len(table.lines)} lines</summary>{body}</details>"
    return f"<h3>{escape.escape(table.title)}</h3>{note}{body}"


def _places(figures: Figures, triton: str) -> str:
    """Return the last section: benchmark, device, versions, commit and date of the figures."""
    rows = (*figures.all(), *figures.on_each_device(bench="micro"))
    found = dict.fromkeys((row.bench, row.device, row.versions, row.commit, row.date[:10]) for row in rows if row.date)
    lines = "".join("<tr>" + "".join(f"<td>{escape.escape(cell)}</td>" for cell in line) + "</tr>" for line in found)
    head = "".join(f"<th>{name}</th>" for name in ("benchmark", "on", "with", "commit", "date"))
    return (
        "<h2>Where these figures come from</h2><p>Rows of <code>bench/results.csv</code>, the newest of each figure, "
        f"and of <code>bench/ledger.csv</code> (triton {escape.escape(triton)}). A commit with a + had changes on top."
        f"</p><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    )
