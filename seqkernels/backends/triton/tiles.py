"""How the Triton backend cuts a layer into programs: what fits on chip, and what a step costs."""

from typing import NamedTuple

import torch

from seqkernels.backends import costs
from seqkernels.backends.call import RESETS, Call
from seqkernels.backends.cells import CELLS
from seqkernels.hardware import GPU

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_KERNEL = "no Triton kernel for {}: the kernels compute in float32"


class Launch(NamedTuple):
    """How a layer is launched: `rows` sequences by `units` hidden units a program."""

    tf32: bool  # products may round float32 factors to TF32
    resident: bool  # a program walks all steps, with the recurrent weights on chip; else every step is a launch
    rows: int
    units: int
    warps: int

    def __str__(self) -> str:
        path = "resident" if self.resident else "stepwise"
        return f"{path}, {self.rows} sequences by {self.units} units a program, {self.warps} warps"


# The widest layer whose weights a program can keep in registers and shared memory without spilling, as the compiler's
# code for a family of GPUs has it: for H a multiple of 16, and for any other, which takes more registers to address.
# Each with 16-bit factors; with float32 factors in tensor cores (TF32; AMD's take float32 as it is); in exact float32
# without them. tests/triton/test_triton_compiled.py compiles every tile for every family, and reads registers, spills
# and shared memory from what comes out.
_WIDEST = {
    "ampere": {  # and all that has its matrix instructions: sm_80 to sm_89, sm_120
        "RNN": ((128, 128, 32), (128, 128, 32)),
        "GRU": ((128, 64, 32), (64, 64, 32)),
        "LSTM": ((128, 32, 32), (32, 32, 32)),
        "LiGRU": ((128, 64, 32), (64, 64, 32)),
    },
    "hopper": {
        "RNN": ((128, 128, 32), (128, 128, 32)),
        "GRU": ((128, 128, 32), (128, 128, 32)),
        "LSTM": ((128, 64, 32), (128, 64, 32)),
        "LiGRU": ((128, 128, 32), (128, 128, 32)),
    },
    "blackwell": {  # of data centres: sm_100, sm_103
        "RNN": ((128, 128, 32), (64, 128, 32)),
        "GRU": ((128, 64, 32), (128, 64, 32)),
        "LSTM": ((128, 64, 32), (128, 64, 32)),
        "LiGRU": ((128, 64, 32), (128, 64, 32)),
    },
    "amd": {
        "RNN": ((128, 64, 0), (128, 64, 0)),
        "GRU": ((128, 64, 0), (128, 64, 0)),
        "LSTM": ((128, 64, 0), (128, 64, 0)),
        "LiGRU": ((128, 64, 0), (128, 64, 0)),
    },
}
ROWS, MIN_UNITS = 16, 32  # no tile is smaller: tensor cores take no fewer sequences, and fewer units would save nothing
SCRATCH = 2 * 4 * ROWS  # bytes a unit that the kernels have been seen to take beside the weights, at most

# Triton's launcher in Python beside torch.bmm is taken for so long, on no measurement: several operators' worth of
# Python.
_THROUGH_PYTHON = 30.0
# A program that walks 16 sequences, by its units: FlashRNN's fused Triton kernels on an H100, B = 16, bfloat16.
_RESIDENT = {32: 1.4, 64: 2.0, 128: 3.2}


def launch_of(call: Call, gpu: GPU) -> Launch:
    """From facts alone: no trial launches, nothing that depends on the batch."""
    masks, norms = set(call.options) - {"layer_norm"}, "layer_norm" in call.options
    size = 4 if norms else call.dtype.itemsize  # layers with norms compute in float32
    units = max(MIN_UNITS, 1 << (call.hidden_size - 1).bit_length())
    precision = 0 if size == 2 else 1 if call.tf32 or gpu.amd else 2
    family, odd = _family(gpu), call.hidden_size % 16 != 0
    widest = _WIDEST[family][CELLS[call.cell].display_name][odd][precision]
    # Options take registers, too. Hopper has enough for norms, or for masks but of an LSTM that needs more to address.
    if RESETS in masks or (norms and (masks or family != "hopper")):
        widest = 0
    elif masks and family != "hopper":
        widest //= 2
    elif masks and odd and call.gates == 4:
        widest //= 4
    # What AMD's compiler keeps in registers passes through shared memory gate by gate.
    weights = (1 if gpu.amd else call.gates) * units * units * size
    if call.projected or units > widest or weights + SCRATCH * units > gpu.shared_memory:
        return _with_all_units(call.tf32, units) if norms else Launch(call.tf32, False, 4, 128, 4)
    # Of four and eight warps those by which the compiler spills nothing.
    if gpu.amd:
        few_warps = units < 128
    elif precision == 2:
        few_warps = call.gates == 1 and not norms
    else:
        of_32_units = {2} | ({3} if norms else {4} if masks and precision == 1 else set())
        few_warps = units == 32 and call.gates in of_32_units
    return Launch(call.tf32, True, ROWS, units, 4 if few_warps else 8)


def _with_all_units(tf32: bool, units: int) -> Launch:
    """Single steps of which a program has all units, as norms need them: a thread has 8 numbers of a tile, but for
    layers of more than 4,096 units."""
    return Launch(tf32, False, max(1, min(4, 1024 // units)), units, min(16, max(4, units // 256)))


def step_cost(call: Call, gpu: GPU, backward: bool) -> float:
    """Microseconds of a step; one that is not resident is launched from Python."""
    launch = launch_of(call, gpu)
    if not launch.resident:
        return (2 if call.projected else 1) * _THROUGH_PYTHON + costs.step_product(call, gpu)
    return costs.waves(call, launch.rows, gpu.multiprocessors) * _RESIDENT[launch.units] * (1.5 if backward else 1)


def _family(gpu: GPU) -> str:
    if gpu.amd:
        return "amd"
    return {"9": "hopper", "10": "blackwell"}.get(gpu.target.removeprefix("sm_")[:-1], "ampere")
