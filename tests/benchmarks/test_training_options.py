"""The options that every training task shares."""

import pytest
import torch
from torch import nn
from training import REAL, REAL_DATA, names_task, only_row, refused, rows, run

from benchmarks import train


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
    (training,) = train.start_runs(task, {"nn.GRU": nn.GRU})
    norms = []
    step = training.optimizer.step
    training.optimizer.step = lambda: (norms.append(gradient_norm(training.model)), step())
    assert train.train(task, [training])
    assert norms and max(norms) <= 1.001e-3


def gradient_norm(model: nn.Module) -> float:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm().item()
