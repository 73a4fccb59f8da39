"""The task names: its models, its data with accents, and what it answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training import REAL, REAL_DATA, ROOT, is_png, names_task, only_row, refused, run

from benchmarks import InputError, data, training_report
from benchmarks.tasks import names


def test_scores_do_not_depend_on_how_a_batch_is_cut(folder):
    """What DataParallel does: cut the input along its first dimension, and join the scores."""
    task = names_task("--data", folder, "--bidirectional")
    model = task.model(nn.GRU)
    (codes, lengths), _, _ = next(iter(task.batches(0)))
    whole = model(codes, lengths)
    parts = [model(*part) for part in zip(codes.chunk(3), lengths.chunk(3), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_model_from_scratch_is_the_same_by_hand_and_by_kernel(folder, tmp_path):
    arguments = ("--model", "scratch", "--epochs", 2, "--limit", 60, "--out", tmp_path)
    assert run("train", "names", "--data", folder, *arguments) == 0
    row = only_row(tmp_path)
    assert row["gap"] < 1e-5
    assert [figures["steps"] for figures in row["modules"].values()] == [120, 120]


def test_the_model_from_scratch_has_the_lectures_sizes():
    model = names.NameClassifierFromScratch(names.ElmanByHand, 18, 128)
    assert model.rnn.combined.weight.shape == (128, 57 + 128)
    assert model(torch.tensor([0, 5])).shape == (1, 18)


def test_answers_names_from_a_file_and_from_the_keyboard(folder, tmp_path, capsys, monkeypatch):
    file = tmp_path / "asked.txt"
    file.write_text("Abcé\n\nKl\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", iter(["Klmno\n", "李\n", "\n", "never\n"]))
    arguments = ("--module", "torch", "--epochs", 20, "--batch-size", 10, "--names", file, "--interactive")
    assert run("train", "names", "--data", folder, *arguments, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "Abcé: Aland " in printed and "Klmno: Bland " in printed
    assert "'李' has letters that have no form in ASCII." in printed
    assert "never" not in printed
    assert (tmp_path / "out" / "train-names-confusion.png").stat().st_size > 1000


def test_no_name_and_no_terminal_ends_the_program_after_its_training(folder, tmp_path):
    """Bytes that are no text, a terminal that shows ASCII alone, no keyboard at all."""
    arguments = ("train", "names", "--data", folder, "--module", "torch", "--epochs", 1, "--interactive")
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments), "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    typed = b"Ab\xff\nKl\xc3\xa9\nKlm\n"
    done = subprocess.run(command, cwd=ROOT, env=environment, input=typed, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"'Ab\\udcff' has letters that have no form in ASCII." in done.stdout and b"\nKlm: " in done.stdout


def test_a_closed_keyboard_asks_for_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    arguments = ("--module", "torch", "--epochs", 1, "--interactive", "--out", tmp_path)
    assert run("train", "names", "--data", folder, *arguments) == 0


def test_dollars_in_a_label_are_no_formula(tmp_path):
    training_report.plot_confusion(torch.eye(2), ["$_$", "A$^$"], "$\\no$", tmp_path / "plot.png")
    assert is_png(tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), ("\n \n", "has no lines"), ("Abc\n李\n", "no form in ASCII")]
)
def test_bad_names_file(content, says, folder, tmp_path, capsys):
    file = tmp_path / "asked.txt"
    if content is not None:
        file.write_text(content)
    refused(capsys, tmp_path, says, "train", "names", "--data", folder, "--names", file)


def test_accents_become_ascii():
    for name, plain in {"Słowik": "Slowik", "Núñez": "Nunez", "Weiß": "Weiss", "O’Neill": "O'Neill"}.items():  # noqa: RUF001
        assert data.ascii_name(name) == plain
    with pytest.raises(InputError, match="no form in ASCII"):
        data.ascii_name("Жуков")


def test_language_files(tmp_path, capsys):
    for language, lines in {"Aish": "Ábe\nAba\nAbb\nAbc\n", "Bish": "Kl\nKm\nKn\n"}.items():
        (tmp_path / "names" / "by_language").mkdir(parents=True, exist_ok=True)
        (tmp_path / "names" / "by_language" / f"{language}.txt").write_text(lines, encoding="utf-8")
    train_rows, test_rows = data.read_language_files(tmp_path)
    assert train_rows == [("Abe", "Aish"), ("Aba", "Aish"), ("Abc", "Aish"), ("Kl", "Bish"), ("Km", "Bish")]
    assert test_rows == [("Abb", "Aish"), ("Kn", "Bish")]
    (tmp_path / "empty").mkdir()
    refused(capsys, tmp_path, "by_language", "train", "names", "--form", "text", "--data", tmp_path / "empty")
    refused(capsys, tmp_path, "--form text needs --data", "train", "names", "--form", "text")


@REAL
def test_real_language_files():
    train_rows, test_rows = data.read_language_files(Path(REAL_DATA))
    assert len({language for _, language in train_rows}) == 18
    assert all(name.isascii() for name, _ in train_rows + test_rows)
    assert len(test_rows) * 2 - len(train_rows) < 40


@REAL
@pytest.mark.parametrize("form", ["csv", "text"])
def test_real_names_learn(form, tmp_path):
    arguments = ("--form", form, "--limit", 1500, "--epochs", 3, "--bidirectional", "--layers", 1)
    assert run("train", "names", "--data", REAL_DATA, *arguments, "--out", tmp_path) == 0
    row = only_row(tmp_path)
    assert row["gap_first_steps"] < 1e-4
    assert all(figures["metric"] > 0.5 for figures in row["modules"].values())
