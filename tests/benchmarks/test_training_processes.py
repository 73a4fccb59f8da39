"""Training by several processes and devices."""

import subprocess
import sys

import pytest
import torch
from training import ROOT, only_row, run, write_csv

from benchmarks import InputError, distributed
from benchmarks.distributed import World


def test_shares_are_disjoint_and_weigh_as_much_as_the_batch():
    for rows_, size in ((7, 2), (1, 3), (8, 4)):
        shards = [World(rank, size).shard(torch.arange(rows_)) for rank in range(size)]
        used = torch.cat([rows for rows, weight in shards if weight])
        assert sorted(used.tolist()) == list(range(rows_))
        means = sum(weight * rows.double().mean() for rows, weight in shards) / size
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


def test_data_parallel_says_that_there_is_one_device(folder, tmp_path, capsys):
    if torch.cuda.device_count() > 1:
        pytest.skip("several GPUs here")
    arguments = ("--module", "torch", "--epochs", 1, "--data-parallel", "--out", tmp_path / "out")
    assert run("train", "names", "--data", folder, *arguments) == 0
    assert "--data-parallel: no GPU in use" in capsys.readouterr().out


def test_devices_are_named_by_local_rank(monkeypatch):
    monkeypatch.setattr(distributed.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "7")
    if torch.cuda.device_count() < 8:
        with pytest.raises(InputError, match="cuda:7"):
            distributed.device_of("cuda")
