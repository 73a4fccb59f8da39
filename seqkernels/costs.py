"""What a step costs on each path of a GPU, in microseconds: estimates, from data sheets and from what others measured.

Nothing here was measured with our own kernels. The constants are what a session with a GPU sets right:
tests/test_select.py holds the choices that follow against the rows in benchmarks/results that were measured on one.
"""

from typing import NamedTuple

import torch

from seqkernels.hardware import GPU

# Multiply-adds a multiprocessor and clock, by compute capability: matrix cores in 16 bits (by mma.sync) and in TF32;
# without them in float32 and float64. Sources: the CUDA programming guide's table of arithmetic throughput, the data
# sheets. AMD's are those of MI300X.
_PRODUCTS = {
    "75": (512, 0, 64, 1),
    "80": (1024, 512, 64, 32),
    "86": (512, 256, 128, 1),
    "89": (512, 256, 128, 1),
    "90": (1024, 512, 128, 64),
    "100": (1024, 512, 128, 64),
    "amd": (1024, 512, 128, 128),
}
_CLOCK = 1700  # clocks a microsecond; the data sheets' boosts are 1,410 (A100) to 2,040 (L4)
_SHARED = 128  # bytes a clock that a multiprocessor reads from its shared memory (Hopper tuning guide)
_L2 = 64  # bytes a clock and multiprocessor from the L2 cache (GA100 white paper: 5,120 for 80 of them)
# One of the dependent launches of a step, where the GPU has little to do in it: 383 ms on an A100 for 8,000 steps of
# four layers, a GRU of H = 130 forward and backward, are 128,000 launches (seen by nsys; cuDNN 9.1 in torch 2.6).
_LAUNCH = 3.0
# What our own stepwise paths add to each step: an operator through torch's dispatcher takes 4 us (measured on a CPU).
# Triton's launcher in Python beside torch.bmm is taken for 30, on no measurement: several operators' worth of Python.
_THROUGH_TORCH, _THROUGH_PYTHON = 4.0, 30.0
# Clocks of a step in one block besides products: two barriers of 16 warps, and the latency of shared memory, of the
# matrix cores' chain and of the activations.
_LATENCY = 400
# Clocks of an exchange between the blocks of a cluster besides its bytes, and bytes a clock that peers push to a block:
# remote shared memory answers after 180 to 213 clocks (arXiv 2402.13499), the rest is for the mbarrier; one block
# writes 21 bytes a clock to another (arXiv 2609.01864).
_EXCHANGE, _PUSHED = 300, 20
# Clocks of an exchange through L2 besides its bytes: from one multiprocessor's write to another's read 956 to 1,110
# (H800; arXiv 2402.13499, 2501.12084). So much come to, in parts, what L2 answers after (258 near, 470 far; Chips and
# Cheese) until the data are there, a flag's way (160 ns), and another answer until they are read.
_THROUGH_L2 = 1000
# A Triton program that walks 16 sequences, by its units: FlashRNN's fused Triton kernels on an H100, B = 16, bfloat16.
_TRITON_RESIDENT = {32: 1.4, 64: 2.0, 128: 3.2}
# cuDNN's kernel for small H, one block a sequence: GRU of H = 128 1.1 us a step, of H = 160 3.1 (A100, nsys), LSTM of
# H = 128 2.4 (153 ms for 64,000 steps): 1.1 up to so many recurrent weights, with which a block has the registers of a
# multiprocessor for itself (nsys again), and beyond on the line of these three.
_SMALL_H = (128 * 384, 1.1, 2.0 / (160 * 480 - 128 * 384))
_PERSIST_STATIC = (2.0, 3.1)  # nn.LSTM(768, 768), fp16, B = 16 on an H100: forward, backward (FlashRNN's figure)


class Layer(NamedTuple):
    """One layer, as far as the cost of its steps depends on it."""

    gates: int
    hidden: int
    projected: bool
    directions: int
    sequences: int
    dtype: torch.dtype
    tf32: bool

    @property
    def weights(self) -> int:
        return self.gates * self.hidden * self.hidden

    def products(self, gpu: GPU) -> int:
        """Multiply-adds a multiprocessor and clock."""
        target = gpu.target.removeprefix("sm_")
        nearest = {"87": "86", "103": "100"}.get(target, target)
        half, tf32, single, double = _PRODUCTS["amd" if gpu.amd else nearest if nearest in _PRODUCTS else "89"]
        if self.dtype.itemsize == 2:
            return half
        return double if self.dtype == torch.float64 else tf32 if self.tf32 and tf32 else single

    def product(self, gpu: GPU, sequences: int) -> float:
        """Clocks that one multiprocessor would multiply for a step of so many sequences, at most 8: matrix cores always
        take 8, and without them there is code for 1, 2, 4 and 8."""
        rows = 8 if self.dtype.itemsize == 2 or self.tf32 else 1 << (sequences - 1).bit_length()
        return rows * self.weights / self.products(gpu)


def single_cta(layer: Layer, gpu: GPU, shared_memory: int, l2: int, sequences: int) -> float:
    """A block walks `sequences` through all steps, and in each reads the weights that its registers do not hold, so
    many bytes from shared memory and so many from L2."""
    read = shared_memory / _SHARED + l2 / _L2
    clocks = _LATENCY + max(read, layer.product(gpu, sequences))
    return _waves(layer, sequences, gpu.multiprocessors) * clocks / _CLOCK


def cluster(
    layer: Layer, gpu: GPU, blocks: int, shared_memory: int, sequences: int, at_once: int, backward: bool
) -> float:
    """Each of `blocks` blocks has a part of the weights, so many bytes of it in shared memory; what it gets from its
    peers in a step are the states of `sequences`, or their gradients in float32."""
    got = sequences * layer.hidden * (4 if backward else layer.dtype.itemsize)
    clocks = max(shared_memory / _SHARED, layer.product(gpu, sequences) / blocks)
    return _waves(layer, sequences, at_once) * (_LATENCY + _EXCHANGE + got / _PUSHED + clocks) / _CLOCK


def persistent_grid(
    layer: Layer,
    gpu: GPU,
    blocks: int,
    cluster: int,
    shared_memory: int,
    sequences: int,
    at_once: int,
    backward: bool,
) -> float:
    """The same by groups of `blocks` blocks, in clusters of so many, which exchange through L2. Forward a block reads
    the states of `sequences` for its cluster, each a part of them, but all come to its shared memory. Backward it is
    pushed the gradients of its cluster's gates; of the states' gradients it writes its part, in float32, and reads as
    much."""
    states = sequences * layer.hidden
    if backward:
        pushed = layer.gates * states * layer.dtype.itemsize * cluster / blocks
        exchange = _EXCHANGE + pushed / _PUSHED + _THROUGH_L2 + 2 * 4 * states / cluster / _L2
    else:
        exchange = _THROUGH_L2 + states * layer.dtype.itemsize / _L2
    clocks = max(shared_memory / _SHARED, layer.product(gpu, sequences) / blocks)
    return _waves(layer, sequences, at_once) * (_LATENCY + exchange + clocks) / _CLOCK


def stepwise(layer: Layer, gpu: GPU) -> float:
    """A cuBLAS product and a kernel a step, twice where h is projected."""
    return (2 if layer.projected else 1) * (2 * _LAUNCH + _THROUGH_TORCH) + _product(layer, gpu)


def triton(layer: Layer, gpu: GPU, resident: bool, rows: int, units: int, backward: bool) -> float:
    """By `select.Tile`; a tile that is not resident is launched in every step, from Python."""
    if not resident:
        return (2 if layer.projected else 1) * _THROUGH_PYTHON + _product(layer, gpu)
    return _waves(layer, rows, gpu.multiprocessors) * _TRITON_RESIDENT[units] * (1.5 if backward else 1)


def cudnn(layer: Layer, gpu: GPU, algorithm: str, backward: bool) -> float:
    """torch's own, by `cudnn_algorithm`."""
    if algorithm == "PERSIST_STATIC":
        return _PERSIST_STATIC[backward]
    if algorithm == "PERSIST_STATIC_SMALL_H":
        weights, least, slope = _SMALL_H
        together = max(1, weights // layer.weights)  # blocks on a multiprocessor
        return _waves(layer, together, gpu.multiprocessors) * (least + slope * max(0, layer.weights - weights))
    # That directions run side by side, on streams of their own, is the best that cuDNN can do.
    return (2 if layer.projected else 1) * 2 * _LAUNCH + _product(layer, gpu)


def cudnn_call(layer: Layer, gpu: GPU, input_size: int) -> float:
    """What a call costs before its steps: one kernel that lays the weights out as cuDNN reads them."""
    of_input = layer.gates * layer.hidden * input_size
    copied = 2 * layer.directions * (layer.weights + of_input) * layer.dtype.itemsize
    return _LAUNCH + copied / (_L2 * gpu.multiprocessors * _CLOCK)


def cudnn_algorithm(layer: Layer, gpu: GPU, padded: bool, layers: int, input_size: int, backward: bool) -> str:
    """Which of cuDNN's algorithms torch asks for: get_algo in aten/src/ATen/native/cudnn/RNN.cpp of PyTorch."""
    if layer.projected or not padded or layer.dtype == torch.float64:
        return "STANDARD"
    simple = layer.gates == 1
    if layer.hidden <= ((256 if simple else 128) if backward else (384 if simple else 192)):
        return "PERSIST_STATIC_SMALL_H"
    target = int(gpu.target.removeprefix("sm_"))
    fits = layers == 1 and layer.directions == 1 and layer.hidden <= 1024 and layer.hidden % 128 == 0
    fits = fits and layer.dtype == torch.float16 and input_size % 128 == 0
    fits = fits and layer.sequences % 8 == 0 and layer.sequences <= 128 and layer.gates != 3
    fits = fits and not (simple and layer.sequences >= 96 and layer.hidden >= 896)
    if fits and target >= 80 and target % 10 != 6 and gpu.multiprocessors >= 98:
        return "PERSIST_STATIC"
    return "STANDARD"


def _product(layer: Layer, gpu: GPU) -> float:
    """A step's matrix product on all multiprocessors, with the weights read from L2."""
    read = layer.weights * layer.dtype.itemsize / _L2
    multiplied = layer.sequences * layer.weights / layer.products(gpu)
    return layer.directions * max(read, multiplied) / (gpu.multiprocessors * _CLOCK)


def _waves(layer: Layer, sequences: int, at_once: int) -> int:
    """How many turns tiles of so many sequences take, of which `at_once` run at the same time."""
    return max(1, -(-layer.directions * -(-layer.sequences // sequences) // at_once))
