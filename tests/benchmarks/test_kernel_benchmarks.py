"""`python -m benchmarks` kernels, report, compare and scaling: what they check, time, write, draw and refuse."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, contenders, kernels, problems, record, report, scaling, timing
from benchmarks.problems import PROBLEMS, Problem, flops, lengths, rows
from seqkernels import select

ROOT = Path(__file__).parents[2]
CASE = contenders.Case("names", "GRU", "infer", "padded", "float32", 1, "cpu", PROBLEMS["names"])
HISTORY = record.git("rev-parse", "--verify", "--quiet", "HEAD") is not None


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict]]:
    code = command.main(["kernels", "--turns", "2", "--threads", "1", "--out", str(tmp_path), *arguments])
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


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_training_checks_every_gradient(layout, tmp_path):
    names = ("torch.nn", "seqkernels", "onnxruntime")
    arguments = ("--problem", "names", "--cell", "LSTM", "--mode", "train", "--layout", layout, "--contender", *names)
    _, (own, ours, other) = run(tmp_path, *arguments)
    # y, h_n, c_n; of x and of four weights
    assert len(own["errors"]) == len(ours["errors"]) == 8
    assert "inference in float32 on a CPU only" in other["absent"] and "median_ms" not in other


def plant(folder: Path, right: str, wrong: str, monkeypatch) -> Path:
    """A copy of the package in which one formula of the backend that runs is another."""
    shutil.copytree(Path(select.__file__).parent, folder / "seqkernels")
    source = folder / "seqkernels" / "backends" / "torch_eager.py"
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    monkeypatch.setenv("SEQKERNELS_BACKEND", "torch_eager")
    return folder


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
        worker.ask(CASE._replace(cell="no such cell"))


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


# ---- judging


def measured(contender: str, problem: str = "names", cell: str = "GRU", **changes) -> dict:
    case = CASE._replace(problem=problem, cell=cell, shape=PROBLEMS[problem])._asdict()
    del case["shape"]
    speed = {} if contender == "seqkernels" else {"speedup": 2.0, "speedup_low": 1.99, "speedup_high": 2.01}
    times = {"median_ms": 1.0, "q1_ms": 0.9, "q3_ms": 1.1, "gflops": 100.0}
    facts = {"peak_gflops": 230.0, "commit": None, "dirty": False, "cpu": "a CPU", "gpu": None, "right": True}
    return {**case, **PROBLEMS[problem]._asdict(), "contender": contender, **facts, **times, **speed, **changes}


def test_a_difference_within_the_spread_is_none():
    def said(speedup: float, low: float, high: float) -> str:
        return kernels.verdict({"speedup": speedup, "speedup_low": low, "speedup_high": high})

    assert said(1.3, 1.28, 1.31) == "1.30x" and said(0.7, 0.69, 0.72) == "0.70x"
    assert said(1.3, 1.0, 1.5) == "=1.30x" and said(1.03, 1.03, 1.03) == "=1.03x"


def test_speedup_is_of_turns_not_of_everything():
    """The second turn was disturbed, for both alike; and of many turns, one in which only one was."""
    ours, theirs = [[1.0, 1.0], [5.0, 5.0], [1.0, 1.0]], [[2.0, 2.0], [10.0, 10.0], [2.0, 2.0]]
    assert timing.speedup(theirs, ours) == {"speedup": 2.0, "speedup_low": 2.0, "speedup_high": 2.0}
    found = timing.speedup([*[[2.0]] * 30, [9.0]], [[1.0]] * 31)
    assert found == {"speedup": 2.0, "speedup_low": 2.0, "speedup_high": 2.0}


def test_a_table_shows_losses_in_the_same_type_and_marks_what_is_old():
    lost = {"speedup": 0.5, "speedup_low": 0.49, "speedup_high": 0.51}
    found = [
        measured("torch.nn"),
        measured("seqkernels"),
        measured("torch.nn", cell="LSTM", **lost),
        measured("seqkernels", cell="LSTM", dirty=True),
    ]
    (table,) = report.tables(found)
    assert table.lines[0] == ["names", "1†: 2.00", "1†‡: 0.50"]
    assert table.lines[-1][1:] == ["2.00", "0.50"]
    page = report.markdown(table)
    assert "| names | 1†: 2.00 | 1†‡: 0.50 |" in page and "230 GFLOP/s" in page
    assert "before the library was last changed" in page and "uncommitted" in page


def test_the_last_row_of_a_case_counts():
    found = report.newest([measured("seqkernels", median_ms=9.0), measured("seqkernels", median_ms=1.0)])
    assert [row["median_ms"] for row in found] == [1.0]


def test_the_page_changes_between_its_markers_only(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("above\n{}\nreplaced\n{}\nbelow\n".format(*report.MARKERS))
    record.append(tmp_path / "kernels.jsonl", measured("torch.nn"), measured("seqkernels"))
    assert command.main(["report", "--rows", str(tmp_path), "--readme", str(page)]) == 0
    text = page.read_text()
    assert (
        text.startswith("above\n")
        and text.endswith("below\n")
        and "replaced" not in text
        and "| names | 1†: 2.00 |" in text
    )
    page.write_text("no markers")
    capsys.readouterr()
    assert command.main(["report", "--rows", str(tmp_path), "--readme", str(page)]) == 2
    assert "once each" in capsys.readouterr().err and page.read_text() == "no markers"


@pytest.mark.parametrize("text", [None, "{not json"])
def test_no_rows_no_report(text, tmp_path, capsys):
    if text is not None:
        (tmp_path / "kernels.jsonl").write_text(text)
    assert command.main(["report", "--rows", str(tmp_path)]) == 2
    assert "kernels.jsonl" in capsys.readouterr().err


def test_the_readme_says_what_the_rows_say():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    between = page.split(report.MARKERS[0])[1].split(report.MARKERS[1])[0]
    rows = report.newest(report.read(record.RESULTS / "kernels.jsonl"))
    expected = "\n\n".join(map(report.markdown, report.tables(report.readme_rows(rows))))

    def numbers(text: str) -> list[str]:
        """Whatever the history of this checkout, which decides about marks, may say."""
        return [re.sub(r"(?<=\d)[†‡]+(?=:)", "", line) for line in text.splitlines() if line.startswith("|")]

    assert numbers(between) == numbers(expected) != []


def test_every_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install seqkernels[benchmarks]")
    found = [
        measured(name, problem, cell, mode=mode, layout=layout)
        for name in ("torch.nn", "seqkernels")
        for problem in ("names", "big")
        for cell in problems.CELLS
        for mode, layout in (("infer", "padded"), ("train", "padded"), ("train", "packed"))
    ]
    grown = [
        {**measured(name), "axis": axis, "value": value, "step_us": value}
        for name in scaling.CONTENDERS
        for axis in scaling.AXES
        for value in (1, 2)
    ]
    drawn = report.draw(found, grown, tmp_path)
    assert sorted(path.name for path in drawn) == sorted(
        f"kernels-{name}.{kind}" for name in ("speedup", "roofline", "packed", "scaling") for kind in ("png", "svg")
    )
    assert all(path.stat().st_size > 5000 for path in drawn)


# ---- scaling and comparing


def test_slopes():
    def rows(axis: str, time) -> list[dict]:
        return [{"value": x, "median_ms": time(x) / 1e3} for x in scaling.AXES[axis].values]

    assert scaling.slope(rows("T", lambda t: 7 * t + 30), "T") == "7.00 us for each of the steps, +30 us for the call"
    assert scaling.slope(rows("H", lambda h: 3 * h**2), "H") == "time grows as H ** 2.00"
    assert scaling.slope(rows("raggedness", lambda p: 100 - 90 * p), "raggedness").startswith("0.90 of the time")
    assert scaling.values_of("threads", 6) == (1, 2, 4, 6)


def test_scaling_measures_along_an_axis(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(scaling.AXES, "T", scaling.Axis("steps", (1, 4)))
    monkeypatch.setattr(scaling, "CENTRE", Problem(4, 2, 3, 5))
    arguments = ["scaling", "--axis", "T", "raggedness", "--turns", "2", "--threads", "1", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    found = read(tmp_path / "scaling.jsonl")
    assert [row["T"] for row in found if row["axis"] == "T"] == [1, 1, 4, 4]
    assert [row["layout"] for row in found if row["axis"] == "raggedness"] == ["packed"] * 10
    assert all(row["step_us"] > 0 and row["right"] and "commit" in row and "plan" in row for row in found)
    assert "us for each of the steps" in capsys.readouterr().out


def test_scaling_and_compare_do_not_time_wrong_results(tmp_path, monkeypatch, capsys):
    planted = plant(tmp_path / "planted", "(1 - n * n)", "(1 - n)", monkeypatch)
    workers = [timing.Worker("seqkernels", 1, root, label) for label, root in (("new", planted), ("old", planted))]
    names = CASE._replace(problem="names", mode="train", shape=PROBLEMS["names"])
    assert compare.compare(names, workers, 2) == ["wrong"]
    for worker in workers:
        worker.stop()
    monkeypatch.syspath_prepend(planted)
    assert command.main(["scaling", "--axis", "B", "--turns", "2", "--threads", "1", "--out", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert "WRONG" in output.out and "wrong results are not timed" in output.err
    assert not (tmp_path / "scaling.jsonl").exists()


@pytest.mark.skipif(not HISTORY, reason="not in a git checkout")
def test_a_revision_is_checked_out_and_gone_again():
    with compare.worktree("HEAD") as root:
        assert (root / "seqkernels" / "__init__.py").exists() and str(root) in record.git("worktree", "list")
    assert not root.exists() and str(root) not in record.git("worktree", "list")


def test_an_unknown_revision_is_refused(capsys):
    assert command.main(["compare", "no-such-revision"]) == 2
    assert "no revision no-such-revision" in capsys.readouterr().err


def test_compare_times_the_package_of_each_folder(tmp_path, capsys):
    shutil.copytree(Path(select.__file__).parent, tmp_path / "seqkernels")
    here = Path(select.__file__).parents[1]
    workers = [timing.Worker("seqkernels", 1, root, label) for label, root in (("new", here), ("old", tmp_path))]
    found = compare.compare(CASE._replace(problem="step", shape=PROBLEMS["step"]), workers, 2)
    for worker in workers:
        worker.stop()
    assert len(found) <= 1 and re.search(r"step +GRU .*\d\.\d\dx", capsys.readouterr().out)


def test_a_folder_without_the_package_is_noticed(tmp_path):
    worker = timing.Worker("seqkernels", 1, tmp_path)
    with pytest.raises(Exception, match="ended with exit code 1"):
        worker.ask(CASE)


def test_the_same_problems_run_under_pytest_benchmark():
    pytest.importorskip("pytest_benchmark", reason="pip install seqkernels[benchmarks]")
    import subprocess

    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/test_kernels.py", "-k", "step and GRU"]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "step GRU infer padded" in done.stdout and "2 passed" in done.stdout, done.stdout
