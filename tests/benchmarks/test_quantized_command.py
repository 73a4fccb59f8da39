"""`python -m benchmarks quantized`, on a layer of a few units; and `train --quantized`."""

from kernel_benchmarks import read

from benchmarks import __main__ as command
from benchmarks import quantized
from benchmarks.problems import Problem


def test_every_contender_has_a_row_and_a_column(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(quantized.SIZES, "step", Problem(3, 2, 16, 24))
    options = ["--size", "step", "--threads", "1", "--rounds", "2", "--out", str(tmp_path)]
    assert command.main(["quantized", *options, "--cell", "GRU", "RNN"]) == 0
    found = read(tmp_path / "quantized.jsonl")
    assert [row["contender"] for row in found] == 2 * list(quantized.CONTENDERS)
    for row in found:
        assert {"run", "machine", "cpu", "isa", "torch", "commit", "plan", "absent"} <= set(row)
        assert row["right"] and ("median_ms" in row) == ("errors" in row) == (row["absent"] is None)
    assert [row["absent"] for row in found if row["cell"] == "RNN" and row["absent"]] == ["it has no RNN"]
    capsys.readouterr()
    assert command.main(["report", "--rows", str(tmp_path), "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "**Quantized to int8, inference, 1 thread of" in page and "| step GRU |" in page


def test_training_says_the_metric_of_int8(tmp_path, capsys):
    options = "--module seqkernels --quantized --limit 5000 --epochs 1 --threads 1"
    assert command.main(["train", "charlm", *options.split(), "--out", str(tmp_path)]) == 0
    (row,) = read(tmp_path / "train.jsonl")
    figures = row["modules"]["seqkernels.GRU"]
    assert abs(figures["quantized_metric"] - figures["metric"]) < 0.02
    assert "With seqkernels.GRU quantized to int8, bits / char:" in capsys.readouterr().out
