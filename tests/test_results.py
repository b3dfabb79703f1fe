"""Tests of the table of results: rows are stored, read back, and replaced by newer rows."""

import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from bench.results import WITH_BF16, ResultRow, newest, provenance, read, store, with_provenance
from voxkern.packed.weights import has_bf16_instructions

ROW = ResultRow(
    "micro", "linear", "time", 12.5, "us", "measured", "python -m bench run", "torch", "b1", "bf16", low=12.0
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    where = {"date": "2026-01-01", "commit": "abc", "device": "a GPU, of some kind", "versions": "torch 2"}
    rows = with_provenance([ROW, replace(ROW, shape="b32", value=1 / 3, low=None)], where)
    store(rows[:1], file)
    store(rows[1:], file)
    assert read(file.read_text()) == rows
    assert rows[0] == replace(ROW, **where)
    assert with_provenance([*rows, ROW])[:2] == rows


def test_a_figure_is_its_newest_row(tmp_path: Path) -> None:
    later, other = replace(ROW, value=3.0, date="2027"), replace(ROW, shape="b32")
    assert newest([ROW, other, later]) == newest([later, other, ROW]) == [later, other]


def test_a_row_replaces_its_figure_s_row_in_place(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    rows = [replace(ROW, shape=shape, versions="torch 2") for shape in ("b1", "b2", "b4")]
    store(rows, file)
    again, elsewhere = replace(rows[1], value=7.0), replace(rows[1], versions="torch 3")
    store([again, elsewhere], file)
    assert read(file.read_text()) == [rows[0], again, rows[2], elsewhere]
    assert not file.with_suffix(".new").exists()


def test_storing_a_row_leaves_the_text_of_the_others(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    store([replace(ROW, metric="launches", value=96)], file)
    before = file.read_text()
    store([ROW], file)
    assert file.read_text().startswith(before)


def test_two_processes_store_all_their_rows(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    shapes = [[f"{worker}-{i}" for i in range(20)] for worker in range(2)]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        list(pool.map(_store_one_by_one, shapes, [file, file]))
    assert {row.shape for row in read(file.read_text())} == set(shapes[0] + shapes[1])


def _store_one_by_one(shapes: list[str], file: Path) -> None:
    for shape in shapes:
        store([replace(ROW, shape=shape)], file)


def test_another_table_is_not_written_to(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has the columns"):
        store([ROW], file)
    assert file.read_text() == "a,b\n1,2\n"


def test_a_row_says_how_it_was_found() -> None:
    with pytest.raises(ValueError, match="how must be one of measured, counted, predicted, not 'guessed'"):
        replace(ROW, how="guessed")


def test_this_machine_has_a_name() -> None:
    here = provenance()
    assert re.search(r", (1 thread|([2-9]|[1-9]\d+) threads)$", here["device"])
    assert (WITH_BF16 in here["device"]) == has_bf16_instructions()
    assert "torch 2" in here["versions"]
    assert here["commit"]
