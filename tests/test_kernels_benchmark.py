"""`python -m benchmarks kernels` on small problems: what it checks, times, writes and refuses."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("benchmarks") is None:
    sys.path.append(str(ROOT))  # last, so that an installed seqkernels goes before the source folder

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import contenders, kernels, timing  # noqa: E402
from benchmarks.problems import PROBLEMS, flops, lengths, rows  # noqa: E402

CASE = contenders.Case("names", "GRU", "infer", "padded", "float32", 1)


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict]]:
    code = command.main(["kernels", "--quick", "--threads", "1", "--out", str(tmp_path), *arguments])
    return code, [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]


def test_a_row_holds_what_judges_and_repeats_it(tmp_path, capsys):
    code, found = run(tmp_path, "--problem", "step", "--cell", "GRU", "--contender", "torch.nn", "seqkernels")
    (row,) = found  # a single step is neither trained nor packed
    assert code == 0 and row["right"] and row["problem"] == "step" and row["threads"] == 1
    assert {"time", "machine", "cpu", "torch", "commit", "dirty", "dtype", "plan", "peak_gflops"} <= set(row)
    for figures in row["contenders"].values():
        assert 0 < figures["q1_ms"] <= figures["median_ms"] <= figures["q3_ms"] and max(figures["errors"]) < 1e-5
    assert "seqkernels" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_training_checks_every_gradient(layout, tmp_path):
    _, (row,) = run(tmp_path, "--problem", "names", "--cell", "LSTM", "--mode", "train", "--layout", layout)
    # y, h_n, c_n; of x and of four weights
    assert [len(row["contenders"][name]["errors"]) for name in ("torch.nn", "seqkernels")] == [8, 8]
    assert "inference in float32 only" in row["absent"]["onnxruntime"]


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "gate", lambda figures, case: False)
    code, (row,) = run(tmp_path, "--problem", "step", "--cell", "RNN", "--contender", "torch.nn", "seqkernels")
    assert code == 1 and not row["right"] and "median_ms" not in row["contenders"]["seqkernels"]
    assert "WRONG" in capsys.readouterr().out


def test_the_gate_is_twice_torchs_own_error():
    def figures(ours: float, own: float) -> dict:
        return {"seqkernels": {"errors": [ours]}, "torch.nn": {"errors": [own]}}

    assert kernels.gate(figures(2e-6, 1e-6), CASE)
    assert not kernels.gate(figures(3e-6, 1e-6), CASE)
    assert not kernels.gate(figures(float("nan"), 1e-6), CASE)


def test_a_contender_that_dies_is_named(tmp_path, capsys):
    case = CASE._replace(cell="no such cell")
    worker = timing.Worker("torch.nn", case)
    with pytest.raises(Exception, match=r"torch\.nn ended with exit code 1"):
        worker.ask("errors")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("cell", ["GRU", "LSTM", "RNN"])
def test_other_libraries_run_the_same_layer(name, cell):
    pytest.importorskip("onnx", reason="pip install seqkernels[contenders]")
    pytest.importorskip(name, reason="pip install seqkernels[contenders]")
    case = CASE._replace(cell=cell)
    right = contenders.torch_nn(case._replace(dtype="float64"))()
    assert max(contenders.errors(contenders.CONTENDERS[name](case)(), right)) < 1e-5


def test_packed_work_counts_rows():
    problem = PROBLEMS["names"]
    assert lengths(problem).max() == problem.T and lengths(problem).min() >= 1
    assert torch.equal(lengths(problem), lengths(problem))
    assert rows(problem, "padded") == 20 * 64 and rows(problem, "packed") == int(lengths(problem).sum())
    assert flops(problem, "GRU", "infer", "padded") == 2 * 20 * 64 * 3 * 100 * 200
    assert flops(problem, "GRU", "train", "padded") == 3 * flops(problem, "GRU", "infer", "padded")
