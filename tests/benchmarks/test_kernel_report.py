"""`python -m benchmarks report`: which rows count, what the tables say, and the plots."""

import re
from pathlib import Path

import pytest
from kernel_benchmarks import CASE

from benchmarks import __main__ as command
from benchmarks import kernels, plots, problems, record, report, scaling, timing
from benchmarks.problems import PROBLEMS

ROOT = Path(__file__).parents[2]


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


def test_speedup_is_of_rounds_not_of_everything():
    """The second round was disturbed, for both alike; and of many rounds, one in which only one side was."""
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


def test_a_busy_machine_has_a_table_of_its_own():
    busy = {"busy_processes": 1, "cpus": 2, "busy_ms": 3.0}
    (table,) = report.busy_tables([measured("torch.nn", **busy | {"busy_ms": 150.0}), measured("seqkernels", **busy)])
    assert table.headings == ["", "seqkernels", "torch.nn"]
    assert table.lines == [["names GRU infer padded float32", "3†: 3.0", "150†: 150.0"]]
    assert "1 other process on 2 cores" in table.title
    assert not report.busy_tables([measured("seqkernels")])


def test_the_last_row_of_a_case_counts():
    found = record.newest([measured("seqkernels", median_ms=9.0), measured("seqkernels", median_ms=1.0)])
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


def test_the_documents_say_what_the_rows_say():
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    between = page.split(report.MARKERS[0])[1].split(report.MARKERS[1])[0]
    rows = record.newest(record.read(record.RESULTS / "kernels.jsonl"))
    expected = "\n\n".join(map(report.markdown, report.readme_tables(rows, record.RESULTS)))

    def numbers(text: str) -> list[str]:
        """Whatever the history of this checkout, which decides about marks, may say."""
        return [re.sub(r"(?<=\d)[†‡]+(?=:)", "", line) for line in text.splitlines() if line.startswith("|")]

    assert numbers(between) == numbers(expected) != []
    means = " ".join(line for line in between.splitlines() if "geometric mean" in line)
    quoted = re.findall(r"(\d+\.\d+) times", " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()))
    assert quoted and all(number in re.findall(r"\d+\.\d+", means) for number in quoted)


def test_steps_have_a_table(tmp_path, capsys):
    layer = {"gpu": "a GPU", "cpu": None, "cell": "gru", "dtype": "tf32", "H": 8, "B": 2, "directions": 1}
    layer["commit"] = None
    rows = [
        {**layer, "contender": "cuda", "path": "cluster", "units": units, "pass": way, "us": us}
        for units, way, us in ((32, "forward", 1.5), (64, "forward", 1.25), (32, "backward", 2.0))
    ]
    rows += [{**layer, "contender": "cudnn", "pass": "forward", "us": 0.75}]
    record.append(tmp_path / "kernels.jsonl", measured("torch.nn"), measured("seqkernels"))
    record.append(tmp_path / "steps.jsonl", *rows)
    assert command.main(["report", "--rows", str(tmp_path), "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "Steps, tf32, a GPU" in said and "| gru, H 8, B 2 | 1.25 / 2.00 | 0.75 / - |" in said


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
    drawn = plots.draw(found, grown, tmp_path)
    assert sorted(path.name for path in drawn) == sorted(
        f"kernels-{name}.{kind}"
        for name in ("overview-cpu", "speedup", "roofline", "packed", "scaling")
        for kind in ("png", "svg")
    )
    assert all(path.stat().st_size > 5000 for path in drawn)
