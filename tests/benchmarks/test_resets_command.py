"""`python -m benchmarks resets`, on a rollout of a few steps."""

import pytest
from kernel_benchmarks import CASE, read

from benchmarks import __main__ as command
from benchmarks import beside, contenders, resets
from benchmarks.problems import Problem

SMALL = Problem(7, 3, 4, 5)
ALWAYS = ["no mask", "seqkernels", "torch.nn"]


def test_every_contender_has_a_row_and_a_column(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(resets.SIZES, "short", SMALL)
    arguments = [
        "--size",
        "short",
        "--cell",
        "GRU",
        "--share",
        "0.2",
        "--threads",
        "1",
        "--rounds",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert command.main(["resets", *arguments]) == 0
    found = read(tmp_path / "resets.jsonl")
    assert len(found) == 2 * (len(ALWAYS) + len(resets.TORCHRL))  # two modes
    for row in found:
        assert {"run", "machine", "cpu", "torch", "commit", "dirty", "plan", "absent"} <= set(row)
        assert row["right"] and row["share"] == 0.2 and row["T"] == 7 and row["problem"] == "short"
        assert ("median_ms" in row) == (row["absent"] is None)
        assert ("errors" in row) == (row["absent"] is None and row["contender"] != "no mask")
    assert [row["contender"] for row in found if row["absent"] is None][:3] == ALWAYS
    capsys.readouterr()
    assert command.main(["report", "--rows", str(tmp_path), "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "**Resets at 20% of the steps, float32" in page and "| short GRU train |" in page


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_contenders_compute_the_same(cell, mode):
    case = CASE._replace(cell=cell, mode=mode, shape=SMALL)
    right = resets.torch_nn(case._replace(dtype="float64"), resets.mask_of(case, 0.3))()
    made = resets.contenders(case, 0.3)
    del made["no mask"]
    for name, make in made.items():
        try:
            run = make()
        except contenders.Unavailable:
            continue
        found = run()
        assert len(found) == len(right) and max(contenders.errors(found, right)) < 1e-5, name


def test_what_is_wrong_is_not_timed(monkeypatch):
    case = CASE._replace(shape=SMALL)
    ours = resets.ours
    monkeypatch.setattr(resets, "ours", lambda case, mask: ours(case, None))
    rows = resets.measure(case, 0.5, 2)
    assert not any(row["right"] or "median_ms" in row for row in rows)
    assert beside.said(rows[1]) == "seqkernels WRONG"
