"""What this machine and this install have: the facts that `select` decides by and `python -m seqkernels` prints."""

import functools
import importlib
import importlib.util
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from seqkernels._ops import ops


class GPU(NamedTuple):
    """Facts about a GPU; tests make GPUs that are not here."""

    name: str
    target: str  # sm_90, gfx942, ...: what kernels are compiled for
    shared_memory: int  # bytes that one program may have
    multiprocessors: int
    driver: tuple[int, int] | None = None  # the newest CUDA that its driver knows; None: unknown
    clusters: tuple[int, ...] = ()  # of 1, 2, ... 16 blocks: how many run at the same time

    @property
    def amd(self) -> bool:
        return self.target.startswith("gfx")

    def clusters_of(self, blocks: int) -> int:
        """How many run at the same time, a block on a multiprocessor; 0: there are none of so many blocks."""
        return self.clusters[blocks - 1] if blocks <= len(self.clusters) else 0

    @property
    def clusters_missing(self) -> str:
        """Why a GPU that could run clusters has not even those of one block; "" if it has, or nobody has asked."""
        if not self.clusters or any(self.clusters) or self.amd or int(self.target.removeprefix("sm_")) < 90:
            return ""
        return (
            f"no clusters, as the CUDA kernels here have no code for those of {self.target}. Remedy: build them with "
            "TORCH_CUDA_ARCH_LIST naming it"
        )


class CudaBuild(NamedTuple):
    """What the library of CUDA kernels was built by and for."""

    nvcc: tuple[int, int] = (13, 0)
    targets: tuple[str, ...] = ("sm_75", "sm_80", "sm_90a", "compute_80")  # compute_*: PTX, for the driver to compile


class Machine(NamedTuple):
    """Facts about a machine and the install on it; tests make machines that are not here."""

    native_missing: str = ""  # why the compiled library seqkernels._C is not loaded; "" if it is
    isa: str = ""  # the instruction set of its kernels for the CPU: the best here, or SEQKERNELS_ISA
    forced_backend: str | None = None  # SEQKERNELS_BACKEND
    cuda_missing: str = "no CUDA kernels are installed"  # why there are none; "" if they are loaded
    cuda_build: CudaBuild = CudaBuild()  # if they are
    emulator: bool = False  # SEQKERNELS_EMULATOR: they are a build that runs them on the CPU, for tests
    cudnn: int = 0  # the version of cuDNN that torch has for these tensors, as 91300 for 9.13; 0: none
    triton: bool = False  # Triton is installed
    interpreter: bool = False  # TRITON_INTERPRET: its kernels run step by step on the CPU
    gpu: GPU | None = None  # the one that the tensors are on, or that an emulator or interpreter takes the CPU for

    @property
    def splits_float32(self) -> bool:
        """Whether kernels for the CPU can take float32 as sums of bfloat16."""
        return self.isa == "amx"


# The CPU as an emulator and Triton's interpreter take it, so that they go the paths of a large GPU.
CPU_AS_GPU = GPU("no GPU, but the CPU in its place", "sm_90", 227 << 10, 1, clusters=16 * (1,))

# In a Hugging Face kernel the library has the unique name of its operators' namespace.
NATIVE = f"{__package__}.{'_C' if ops.name == 'seqkernels' else ops.name}"


def native() -> ModuleType:
    """The compiled library."""
    return importlib.import_module(NATIVE)


def _load_native() -> str:
    """Load the compiled library, which registers its operators; the reason if that cannot be done."""
    try:
        native()
    except ModuleNotFoundError:
        if sysconfig.get_config_var("Py_GIL_DISABLED"):
            return "the compiled part is for Pythons with a GIL, and this one has none"
        return (
            "this install has no compiled part (it was built with SEQKERNELS_BUILD=none, or this is a clone that was "
            "not built in place: pip install -e .)"
        )
    except ImportError as error:
        return f"the compiled part does not load: {error}"
    return ""


def _choose_isa(wanted: str) -> str:
    """The instruction set in use from now on. ValueError if `wanted` is one that is not built or does not run here."""
    if wanted:
        try:
            native().force_isa(wanted)
        except ValueError as error:
            raise ValueError(f"SEQKERNELS_ISA: {error}") from None
    return native().isa()


def _load_cuda(emulator: str | None) -> str:
    """Load the library of CUDA kernels, which needs a torch that has CUDA; the reason if that cannot be done."""
    library = Path(emulator) if emulator else Path(__file__).with_name("_cuda.so")
    if not library.exists():
        return "this install has no CUDA kernels"
    if not emulator and torch.version.cuda is None:
        return "this torch has no CUDA"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the CUDA kernels do not load: {error}"
    return ""


def _cuda_build() -> CudaBuild:
    version, *targets = ops.cuda_build().split()
    major, minor = map(int, version.split("."))
    return CudaBuild((major, minor), tuple(targets))


def _here() -> Machine:
    emulator = os.environ.get("SEQKERNELS_EMULATOR") or None
    cuda_missing = _load_cuda(emulator)
    native_missing = _load_native()
    interpreter = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    return Machine(
        cuda_missing=cuda_missing,
        cuda_build=CudaBuild() if cuda_missing or emulator else _cuda_build(),
        emulator=emulator is not None,
        native_missing=native_missing,
        isa="" if native_missing else _choose_isa(os.environ.get("SEQKERNELS_ISA", "")),
        forced_backend=os.environ.get("SEQKERNELS_BACKEND") or None,
        triton=importlib.util.find_spec("triton") is not None,  # which does not import it
        interpreter=interpreter,
        gpu=CPU_AS_GPU if emulator or interpreter else None,
    )


THIS_MACHINE = _here()


def constant_in_traces(function: Callable) -> Callable:
    """For torch.compile the answer is a constant: torch.compiler.assume_constant_result, which imports the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_traces
def machine_of(device: torch.device) -> Machine:
    """This machine, with the GPU that tensors on `device` are on."""
    return _machine_with_gpu(device) if device.type == "cuda" else THIS_MACHINE


@functools.cache
def _machine_with_gpu(device: torch.device) -> Machine:
    return THIS_MACHINE._replace(gpu=gpu_of(device), cudnn=cudnn_version())


@functools.cache
def gpu_of(device: torch.device) -> GPU:
    if device.type != "cuda":
        return CPU_AS_GPU
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        target, shared = facts.gcnArchName.split(":")[0], facts.shared_memory_per_block
    else:
        target, shared = f"sm_{facts.major}{facts.minor}", facts.shared_memory_per_block_optin  # type: ignore[attr-defined]
    driver, clusters = None, ()
    if not THIS_MACHINE.cuda_missing and not THIS_MACHINE.emulator:
        version = ops.cuda_driver()
        driver = version // 1000, version % 1000 // 10
        with torch.cuda.device(device):
            clusters = tuple(ops.cuda_clusters())
    return GPU(facts.name, target, shared, facts.multi_processor_count, driver, clusters)


def cudnn_version() -> int:
    """As `Machine.cudnn`; ROCm's MIOpen goes by torch.backends.cudnn as well, and is none."""
    return 0 if torch.version.hip else torch.backends.cudnn.version() or 0


def tf32(device: torch.device) -> bool:
    """Whether torch lets recurrent layers on `device` round float32 factors to TF32, as nn.GRU then does."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]


def bfloat16_parts(device: torch.device, dtype: torch.dtype) -> int:
    """Of how many bfloat16 torch lets a factor of recurrent layers on a CPU be the sum: 0, it does not; 1 or 2.

    torch.backends.mkldnn.rnn.fp32_precision says it, or where that is "none" torch.set_float32_matmul_precision, whose
    "high" is for TF32 or sums of two bfloat16, and "medium" for one.
    """
    if dtype != torch.float32 or device.type != "cpu":
        return 0
    # torch.backends.mkldnn.rnn takes five times as long.
    precision = torch._C._get_fp32_precision_getter("mkldnn", "rnn")
    return _BFLOAT16_PARTS[torch.get_float32_matmul_precision() if precision == "none" else precision]


_BFLOAT16_PARTS = {"ieee": 0, "highest": 0, "tf32": 2, "high": 2, "bf16": 1, "medium": 1}
# As that of machine_of.
bfloat16_parts._dynamo_marked_constant = True  # type: ignore[attr-defined]

NO_TRITON = "Triton is not installed. Remedy: pip install triton (Linux; torch's builds for GPUs bring it)"


def describe() -> list[tuple[str, str]]:
    """(what, finding) for each thing that decides what can run here, with the remedy where something is missing."""
    rows = [("torch", str(torch.__version__))]
    if not THIS_MACHINE.native_missing:
        rows.append(("CPU kernels", f"{native().isa()} in use; {native().build_info()}"))
    else:
        rows.append(
            ("CPU kernels", f"none: {THIS_MACHINE.native_missing}. Remedy: python -m seqkernels doctor says it")
        )
    rows.append(("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"))
    rows.append(("CUDA", _cuda()))
    rows.append(("CUDA kernels", _cuda_kernels()))
    rows.append(("cuDNN", str(cudnn_version() or "none: this torch has no cuDNN")))
    rows.append(("Triton kernels", _triton()))
    rows.append(("SEQKERNELS_BACKEND", THIS_MACHINE.forced_backend or "not set: chosen per call"))
    return rows


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {torch.version.cuda}; no GPU is visible"
    gpus = (gpu_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count()))
    return f"torch is built for CUDA {torch.version.cuda}; {', '.join(map(said_of, gpus))}"


def said_of(gpu: GPU) -> str:
    """A GPU, and whether it has the clusters that layers of many hidden units run on; part of one (MIG) has fewer."""
    clusters = ""  # unknown where no CUDA kernels are installed
    if gpu.clusters:
        widest = max((blocks for blocks in range(1, 17) if gpu.clusters_of(blocks)), default=0)
        none = gpu.clusters_missing or "no clusters: wide layers go by steps"
        clusters = f", clusters of up to {widest} blocks" if widest > 1 else f", {none}"
    return f"{gpu.name} ({gpu.target}, {gpu.multiprocessors} multiprocessors{clusters})"


def _cuda_kernels() -> str:
    if torch.version.cuda is None and not THIS_MACHINE.emulator:
        return f"none: {THIS_MACHINE.cuda_missing}"
    if THIS_MACHINE.cuda_missing:
        remedy = "nvcc (NVIDIA's CUDA toolkit) at CUDA_HOME or on the PATH, then in a clone"
        return f"none: {THIS_MACHINE.cuda_missing}. Remedy: {remedy} FORCE_CUDA=1 pip install --no-build-isolation -e ."
    if THIS_MACHINE.emulator:
        return "run on the CPU, every access checked (SEQKERNELS_EMULATOR), for backend='cuda' only"
    nvcc, targets = THIS_MACHINE.cuda_build
    return f"built for {', '.join(targets)} by nvcc {nvcc[0]}.{nvcc[1]}"


def _triton() -> str:
    if not THIS_MACHINE.triton:
        return f"none: {NO_TRITON}"
    version = importlib.import_module("triton").__version__
    if THIS_MACHINE.interpreter:
        return f"Triton {version}, interpreted on the CPU (TRITON_INTERPRET), for backend='triton' only"
    return f"Triton {version}" + ("" if torch.cuda.is_available() else "; it needs a GPU")
