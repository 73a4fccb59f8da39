"""What a step costs on a GPU: constants that `python -m benchmarks fit` draws from measured rows, by the GPU's name
(`measured`), times terms that a backend knows of a call; and the rates of GPUs that the terms are made of.

A GPU without measured rows takes the constants of `_NEAREST`: its terms already say what it does in a clock. For the
host and for cuDNN it takes figures that were measured on other GPUs.
"""

from typing import NamedTuple

import torch

from seqkernels.backends.call import Call
from seqkernels.backends.measured import MEASURED
from seqkernels.hardware import GPU

_NEAREST = "NVIDIA H200"
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
ROWS = 64  # that cuBLAS multiplies at once, however few there are
COPIED = 16  # bytes a clock and multiprocessor that copies of rows move (H200: 4.8 TB/s by its data sheet)
# Operations of torch that bring rows into the order of pieces, and back, beyond those that number pieces (counted).
CUTTING = 29
# One of the dependent launches of a step, where the GPU has little to do in it: 383 ms on an A100 for 8,000 steps of
# four layers, a GRU of H = 130 forward and backward, are 128,000 launches (seen by nsys; cuDNN 9.1 in torch 2.6).
LAUNCH = 3.0

# Of a wavefront: what a chunk of steps takes besides them on the GPU, and for the host to launch. On the H200 a sweep
# begins in 12 us (the median of `fixed_us` in benchmarks/results/steps.jsonl), its product is a launch more; the host
# takes 17 us for a product and 10 for a kernel. What events take nobody has measured.
CHUNK = 20.0
HOST_OF_CHUNK = 35.0

_UNMEASURED = {
    **MEASURED[_NEAREST],
    "cuda stepwise forward": (2 * LAUNCH + 4,),  # an operator through torch's dispatcher takes 4 us (measured on a CPU)
    "cuda stepwise backward": (2 * LAUNCH + 4,),
    # GRU of H = 128 1.1 us a step, of H = 160 3.1 (A100, nsys), LSTM of H = 128 2.4 (153 ms for 64,000 steps).
    "cudnn PERSIST_STATIC_SMALL_H forward": (1.1, 0.72, 0.0),
    "cudnn PERSIST_STATIC_SMALL_H backward": (1.1, 0.72, 0.0),
    # nn.LSTM(768, 768), fp16, B = 16 on an H100 (FlashRNN's figure).
    "cudnn PERSIST_STATIC forward": (2.0,),
    "cudnn PERSIST_STATIC backward": (3.1,),
    # That directions run side by side, on streams of their own, is the best that cuDNN can do.
    "cudnn STANDARD forward": (2 * LAUNCH,),
    "cudnn STANDARD backward": (2 * LAUNCH,),
}


class Terms(NamedTuple):
    """What a step costs, by the constants of `key`."""

    key: str
    terms: tuple[float, ...]
    known: float = 0.0

    def us(self, constants: tuple[float, ...]) -> float:
        """Microseconds."""
        return self.known + sum(constant * term for constant, term in zip(constants, self.terms, strict=True))


def cost(found: Terms, gpu: GPU) -> float:
    return found.us(MEASURED.get(gpu.name, _UNMEASURED).get(found.key) or _UNMEASURED[found.key])


def copies(call: Call, gpu: GPU) -> float:
    """What it takes to copy rows of input and output into the order of pieces and back, as its share of a step."""
    row = (call.input_size + call.directions * call.hidden_size) * call.dtype.itemsize
    moved = 2 * call.sequences * row * (2 if call.training else 1)
    return moved / (COPIED * gpu.multiprocessors * CLOCK) + CUTTING * LAUNCH / max(call.steps, 1)


def of_call(backend: str, call: Call, gpu: GPU) -> float:
    """What the host takes for a call, in microseconds, as its share of a step."""
    return cost(Terms(call_key(backend, call), (1.0,)), gpu) / max(call.steps, 1)


def call_key(backend: str, call: Call) -> str:
    dtype = " bfloat16" if call.dtype == torch.bfloat16 else ""  # which is slow to begin in cuDNN
    return f"{backend} call {'train' if call.training else 'infer'}{dtype}"


def source(backend: str, gpu: GPU | None) -> str:
    """Where the constants of a backend come from."""
    if gpu is None or gpu.name not in MEASURED:
        return "estimated for a GPU nobody measured"
    if not any(key.startswith(f"{backend} ") for key in MEASURED[gpu.name]):
        return f"estimated, as nobody measured it on an {gpu.name}"
    return f"measured on an {gpu.name}"


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
    rows = -(-call.sequences // ROWS) * ROWS if call.sequences > 1 else 1
    multiplied = rows * call.weights / multiply_adds(call, gpu)
    return call.directions * max(read, multiplied) / (gpu.multiprocessors * CLOCK)


def waves(call: Call, sequences: int, at_once: int) -> int:
    """How many waves tiles of so many sequences take, of which `at_once` run at the same time."""
    return max(1, -(-call.directions * -(-call.sequences // sequences) // at_once))
