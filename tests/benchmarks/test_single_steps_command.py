"""`python -m benchmarks single-steps`, on a small cell."""

from kernel_benchmarks import read

from benchmarks import __main__ as command
from benchmarks import single_steps
from benchmarks.problems import Problem


def test_both_cells_have_a_row_and_a_column(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(single_steps.SIZES, "1x256", Problem(1, 2, 3, 5))
    arguments = ["--size", "1x256", "--threads", "1", "--rounds", "2", "--out", str(tmp_path)]
    assert command.main(["single-steps", *arguments]) == 0
    found = read(tmp_path / "single-steps.jsonl")
    assert len(found) == 2 * 2 * 3 * 2  # dtypes, modes, cells, contenders
    for row in found:
        assert row["right"] and row["layout"] == "cell" and row["B"] == 2 and "median_ms" in row
        assert ("speedup" in row) == (row["contender"] == "torch.nn")
    capsys.readouterr()
    assert command.main(["report", "--rows", str(tmp_path), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "One step of a cell, float32 under autocast to bfloat16" in said and "LSTM train 1x256" in said
