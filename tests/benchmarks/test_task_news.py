"""The task news: where sentences end, cells, word vectors, and data that cannot be used."""

from pathlib import Path

import pytest
import torch
from torch import nn
from training import REAL, REAL_DATA, only_row, options, refused, rows, run, write_csv

from benchmarks.tasks import TASKS, news


def test_tokens_follow_basic_english():
    assert tokens_of('It\'s "AI": (really) 3.5%!<br />No;yes?') == "it ' s ai ( really ) 3 . 5% ! no yes ?"


def tokens_of(text: str) -> str:
    return " ".join(news.tokens(text))


def news_task(data_folder: Path, *arguments: object):
    chosen = options("news", "--data", data_folder, "--batch-size", 8, *arguments)
    return TASKS["news"](next(iter(TASKS["news"].variants(chosen).values())))


def test_packed_and_lengths_end_at_the_last_word(folder):
    """Both give what every sentence gives alone; padded does so only for the longest."""
    seqkernels = pytest.importorskip("seqkernels")
    for rnn_class, end in (
        (nn.RNN, "packed"),
        (nn.RNN, "lengths"),
        (seqkernels.RNN, "packed"),
        (seqkernels.RNN, "lengths"),
    ):
        task = news_task(folder, "--end", end)
        model = task.model(rnn_class)
        (words, lengths), _, _ = next(iter(task.batches(0)))
        alone = [model(row[None, :length], length[None]) for row, length in zip(words, lengths, strict=True)]
        torch.testing.assert_close(model(words, lengths), torch.cat(alone))
        task.options.end = "padded"
        padded = task.model(rnn_class)
        padded.load_state_dict(model.state_dict())
        same = (padded(words, lengths) - torch.cat(alone)).abs().amax(dim=1) < 1e-5
        assert same.tolist() == (lengths == lengths.max()).tolist()


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_news_learns_with_every_cell(cell, folder, tmp_path):
    arguments = ("--cell", cell, "--end", "packed", "--batch-size", 8, "--epochs", 6, "--lr", 3e-3)
    assert run("train", "news", "--data", folder, *arguments, "--out", tmp_path) == 0
    row = only_row(tmp_path)
    assert row["variant"] == "packed, batch 8"
    assert all(figures["metric"] > 0.9 for figures in row["modules"].values())


def test_news_compares_ends_and_batch_sizes(folder, tmp_path, capsys):
    arguments = ("--end", "padded", "packed", "--batch-size", 4, 8, "--epochs", 1, "--module", "torch")
    assert run("train", "news", "--data", folder, *arguments, "--out", tmp_path) == 0
    assert [row["variant"] for row in rows(tmp_path)] == [
        "padded, batch 4",
        "padded, batch 8",
        "packed, batch 4",
        "packed, batch 8",
    ]
    assert "packed, batch 8" in capsys.readouterr().out


def test_glove_vectors_are_used_and_frozen(folder, tmp_path):
    file = tmp_path / "glove.txt"
    file.write_text("war 1 2 3\nunheard -1 0 1\ngoal 4 5 6.5\n")
    task = news_task(folder, "--glove", file, "--embedding", 3)
    weight = task.model(nn.RNN).embedding.weight
    assert not weight.requires_grad
    assert weight[task.words["war"]].tolist() == [1, 2, 3] and weight[task.words["goal"]].tolist() == [4, 5, 6.5]
    assert weight[news.PADDING].tolist() == [0, 0, 0] and weight[task.words["vote"]].tolist() == [0, 0, 0]
    out = ("--out", tmp_path / "out")
    arguments = ("--glove", file, "--embedding", 3, "--end", "packed", "--batch-size", 8, "--epochs", 1)
    assert run("train", "news", "--data", folder, *arguments, *out) == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("war 1 2\n", "line 1: the model takes 3 numbers a word, found 2"),
        ("war 1 2 3 4\n", "line 1: the model takes 3 numbers a word, found 4"),
        ("war 1 2 3\ngoal 1 2\n", "line 2: the model takes 3 numbers a word, found 2"),
        ("war 1 2 3\ngoal 1 x 3\n", "line 2: could not convert"),
        ("", "has no word vectors"),
        (None, "cannot be read"),
    ],
)
def test_bad_glove(content, says, folder, tmp_path, capsys):
    file = tmp_path / "glove.txt"
    if content is not None:
        file.write_text(content)
    refused(capsys, tmp_path, says, "train", "news", "--data", folder, "--glove", file, "--embedding", 3)


@pytest.mark.parametrize(
    ("rows_", "says"),
    [
        ([("1", "no description")], "line 1: expected"),
        ([("1", "a", "b"), ("5", "a", "b")], "line 2: expected"),
        ([], "has no rows"),
    ],
)
def test_bad_news(rows_, says, folder, tmp_path, capsys):
    write_csv(folder / "ag_news_csv" / "train.csv", rows_)
    refused(capsys, tmp_path, says, "train", "news", "--data", folder)


def test_missing_news(folder, tmp_path, capsys):
    (folder / "ag_news_csv" / "train.csv").unlink()
    refused(capsys, tmp_path, "holds no ag_news_csv/train.csv", "train", "news", "--data", folder)
    refused(capsys, tmp_path, "is not a folder", "train", "news", "--data", tmp_path / "nowhere")


@REAL
def test_real_news_packed_beats_padded(tmp_path):
    arguments = ("--end", "padded", "packed", "--batch-size", 8, "--epochs", 3, "--module", "seqkernels")
    assert run("train", "news", "--data", REAL_DATA, *arguments, "--out", tmp_path) == 0
    padded, packed = (row["modules"]["seqkernels.RNN"]["metric"] for row in rows(tmp_path))
    assert packed > padded + 0.2
