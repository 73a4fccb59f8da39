"""The training tasks one by one: what they learn, on the real data where it is, and what each option does."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from training import REAL_DATA, ROOT, only_row, options, refused, rows, run, write_csv

from benchmarks import InputError, checkpoint, data, distributed, profiling, train, training_report
from benchmarks.distributed import World
from benchmarks.tasks import TASKS, charlm, hello, names, news

REAL = pytest.mark.skipif(not REAL_DATA, reason="SEQKERNELS_DATA does not name the folder with the real data")


def classes(*names: str) -> dict[str, type[nn.Module]]:
    return {name: getattr(nn, name) for name in names}


# hello


def test_every_way_learns_to_spell(tmp_path, capsys):
    assert run("train", "hello", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    last = [line for line in printed.splitlines() if "epoch [15/15]" in line]
    assert len(last) == 2 * len(hello.VARIANTS) and all(" ohlol " in line for line in last)
    assert {row["variant"]: row["options"]["lr"] for row in rows(tmp_path)} == {
        "cell": 0.1,
        "rnn": 0.05,
        "rnn2": 0.05,
        "lstm2": 0.05,
        "gru2": 0.05,
    }
    assert all(row["gap"] < 1e-4 for row in rows(tmp_path))


# names


def names_task(*arguments: object, world: World = World()):  # noqa: B008
    return TASKS["names"](options("names", *arguments), world)


def test_scores_do_not_depend_on_how_a_batch_is_cut(folder):
    """What DataParallel does: cut the input along its first dimension, and join the scores."""
    task = names_task("--data", folder, "--bidirectional")
    model = task.model(nn.GRU)
    (codes, lengths), _, _ = next(iter(task.batches(0)))
    whole = model(codes, lengths)
    parts = [model(*part) for part in zip(codes.chunk(3), lengths.chunk(3), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_data_parallel_says_that_there_is_one_device(folder, tmp_path, capsys):
    if torch.cuda.device_count() > 1:
        pytest.skip("several GPUs here")
    arguments = ("--module", "torch", "--epochs", 1, "--data-parallel", "--out", tmp_path / "out")
    assert run("train", "names", "--data", folder, *arguments) == 0
    assert "--data-parallel: no GPU in use" in capsys.readouterr().out


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


# Several processes


def test_shares_are_disjoint_and_weigh_as_much_as_the_batch():
    for rows_, size in ((7, 2), (1, 3), (8, 4)):
        shares = [World(rank, size).share(torch.arange(rows_)) for rank in range(size)]
        used = torch.cat([rows for rows, weight in shares if weight])
        assert sorted(used.tolist()) == list(range(rows_))
        means = sum(weight * rows.double().mean() for rows, weight in shares) / size
        assert means == pytest.approx(torch.arange(rows_).double().mean())


def test_two_processes_train_as_one(folder, tmp_path):
    """gloo, two processes with half of every batch each; the last batch has one name for two processes."""
    write_csv(
        folder / "names" / "names_train.csv.gz", [(f"Ab{'c' * (i % 5)}", "Aland") for i in range(20)] + [("K", "B")]
    )
    write_csv(folder / "names" / "names_test.csv.gz", [("Abc", "Aland"), ("Kk", "B")])
    arguments = ["train", "names", "--data", folder, "--epochs", 2, "--batch-size", 4, "--threads", 1]
    assert run(*arguments, "--out", tmp_path / "one") == 0
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "benchmarks",
    ]
    command = [str(part) for part in [*launcher, *arguments, "--out", tmp_path / "two"]]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    one, two = only_row(tmp_path / "one"), only_row(tmp_path / "two")
    assert two["processes"] == 2 and one["processes"] == 1
    for label, figures in one["modules"].items():
        assert figures["steps"] == two["modules"][label]["steps"]
        assert two["modules"][label]["train_loss"] == pytest.approx(figures["train_loss"], rel=1e-5)


# news


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


# charlm


TEXT = "the quick brown fox jumps over the lazy dog.\n" * 120


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


LINES = ("--batch-size", 4, "--hidden", 24, "--embedding", 8)
QUICK = (*LINES, "--chunk", 20)


@pytest.mark.parametrize("more", [("--cell", "LSTM", "--dropout", 0.2), ("--lines",), ("--cell", "RNN", "--layers", 1)])
@pytest.mark.parametrize("forcing", [1, 0, 0.5])
def test_charlm_trains_every_way(more, forcing, text, tmp_path):
    arguments = (
        "--epochs",
        2,
        *(LINES if "--lines" in more else QUICK),
        *more,
        "--teacher-forcing",
        forcing,
        "--sample",
        5,
    )
    assert run("train", "charlm", "--text", text, *arguments, "--out", tmp_path) == 0
    row = only_row(tmp_path)
    assert row["gap"] < 1e-3
    assert all(figures["metric"] < 5 for figures in row["modules"].values())


def charlm_task(text: Path, *arguments: object):
    return TASKS["charlm"](options("charlm", "--text", text, *(LINES if "--lines" in arguments else QUICK), *arguments))


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_free_running_feeds_back_the_prediction(cell, lines, text):
    task = charlm_task(text, "--cell", cell, *["--lines"] * lines)
    torch.manual_seed(0)
    model = task.model(getattr(nn, cell))
    codes = next(iter(task.batches(0))).input
    scores, _ = charlm.run_freely(model, codes, None)
    # Given its own predictions as if they were the text, the model under teacher forcing says the same.
    predicted = scores.argmax(dim=1)
    if lines:
        sizes = codes.batch_sizes.tolist()
        steps = predicted.split(sizes)
        fed = torch.cat([codes.data[: sizes[0]], *(step[:size] for step, size in zip(steps, sizes[1:], strict=False))])
        forced, _ = model(nn.utils.rnn.PackedSequence(fed, codes.batch_sizes), None)
    else:
        fed = torch.cat([codes[:1], predicted.view_as(codes)[:-1]])
        forced, _ = model(fed, None)
    torch.testing.assert_close(forced, scores)


def test_lines_are_whole_and_start_anew(text):
    task = charlm_task(text, "--lines")
    seen = 0
    for codes, following, _ in task.batches(0):
        padded, lengths = nn.utils.rnn.pad_packed_sequence(codes, batch_first=True)
        for row, length in zip(padded, lengths, strict=True):
            line = "".join(task.characters[code] for code in row[:length])
            assert line == "\n" + TEXT.splitlines()[0] or line == "\n" + TEXT[: int(len(TEXT) * 0.9)].splitlines()[-1]
        seen += following.numel()
    assert seen == task.samples


def test_bits_per_character_of_a_model_that_knows_nothing(text):
    task = charlm_task(text)
    model = task.model(nn.GRU)
    nn.init.zeros_(model.linear.weight)
    nn.init.zeros_(model.linear.bias)
    assert task.evaluate(model) == pytest.approx(torch.log2(torch.tensor(len(task.characters))).item(), rel=1e-4)


def test_generation_follows_temperature_seed_and_prime(text, tmp_path, capsys):
    kept = tmp_path / "kept" / "charlm.pt"
    arguments = ("--epochs", 8, "--lr", 1e-2, "--module", "torch", *QUICK, "--checkpoint", kept, "--out", tmp_path)
    assert run("train", "charlm", "--text", text, *arguments) == 0
    capsys.readouterr()

    def generated(*arguments: object) -> str:
        assert run("generate", kept, "--module", "torch", "--length", 60, *arguments) == 0
        return capsys.readouterr().out[:-1]

    cold = generated("--prime", "the quick", "--temperature", 0)
    assert cold.startswith("the quick brown") and len(cold) == len("the quick") + 60
    assert generated("--temperature", 5, "--seed", 1) == generated("--temperature", 5, "--seed", 1)
    assert generated("--temperature", 5, "--seed", 1) != generated("--temperature", 5, "--seed", 2)
    for prime, says in (("Ж", "which the model does not know"), ("", "needs one character or more")):
        assert run("generate", kept, "--module", "torch", "--prime", prime) == 2
        assert says in capsys.readouterr().err
    for path, says in ((text, "is no checkpoint"), (tmp_path / "nowhere", "cannot be read")):
        assert run("generate", path) == 2
        assert says in capsys.readouterr().err
    pytest.importorskip("seqkernels")
    assert run("generate", kept, "--prime", "the quick", "--temperature", 0, "--length", 60) == 0
    assert capsys.readouterr().out[:-1] == cold


# Checkpoints


def losses(path: Path) -> list[torch.Tensor]:
    return [run["losses"] for run in checkpoint.load(path)["runs"]]


@pytest.mark.parametrize("moment", [1, 2, 5, 9])
def test_a_killed_training_continues_to_the_same_losses(moment, text, tmp_path, monkeypatch, capsys):
    """Killed while it writes its n-th checkpoint, dropout and coin tosses of teacher forcing included."""
    arguments = ("train", "charlm", "--text", text, *QUICK, "--epochs", 2, "--dropout", 0.3, "--teacher-forcing", 0.5)
    arguments = (*arguments, "--save-every", 7, "--sample", 0, "--out", tmp_path)
    assert run(*arguments, "--checkpoint", tmp_path / "whole.pt") == 0
    replace, calls = os.replace, 0

    def killed(*paths: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt  # as late as can be: the new file is written, but not in its place
        replace(*paths)

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    assert run(*arguments, "--checkpoint", tmp_path / "cut.pt") == 130
    monkeypatch.setattr(checkpoint.os, "replace", replace)
    capsys.readouterr()
    assert run(*arguments, "--checkpoint", tmp_path / "cut.pt") == 0
    assert ("Continuing" in capsys.readouterr().out) == (moment > 1)
    for whole, cut in zip(losses(tmp_path / "whole.pt"), losses(tmp_path / "cut.pt"), strict=True):
        assert torch.equal(whole, cut)


def test_a_training_killed_by_the_system_continues(text, tmp_path):
    kept, out = tmp_path / "kept.pt", tmp_path / "out"
    arguments = [
        "train",
        "charlm",
        "--text",
        text,
        *QUICK,
        "--epochs",
        3,
        "--save-every",
        3,
        "--checkpoint",
        kept,
        "--out",
        out,
    ]
    arguments = [str(argument) for argument in [*arguments, "--sample", 0]]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not kept.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = checkpoint.load(kept)  # whole, whatever the moment
    assert run(*arguments) == 0
    assert run(*arguments[:-6], "--checkpoint", tmp_path / "whole.pt", "--out", out, "--sample", 0) == 0
    for first, cut, whole in zip(before["runs"], losses(kept), losses(tmp_path / "whole.pt"), strict=True):
        assert torch.equal(cut, whole)
        assert torch.equal(first["losses"], cut[: len(first["losses"])])


def test_more_epochs_continue_a_finished_training(folder, tmp_path):
    kept = tmp_path / "kept.pt"
    arguments = ("train", "names", "--data", folder, "--module", "torch", "--batch-size", 50, "--checkpoint", kept)
    for epochs in (1, 3):
        assert run(*arguments, "--epochs", epochs, "--out", tmp_path) == 0
    assert [row["modules"]["nn.GRU"]["steps"] for row in rows(tmp_path)] == [3, 9]


def test_a_checkpoint_of_something_else_is_refused(folder, text, tmp_path, capsys):
    kept = tmp_path / "kept.pt"
    arguments = ("train", "names", "--data", folder, "--module", "torch", "--epochs", 1, "--out", tmp_path / "a")
    assert run(*arguments, "--checkpoint", kept) == 0
    content = kept.read_bytes()
    capsys.readouterr()
    for other, says in (
        ((*arguments, "--lr", 0.5), "--lr"),
        (
            ("train", "charlm", "--text", text, "--out", tmp_path / "b", "--module", "torch"),
            "checkpoint of the task names",
        ),
        (("train", "hello", "--out", tmp_path / "b"), "keeps one training"),
    ):
        assert run(*other, "--checkpoint", kept) == 2
        assert says in capsys.readouterr().err
    assert kept.read_bytes() == content
    kept.write_bytes(content[: len(content) // 2])
    assert run(*arguments, "--checkpoint", kept) == 2
    assert "is no checkpoint" in capsys.readouterr().err


# Options of every task


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes(dtype, folder, tmp_path):
    assert run("train", "names", "--data", folder, "--dtype", dtype, "--epochs", 1, "--out", tmp_path) == 0
    row = only_row(tmp_path)
    assert row["dtype"] == dtype
    assert row["gap"] < (1e-10 if dtype == "float64" else 0.1)


def test_amp(folder, tmp_path):
    assert run("train", "names", "--data", folder, "--amp", "--epochs", 1, "--out", tmp_path) == 0
    assert only_row(tmp_path)["gap"] < 0.1


@REAL
@pytest.mark.parametrize("option", ["--amp", "--dtype bfloat16", "--backend torch_eager"])
@pytest.mark.parametrize(
    "task",
    [
        "names --limit 300 --layers 1 --clip 1",
        "names --form text --model scratch --limit 100",
        "news --cell GRU --end lengths --batch-size 16 --limit 200",
        "charlm --text charlm/tinyshakespeare.txt --limit 4000 --hidden 32 --sample 5",
    ],
)
def test_every_task_takes_the_shared_options(task, option, tmp_path):
    arguments = f"train {task} {option} --epochs 1".replace("charlm/", f"{REAL_DATA}/charlm/").split()
    data = [] if "charlm" in task else ["--data", REAL_DATA]
    assert run(*arguments, *data, "--out", tmp_path) == 0
    row = only_row(tmp_path)
    assert all(0 < figures["train_loss"] < 10 for figures in row["modules"].values())
    assert row.get("gap_first_steps", 0) < 0.1


def test_options_that_would_do_nothing_are_refused(folder, text, tmp_path, capsys):
    for arguments, says in (
        (("names", "--data", folder, "--model", "scratch", "--layers", 2), "--model scratch"),
        (("names", "--data", folder, "--module", "torch", "--backend", "cpu"), "--backend"),
        (("charlm", "--text", text, "--lines", "--chunk", 5), "--chunk"),
        (("charlm", "--text", text, "--prime", ""), "--prime"),
    ):
        refused(capsys, tmp_path, says, "train", *arguments)
    blank = tmp_path / "blank.txt"
    blank.write_text("\n" * 500)
    refused(capsys, tmp_path, "no line", "train", "charlm", "--text", blank, "--lines")


def test_a_run_that_was_cut_short_is_drawn_beside_a_whole_one(tmp_path):
    runs = [train.Run("a", nn.Identity(), None, losses=list(torch.rand(steps))) for steps in (400, 3)]
    _, axes = training_report.open_pyplot().subplots()
    training_report.plot_losses(axes, runs)
    assert [len(line.get_xdata()) for line in axes.lines] == [393, 1]


def test_compile(folder, tmp_path):
    arguments = ("--compile", "--module", "seqkernels", "--epochs", 1, "--batch-size", 75, "--out", tmp_path)
    assert run("train", "names", "--data", folder, *arguments) == 0
    assert run("train", "names", "--data", folder, *[a for a in arguments if a != "--compile"]) == 0
    compiled, eager = (row["modules"]["seqkernels.GRU"]["train_loss"] for row in rows(tmp_path))
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_backend_is_forced(folder, tmp_path, capsys):
    arguments = ("train", "names", "--data", folder, "--epochs", 1, "--out", tmp_path / "out")
    assert run(*arguments, "--backend", "torch_eager") == 0
    assert "torch_eager" in only_row(tmp_path / "out")["modules"]["seqkernels.GRU"]["plan"]
    capsys.readouterr()
    assert run(*arguments, "--backend", "abacus") == 2
    assert "abacus" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "meta"])
def test_bad_device(device, folder, tmp_path, capsys):
    refused(
        capsys, tmp_path, f"--device {device} cannot be used", "train", "names", "--data", folder, "--device", device
    )


@pytest.mark.parametrize("arguments", [("--teacher-forcing", 1.5), ("--temperature", -1), ("--dropout", "x")])
def test_bad_charlm_options(arguments, text, tmp_path):
    assert run("train", "charlm", "--text", text, *arguments, "--out", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()


def test_clip_bounds_the_gradient(folder, tmp_path):
    task = names_task("--data", folder, "--clip", 1e-3, "--epochs", 1)
    (training,) = train.start_runs(task, classes("GRU"))
    norms = []
    step = training.optimizer.step
    training.optimizer.step = lambda: (norms.append(gradient_norm(training.model)), step())
    assert train.train(task, [training])
    assert norms and max(norms) <= 1.001e-3


def gradient_norm(model: nn.Module) -> float:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()


# Measuring


class Slow(nn.Module):
    """A layer of known cost, forward and backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sleep.apply(x)


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(0.02)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.04)
        return grad


def test_the_layers_share_counts_both_ways():
    layer = Slow()
    x = torch.ones(3, requires_grad=True)

    def step() -> None:
        y = layer(x * 2)
        time.sleep(0.06)
        y.sum().backward()

    share = profiling.layer_share([step] * 3, layer, torch.device("cpu"))
    assert 0.4 < share < 0.6  # of a sleep, not of a speed


def test_the_layers_share_of_a_cell_that_is_stepped():
    """What one call gives the next takes: the end of one backward is the beginning of another."""
    layer = Slow()
    x = torch.ones(3, requires_grad=True)

    def step() -> None:
        h = x * 2
        for _ in range(3):
            h = layer(h)
        time.sleep(0.18)
        h.sum().backward()

    assert 0.4 < profiling.layer_share([step] * 2, layer, torch.device("cpu")) < 0.6


def test_peak_memory_sees_what_is_freed_again():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc here")
    peak = profiling.peak_memory(lambda: torch.ones(8 << 20).sum(), torch.device("cpu"))
    assert 30e6 < peak < 60e6


def test_several_trainings_are_drawn(folder, tmp_path):
    assert run("train", "hello", "--epochs", 2, "--module", "torch", "--out", tmp_path) == 0
    assert (tmp_path / "train-hello.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["variant"] == "cell"


def test_devices_are_named_by_local_rank(monkeypatch):
    monkeypatch.setattr(distributed.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "7")
    if torch.cuda.device_count() < 8:
        with pytest.raises(InputError, match="cuda:7"):
            distributed.device_of("cuda")


def test_titles_count_whole_epochs(folder):
    task = names_task("--data", folder)
    runs = [train.Run("a", nn.Identity(), None, epoch_seconds=[1.0]), train.Run("b", nn.Identity(), None)]
    assert training_report.title([training_report.Training(task, runs)]) == "names: 0 of 10 epochs"
    assert isinstance(task.options, argparse.Namespace)
