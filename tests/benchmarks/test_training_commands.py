"""The commands `train` and `demo`: bad input is one sentence and exit code 2, and nothing is written."""

import io
import subprocess
import sys

import pytest
from training import ROOT, only_row, refused, run

from benchmarks import __main__ as command
from benchmarks import data


def test_a_file_has_each_line_when_it_is_printed(monkeypatch):
    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file))
    command.take_any_text()
    print("a line")
    assert file.getvalue() == b"a line\n"


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
    refused(capsys, tmp_path, "-e '.[benchmarks]'` installs what", "train", "names", "--data", folder)


def test_missing_seqkernels(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "seqkernels", None)
    assert run("train", "names", "--data", folder, "--out", tmp_path / "out") == 2
    assert "--module torch" in capsys.readouterr().err


def test_command_line_has_no_traceback(tmp_path):
    arguments = ("-m", "benchmarks", "train", "names", "--module", "torch", "--data", tmp_path / "nowhere")
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "is not a folder" in result.stderr


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
