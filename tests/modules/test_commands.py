"""`python -m seqkernels` doctor and bench: what they find, what they print, and what they refuse."""

import io

import pytest
import torch

import seqkernels as sk
from seqkernels import __main__ as command
from seqkernels import select
from seqkernels.commands import bench, doctor
from seqkernels.hardware import THIS_MACHINE

SMALL = bench.Shape("small", 3, 2, 4, 5)
ON_GPU = torch.get_default_device().type != "cpu"
pytestmark = pytest.mark.skipif(ON_GPU, reason="the commands choose devices themselves")


def test_a_whole_install_passes(monkeypatch, capsys):
    """Triton's interpreter has tests of its own, and takes long."""
    monkeypatch.setattr(select, "BACKENDS", tuple(name for name in select.BACKENDS if name != "triton"))
    missing = bool(THIS_MACHINE.native_missing) and doctor.compiled_part().state == "missing"
    assert command.main(["doctor"]) == missing
    said = capsys.readouterr().out
    assert "seqkernels" in said and "torch_eager" in said and ("right." in said or "Remedy" in said)


def test_a_wrong_backend_is_a_fault(monkeypatch, capsys):
    monkeypatch.setattr(select, "BACKENDS", ("torch_eager",))
    results = doctor.results

    def a_little_off(module, x):
        return [y * 1.00001 if isinstance(module, sk.RNN) else y for y in results(module, x)]

    monkeypatch.setattr(doctor, "results", a_little_off)
    assert command.main(["doctor"]) == 1
    assert "wrong    torch_eager" in capsys.readouterr().out


def test_a_backend_that_fails_is_a_fault_and_the_others_are_tried(monkeypatch, capsys):
    def fails(name: str, *_) -> float:
        if name == "torch_eager":
            raise RuntimeError("no such kernel")
        return 0.0

    monkeypatch.setattr(select, "BACKENDS", ("torch_eager", "cuda"))
    monkeypatch.setattr(doctor, "compare", fails)
    assert command.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in said and "cuda" in said.partition("no such kernel")[2]


@pytest.mark.parametrize(
    ("cxx", "said"), [("'c++", "CXX='c++ is no command line"), (" ", "c++"), ("/none", "/none: No")]
)
def test_a_cxx_that_is_no_compiler_is_said(cxx, said, monkeypatch):
    monkeypatch.setenv("CXX", cxx)
    assert doctor.compiler().said.startswith(said)


@pytest.mark.parametrize(
    ("name", "state", "said"),
    [
        ("torch_eager", "ok", "SEQKERNELS_BACKEND=torch_eager runs every call, on cpu"),
        ("cdua", "wrong", "SEQKERNELS_BACKEND=cdua: there is no such backend; choose one of"),
    ],
)
def test_a_forced_backend_is_said_and_a_fault_where_it_cannot_run(name, state, said, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "THIS_MACHINE", THIS_MACHINE._replace(forced_backend=name))
    monkeypatch.setattr(select, "BACKENDS", ())
    monkeypatch.setattr(doctor, "compiled_part", doctor.compiler)
    assert command.main(["doctor"]) == (state == "wrong")
    printed = capsys.readouterr().out
    assert f"{state:<7}  forced       {said}" in printed
    assert ("unset SEQKERNELS_BACKEND" in printed) == (state == "wrong")


def test_what_is_missing_has_a_command(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "THIS_MACHINE", THIS_MACHINE._replace(native_missing="it was not built"))
    monkeypatch.setattr(select, "BACKENDS", ())
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(doctor.sysconfig, "get_config_var", lambda name: 0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert command.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "it was not built" in said and "install a C++17 compiler" in said and "pip install" in said
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    assert command.main(["doctor"]) == 0


def test_bench_prints_a_line_for_each_case(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPES", (SMALL,))
    threads = torch.get_num_threads()
    assert command.main(["bench", "--seconds", "0.01", "--threads", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if "small" in line]
    assert len(lines) == 4 and all(line.endswith(" x") for line in lines) and "1 thread of" in said.out
    assert torch.get_num_threads() == threads
    assert "4 of 4: cpu LSTM small training" in said.err


def test_bench_draws_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    for number, what in enumerate(("cpu GRU", "cpu LSTM", "")):
        bench.show_progress(number, 2, what, file)
    bars = [line.rstrip(" ") for line in file.getvalue().split("\r")]
    assert bars == ["", "[  ] 0 of 2  cpu GRU", "[# ] 1 of 2  cpu LSTM", f"[##] 2 of 2{' ' * 32}\n"]


def test_bench_ends_a_case_with_the_round_in_which_its_time_is_over(monkeypatch):
    now, rounds = [0.0], []

    def seconds_of(case, one, count):
        now[0] += 1.0
        rounds.append(count)
        return 1.0

    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bench, "seconds_of", seconds_of)
    case = bench.Case("cpu", "GRU", SMALL, False)
    for until, runs in ((-5.0, 2), (2.0, 2), (2.5, 4), (6.0, 6)):  # each module runs once to begin with
        now[0] = 0.0
        rounds.clear()
        assert bench.measure(case, until) == bench.Row(1e3, 1e3, 1.0)
        assert len(rounds) == runs, until
    now[0] = 100.0
    shares = []
    for _, until in bench.schedule([case] * 3, 12):
        shares.append(until - now[0])
        now[0] += 6
    assert shares == [4, 3, 0]  # a case that takes longer shortens those after it


def test_bench_does_not_time_wrong_results(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPES", (SMALL,))
    modules = bench.modules

    def other(case):
        theirs, ours = modules(case)
        ours.weight_hh_l0.data += 0.01
        return theirs, ours

    monkeypatch.setattr(bench, "modules", other)
    assert command.main(["bench", "--seconds", "0.01"]) == 1
    assert "wrong: error" in capsys.readouterr().out


def test_bench_says_of_a_backend_that_cannot_run(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPES", (SMALL,))
    monkeypatch.setattr(sk.GRU, "backend", "none")
    assert command.main(["bench", "--seconds", "0.01", "--device", "cpu"]) == 1
    assert "none: there is no such backend" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    ["--seconds x", "--seconds 0", "--seconds nan", "--seconds 1e9", "--threads 0", "--threads 1.5", "--device tpu"],
)
def test_options_that_do_not_fit_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["bench", *arguments.split()])
    assert ended.value.code == 2 and arguments.split()[1] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys):
    assert command.main(["bench", "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["cure"])
    assert ended.value.code == 2 and "doctor" in capsys.readouterr().err
