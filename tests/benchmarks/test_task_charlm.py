"""The task charlm: teacher forcing and free running, lines and chunks, and text that is generated."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from training import LINES, QUICK, TEXT, only_row, options, rows, run

from benchmarks.tasks import TASKS, charlm


@pytest.mark.parametrize("more", [("--cell", "LSTM", "--dropout", 0.2), ("--lines",), ("--cell", "RNN", "--layers", 1)])
@pytest.mark.parametrize("forcing", [1, *(pytest.param(p, marks=pytest.mark.slow) for p in (0, 0.5))])
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


def test_cells_are_regularized_one_training_after_the_other(text, tmp_path):
    choices = "none", "zoneout=0.3", "layer_norm=gates,weight_dropout=0.5"
    arguments = "--text", text, *QUICK, "--sample", 0, "--regularize", *choices
    assert run("train", "charlm", *arguments, "--module", "seqkernels", "--out", tmp_path) == 0
    found = rows(tmp_path)
    assert [row["variant"] for row in found] == [row["options"]["regularize"] for row in found] == list(choices)
    assert len({figures["train_loss"] for row in found for figures in row["modules"].values()}) == len(choices)


OURS = "--module", "seqkernels", "--regularize"


@pytest.mark.parametrize(
    "more, message",
    [
        (("--regularize", "zoneout=0.1"), "give --module seqkernels"),
        ((*OURS, "zone=0.1"), "'zone=0.1': no regularizer is named zone. It takes NAME=VALUE, of zoneout, "),
        ((*OURS, ""), "'': an option has no name. It takes NAME=VALUE"),
        ((*OURS, "zoneout=0.1,zoneout=0.2"), "zoneout is given twice"),
        ((*OURS, "zoneout=1"), r"'zoneout=1': zoneout is a probability in \[0, 1\)"),
        ((*OURS, "blocks=2"), "'blocks=2': no regularizer is named blocks"),
        ((*OURS, "candidate_dropout=.1", "--cell", "RNN"), "candidate_dropout is for gated cells"),
    ],
)
def test_what_no_cell_has_is_refused(more, message, text, tmp_path, capsys):
    assert run("train", "charlm", "--text", text, *more, "--out", tmp_path) == 2
    assert re.search(message, capsys.readouterr().err)


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
