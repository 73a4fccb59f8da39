"""What this machine and this install have: the facts that `select` decides by and `python -m seqkernels` prints."""

import importlib
import os
from typing import NamedTuple

import torch


class Machine(NamedTuple):
    """Facts about a machine and the install on it; tests make machines that are not here."""

    native: bool = True  # the compiled library seqkernels._C is loaded
    native_missing: str = ""  # if not, why
    forced_backend: str | None = None  # SEQKERNELS_BACKEND


def _load_native() -> str:
    """Load the compiled library, which registers its operators; the reason if that cannot be done."""
    try:
        importlib.import_module("seqkernels._C")
    except ModuleNotFoundError:
        return "this install has no compiled part (it was built with SEQKERNELS_BUILD=none)"
    except ImportError as error:
        return f"the compiled part does not load: {error}"
    return ""


def _here() -> Machine:
    missing = _load_native()
    return Machine(not missing, missing, os.environ.get("SEQKERNELS_BACKEND") or None)


HERE = _here()


def describe() -> list[tuple[str, str]]:
    """(what, finding) for each thing that decides what can run here, with the remedy where something is missing."""
    rows = [("torch", torch.__version__)]
    if HERE.native:
        native = importlib.import_module("seqkernels._C")
        rows.append(("CPU kernels", f"{native.isa()} in use; {native.build_info()}"))
    else:
        rows.append(("CPU kernels", f"none: {HERE.native_missing}. Remedy: a C++ compiler, then pip install again"))
    rows.append(("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"))
    rows.append(("CUDA", _cuda()))
    rows.append(("CUDA kernels", "none in this version; CUDA tensors run on torch_eager"))
    rows.append(("Triton kernels", "none in this version"))
    rows.append(("SEQKERNELS_BACKEND", HERE.forced_backend or "not set: chosen per call"))
    return rows


def _cuda() -> str:
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {torch.version.cuda}; no GPU is visible"
    names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"torch is built for CUDA {torch.version.cuda}; {', '.join(names)}"
