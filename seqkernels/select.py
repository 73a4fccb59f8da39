"""Which backend runs a call, and why the others do not: a pure function of the call and the machine."""

import functools
from typing import NamedTuple

import torch

from seqkernels import costs
from seqkernels.hardware import GPU, THIS_MACHINE, INTERPRETED, NO_TRITON, CudaBuild, Machine

# In order of preference, where no cost says otherwise; the last one takes everything.
BACKENDS = ("cpu", "cuda", "triton", "cudnn", "torch_eager")

NATIVE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    """What a choice may depend on. Under torch.compile only the first four are given, as a plan that reads no size puts
    no guard on one. The sizes let costs decide between backends, and say which kernel would run."""

    cell: str  # rnn_tanh, rnn_relu, gru, lstm
    device_type: str
    dtype: torch.dtype
    transformed: bool = False  # a torch.func transform or forward-mode AD is at work
    hidden_size: int | None = None
    projected: bool = False
    tf32: bool = False  # torch lets recurrent layers round float32 factors to TF32
    input_size: int = 0
    layers: int = 1
    directions: int = 1
    sequences: int | None = None  # by `class_of_sequences`
    steps: int | None = None  # by `class_of_steps`
    layout: str = "padded"  # packed: steps differ in size; device: only the GPU knows how; cell: one step of a cell
    training: bool = False  # gradients are wanted
    cudnn: bool = True  # torch.backends.cudnn.enabled
    deterministic: bool = False  # torch.use_deterministic_algorithms
    capturing: bool = False  # a packed batch, into a CUDA graph
    compiled: bool = False  # by torch.compile


CUDNN_STEPS = 65535  # that cuDNN takes at most


def class_of_sequences(sequences: int) -> int:
    """As exact as costs need it, so that few plans have to be kept."""
    return sequences if sequences <= 128 else -(-sequences // 128) * 128


def class_of_steps(steps: int) -> int:
    """The power of two above, but for what cuDNN does not take."""
    return CUDNN_STEPS + 1 if steps > CUDNN_STEPS else min(1 << max(steps - 1, 0).bit_length(), CUDNN_STEPS)


class Plan(NamedTuple):
    """The backend that runs, the reason, and what speaks against each other one."""

    backend: str
    reason: str
    refusals: tuple[tuple[str, str], ...]
    kernel: str = ""  # which of its kernels, where there is a choice and the call has its sizes

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
        path = "resident" if self.resident else "stepwise"
        return f"{path}, {self.rows} sequences by {self.units} units a program, {self.warps} warps"


def reason_against(backend: str, call: Call, machine: Machine) -> str | None:
    """Why `backend` cannot run `call` on `machine`; None if it can."""
    if not call.dtype.is_floating_point:
        return f"{call.dtype} is no floating dtype"
    if backend == "torch_eager":
        return None
    if backend == "cpu":
        if call.device_type != "cpu":
            return f"the tensors are on {call.device_type}"
        if call.dtype not in NATIVE_DTYPES:
            return f"no CPU kernel for {call.dtype}"
        if call.transformed:
            return "torch.func transforms and forward-mode AD need operations that torch can differentiate itself"
        return None if machine.native else machine.native_missing
    if backend == "cuda":
        return _reason_against_cuda(call, machine)
    if backend == "triton":
        return _reason_against_triton(call, machine)
    if backend == "cudnn":
        return _reason_against_cudnn(call, machine)
    return f"there is no such backend; choose one of {', '.join(BACKENDS)}"


def _reason_against_cuda(call: Call, machine: Machine) -> str | None:
    if call.device_type != ("cpu" if machine.emulator else "cuda"):
        return f"the tensors are on {call.device_type}"
    if machine.cuda_missing:
        return machine.cuda_missing
    if call.dtype not in NATIVE_DTYPES:
        return f"no CUDA kernel for {call.dtype}"
    if call.transformed:
        return "torch.func transforms and forward-mode AD need operations that torch can differentiate itself"
    return _reason_against_code(machine.cuda_build, machine.gpu) if machine.gpu else None


def _reason_against_code(build: CudaBuild, gpu: GPU) -> str | None:
    """Why nothing that was built runs on `gpu`."""
    if gpu.amd:
        return f"{gpu.name} does not run CUDA"
    running = [target for target in build.targets if _runs(target, gpu)]
    if not running:
        return (
            f"the CUDA kernels here are built for {', '.join(build.targets)}, none of which {gpu.name} ({gpu.target}) "
            "runs. Remedy: build them with TORCH_CUDA_ARCH_LIST naming it"
        )
    # Machine code needs a driver for its major version of CUDA, PTX one that is no older than nvcc.
    needed = (build.nvcc[0], 0) if any(target.startswith("sm_") for target in running) else build.nvcc
    if gpu.driver and gpu.driver < needed:
        return (
            f"the CUDA kernels here need a driver for CUDA {needed[0]}.{needed[1]}, and this one is for "
            f"{gpu.driver[0]}.{gpu.driver[1]}. Remedy: a newer driver, or build them with an older nvcc"
        )
    return None


def _runs(target: str, gpu: GPU) -> bool:
    """Whether `gpu` runs code for `target`: machine code that of its generation, and no newer than it is, PTX all that
    is no newer; with an a at the end that of its own alone, with an f its generation's."""
    kind, _, number = target.partition("_")
    built, own = int(number.rstrip("af")), int(gpu.target.removeprefix("sm_"))
    if number.endswith("a"):
        return built == own
    return built <= own and (built // 10 == own // 10 or (kind == "compute" and not number.endswith("f")))


def _reason_against_triton(call: Call, machine: Machine) -> str | None:
    if call.device_type == "cpu" and not machine.interpreter:
        return "the tensors are on the CPU (TRITON_INTERPRET=1 lets Triton's kernels run there, slowly, for tests)"
    if call.device_type not in ("cpu", "cuda"):
        return f"the tensors are on {call.device_type}"
    if not machine.triton:
        return NO_TRITON
    if call.dtype not in TRITON_DTYPES:
        return f"no Triton kernel for {call.dtype}: the kernels compute in float32"
    if call.transformed:
        return "torch.func transforms and forward-mode AD need operations that torch can differentiate itself"
    gpu = machine.gpu
    if gpu and not gpu.amd and int(gpu.target.removeprefix("sm_")) < 80:
        return f"Triton needs compute capability 8.0, {gpu.name} has {gpu.target}"
    return None


def _reason_against_cudnn(call: Call, machine: Machine) -> str | None:
    if call.device_type != "cuda" and not (call.device_type == "cpu" and machine.cudnn_on_cpu):
        return f"the tensors are on {call.device_type}"
    gpu = machine.gpu
    if gpu and gpu.amd:
        return f"{gpu.name} has MIOpen, not cuDNN"
    if not machine.cudnn and not machine.cudnn_on_cpu:
        return "this torch has no cuDNN"
    if not call.cudnn:
        return "torch.backends.cudnn.enabled is False"
    if call.dtype not in NATIVE_DTYPES:
        return f"cuDNN does not take {call.dtype}"
    if call.dtype == torch.bfloat16 and gpu and (machine.cudnn < 91300 or int(gpu.target.removeprefix("sm_")) < 80):
        return f"bfloat16 needs cuDNN 9.13 and compute capability 8.0, not cuDNN {machine.cudnn} and {gpu.target}"
    if call.transformed:
        return "torch.func transforms and forward-mode AD need operations that torch can differentiate itself"
    if call.compiled:
        return "torch.compile needs an operator whose results have known sizes, and what cuDNN saves has not"
    if call.layout == "cell":
        return "cuDNN has kernels for whole sequences, not for a cell"
    if call.layout == "device":
        return "cuDNN must know on the CPU how long sequences are, and these lengths are on the GPU"
    if call.steps is not None and call.steps > CUDNN_STEPS:
        return f"cuDNN takes at most {CUDNN_STEPS} steps"
    if call.capturing:
        return "cuDNN's kernels for packed batches are not known to survive in a CUDA graph"
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
    """The path and the tile of a layer, from facts alone: no trial launches, nothing that depends on the batch."""
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


def single_cta(
    cell: str, hidden_size: int, projected: bool, dtype: torch.dtype, tf32: bool, gpu: GPU, backward: bool
) -> bool:
    """Whether there is a kernel for a layer's sweep in one launch, a block taking its sequences through all steps."""
    if projected or gpu.amd or int(gpu.target.removeprefix("sm_")) < 80:
        return False
    return _width(hidden_size, dtype) > 0 and _buffers(cell, hidden_size, dtype, backward) <= gpu.shared_memory


def residency(cell: str, hidden_size: int, dtype: torch.dtype, tf32: bool, gpu: GPU, backward: bool) -> Residency:
    """Where a single CTA has its weights. csrc/cuda/single_cta.cu and product.h say the same."""
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
        if gates == 4:
            return (3 if width > 64 and even else 2) if backward else 1
        return 4 if backward else 3
    if dtype.itemsize == 4:
        return (3 if backward else 4) if gates == 4 else 5 if backward else 6
    if width <= 128:
        return 4
    return (2 if backward or not even else 4) if gates == 4 else 4 if backward else 5


class Group(NamedTuple):
    """Blocks that share the hidden units of a layer and exchange in every step."""

    blocks: int
    units: int  # of a block; on the persistent grid of one of its clusters
    weights: int  # bytes of a block's shared memory for weights,
    memory: int  # and all of them
    at_once: int  # groups that run at the same time


def clusters(
    cell: str, hidden_size: int, projected: bool, dtype: torch.dtype, tf32: bool, gpu: GPU, backward: bool
) -> tuple[list[Group], str]:
    """The clusters that can take a layer, those of most blocks first; if there are none, why."""
    against = _reason_against_groups(projected, dtype, gpu)
    if against:
        return [], against
    gates, fits = _GATES[cell.partition("_")[0]], []
    for units in (32, 48, 64):
        blocks = -(-hidden_size // units)
        weights, memory = _memory_of_slice(gates, hidden_size, blocks, units, 0, dtype, tf32, backward)
        if 2 <= blocks <= 16 and memory <= gpu.shared_memory:
            fits.append(Group(blocks, units, weights, memory, gpu.clusters_of(blocks)))
    able = [found for found in fits if found.at_once]
    if able:
        return able, ""
    if fits:
        return [], f"{gpu.name} runs no cluster of {' or '.join(str(found.blocks) for found in fits)} blocks"
    if hidden_size <= 32:
        return [], f"a cluster of one block, which {hidden_size} hidden units would be, is none"
    return [], f"no 16 blocks hold the weights of {hidden_size} hidden units of {gates} gates in {dtype}"


UNITS = 16  # hidden units of a block of the persistent grid


def persistent_grid(
    cell: str, hidden_size: int, projected: bool, dtype: torch.dtype, tf32: bool, gpu: GPU, backward: bool
) -> tuple[list[Group], str]:
    """The groups of blocks that can take a layer, as clusters of 4 blocks and of 2; if there are none, why."""
    against = _reason_against_groups(projected, dtype, gpu)
    if against:
        return [], against
    gates, fits = _GATES[cell.partition("_")[0]], []
    for cluster in (4, 2):
        units = cluster * UNITS
        blocks = -(-hidden_size // units) * cluster
        weights, memory = _memory_of_slice(gates, hidden_size, blocks, UNITS, cluster, dtype, tf32, backward)
        if blocks and memory <= gpu.shared_memory:
            at_once = gpu.clusters_of(cluster) * cluster // blocks
            fits.append(Group(blocks, units, weights, memory, at_once))
    able = [found for found in fits if found.at_once]
    if able:
        return able, ""
    if fits:
        needed = " or ".join(f"{found.blocks} blocks in clusters of {found.units // UNITS}" for found in fits)
        return [], f"{gpu.name} does not run {needed} at the same time"
    return [], f"blocks of {UNITS} hidden units do not hold the weights of {hidden_size}, {gates} gates in {dtype}"


def _reason_against_groups(projected: bool, dtype: torch.dtype, gpu: GPU) -> str:
    if gpu.target != "sm_90":
        return f"clusters are for compute capability 9.0, {gpu.name} has {gpu.target}"
    if projected:
        return "no kernel for several blocks takes a projection"
    return "no kernel for several blocks takes float64" if dtype == torch.float64 else ""


def _memory_of_slice(
    gates: int, hidden_size: int, blocks: int, units: int, cluster: int, dtype: torch.dtype, tf32: bool, backward: bool
) -> tuple[int, int]:
    """Bytes of shared memory of a block, one of `blocks` with `units` hidden units each: of the weights that its
    registers do not hold, and all, with two mbarriers, two buffers of what the product multiplies, and what threads or
    blocks exchange. csrc/cuda/slice.h says the same; on the persistent grid, by clusters of so many blocks, persistent_grid.h, and
    where all blocks are one cluster (0) cluster.h."""
    chunk = 64 // dtype.itemsize
    if backward:
        # Units whose gates' gradients a block multiplies at once, how many times, and for how many states.
        of_units, sets, states = (
            (2 * units, cluster // 2, blocks // cluster * units) if cluster else (units, 1, hidden_size)
        )
        warps, chunks = 8, sets * -(-gates * of_units // chunk)
        exchanged = 3 * SEQUENCES * units * 4 if cluster else 2 * blocks * SEQUENCES * units * 4
        fragments = 2 * chunks * -(-states // (32 * warps))
    else:
        warps, chunks = 6 if units == 48 else 8, -(-blocks * units // chunk)
        parts = warps * 16 // units
        exchanged = parts * gates * SEQUENCES * (units + 4) * 4 - 16
        fragments = gates * -(-hidden_size // (chunk * parts))
    factors = 2 * SEQUENCES * 64 * (chunks + (chunks + 1) % 2)
    held = (_held_on_persistent_grid if cluster else _held_in_cluster)(gates, dtype, tf32, backward)
    weights = max(0, fragments - held) * warps * 32 * 32
    return weights, 16 + factors + exchanged + weights


def _held_in_cluster(gates: int, dtype: torch.dtype, tf32: bool, backward: bool) -> int:
    """Fragments of the weights that threads hold in registers, as in csrc/cuda/cluster.cu."""
    if dtype.itemsize == 4 and not tf32:
        return {1: 12, 3: 11, 4: 11}[gates] if backward else {1: 17, 3: 12, 4: 10}[gates]
    return 22 if gates == 1 and not backward else 18


def _held_on_persistent_grid(gates: int, dtype: torch.dtype, tf32: bool, backward: bool) -> int:
    """The same, as in csrc/cuda/persistent_grid.cu."""
    if dtype.itemsize == 4 and not tf32:
        return {1: 12, 3: 9, 4: 8}[gates] if backward else {1: 17, 3: 10, 4: 8}[gates]
    if dtype.itemsize == 4 and backward:
        return 16 if gates == 4 else 17
    return 22 if gates == 1 and not backward else 18


class Path(NamedTuple):
    """How the CUDA backend sweeps a layer."""

    name: str = "stepwise"  # or single CTA, cluster, persistent grid
    tile: int = 0  # sequences that a block, a cluster or a group of clusters takes at once
    units: int = 0  # hidden units of a cluster's blocks; of the persistent grid's clusters

    def __str__(self) -> str:
        of = {"cluster": "block", "persistent grid": "cluster"}
        return self.name + (f" with {self.units} units a {of[self.name]}" if self.units else "")


@functools.lru_cache(1024)
def path(
    cell: str,
    hidden_size: int,
    projected: bool,
    dtype: torch.dtype,
    tf32: bool,
    gpu: GPU,
    backward: bool,
    directions: int,
    sequences: int,
) -> tuple[Path, float]:
    """The quickest path of one pass, and the microseconds of a step on it."""
    facts = cell, hidden_size, projected, dtype, tf32, gpu, backward
    gates = _GATES[cell.partition("_")[0]]
    layer = costs.Layer(gates, hidden_size, projected, directions, sequences, dtype, tf32)
    paths = [(Path(), costs.stepwise(layer, gpu))]
    if single_cta(*facts):
        _, shared, l2 = residency(cell, hidden_size, dtype, tf32, gpu, backward)
        tile = sequences_of_tile(directions, sequences, gpu.multiprocessors)
        cost = costs.single_cta(layer, gpu, shared, l2, tile)
        paths.append((Path("single CTA", tile), cost))
    for found in clusters(*facts)[0]:
        tile = sequences_of_tile(directions, sequences, found.at_once)
        cost = costs.cluster(layer, gpu, found.blocks, found.weights, tile, found.at_once, backward)
        paths.append((Path("cluster", tile, found.units), cost))
    for found in persistent_grid(*facts)[0]:
        # As many for either direction; or if not even one for each, one direction after the other.
        at_once = found.at_once - found.at_once % directions or found.at_once
        tile = sequences_of_tile(directions, sequences, at_once)
        cluster = found.units // UNITS
        cost = costs.persistent_grid(layer, gpu, found.blocks, cluster, found.weights, tile, at_once, backward)
        paths.append((Path("persistent grid", tile, found.units), cost))
    return min(paths, key=lambda one: one[1])


def sequences_of_tile(directions: int, sequences: int, at_once: int) -> int:
    """As few as let the tiles of all directions run at once: a step lasts the longer, the more there is to read and
    write."""
    most = max(1, min(SEQUENCES, sequences))
    return next((tile for tile in range(1, most) if directions * -(-sequences // tile) <= at_once), most)


def plan(call: Call, machine: Machine = THIS_MACHINE, backend: str | None = None) -> Plan:
    """Choose for `call`: the backend of the least cost, and where costs say nothing the first that can run it.
    `backend` or SEQKERNELS_BACKEND forces one.

    Raises:
        ValueError: the forced backend cannot run the call, or none can; with each backend's reason.
    """
    forced = backend or machine.forced_backend
    candidates = (forced,) if forced else BACKENDS
    against = {candidate: reason_against(candidate, call, machine) for candidate in candidates}
    if not forced:
        for candidate, reason in against.items():
            against[candidate] = reason or _reason_not_default(candidate, call, machine)
    able = [candidate for candidate in candidates if against[candidate] is None]
    if not able:
        raise ValueError(
            f"no backend runs {call.cell} in {call.dtype} on {call.device_type}: "
            + "; ".join(f"{candidate}: {reason}" for candidate, reason in against.items())
        )
    if forced:
        return Plan(forced, "forced", (), _kernel(forced, call, machine))
    cost = {candidate: _cost(candidate, call, machine) for candidate in able}
    known = [candidate for candidate in able if cost[candidate] is not None]
    chosen = min(known, key=lambda candidate: cost[candidate]) if known else able[0]
    ways = "a step forward and backward" if call.training else "a step"
    for candidate in able:
        about = "" if cost[candidate] is None else f"by estimate about {cost[candidate]:.1f} us {ways}"
        kernel = _kernel(candidate, call, machine)
        if candidate != chosen:
            against[candidate] = f"{about} ({kernel})" if about else f"it could run, but {chosen} is preferred"
        elif about:
            reason = f"{_REASONS[chosen]}, {about}"
    refusals = tuple((candidate, reason) for candidate, reason in against.items() if candidate != chosen)
    return Plan(chosen, reason if known else _REASONS[chosen], refusals, _kernel(chosen, call, machine))


def _reason_not_default(backend: str, call: Call, machine: Machine) -> str | None:
    """Why a backend that can run a call is for those alone who name it."""
    if backend == "triton" and machine.interpreter:
        return "Triton's interpreter runs for those who name it: backend='triton'"
    if backend == "cuda" and machine.emulator:
        return "CUDA kernels run on the CPU for those who name them: backend='cuda'"
    if backend == "cudnn" and call.device_type == "cpu":
        return "a stand-in for cuDNN runs on the CPU for those who name it: backend='cudnn'"
    if backend == "cudnn" and call.deterministic:
        return "cuDNN does not promise the same bits on every run, which torch.use_deterministic_algorithms asks for"
    return None


def _kernel(backend: str, call: Call, machine: Machine) -> str:
    """Which kernels of a backend would run, forward and backward."""
    if call.hidden_size is None or (backend == "cudnn" and call.sequences is None):
        return ""
    gpu = machine.gpu or INTERPRETED
    layer = call.cell, call.hidden_size, call.projected, call.dtype, call.tf32, gpu
    if backend == "cuda":
        sizes = call.directions, call.sequences or 1
        ways = [str(path(*layer, back, *sizes)[0]) for back in (False, True)]
    elif backend == "cudnn":
        ways = [_algorithm(call, gpu, back) for back in (False, True)]
    else:
        return str(triton_tile(*layer)) if backend == "triton" else ""
    return ways[0] if ways[0] == ways[1] else f"forward {ways[0]}, backward {ways[1]}"


def _algorithm(call: Call, gpu: GPU, backward: bool) -> str:
    padded = call.layout == "padded"
    return costs.cudnn_algorithm(_layer(call), gpu, padded, call.layers, call.input_size, backward)


def _layer(call: Call) -> costs.Layer:
    gates, hidden = _GATES[call.cell.partition("_")[0]], call.hidden_size
    sizes = call.projected, call.directions, call.sequences
    return costs.Layer(gates, hidden, *sizes, call.dtype, call.tf32)


def _cost(backend: str, call: Call, machine: Machine) -> float | None:
    """Microseconds of a step through all layers, forward and, in training, backward; None where nothing is known."""
    gpu = machine.gpu
    if call.device_type != "cuda" or gpu is None or call.hidden_size is None or call.sequences is None:
        return None
    ways = (False, True) if call.training else (False,)
    layer, facts = _layer(call), (call.cell, call.hidden_size, call.projected, call.dtype, call.tf32)
    if backend == "cuda":
        steps = [path(*facts, gpu, back, call.directions, call.sequences)[1] for back in ways]
    elif backend == "triton":
        steps = [costs.triton(layer, gpu, *triton_tile(*facts, gpu)[:3], back) for back in ways]
    elif backend == "cudnn":
        steps = [costs.cudnn(layer, gpu, _algorithm(call, gpu, back), back) for back in ways]
        steps.append(costs.cudnn_call(layer, gpu, call.input_size) / max(call.steps, 1))
    else:
        return None
    return call.layers * sum(steps)


_REASONS = {
    "cpu": "compiled kernels for this CPU",
    "cuda": "compiled kernels for NVIDIA GPUs",
    "triton": "kernels that Triton compiles for this GPU",
    "cudnn": "torch's own kernels for NVIDIA GPUs",
    "torch_eager": "plain torch operations run anywhere; slower than torch.nn where torch has a fused kernel",
}
