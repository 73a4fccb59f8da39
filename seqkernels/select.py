"""Which backend runs a problem, and why the others do not: a pure function of the problem and the machine."""

from typing import NamedTuple

import torch

from seqkernels.hardware import GPU, HERE, INTERPRETED, NO_TRITON, Machine

# In order of preference; the last one takes everything.
BACKENDS = ("cpu", "cuda", "triton", "torch_eager")

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """What a choice may depend on. The backend depends on nothing but the first four: a plan that reads no size puts no
    guard on one under torch.compile. The others say which kernel of that backend runs, where they are given."""

    cell: str  # rnn_tanh, rnn_relu, gru, lstm
    device_type: str
    dtype: torch.dtype
    transformed: bool = False  # a torch.func transform or forward-mode AD is at work
    hidden_size: int | None = None
    projected: bool = False
    tf32: bool = False  # torch lets recurrent layers round float32 factors to TF32


class Plan(NamedTuple):
    """The backend that runs, the reason, and what speaks against each backend that was preferred to it."""

    backend: str
    reason: str
    refusals: tuple[tuple[str, str], ...]
    kernel: str = ""  # which of its kernels, where there is a choice and the problem has its sizes

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}" + (f"; {self.kernel}" if self.kernel else "")]
        return "\n".join(lines + [f"  not {backend}: {reason}" for backend, reason in self.refusals])


class Tile(NamedTuple):
    """How the Triton backend cuts a layer: `rows` sequences by `units` hidden units a program."""

    resident: bool  # a program walks all steps, with the recurrent weights on chip; else every step is a launch
    rows: int
    units: int
    warps: int

    def __str__(self) -> str:
        road = "resident" if self.resident else "stepwise"
        return f"{road}, {self.rows} sequences by {self.units} units a program, {self.warps} warps"


def reason_against(backend: str, problem: Problem, machine: Machine) -> str | None:
    """Why `backend` cannot run `problem` on `machine`; None if it can."""
    if not problem.dtype.is_floating_point:
        return f"{problem.dtype} is no floating dtype"
    if backend == "torch_eager":
        return None
    if backend == "cpu":
        if problem.device_type != "cpu":
            return f"the tensors are on {problem.device_type}"
        if problem.dtype not in NATIVE_DTYPES:
            return f"no CPU kernel for {problem.dtype}"
        if problem.transformed:
            return "torch.func transforms and forward-mode AD need operations that torch can differentiate itself"
        return None if machine.native else machine.native_missing
    if backend == "cuda":
        return _reason_against_cuda(problem, machine)
    if backend == "triton":
        return _reason_against_triton(problem, machine)
    return f"there is no such backend; choose one of {', '.join(BACKENDS)}"


def _reason_against_cuda(problem: Problem, machine: Machine) -> str | None:
    if problem.device_type != ("cpu" if machine.host_run else "cuda"):
        return f"the tensors are on {problem.device_type}"
    if machine.cuda_missing:
        return machine.cuda_missing
    if problem.dtype not in NATIVE_DTYPES:
        return f"no CUDA kernel for {problem.dtype}"
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need operations that torch can differentiate itself"
    gpu = machine.gpu
    if gpu and gpu.amd:
        return f"{gpu.name} does not run CUDA"
    if gpu and int(gpu.target.removeprefix("sm_")) < 75:
        return f"the CUDA kernels need compute capability 7.5, {gpu.name} has {gpu.target}"
    return None


def _reason_against_triton(problem: Problem, machine: Machine) -> str | None:
    if problem.device_type == "cpu" and not machine.interpreter:
        return "the tensors are on the CPU (TRITON_INTERPRET=1 lets Triton's kernels run there, slowly, for tests)"
    if problem.device_type not in ("cpu", "cuda"):
        return f"the tensors are on {problem.device_type}"
    if not machine.triton:
        return NO_TRITON
    if problem.dtype not in TRITON_DTYPES:
        return f"no Triton kernel for {problem.dtype}: the kernels compute in float32"
    if problem.transformed:
        return "torch.func transforms and forward-mode AD need operations that torch can differentiate itself"
    gpu = machine.gpu
    if gpu and not gpu.amd and int(gpu.target.removeprefix("sm_")) < 80:
        return f"Triton needs compute capability 8.0, {gpu.name} has {gpu.target}"
    return None


# The widest layer whose weights a program can hold in registers and shared memory without spilling, as the compiler's
# code for a family of GPUs has it: for H a multiple of 16, and for any other, which takes more registers to address.
# Each with 16-bit factors; with float32 factors in matrix cores (TF32; AMD's take float32 as it is); in exact float32
# without them. tests/test_triton_compiled.py compiles every tile for every family, and reads registers, spills and
# shared memory from what comes out.
_WIDEST = {
    "ampere": {  # and all that has its matrix instructions: sm_80 to sm_89, sm_120
        "rnn": ((128, 128, 32), (128, 128, 32)),
        "gru": ((128, 64, 32), (64, 64, 32)),
        "lstm": ((128, 32, 32), (32, 32, 32)),
    },
    "hopper": {
        "rnn": ((128, 128, 32), (128, 128, 32)),
        "gru": ((128, 128, 32), (128, 128, 32)),
        "lstm": ((128, 64, 32), (128, 64, 32)),
    },
    "blackwell": {  # of data centres: sm_100, sm_103
        "rnn": ((128, 128, 32), (64, 128, 32)),
        "gru": ((128, 64, 32), (128, 64, 32)),
        "lstm": ((128, 64, 32), (128, 64, 32)),
    },
    "amd": {
        "rnn": ((128, 64, 0), (128, 64, 0)),
        "gru": ((128, 64, 0), (128, 64, 0)),
        "lstm": ((128, 64, 0), (128, 64, 0)),
    },
}
_GATES = {"rnn": 1, "gru": 3, "lstm": 4}
ROWS, NARROWEST = 16, 32  # no tile is smaller: matrix cores take no fewer sequences, and fewer units would save nothing
_SCRATCH = 2 * 4 * ROWS  # bytes a unit that the kernels have been seen to take beside the weights, at most


def triton_tile(cell: str, hidden_size: int, projected: bool, dtype: torch.dtype, tf32: bool, gpu: GPU) -> Tile:
    """The road and the tile of a layer, from facts alone: no trial launches, nothing that depends on the batch."""
    kind, size = cell.partition("_")[0], dtype.itemsize
    units = max(NARROWEST, 1 << (hidden_size - 1).bit_length())
    precision = 0 if size == 2 else 1 if tf32 or gpu.amd else 2
    widest = _WIDEST[_family(gpu)][kind][hidden_size % 16 != 0][precision]
    # What AMD's compiler keeps in registers passes through shared memory gate by gate.
    weights = (1 if gpu.amd else _GATES[kind]) * units * units * size
    if projected or units > widest or weights + _SCRATCH * units > gpu.shared_memory:
        return Tile(False, 4, 128, 4)
    few_warps = units < 128 if gpu.amd else kind == "rnn" and precision == 2
    return Tile(True, ROWS, units, 4 if few_warps else 8)


def _family(gpu: GPU) -> str:
    if gpu.amd:
        return "amd"
    return {"9": "hopper", "10": "blackwell"}.get(gpu.target.removeprefix("sm_")[:-1], "ampere")


class Residency(NamedTuple):
    """Where the recurrent weights of a block lie, in bytes. What it reads from the L2 cache it reads in every step."""

    registers: int
    shared_memory: int
    l2: int


SEQUENCES = 8  # that a block takes at most: what the matrix cores multiply at once


def single_block(
    cell: str, hidden_size: int, projected: bool, dtype: torch.dtype, tf32: bool, gpu: GPU, backward: bool
) -> bool:
    """Whether there is a kernel for a layer's sweep in one launch, a block taking its sequences through all steps."""
    if projected or gpu.amd or int(gpu.target.removeprefix("sm_")) < 80:
        return False
    return _width(hidden_size, dtype) > 0 and _buffers(cell, hidden_size, dtype, backward) <= gpu.shared_memory


def residency(cell: str, hidden_size: int, dtype: torch.dtype, tf32: bool, gpu: GPU, backward: bool) -> Residency:
    """Where a single block has its weights. csrc/cuda/single_block.cu and product.h say the same."""
    gates, width = _GATES[cell.partition("_")[0]], _width(hidden_size, dtype)
    blocks = 2 if width > 128 else 1
    groups, group = width * dtype.itemsize // 64 * blocks, gates * width // blocks * 64
    held = min(groups, _held(gates, width, dtype, tf32, backward, hidden_size % 2 == 0))
    left = gpu.shared_memory - _buffers(cell, hidden_size, dtype, backward)
    shared = min(groups - held, left // group)
    return Residency(held * group, shared * group, (groups - held - shared) * group)


def _width(hidden_size: int, dtype: torch.dtype) -> int:
    """Hidden units that the kernel for a layer is made for; 0: there is none."""
    widest = {2: 256, 4: 128}.get(dtype.itemsize, 0)
    widths = (64, 128, 256) if hidden_size % 2 else (32, 64, 96, 128, 192, 256)
    return next((width for width in widths if hidden_size <= width <= widest), 0)


def _buffers(cell: str, hidden_size: int, dtype: torch.dtype, backward: bool) -> int:
    """Bytes of shared memory for two buffers of what 8 sequences exchange: states, or gradients of gates. Rows begin
    half of what shared memory gives at once, 128 bytes, apart."""
    factors = _width(hidden_size, dtype) * (_GATES[cell.partition("_")[0]] if backward else 1)
    row = factors * dtype.itemsize
    return 2 * SEQUENCES * (row + (64 if row % 128 == 0 else 0))


def _held(gates: int, width: int, dtype: torch.dtype, tf32: bool, backward: bool, even: bool) -> int:
    """Groups of fragments (32 bytes of each thread and gate) that threads hold in registers."""
    if gates == 1:
        return 16
    if dtype.itemsize == 4 and not tf32:
        return (3 if width > 64 else 2) if backward and gates == 4 else 4 if backward else 1 if gates == 4 else 3
    if dtype.itemsize == 4:
        return (3 if backward else 4) if gates == 4 else 5 if backward else 6
    if width <= 128:
        return 4
    return (2 if backward or not even else 4) if gates == 4 else 4 if backward else 5


def sequences_of_block(sequences: int, gpu: GPU) -> int:
    """As few as let all blocks run at once: a step of a block lasts the longer, the more it has to read and write."""
    return max(1, min(SEQUENCES, -(-sequences // gpu.multiprocessors)))


def plan(problem: Problem, machine: Machine = HERE, backend: str | None = None) -> Plan:
    """Choose for `problem`; `backend` or SEQKERNELS_BACKEND forces one.

    Raises:
        ValueError: the forced backend cannot run the problem, or none can; with each backend's reason.
    """
    forced = backend or machine.forced_backend
    refusals = ()
    for candidate in (forced,) if forced else BACKENDS:
        against = reason_against(candidate, problem, machine)
        if candidate == "triton" and not forced and machine.interpreter:
            against = "Triton's interpreter runs for those who name it: backend='triton'"
        if candidate == "cuda" and not forced and machine.host_run:
            against = "CUDA kernels run on the CPU for those who name them: backend='cuda'"
        if against is None:
            why = "forced" if forced else _REASONS[candidate]
            return Plan(candidate, why, refusals, _kernel(candidate, problem, machine))
        refusals += ((candidate, against),)
    raise ValueError(
        f"no backend runs {problem.cell} in {problem.dtype} on {problem.device_type}: "
        + "; ".join(f"{candidate}: {against}" for candidate, against in refusals)
    )


def _kernel(backend: str, problem: Problem, machine: Machine) -> str:
    if backend not in ("cuda", "triton") or problem.hidden_size is None:
        return ""
    gpu = machine.gpu or INTERPRETED
    if backend == "cuda":
        layer = problem.cell, problem.hidden_size, problem.projected, problem.dtype, problem.tf32, gpu
        forward, back = ("single block" if single_block(*layer, way) else "stepwise" for way in (False, True))
        return forward if forward == back else f"forward {forward}, backward {back}"
    return str(triton_tile(problem.cell, problem.hidden_size, problem.projected, problem.dtype, problem.tf32, gpu))


_REASONS = {
    "cpu": "compiled kernels for this CPU",
    "cuda": "compiled kernels for NVIDIA GPUs",
    "triton": "kernels that Triton compiles for this GPU",
    "torch_eager": "plain torch operations run anywhere; slower than torch.nn where torch has a fused kernel",
}
