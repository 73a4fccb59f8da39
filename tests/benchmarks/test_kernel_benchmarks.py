"""`python -m benchmarks kernels`: what it checks, times and writes, and who is measured."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_benchmarks import CASE, plant, read

from benchmarks import __main__ as command
from benchmarks import contenders, kernels, problems, record, timing
from benchmarks.problems import PROBLEMS, Problem, flops, lengths, rows
from seqkernels import select

ROOT = Path(__file__).parents[2]


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict]]:
    code = command.main(["kernels", "--rounds", "2", "--threads", "1", "--out", str(tmp_path), *arguments])
    return code, read(tmp_path / "kernels.jsonl")


def test_a_row_holds_what_judges_and_repeats_it(tmp_path, capsys):
    code, found = run(tmp_path, "--problem", "step", "--cell", "GRU", "--contender", "torch.nn", "seqkernels")
    own, ours = found  # a single step is neither trained nor packed
    assert code == 0 and (own["contender"], ours["contender"]) == ("torch.nn", "seqkernels")
    for row in found:
        assert row["right"] and row["problem"] == "step" and row["threads"] == 1 and row["H"] == 256
        assert {"run", "time", "machine", "cpu", "torch", "commit", "dirty", "dtype", "plan", "peak_gflops"} <= set(row)
        assert {"gpu", "driver", "tf32", "version"} <= set(row)
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] and max(row["errors"]) < 1e-5
    assert own["speedup_low"] <= own["speedup"] <= own["speedup_high"] and "speedup" not in ours
    assert "seqkernels" in capsys.readouterr().out


def test_busy_processes_are_gone_after_their_turn(tmp_path, monkeypatch, capsys):
    started = []

    class Started(subprocess.Popen):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            started.append(self)

    monkeypatch.setattr(timing.subprocess, "Popen", Started)
    arguments = ("--problem", "step", "--cell", "GRU", "--contender", "torch.nn", "seqkernels", "--busy", "2")
    code, found = run(tmp_path, *arguments)
    busy = [other for other in started if other.args[0] == sys.executable]
    assert code == 0 and len(busy) == 2 and all(other.poll() is not None for other in busy)
    assert all(row["busy_processes"] == 2 and row["busy_ms"] > 0 and row["median_ms"] > 0 for row in found)
    assert " busy " in capsys.readouterr().out


def test_contenders_of_one_process_are_measured_as_those_of_several():
    """As on a GPU, where no contender's threads spin."""
    case = CASE._replace(mode="train")
    here = [timing.InProcess(name) for name in ("torch.nn", "seqkernels", "onnxruntime")]
    own, ours, other = kernels.measure(case, here, 3)
    assert own["right"] and ours["median_ms"] > 0 and own["speedup"] > 0 and "median_ms" not in other
    assert len(own["errors"]) == len(ours["errors"]) and max(ours["errors"]) < 1e-5


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_training_checks_every_gradient(layout, tmp_path):
    names = ("torch.nn", "seqkernels", "onnxruntime")
    arguments = ("--problem", "names", "--cell", "LSTM", "--mode", "train", "--layout", layout, "--contender", *names)
    _, (own, ours, other) = run(tmp_path, *arguments)
    # y, h_n, c_n; of x and of four weights
    assert len(own["errors"]) == len(ours["errors"]) == 8
    assert "inference in float32 on a CPU only" in other["absent"] and "median_ms" not in other


@pytest.mark.parametrize(
    ("right", "wrong", "mode"),
    [("torch.tanh(x_n + r * h_n)", "torch.tanh(x_n + 1.0001 * r * h_n)", "infer"), ("(1 - n * n)", "(1 - n)", "train")],
)
def test_a_kernel_that_is_made_wrong_is_caught_and_not_timed(right, wrong, mode, tmp_path, monkeypatch, capsys):
    """In one place of the forward, in another of the backward."""
    monkeypatch.syspath_prepend(plant(tmp_path / "planted", right, wrong, monkeypatch))
    arguments = ("--problem", "names", "--cell", "GRU", "--layout", "padded", "--contender", "torch.nn", "seqkernels")
    code, found = run(tmp_path, "--mode", mode, *arguments)
    assert code == 1 and not any(row["right"] or "median_ms" in row for row in found)
    assert "WRONG" in capsys.readouterr().out
    assert command.main(["report", "--rows", str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert "refused, its results were wrong: names GRU" in output.err and "Inference" not in output.out


def test_the_gate_is_twice_torchs_own_error():
    def rows(ours: float, own: float) -> dict:
        return {"seqkernels": {"errors": [ours]}, "torch.nn": {"errors": [own]}}

    assert kernels.gate(rows(2e-6, 1e-6), CASE)
    assert not kernels.gate(rows(3e-6, 1e-6), CASE)
    assert not kernels.gate(rows(math.nan, 1e-6), CASE)
    assert not kernels.gate({"seqkernels cpu": {"errors": [1e-3]}}, CASE)  # without torch.nn, too


def test_a_contender_that_dies_is_named():
    worker = timing.Worker("torch.nn", 1)
    with pytest.raises(Exception, match=r"torch\.nn ended with exit code 1"):
        worker.request(CASE._replace(cell="no such cell"))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("cell", ["GRU", "LSTM", "RNN"])
def test_other_libraries_run_the_same_layer(name, cell):
    pytest.importorskip("onnx", reason="pip install seqkernels[contenders]")
    pytest.importorskip(name, reason="pip install seqkernels[contenders]")
    case = CASE._replace(cell=cell)
    right = contenders.torch_nn(case._replace(dtype="float64"))()
    assert max(contenders.errors(contenders.CONTENDERS[name](case)(), right)) < 1e-5


@pytest.mark.parametrize("name", ["aten cells", "compiled loop", *(f"seqkernels {b}" for b in select.BACKENDS)])
@pytest.mark.parametrize("cell", ["GRU", "LSTM", "RNN"])
def test_loops_and_each_backend_run_the_same_layer(name, cell):
    case = CASE._replace(cell=cell, mode="train", shape=Problem(3, 2, 4, 5))
    right = contenders.torch_nn(case._replace(dtype="float64"))()
    try:
        found = contenders.CONTENDERS[name](case)()
    except contenders.Unavailable as reason:
        pytest.skip(str(reason))
    assert len(found) == len(right) and max(contenders.errors(found, right)) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_contenders_run_a_case_in_its_dtype(dtype):
    case = CASE._replace(cell="GRU", shape=Problem(3, 2, 4, 5), dtype=dtype)
    right = contenders.torch_nn(case._replace(dtype="float64"))()
    for name in ("torch.nn", "seqkernels"):
        found = contenders.CONTENDERS[name](case)()
        assert all(result.dtype == getattr(torch, dtype) for result in found)
        assert max(contenders.errors(found, right)) < (1e-2 if dtype == "bfloat16" else 1e-12)


def test_a_case_sets_the_precision_of_float32():
    case = CASE._replace(cell="GRU", shape=Problem(3, 4, 4, 6))
    worker = timing.InProcess("seqkernels")
    for dtype, precision in (("float32-high", "high"), ("float32-medium", "medium"), ("float32", "highest")):
        worker.request(case._replace(dtype=dtype))
        worker.request("errors")  # beside a case in float64
        worker.request(1)
        assert torch.get_float32_matmul_precision() == precision and worker.run()[0].dtype == torch.float32


def test_every_backend_is_a_contender():
    assert contenders.OUR_BACKENDS == select.BACKENDS


def test_a_contender_says_why_it_stays_away():
    long = CASE._replace(shape=PROBLEMS["charlm"])
    for name, case, said in (
        ("compiled loop", long, "200 of them"),
        ("aten cells", CASE._replace(layout="packed"), "padded layer only"),
        ("torch.nn float32", CASE, "in float32 itself"),
    ):
        with pytest.raises(contenders.Unavailable, match=said):
            contenders.CONTENDERS[name](case)


def test_packed_work_counts_rows():
    problem = PROBLEMS["names"]
    assert lengths(problem).max() == problem.T and lengths(problem).min() >= 1
    assert torch.equal(lengths(problem), lengths(problem))
    assert rows(problem, "padded") == 20 * 64 and rows(problem, "packed") == int(lengths(problem).sum())
    assert flops(problem, "GRU", "infer", "padded") == 2 * 20 * 64 * 3 * 100 * 200
    assert flops(problem, "GRU", "train", "padded") == 3 * flops(problem, "GRU", "infer", "padded")
    assert flops(problem._replace(layers=2), "RNN", "infer", "padded") == 2 * 20 * 64 * 100 * (200 + 200)


def test_lengths_of_a_task_come_from_its_data(tmp_path, monkeypatch, capsys):
    import gzip

    problems.task_lengths.cache_clear()
    monkeypatch.delenv("SEQKERNELS_DATA", raising=False)
    case = ("--problem", "names-real", "--cell", "GRU", "--mode", "infer", "--layout", "packed")
    code = command.main(["kernels", *case, "--contender", "torch.nn", "--threads", "1", "--out", str(tmp_path)])
    assert code == 0 and "left out: the lengths of names need its data" in capsys.readouterr().out
    (tmp_path / "names").mkdir()
    for file in ("names_train.csv.gz", "names_test.csv.gz"):
        (tmp_path / "names" / file).write_bytes(gzip.compress(b'"Ng","Chinese"\n"Lee","Chinese"\n'))
    monkeypatch.setenv("SEQKERNELS_DATA", str(tmp_path))
    found = lengths(PROBLEMS["names-real"])
    problems.task_lengths.cache_clear()
    assert set(found.tolist()) == {2, 3, 20} and found.max() == 20  # the longest is T


def test_the_same_problems_run_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark", reason="pip install seqkernels[benchmarks]")
    import subprocess

    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/test_kernels.py", "-k", "step and GRU"]
    # Where these tests run in several processes, pytest-benchmark would take itself for one of them, and not measure.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0 and "step GRU infer padded" in done.stdout and "2 passed" in done.stdout, done.stdout


@pytest.mark.skipif(not shutil.which("git"), reason="no git here")
def test_rows_that_were_written_make_no_tree_dirty(tmp_path, monkeypatch):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", results)
    record.git("init")
    record.git("-c", "user.name=me", "-c", "user.email=me@here", "commit", "--allow-empty", "-m", "first")
    (results / "models.jsonl").write_text("")
    assert record.revision()["commit"] and not record.revision()["dirty"]
    (tmp_path / "changed.py").write_text("")
    assert record.revision()["dirty"]
