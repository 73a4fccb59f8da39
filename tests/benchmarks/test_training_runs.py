"""The training runs of `python -m benchmarks`, on small data: what they print, write, refuse and survive."""

import gzip
import hashlib
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn
from training import LETTERS, REAL_DATA, ROOT, is_png, only_row, options, refused, rows, run, write_csv

from benchmarks import __main__ as command
from benchmarks import data, train, training_report
from benchmarks.tasks import TASKS
from benchmarks.tasks.charlm import chunks, streams


def small(name: str, folder: Path) -> tuple:
    """Options that make a task quick."""
    return {
        "hello": (),
        "names": ("--data", folder),
        "news": ("--data", folder, "--batch-size", 8, "--hidden", 16, "--embedding", 8),
        "charlm": ("--limit", 6000, "--chunk", 25, "--batch-size", 8, "--sample", 20),
    }[name]


# Runs


def test_names_learns_and_reports(folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--module", "torch", "--epochs", 12, "--batch-size", 10, "--threads", 1, "--out", out)
    assert run("train", "names", "--data", folder, *arguments) == 0
    printed = capsys.readouterr()
    assert "150 train and 30 test names of 3 countries" in printed.out
    assert "12 of 12 epochs" in printed.out
    assert "test accuracy" in printed.out
    assert printed.err == ""  # no terminal, no progress bar
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


# The shared loop


def test_modules_take_turns_from_the_same_weights(folder, monkeypatch):
    task = TASKS["names"](options("names", "--data", folder, "--epochs", 3))
    runs = train.start_runs(task, {"first": nn.GRU, "second": nn.GRU})
    turns = []
    train_epoch = train.train_epoch
    monkeypatch.setattr(
        train, "train_epoch", lambda task, run, *rest: (turns.append(run.label), train_epoch(task, run, *rest))
    )
    assert train.train(task, runs)
    assert turns == ["first", "second"] * 3
    assert train.largest_gap(runs) == 0
    assert runs[0].model is not runs[1].model


def test_gap_is_relative_and_of_the_common_steps():
    first, second = (
        train.Run("", nn.Identity(), None, losses=[torch.tensor(loss) for loss in losses])
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


# Data


def test_batches_keep_names_and_countries_together(folder):
    task = TASKS["names"](options("names", "--data", folder, "--batch-size", 7))
    seen = 0
    for (codes, lengths), countries, _ in task.batches(0):
        for row, length, country in zip(codes, lengths, countries, strict=True):
            name = bytes(row[:length].tolist()).decode()
            assert set(name.lower()) <= set(LETTERS[task.countries[country]])
            seen += 1
    assert seen == 150


def test_order_depends_on_seed_and_epoch_alone(folder):
    task = TASKS["names"](options("names", "--data", folder))
    first, again, next_epoch = (next(iter(task.batches(epoch))).input[0] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_epoch)


def test_limit_takes_rows_of_every_country(folder):
    task = TASKS["names"](options("names", "--data", folder, "--limit", 10))
    assert len(task.train.lengths) <= 10 and set(task.train.countries.tolist()) == {0, 1, 2}


def test_chunks_cover_every_stream():
    text = streams(torch.arange(103), 4)
    assert text.shape == (25, 4)
    assert torch.equal(text.t().flatten(), torch.arange(100))
    parts = list(chunks(text, 10))
    assert [len(codes) for codes, _ in parts] == [10, 10, 4]
    assert all(torch.equal(codes + 1, following) for codes, following in parts)
    assert torch.equal(torch.cat([codes for codes, _ in parts]), text[:-1])


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    """The public originals' stand-in on this machine, with an empty cache."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder / "names"))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setattr(data, "NAMES_URL", f"http://127.0.0.1:{server.server_port}/")
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    yield folder / "names"
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_is_cached(server, tmp_path, monkeypatch, capsys):
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in server.iterdir()}
    monkeypatch.setattr(data, "NAMES_SHA256", {file: sums[file] for file in data.NAMES_SHA256})
    arguments = ("train", "names", "--module", "torch", "--epochs", 1, "--limit", 20, "--out", tmp_path / "out")
    assert run(*arguments) == 0
    assert capsys.readouterr().err.count("Downloading") == 2
    monkeypatch.setattr(data, "NAMES_URL", "http://127.0.0.1:9/")
    assert run(*arguments) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("fault", ["checksum", "missing file", "no server"])
def test_failed_download_names_the_way_out(fault, server, capsys, monkeypatch, tmp_path):
    if fault == "missing file":
        (server / "names_train.csv.gz").unlink()
    if fault == "no server":
        monkeypatch.setattr(data, "NAMES_URL", "http://127.0.0.1:9/")
    assert run("train", "names", "--module", "torch", "--out", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("Downloading")
    assert "--data DIR" in lines[1] and "SEQKERNELS_DATA=DIR" in lines[1]
    assert not list((tmp_path / "cache").rglob("*.gz"))


# Bad input: one sentence, exit code 2, nothing written


def spoil(folder: Path, fault: str) -> None:
    train_file, test_file = folder / "names" / "names_train.csv.gz", folder / "names" / "names_test.csv.gz"
    match fault:
        case "no folder":
            shutil.rmtree(folder)
        case "no test file":
            test_file.unlink()
        case "no rows":
            write_csv(train_file, [])
        case "three columns":
            write_csv(train_file, [("Ada", "Aland"), ("Kim", "Bland", "?")])
        case "one column":
            write_csv(test_file, [("Ada",)])
        case "empty name":
            write_csv(train_file, [("", "Aland")])
        case "unknown letter":
            write_csv(train_file, [("Åda", "Aland")])
        case "unknown country":
            write_csv(test_file, [("Ada", "Atlantis")])
        case "not gzip":
            train_file.write_text('"Ada","Aland"\n')
        case "cut gzip":
            train_file.write_bytes(train_file.read_bytes()[:-20])
        case "spoilt gzip":
            content = bytearray(train_file.read_bytes())
            content[30:60] = bytes(30)
            train_file.write_bytes(content)
        case "not UTF-8":
            with gzip.open(train_file, "wb") as file:
                file.write(b'"\xff\xfe","Aland"\n')


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no folder", "is not a folder"),
        ("no test file", "holds no names/names_test.csv.gz"),
        ("no rows", "has no rows"),
        ("three columns", "line 2: expected"),
        ("one column", "line 1: expected"),
        ("empty name", "line 1: expected"),
        ("unknown letter", "letters outside ASCII"),
        ("unknown country", "Atlantis"),
        ("not gzip", "cannot be read"),
        ("cut gzip", "cannot be read"),
        ("spoilt gzip", "cannot be read"),
        ("not UTF-8", "cannot be read"),
    ],
)
def test_bad_names(fault, says, folder, tmp_path, capsys):
    spoil(folder, fault)
    refused(capsys, tmp_path, says, "train", "names", "--data", folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"", "gives 0 characters"),
        (b"short", "gives 5 characters"),
        (b"\xff" * 9999, "UTF-8"),
    ],
)
def test_bad_text(content, says, tmp_path, capsys):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    refused(capsys, tmp_path, says, "train", "charlm", "--text", text)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--epochs", 0),
        ("--batch-size", -1),
        ("--seed", "x"),
        ("--threads", 10**6),
        ("--lr", "nan"),
        ("--module", "keras"),
        ("--lim", 3),
    ],
)
def test_bad_options(arguments, capsys, tmp_path):
    assert run("train", "names", *arguments, "--out", tmp_path / "out") == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file(folder, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    assert run("train", "names", "--data", folder, "--module", "torch", "--out", file) == 2
    assert "cannot be made a folder" in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.parametrize("package", ["tqdm", "rich", "matplotlib"])
def test_missing_package(package, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    refused(capsys, tmp_path, "pip install seqkernels[benchmarks]", "train", "names", "--data", folder)


def test_missing_seqkernels(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "seqkernels", None)
    assert run("train", "names", "--data", folder, "--out", tmp_path / "out") == 2
    assert "--module torch" in capsys.readouterr().err


def test_command_line_has_no_traceback(tmp_path):
    arguments = ("-m", "benchmarks", "train", "names", "--module", "torch", "--data", tmp_path / "nowhere")
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "is not a folder" in result.stderr


# Demo


def demo(*arguments: object) -> int:
    return run("demo", "--module", "torch", "--epochs", 1, *arguments)


def test_demo_takes_names_where_they_are(folder, tmp_path, capsys, monkeypatch):
    assert demo("--data", folder, "--out", tmp_path / "a") == 0
    assert "Demo: train names, since" in capsys.readouterr().out
    monkeypatch.setenv(data.VARIABLE, str(folder))
    assert demo("--out", tmp_path / "b") == 0
    assert only_row(tmp_path / "b")["task"] == "names"


@pytest.mark.parametrize("variable", [None, "", "nowhere"])
def test_demo_without_names(variable, tmp_path, capsys, monkeypatch):
    if variable is not None:
        monkeypatch.setenv(data.VARIABLE, variable and str(tmp_path / variable))
    assert demo("--limit", 3000, "--out", tmp_path / "out") == 0
    assert "Demo: train charlm, on text that comes with Python" in capsys.readouterr().out
    assert only_row(tmp_path / "out")["task"] == "charlm"


def test_demo_refuses_a_wrong_folder(tmp_path, capsys):
    refused(capsys, tmp_path, "is not a folder", "demo", "--data", tmp_path / "nowhere")


def test_table_shows_no_number_where_there_is_none():
    assert training_report.number(float("nan"), ".2f") == "-"
    assert training_report.number(1234.5, ",.0f") == "1,234"
