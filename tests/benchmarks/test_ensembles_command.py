"""`python -m benchmarks ensembles`, on layers of a few units."""

import pytest
import torch
from kernel_benchmarks import CASE, read

from benchmarks import __main__ as command
from benchmarks import beside, contenders, ensembles
from benchmarks.problems import Problem

SMALL = Problem(7, 3, 4, 5)


def test_every_contender_has_a_row_and_a_column(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ensembles.SIZES, "1x1", SMALL)
    options = {"--size": "1x1", "--cell": "GRU", "--members": "3", "--threads": "1", "--rounds": "2"}
    arguments = [word for option in {**options, "--out": str(tmp_path)}.items() for word in option]
    assert command.main(["ensembles", *arguments]) == 0
    found = read(tmp_path / "ensembles.jsonl")
    names = ["seqkernels", "seqkernels, the function", "seqkernels, a call each", "torch.nn"]
    assert [row["contender"] for row in found] == 2 * names
    for row in found:
        assert {"run", "machine", "cpu", "torch", "commit", "dirty", "plan", "median_ms"} <= set(row)
        assert row["right"] and row["members"] == 3 and row["T"] == 7 and row["problem"] == "1x1"
    capsys.readouterr()
    assert command.main(["report", "--rows", str(tmp_path), "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "**Ensembles of 3 layers, float32" in page and "| 1x1 GRU train |" in page


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_contenders_compute_the_same(cell, mode):
    rows = ensembles.measure(CASE._replace(cell=cell, mode=mode, shape=SMALL), 3, 2)
    assert all(row["right"] and max(row["errors"]) < 1e-5 for row in rows)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_runs_are_timed_within_one_inference_mode(mode):
    seen = []

    def run():
        seen.append(torch.is_inference_mode_enabled())

    beside.measure(CASE._replace(mode=mode), {"seqkernels": lambda: run}, lambda *_: None, lambda _: True, 2)
    assert seen and set(seen) == {mode == "infer"}


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(ensembles, "together", lambda case, count, *_: lambda: contenders_of(case, count))
    rows = ensembles.measure(CASE._replace(shape=SMALL), 2, 2)
    assert not any(row["right"] or "median_ms" in row for row in rows)
    assert beside.said(rows[0]) == "seqkernels WRONG"


def contenders_of(case, count):
    return [2 * each for each in ensembles.side_by_side(ensembles.one_by_one(case, contenders.nn, count)())]
