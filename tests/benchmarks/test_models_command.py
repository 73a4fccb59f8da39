"""`python -m benchmarks models`, with a zoo of one model that needs no package."""

import pytest
import torch
from kernel_benchmarks import read
from torch import nn

from benchmarks import __main__ as command
from benchmarks import models
from benchmarks.zoo import Entry


def small():
    x = torch.randn(3, 2, 4)
    return nn.GRU(4, 5), lambda model: model(x)


def test_both_forms_have_a_row_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        models, "ZOO", {"small": Entry(small, 1, "torch"), "absent": Entry(small, 1, "no_such_package")}
    )
    assert command.main(["models", "--threads", "1", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert "absent: skipped, No module named 'no_such_package'" in capsys.readouterr().out
    found = read(tmp_path / "models.jsonl")
    assert [(row["contender"], row["mode"]) for row in found] == [
        (contender, mode) for mode in ("infer", "train") for contender in ("torch.nn", "seqkernels")
    ]
    for row in found:
        assert (
            row["right"] and row["problem"] == "small" and row["swapped"] == 1 and row["package"].startswith("torch ")
        )
        assert {"run", "machine", "cpu", "torch", "commit", "dirty"} <= set(row)
        assert 0 < row["q1_ms"] <= row["median_ms"] and ("speedup" in row) == (row["contender"] == "torch.nn")
    assert command.main(["report", "--rows", str(tmp_path), "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "**Other people's models, float32" in page and "| small | 1 |" in page


def test_what_is_wrong_is_not_timed(monkeypatch):
    calls = iter([torch.ones(2), 2 * torch.ones(2)])
    rows = models.measure(Entry(lambda: (nn.GRU(4, 5), lambda _: next(calls)), 1, "torch"), "infer", 2)
    assert not any(row["right"] or "median_ms" in row for row in rows)


@pytest.mark.parametrize("right, text", [(True, "seqkernels 1.5 ms"), (False, "seqkernels WRONG")])
def test_a_row_is_said(right, text):
    assert models.said({"contender": "seqkernels", "right": right, "median_ms": 1.5}) == text
