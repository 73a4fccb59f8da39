"""Training runs of `python -m benchmarks`, on small data: what they print, write, draw and refuse."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn
from training import REAL_DATA, is_png, names_task, only_row, options, rows, run

from benchmarks import __main__ as command
from benchmarks import data, train, training_report
from benchmarks.task import Run
from benchmarks.tasks import TASKS


def small(name: str, folder: Path) -> tuple:
    """Options that make a task quick."""
    return {
        "hello": (),
        "names": ("--data", folder),
        "news": ("--data", folder, "--batch-size", 8, "--hidden", 16, "--embedding", 8),
        "charlm": ("--limit", 6000, "--chunk", 25, "--batch-size", 8, "--sample", 20),
    }[name]


def test_names_learns_and_reports(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.Lines, "seconds", 0)
    out = tmp_path / "out"
    arguments = ("--module", "torch", "--epochs", 12, "--batch-size", 10, "--threads", 1, "--out", out)
    assert run("train", "names", "--data", folder, *arguments) == 0
    printed = capsys.readouterr()
    assert "150 train and 30 test names of 3 countries" in printed.out
    assert "12 of 12 epochs" in printed.out
    assert "test accuracy" in printed.out
    lines = printed.err.splitlines()  # no terminal, no progress bar
    assert lines[0].startswith("nn.GRU epoch 1/12: 0% of 150 names") and "\r" not in printed.err
    row = only_row(out)
    assert row["task"] == "names" and row["seed"] == 0 and row["threads"] == 1 and row["dtype"] == "float32"
    assert row["torch"] == torch.__version__
    assert {"machine", "cpu", "seqkernels", "commit", "dirty", "options"} <= row.keys()
    figures = row["modules"]["nn.GRU"]
    assert figures["steps"] == 12 * 15 and len(figures["epoch_seconds"]) == 12
    assert figures["metric"] > 0.9
    assert is_png(out / "train-names.png")


@pytest.mark.parametrize("name", TASKS)
def test_both_modules_train_alike(name, folder, tmp_path, capsys):
    pytest.importorskip("seqkernels")
    out = tmp_path / "out"
    assert run("train", name, *small(name, folder), "--epochs", 2, "--out", out) == 0
    assert "Largest relative gap between the two loss curves" in capsys.readouterr().out
    for row in rows(out):
        theirs, ours = row["modules"].values()
        assert row["gap"] < 1e-4
        assert ours["steps"] == theirs["steps"]
        assert ours["metric"] == pytest.approx(theirs["metric"], rel=1e-3)
        assert ours["plan"] and theirs["plan"] is None
        assert 0 < ours["layer_seconds_per_epoch"] < ours["seconds_per_epoch"]
        assert ours["peak_memory_bytes"] is not None
    assert is_png(out / f"train-{name}.png")


def test_charlm_learns_from_a_text_file(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    out = tmp_path / "out"
    arguments = ("--epochs", 6, "--batch-size", 4, "--chunk", 20, "--module", "torch", "--out", out)
    assert run("train", "charlm", "--text", text, *arguments) == 0
    assert only_row(out)["modules"]["nn.GRU"]["metric"] < 1.0  # 27 characters by chance: 4.75 bits


def test_python_carries_a_text():
    text = data.python_documentation()
    assert len(text) > 100_000 and "comprehension" in text


def test_one_seed_gives_one_result(folder, tmp_path):
    rows = []
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        run(
            "train",
            "names",
            "--data",
            folder,
            "--module",
            "torch",
            "--epochs",
            1,
            "--seed",
            seed,
            "--out",
            tmp_path / out,
        )
        rows.append(only_row(tmp_path / out)["modules"]["nn.GRU"]["train_loss"])
    assert rows[0] == rows[1] != rows[2]


def test_rows_are_appended(folder, tmp_path):
    for _ in range(2):
        run("train", "names", "--data", folder, "--module", "torch", "--epochs", 1, "--limit", 20, "--out", tmp_path)
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 2


def test_real_names(tmp_path):
    if not REAL_DATA:
        pytest.skip("SEQKERNELS_DATA does not name the folder with the real names")
    folder = Path(REAL_DATA)
    for path in data.names_files(folder):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == data.NAMES_SHA256[path.name]
    out = tmp_path / "out"
    assert (
        run("train", "names", "--data", folder, "--limit", 1000, "--epochs", 2, "--module", "torch", "--out", out) == 0
    )
    assert "of 18 countries" in only_row(out)["description"]
    assert only_row(out)["modules"]["nn.GRU"]["train_loss"] < 2.2  # by chance: log(18) = 2.9


def test_modules_alternate_from_the_same_weights(folder, monkeypatch):
    task = TASKS["names"](options("names", "--data", folder, "--epochs", 3))
    runs = train.start_runs(task, {"first": nn.GRU, "second": nn.GRU})
    order = []
    train_epoch = train.train_epoch
    monkeypatch.setattr(
        train, "train_epoch", lambda task, run, *rest: (order.append(run.label), train_epoch(task, run, *rest))
    )
    assert train.train(task, runs)
    assert order == ["first", "second"] * 3
    assert train.largest_gap(runs) == 0
    assert runs[0].model is not runs[1].model


def test_gap_is_relative_and_of_the_common_steps():
    first, second = (
        Run("", nn.Identity(), None, losses=[torch.tensor(loss) for loss in losses])
        for losses in ((2.0, 4.0, 8.0), (2.0, 3.0))
    )
    assert train.largest_gap([first, second]) == 0.25
    assert train.largest_gap([first, second], steps=1) == 0
    assert train.largest_gap([first, second], window=200) == pytest.approx(1 / 6)


@pytest.mark.parametrize("steps_before", [0, 3, 20])
def test_ctrl_c_shows_what_was_done(steps_before, folder, tmp_path, capsys, monkeypatch):
    done = 0

    def loss(task, model, names, countries, state):
        nonlocal done
        done += 1
        if done == 3 + steps_before:  # two warm-ups
            raise KeyboardInterrupt
        return original(task, model, names, countries, state)

    original = TASKS["names"].loss
    monkeypatch.setattr(TASKS["names"], "loss", loss)
    monkeypatch.setattr(command, "rnn_classes", lambda *_: {"first": nn.GRU, "second": nn.GRU})
    out = tmp_path / "out"
    assert run("train", "names", "--data", folder, "--batch-size", 10, "--out", out) == 130
    printed = capsys.readouterr()
    assert printed.err.startswith("Stopped by Ctrl-C") and printed.err.count("\n") == 1
    if steps_before:
        steps = [figures["steps"] for figures in only_row(out)["modules"].values()]
        assert sum(steps) == steps_before
        assert is_png(out / "train-names.png")
    else:
        assert not list(out.iterdir())


def test_several_trainings_are_drawn(folder, tmp_path):
    assert run("train", "hello", "--epochs", 2, "--module", "torch", "--out", tmp_path) == 0
    assert (tmp_path / "train-hello.png").stat().st_size > 10_000
    assert rows(tmp_path)[0]["variant"] == "cell"


def test_a_run_that_was_cut_short_is_drawn_beside_a_whole_one(tmp_path):
    runs = [Run("a", nn.Identity(), None, losses=list(torch.rand(steps))) for steps in (400, 3)]
    _, axes = training_report.open_pyplot().subplots()
    training_report.plot_losses(axes, runs)
    assert [len(line.get_xdata()) for line in axes.lines] == [393, 1]


def test_titles_count_whole_epochs(folder):
    task = names_task("--data", folder)
    runs = [Run("a", nn.Identity(), None, epoch_seconds=[1.0]), Run("b", nn.Identity(), None)]
    assert training_report.title([training_report.Training(task, runs)]) == "names: 0 of 10 epochs"


def test_table_shows_no_number_where_there_is_none():
    assert training_report.number(float("nan"), ".2f") == "-"
    assert training_report.number(1234.5, ",.0f") == "1,234"
