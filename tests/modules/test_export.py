"""torch.export with dynamic sizes, saved and run in a fresh process; packages of AOTInductor, in Python and without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels as sk
from seqkernels.hardware import THIS_MACHINE, native

DYNAMIC = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
ROWS = {0: Dim.DYNAMIC}


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = sk.GRU(4, 5, num_layers=2, bidirectional=True)
        self.lstm = sk.LSTM(10, 6, proj_size=3, learn_initial_state=True)

    def forward(self, x):
        return self.lstm(self.gru(x)[0])[0]


class Ragged(Padded):
    def forward(self, x, lengths):
        return self.gru(x, lengths=lengths)


class Packed(Padded):
    def forward(self, data, batch_sizes):
        return self.gru(PackedSequence(data, batch_sizes))[0].data


class OneAfterTheOther(Padded):
    def forward(self, rows, cu_seqlens):
        weights = self.gru._flat_weights
        return sk.functional.gru(
            rows, None, weights, num_layers=2, bidirectional=True, cu_seqlens=cu_seqlens, max_seqlen=rows.shape[0]
        )


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = sk.LSTMCell(4, 5)

    def forward(self, x):
        return self.cell(x)


def packed(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = pack_padded_sequence(torch.randn(max(lengths), len(lengths), 4), lengths)
    return sequences.data, sequences.batch_sizes


def ends(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


# The model, shapes, what it is exported with, and others that it then is called with.
PROGRAMS = {
    "padded": (Padded, (DYNAMIC,), [(torch.randn(7, 3, 4),), (torch.randn(20, 5, 4),), (torch.randn(1, 1, 4),)]),
    "lengths": (
        Ragged,
        (DYNAMIC, ROWS),
        [(torch.randn(7, 3, 4), torch.tensor([7, 2, 3])), (torch.randn(9, 2, 4), torch.tensor([0, 9]))],
    ),
    "packed": (Packed, (ROWS, ROWS), [packed(7, 3, 2), packed(5, 4, 4, 1)]),
    "cu_seqlens": (
        OneAfterTheOther,
        (ROWS, ROWS),
        [(torch.randn(9, 4), ends(2, 4, 3)), (torch.randn(12, 4), ends(1, 5, 0, 6))],
    ),
    "cell": (Cell, (ROWS,), [(torch.randn(3, 4),), (torch.randn(8, 4),)]),
}


def exported(name: str, strict: bool = False):
    cls, shapes, calls = PROGRAMS[name]
    torch.manual_seed(0)
    model = cls().eval()
    return model, torch.export.export(model, calls[0], dynamic_shapes=shapes, strict=strict), calls


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_with_other_sizes(name, strict):
    model, program, calls = exported(name, strict)
    for inputs in calls:
        torch.testing.assert_close(program.module()(*inputs), model(*inputs))


def in_a_fresh_process(load: str, tmp_path, model, inputs):
    torch.save((inputs, model(*inputs)), tmp_path / "expected.pt")
    code = f"""
import torch, seqkernels
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    torch.testing.assert_close(({load})(*inputs), expected)
print("the same")
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "the same\n"


@pytest.mark.skipif(torch.get_default_device().type != "cpu", reason="the other process has another default device")
def test_a_saved_program_runs_in_a_fresh_process(tmp_path):
    model, program, calls = exported("lengths")
    torch.export.save(program, tmp_path / "program.pt2")
    in_a_fresh_process(f"torch.export.load({str(tmp_path / 'program.pt2')!r}).module()", tmp_path, model, calls[1])


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A model, the path of its package, and the sizes that it is called with."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("other processes have another default device")
    model, program, calls = exported("padded")
    unoptimized = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # compiles in half the time
    path = tmp_path_factory.mktemp("package") / "package.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=unoptimized)
    return model, path, calls


@pytest.mark.slow
def test_a_package_of_aotinductor_runs_in_a_fresh_process(package, tmp_path):
    model, path, calls = package
    loaded = torch._inductor.aoti_load_package(str(path))
    with torch.no_grad():
        for inputs in calls:
            torch.testing.assert_close(loaded(*inputs), model(*inputs))
        in_a_fresh_process(f"torch._inductor.aoti_load_package({str(path)!r})", tmp_path, model, calls[1])


@pytest.mark.slow
@pytest.mark.skipif(bool(THIS_MACHINE.native_missing), reason=THIS_MACHINE.native_missing)
def test_a_package_runs_in_a_program_without_python(package, tmp_path):
    """To the bits that it gives in Python."""
    compiler, torchs = shutil.which(os.environ.get("CXX", "c++")), Path(torch.__file__).parent
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    program, source = tmp_path / "run_package", Path(__file__).parents[1] / "cpu/run_package.cpp"
    headers = [f"-isystem{torchs}/include", f"-isystem{torchs}/include/torch/csrc/api/include"]
    libraries = [f"-L{torchs}/lib", f"-Wl,-rpath,{torchs}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(
        [compiler, "-std=c++20", "-O0", *headers, str(source), "-o", str(program), *libraries, "-ldl"], check=True
    )
    _, path, calls = package
    loaded = torch._inductor.aoti_load_package(str(path))
    for (x,) in calls:
        (tmp_path / "input").write_bytes(x.numpy().tobytes())
        files = [native().__file__, path, tmp_path / "input", tmp_path / "output"]
        subprocess.run([program, *map(str, [*files, *x.shape])], check=True)
        with torch.no_grad():
            expected = loaded(x)
        assert (tmp_path / "output").read_bytes() == expected.numpy().tobytes()
