"""Tests of the table of results: rows are appended, read back, and superseded by newer rows."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.results import Provenance, ResultRow, append, newest, provenance, read, with_provenance

ROW = ResultRow(
    "micro", "linear", "time", 12.5, "us", "measured", "python -m bench run", "torch", "b1", "bf16", low=12.0
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    where = Provenance("2026-01-01T00:00:00+00:00", "abc", "a GPU, of some kind", "torch 2")
    rows = [with_provenance(ROW, where), with_provenance(replace(ROW, value=1 / 3, low=None, high=2.0), where)]
    append(rows[:1], file)
    append(rows[1:], file)
    assert read(file.read_text()) == rows
    assert rows[0].device == "a GPU, of some kind"


def test_a_figure_is_its_newest_row(tmp_path: Path) -> None:
    later, other = replace(ROW, value=3.0, date="2027"), replace(ROW, shape="b32")
    assert newest([ROW, other, later]) == [later, other]


def test_another_table_is_not_written_to(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns"):
        append([ROW], file)
    assert file.read_text() == "a,b\n1,2\n"


def test_a_row_says_how_it_was_found() -> None:
    with pytest.raises(ValueError, match="how must be one of measured, counted, predicted, not 'guessed'"):
        replace(ROW, how="guessed")


def test_this_machine_has_a_name() -> None:
    here = provenance()
    assert here.device.endswith("threads")
    assert "torch 2" in here.versions
    assert here.commit
