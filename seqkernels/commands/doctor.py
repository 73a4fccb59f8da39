"""`python -m seqkernels doctor`: try this install, and say what is missing and the command that installs it.

Every backend that can run here runs an RNN, a GRU and an LSTM, forward and backward, in float32, on sequences of
different lengths. Each result is compared with the float64 specification (seqkernels/reference.py): its error may be
twice that of torch.nn on the same device, and some units of rounding. The exit code is 0 if all that this machine can
run is there and right, and 1 if not.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqkernels
from seqkernels import hardware, reference, select
from seqkernels.hardware import THIS_MACHINE

REINSTALL = "python -m pip install --force-reinstall --no-deps --no-build-isolation -e .  # in a clone of seqkernels"
LENGTHS = (9, 4, 9, 1, 7, 6, 2, 5)
INPUT, HIDDEN = 12, 40
CELLS = {"RNN": "rnn_tanh", "GRU": "gru", "LSTM": "lstm"}
FLOOR = 8  # units of rounding; the same layer on another machine errs by one or two


class Finding(NamedTuple):
    state: str  # "ok"; "-": nothing for this machine; "missing", "wrong": faults
    what: str
    said: str
    remedy: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(options: argparse.Namespace) -> int:
    versions = f"seqkernels {seqkernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {platform.system()} {platform.machine()}")
    faults = 0
    for found in (compiled_part(), compiler(), gpu(), *forced_backend(), *map(backend, select.BACKENDS)):
        print(f"{found.state:<7}  {found.what:<11}  {found.said}", flush=True)
        if found.remedy:
            print(f"{'':<22}Remedy: {found.remedy}")
        faults += found.state in ("missing", "wrong")
    if faults:
        print(f"{faults} of these {'is a fault' if faults == 1 else 'are faults'}.")
        return 1
    print("All that this machine can run is there and right.")
    return 0


def compiled_part() -> Finding:
    missing = THIS_MACHINE.native_missing
    if not missing:
        return Finding("ok", "CPU kernels", f"{hardware.native().isa()} in use")
    if sys.platform != "linux" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return Finding("-", "CPU kernels", f"{missing}; layers run by torch's own operations, slower than torch.nn")
    needed = "" if compiler().state == "ok" else "install a C++17 compiler (Debian: apt install g++), then "
    return Finding("missing", "CPU kernels", missing, f"{needed}SEQKERNELS_BUILD=cpu {REINSTALL}")


def compiler() -> Finding:
    """Whether there is one, and it takes C++17; it is needed only to build."""
    wanted = os.environ.get("CXX", "")
    try:
        words = shlex.split(wanted) or ["c++"]
    except ValueError as error:
        return Finding("-", "compiler", f"CXX={wanted} is no command line: {str(error).lower()}; it is needed to build")
    options = ["-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    try:
        done = subprocess.run([*words, *options], input="#include <optional>\n", capture_output=True, text=True)
    except OSError as error:
        return Finding("-", "compiler", f"{words[0]}: {error.strerror}; it is needed to build, not to run")
    if done.returncode:
        return Finding("-", "compiler", f"{words[0]} does not compile C++17; it is needed to build, not to run")
    return Finding("ok", "compiler", f"{shlex.join(words)} compiles C++17")


def gpu() -> Finding:
    if torch.cuda.is_available():
        return Finding("ok", "GPU", hardware.said_of(hardware.gpu_of(torch.device("cuda"))))
    if not shutil.which("nvidia-smi"):
        return Finding("-", "GPU", "none is here")
    if torch.version.cuda is None:
        return Finding(
            "missing",
            "GPU",
            "NVIDIA's driver is here, but this torch is built without CUDA",
            "python -m pip install --force-reinstall torch  # or another line of https://pytorch.org/get-started",
        )
    return Finding("missing", "GPU", "torch sees none", "python -c 'import torch; torch.cuda.init()' says why")


def forced_backend() -> list[Finding]:
    """Whether the backend that SEQKERNELS_BACKEND names can run here; nothing where it is not set."""
    name = THIS_MACHINE.forced_backend
    if name is None:
        return []
    against = reasons_against(name)
    running = [device.type for device, reason in against.items() if reason is None]
    if running:
        return [Finding("ok", "forced", f"SEQKERNELS_BACKEND={name} runs every call, on {' and '.join(running)} alone")]
    reason = list(against.values())[-1]
    return [Finding("wrong", "forced", f"SEQKERNELS_BACKEND={name}: {reason}", "unset SEQKERNELS_BACKEND")]


def reasons_against(name: str) -> dict[torch.device, str | None]:
    """Why a backend cannot run on the devices that are here; None where it can. The last is the GPU if there is one."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    return {device: select.unsupported(name, _call(device), hardware.machine_of(device)) for device in devices}


def backend(name: str) -> Finding:
    """Run it on the devices that it is for; or say why not, and whether that is a fault."""
    against = reasons_against(name)
    devices = list(against)
    running = [device for device in devices if against[device] is None]
    if not running:
        reason = str(against[devices[-1]])
        if devices[-1].type == "cpu":
            return Finding("-", name, reason if name == "cpu" else "it needs a GPU")
        remedy = remedies(name)
        reason, _, own = reason.partition(". Remedy: ")
        return Finding("missing" if own or remedy else "-", name, reason, own or remedy)
    try:
        ratios = {device.type: max(compare(name, device, cell) for cell in CELLS) for device in running}
    except Exception as error:  # whatever it is, it is the finding
        return Finding("wrong", name, f"{type(error).__name__}: {error}", REINSTALL)
    wrong = max(ratios.values()) > 1
    said = "; ".join(f"on {device} errors reach {ratio:.0%} of what is allowed" for device, ratio in ratios.items())
    return Finding("wrong" if wrong else "ok", name, said, "report it, with what this command prints" if wrong else "")


def _call(device: torch.device) -> select.Call:
    return select.Call("gru", device.type, torch.float32)


def remedies(name: str) -> str:
    """How to get a backend that is missing on a machine with a GPU; "" if there is no way."""
    if name != "cuda" or torch.version.hip:
        return ""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    there = shutil.which("nvcc") or (home and (Path(home) / "bin/nvcc").exists())
    return f"{'' if there else 'install nvcc (the CUDA toolkit), then '}FORCE_CUDA=1 {REINSTALL}"


def compare(name: str, device: torch.device, cell: str) -> float:
    """The largest error of a result, as a share of what is allowed: 1 is the limit."""
    torch.manual_seed(0)
    theirs = getattr(nn, cell)(INPUT, HIDDEN, bidirectional=True)
    ours = getattr(seqkernels, cell)(INPUT, HIDDEN, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    ours.backend = name
    x = torch.randn(max(LENGTHS), len(LENGTHS), INPUT)
    right = specified(theirs, CELLS[cell], x)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # exact float32 is compared
    try:
        found = [results(module.to(device), x.to(device)) for module in (ours, theirs)]
    finally:
        torch.backends.cudnn.allow_tf32 = before
    floor = FLOOR * torch.finfo(torch.float32).eps
    return max(error(a, c) / (2 * error(b, c) + floor) for a, b, c in zip(*found, right, strict=True))


def error(value: Tensor, right: Tensor) -> float:
    """Relative, in the Euclidean norm; infinite where a number is none."""
    found = ((value.detach().cpu().double() - right.detach()).norm() / right.detach().norm()).item()
    return found if found == found else float("inf")


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    output, _ = module(pack_padded_sequence(x, torch.tensor(LENGTHS), enforce_sorted=False))
    output = pad_packed_sequence(output)[0]
    output.square().sum().backward()
    assert x.grad is not None
    return [output, x.grad, *(parameter.grad for parameter in module.parameters() if parameter.grad is not None)]


def specified(module: nn.Module, cell: str, x: Tensor) -> list[Tensor]:
    """The same by the specification."""
    x = x.double().requires_grad_()
    weights = [weight.detach().double().requires_grad_() for weight in module.parameters()]
    state = torch.zeros(2, len(LENGTHS), HIDDEN, dtype=torch.float64)
    sequences = [x[:length, b] for b, length in enumerate(LENGTHS)]
    c_0 = state if cell == "lstm" else None
    outputs, _, _ = reference.forward(cell, sequences, state, c_0, weights, bidirectional=True)
    output = nn.utils.rnn.pad_sequence(outputs)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *weights])]
