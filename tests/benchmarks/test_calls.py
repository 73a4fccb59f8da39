"""`python -m benchmarks calls`: the host's time by layer of the software, and what a run asks for."""

import pytest
import torch
from kernel_benchmarks import CASE, read

from benchmarks import __main__ as command
from benchmarks import call_layers, calls, contenders, profiling
from benchmarks.problems import Problem

SMALL = CASE._replace(shape=Problem(3, 2, 4, 5))


@pytest.mark.slow
def test_every_contender_has_a_row_with_time_and_counts(tmp_path, capsys):
    arguments = ["--size", "9x7x17", "--cell", "GRU", "--dtype", "float32", "--threads", "1", "--rounds", "2"]
    assert command.main(["calls", *arguments, "--out", str(tmp_path)]) == 0
    found = read(tmp_path / "calls.jsonl")
    assert [row["contender"] for row in found] == list(calls.CONTENDERS) * 2
    assert [row["mode"] for row in found] == ["infer"] * len(calls.CONTENDERS) + ["train"] * len(calls.CONTENDERS)
    for row in found:
        assert row["right"] and row["problem"] == "9x7x17" and row["T"] == 9
        assert {"run", "machine", "cpu", "torch", "commit", "dirty", "plan", "absent"} <= set(row)
        assert (row["absent"] is None) == ("median_ms" in row)
        if "median_ms" in row:
            assert 0 < row["q1_ms"] <= row["median_ms"] and row["launches"] is None and row["allocations"] >= 0
    assert {row["contender"] for row in found if "median_ms" in row} >= {"torch.nn", "seqkernels"}
    capsys.readouterr()
    assert command.main(["report", "--rows", str(tmp_path), "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "**Host time of a call, float32, cpu**" in page and "a forward and backward pass" in page
    assert "| GRU 9x7x17 |" in page and "seqkernels functional" in page


@pytest.mark.parametrize("name", call_layers.LAYERS)
@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("cell", ["GRU", "LSTM", "RNN"])
def test_each_layer_of_the_software_computes_the_same(cell, mode, name):
    case = SMALL._replace(cell=cell, mode=mode)
    right = contenders.torch_nn(case._replace(dtype="float64"))()
    try:
        run = call_layers.LAYERS[name](case)
    except contenders.Unavailable as reason:
        pytest.skip(str(reason))
    for _ in range(2):
        found = run()
        assert len(found) == len(right) and max(contenders.errors(found, right)) < 1e-5


def test_memory_that_is_asked_for_is_counted():
    def run() -> None:
        torch.empty(3), torch.empty(5)

    assert profiling.counts(run, torch.device("cpu")) == {"launches": None, "allocations": 2}


def test_the_share_is_of_the_quickest_other_one():
    common = {"right": True, "device": "cpu", "dtype": "float32", "mode": "infer", "cell": "GRU", "problem": "1x1x96"}
    counts = {"launches": 5, "allocations": 2}
    times = {"torch.nn": 0.08, "onnxruntime": 0.04, "seqkernels": 0.05, "seqkernels C++": 0.01}
    rows = [common | counts | {"contender": name, "median_ms": time} for name, time in times.items()]
    ((title, headings, lines, _),) = calls.tables([*rows, common | {"contender": "torch.nn float32"}])
    assert title == "Host time of a call, float32, cpu" and headings == ["", *times, "share"]
    assert lines == [["GRU 1x1x96", "80 (5, 2)", "40 (5, 2)", "50 (5, 2)", "10 (5, 2)", "1.25"]]
    assert not list(calls.tables([row | {"right": False} for row in rows]))


def test_a_gpu_that_is_not_here_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["calls", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["calls", "steps"])
def test_a_device_that_is_none_is_refused(name, capsys):
    assert command.main([name, "--device", "nope"]) == 2
    assert capsys.readouterr().err == "python -m benchmarks: --device nope: it is cpu or cuda.\n"
