"""Training that was killed continues to the same losses."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training import QUICK, ROOT, rows, run

from benchmarks import InputError, checkpoint


def losses(path: Path) -> list[torch.Tensor]:
    return [run["losses"] for run in checkpoint.load(path)["runs"]]


@pytest.mark.parametrize("moment", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 9))])
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
    assert "is damaged" in capsys.readouterr().err
    kept.write_bytes(content[7:])
    assert run(*arguments, "--checkpoint", kept) == 2
    assert "is no checkpoint" in capsys.readouterr().err


CONTENT = {"task": "names", "options": {}, "runs": [{"losses": torch.arange(4.0)}]}


def test_every_damage_is_noticed(tmp_path):
    """A bit that flipped, bytes that are missing or too many: one sentence, and never other numbers than were saved."""
    path = tmp_path / "kept.pt"
    checkpoint.save(path, CONTENT)
    content = path.read_bytes()
    damaged = [content[:n] for n in range(0, len(content), 41)] + [content + b"x", b"", b"PK" + content]
    for bit in range(0, 8 * len(content), 61):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"is damaged|is no checkpoint"):
            checkpoint.load(path)


def test_a_file_of_torch_save_alone_is_read_as_before(tmp_path):
    torch.save(CONTENT, tmp_path / "old.pt")
    assert torch.equal(checkpoint.load(tmp_path / "old.pt")["runs"][0]["losses"], torch.arange(4.0))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(function, tmp_path, monkeypatch):
    path = tmp_path / "kept.pt"
    checkpoint.save(path, CONTENT)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, function, full)
    with pytest.raises(InputError, match=r"kept\.pt cannot be written: No space left on device"):
        checkpoint.save(path, {**CONTENT, "task": "news"})
    assert checkpoint.load(path)["task"] == "names" and os.listdir(tmp_path) == ["kept.pt"]


def test_two_trainings_do_not_share_a_checkpoint(folder, tmp_path, capsys):
    kept = tmp_path / "kept.pt"
    arguments = ("train", "names", "--data", folder, "--module", "torch", "--epochs", 1, "--out", tmp_path / "a")
    left = tmp_path / "kept.pt.abc.unfinished"  # of a training that was killed while it saved
    left.touch()
    with checkpoint.locked(kept):
        assert not left.exists()
        assert run(*arguments, "--checkpoint", kept) == 2
        assert "is in use by another training" in capsys.readouterr().err
    assert run(*arguments, "--checkpoint", kept) == 0
    assert not list(tmp_path.glob("kept.pt.*"))
