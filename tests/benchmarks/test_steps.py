"""`python -m benchmarks steps`: the order of layers, the slope, and rows that `fit` and `report` read."""

import time

import pytest
import torch
from gpus import GPUS, MIG
from kernel_benchmarks import read

from benchmarks import __main__ as command
from benchmarks import fit, steps
from seqkernels import hardware
from seqkernels.hardware import Machine

H200, CUDA = GPUS["NVIDIA H200"], torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    monkeypatch.setattr(steps, "_said", set())


def machine_with(monkeypatch, gpu, **facts):
    machine = Machine(cuda_missing="", triton=True, cudnn=91900, gpu=gpu)._replace(**facts)
    monkeypatch.setattr(hardware, "machine_of", lambda device: machine)
    monkeypatch.setattr(hardware, "gpu_of", lambda device: gpu)


def offered(layer, backward=False) -> list:
    return [(one.name, one.path.get("path"), one.path.get("units")) for one in found(layer, backward)]


def found(layer, backward):
    return list(steps.contenders(layer, CUDA, backward))


@pytest.fixture
def no_modules(monkeypatch):
    """Contenders are named, and nothing is put on a GPU that is not here."""
    monkeypatch.setattr(steps, "module_of", lambda layer, device: torch.nn.GRU(8, 8))


def test_a_short_run_measures_the_cpu_and_torch_nn(tmp_path, capsys, monkeypatch):
    layer = steps.Layer("gru", "float32", 16, 2, 2)
    monkeypatch.setattr(steps, "layers", lambda: iter([layer]))
    times = iter(range(1, 9))  # of a machine that nothing disturbs
    monkeypatch.setattr(steps, "microseconds", lambda run, device: run() and next(times))
    assert command.main(["steps", "--device", "cpu", "--out", str(tmp_path), "--steps", "4", "2"]) == 0
    rows = read(tmp_path / "steps.jsonl")
    assert [(row["contender"], row["pass"]) for row in rows] == [
        (name, way) for way in ("forward", "backward") for name in ("cpu", "torch.nn")
    ]
    for row in rows:
        assert row["T"] == [2, 4] and row["H"] == 16 and row["torch"] == torch.__version__ and row["gpu_facts"] is None
    assert "Rows: 4" in capsys.readouterr().out
    (tmp_path / "kernels.jsonl").touch()
    assert command.main(["report", "--rows", str(tmp_path), "--markdown"]) == 0
    assert "Steps, float32" in capsys.readouterr().out


def test_a_step_is_the_slope(monkeypatch):
    monkeypatch.setattr(steps, "microseconds", lambda run, device: run())
    one = steps.Contender("cuda", {"path": "cluster"}, lambda T: lambda: 100 + 1.5 * T)
    monkeypatch.setattr(steps, "contenders", lambda layer, device, backward: iter([one]))
    rows = list(steps.measure(next(steps.layers()), CUDA, (1024, 3072)))
    assert [(row["pass"], row["us"], row["fixed_us"]) for row in rows] == [
        ("forward", 1.5, 100),
        ("backward", 1.5, 100),
    ]


def test_noise_is_no_row(monkeypatch, capsys):
    monkeypatch.setattr(steps, "microseconds", lambda run, device: 5.0)
    one = steps.Contender("cuda", {}, lambda T: lambda: None)
    monkeypatch.setattr(steps, "contenders", lambda layer, device, backward: iter([one]))
    assert list(steps.measure(next(steps.layers()), CUDA, (1024, 3072))) == []
    assert "3072 steps took no longer than 1024" in capsys.readouterr().out


def test_the_clock_counts_microseconds():
    assert 1000 < steps.microseconds(lambda: time.sleep(0.002), torch.device("cpu")) < 1e6


def test_what_says_most_comes_first():
    ordered = list(steps.layers())
    assert len(set(ordered)) == len(ordered) == 3 * 4 * 7 * 3 * 2
    assert ordered[0] == ("gru", "float32", 128, 16, 1)
    for i, values in enumerate(steps.AXES.values()):  # soon every axis has varied
        assert len({layer[i] for layer in ordered[:6]}) > 1, values


def test_the_budget_ends_it(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 1.0, 6.0])
    monkeypatch.setattr(steps.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(steps, "measure", lambda *given: iter(()))
    assert command.main(["steps", "--device", "cpu", "--budget", "5", "--out", str(tmp_path)]) == 0
    assert "The budget of 5 s is spent." in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["0", "-3", "soon"])
def test_a_budget_is_positive(budget, capsys):
    with pytest.raises(SystemExit):
        command.main(["steps", "--budget", budget])
    assert "is not a positive number" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_sentence(capsys, tmp_path):
    assert command.main(["steps", "--out", str(tmp_path)]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_every_path_is_offered_and_can_be_fitted(monkeypatch, no_modules):
    machine_with(monkeypatch, H200)
    layer = steps.Layer("gru", "bfloat16", 128, 16, 1)
    assert [path for name, path, _ in offered(layer) if name == "cuda"] == [
        "stepwise", "single CTA", "cluster", "cluster", "cluster", "persistent grid", "persistent grid"
    ]  # fmt: skip
    assert [name for name, *_ in offered(layer)][-2:] == ["triton", "cudnn"]
    facts = H200._asdict()
    for backward in (False, True):
        for one in found(layer, backward):
            way = "backward" if backward else "forward"
            row = {**layer._asdict(), **one.path, "contender": one.name, "pass": way, "us": 1.0, "gpu": H200.name}
            sample = fit.sample_of({**row, "gpu_facts": facts})
            assert (sample is None) == (one.name == "triton")


@pytest.mark.parametrize(
    ("gpu", "facts", "sentence"),
    [
        (
            GPUS["NVIDIA A100-SXM4-80GB"],
            {},
            "cuda, cluster, left out of such layers: clusters need compute capability",
        ),
        (MIG, {}, "the GPU runs no cluster of 8 blocks"),
        (H200._replace(driver=(12, 2)), {}, "cuda left out: the CUDA kernels here need a driver for CUDA 13.0"),
        (H200, {"cudnn": 0}, "cudnn left out: this torch has no cuDNN"),
    ],
    ids=["no clusters", "MIG", "driver", "no cuDNN"],
)
def test_what_cannot_run_says_why_once(gpu, facts, sentence, monkeypatch, capsys, no_modules):
    machine_with(monkeypatch, gpu, **facts)
    for _ in range(2):
        offered(steps.Layer("gru", "bfloat16", 256, 16, 1))
    assert capsys.readouterr().out.count(sentence) == 1


def test_cudnn_switched_off_is_left_out(monkeypatch, capsys, no_modules):
    machine_with(monkeypatch, H200)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert "cudnn" not in [name for name, *_ in offered(steps.Layer("gru", "float32", 128, 16, 1))]
    assert "cudnn left out: torch.backends.cudnn.enabled is False" in capsys.readouterr().out


def test_a_slice_of_a_gpu_is_called_one(monkeypatch, capsys):
    machine_with(monkeypatch, MIG)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert steps.provenance(CUDA)["gpu_facts"]["multiprocessors"] == 16
    assert "the rows are of the slice" in capsys.readouterr().out
