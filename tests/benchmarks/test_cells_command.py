"""`python -m benchmarks cells`, on a layer of a few units."""

import pytest
from kernel_benchmarks import CASE, read

from benchmarks import __main__ as command
from benchmarks import cells, contenders
from benchmarks.problems import Problem

SMALL = Problem(5, 3, 4, 8)


def test_every_contender_has_a_row_and_a_column(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(cells.SIZES, "short", SMALL)
    monkeypatch.setattr(cells, "MAX_UNROLLED", 1)  # nothing is compiled
    arguments = ["--size", "short", "--cell", "LSTM", "--option", "zoneout", "blocks", "--threads", "1"]
    arguments += ["--rounds", "2", "--out"]
    assert command.main(["cells", *arguments, str(tmp_path)]) == 0
    found = read(tmp_path / "cells.jsonl")
    assert len(found) == 2 * 2 * 4  # modes, options, contenders
    for row in found:
        assert row["right"] and row["option"] in ("zoneout", "blocks") and row["T"] == 5
        assert ("median_ms" in row) == (row["absent"] is None)
    assert all(row["absent"] for row in found if row["contender"] == cells.COMPILED)
    capsys.readouterr()
    assert command.main(["report", "--rows", str(tmp_path), "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "**Options of cells, float32" in page and "| short LSTM train zoneout |" in page


@pytest.mark.parametrize("option", cells.OPTIONS)
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_contenders_compute_the_same(cell, option):
    case = CASE._replace(cell=cell, mode="train", shape=SMALL)
    right = cells.ours(case._replace(dtype="float64"), option)()
    try:
        found = cells.loop(case, option)()
    except contenders.Unavailable:
        assert option == "weight"
        return
    assert max(contenders.errors(found, right)) < 1e-5
    assert max(contenders.errors(cells.ours(case, option)(), right)) < 1e-5
