"""What GPUs can do, as far as the backends' estimates share it: rates from data sheets and from what others measured.

Nothing here was measured with our own kernels. The constants are what measurements on a GPU set right:
tests/ops/test_select.py checks the choices that follow against the rows in benchmarks/results that came from one.
"""

import torch

from seqkernels.backends.call import Call
from seqkernels.hardware import GPU

# Multiply-adds a multiprocessor and clock, by compute capability: tensor cores in 16 bits (by mma.sync) and in TF32;
# without them in float32 and float64. Sources: the CUDA programming guide's table of arithmetic throughput, the data
# sheets. AMD's are those of MI300X.
_MULTIPLY_ADDS = {
    "75": (512, 0, 64, 1),
    "80": (1024, 512, 64, 32),
    "86": (512, 256, 128, 1),
    "89": (512, 256, 128, 1),
    "90": (1024, 512, 128, 64),
    "100": (1024, 512, 128, 64),
    "amd": (1024, 512, 128, 128),
}
CLOCK = 1700  # clocks a microsecond; the data sheets' boosts are 1,410 (A100) to 2,040 (L4)
SHARED = 128  # bytes a clock that a multiprocessor reads from its shared memory (Hopper tuning guide)
L2 = 64  # bytes a clock and multiprocessor from the L2 cache (GA100 white paper: 5,120 for 80 of them)
# One of the dependent launches of a step, where the GPU has little to do in it: 383 ms on an A100 for 8,000 steps of
# four layers, a GRU of H = 130 forward and backward, are 128,000 launches (seen by nsys; cuDNN 9.1 in torch 2.6).
LAUNCH = 3.0


def multiply_adds(call: Call, gpu: GPU) -> int:
    """Multiply-adds a multiprocessor and clock."""
    target = gpu.target.removeprefix("sm_")
    nearest = {"87": "86", "103": "100"}.get(target, target)
    half, tf32, single, double = _MULTIPLY_ADDS["amd" if gpu.amd else nearest if nearest in _MULTIPLY_ADDS else "89"]
    if call.dtype.itemsize == 2:
        return half
    return double if call.dtype == torch.float64 else tf32 if call.tf32 and tf32 else single


def step_product(call: Call, gpu: GPU) -> float:
    """Microseconds of a step's matrix product on all multiprocessors, with the weights read from L2."""
    read = call.weights * call.dtype.itemsize / L2
    multiplied = call.sequences * call.weights / multiply_adds(call, gpu)
    return call.directions * max(read, multiplied) / (gpu.multiprocessors * CLOCK)


def rounds(call: Call, sequences: int, at_once: int) -> int:
    """How many rounds tiles of so many sequences take, of which `at_once` run at the same time."""
    return max(1, -(-call.directions * -(-call.sequences // sequences) // at_once))
