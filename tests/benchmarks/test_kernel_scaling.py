"""`python -m benchmarks` scaling and compare: how cost grows, and what a revision changed."""

import re
import shutil
from pathlib import Path

import pytest
from kernel_benchmarks import CASE, plant, read

from benchmarks import __main__ as command
from benchmarks import compare, record, scaling, timing
from benchmarks.problems import PROBLEMS, Problem
from seqkernels import select

HISTORY = record.git("rev-parse", "--verify", "--quiet", "HEAD") is not None


def test_slopes():
    def rows(axis: str, time) -> list[dict]:
        return [{"value": x, "median_ms": time(x) / 1e3} for x in scaling.AXES[axis].values]

    assert scaling.slope(rows("T", lambda t: 7 * t + 30), "T") == "7.00 us for each of the steps, +30 us for the call"
    assert scaling.slope(rows("H", lambda h: 3 * h**2), "H") == "time grows as H ** 2.00"
    assert scaling.slope(rows("raggedness", lambda p: 100 - 90 * p), "raggedness").startswith("0.90 of the time")
    assert scaling.values_of("threads", 6) == (1, 2, 4, 6)


@pytest.mark.slow
def test_scaling_measures_along_an_axis(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(scaling.AXES, "T", scaling.Axis("steps", (1, 4)))
    monkeypatch.setattr(scaling, "CENTRE", Problem(4, 2, 3, 5))
    arguments = ["scaling", "--axis", "T", "raggedness", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]
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
    assert command.main(["scaling", "--axis", "B", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]) == 2
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
        worker.request(CASE)
