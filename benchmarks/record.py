"""Result rows: one JSON line a run, with all that is needed to judge and to repeat it; written, and read back."""

import argparse
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import InputError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEY = ("problem", "cell", "mode", "layout", "dtype", "threads", "device", "cpu", "gpu")

Row = dict[str, Any]


def environment() -> dict[str, Any]:
    """The machine and the versions that a row was measured with."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": platform.platform(),
        "cpu": cpu_name(),
        "isa": isa(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seqkernels": seqkernels_version(),
        **gpu(),
        **revision(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def isa() -> str | None:
    """The instruction set of our kernels for the CPU; None where they take no part in the run."""
    hardware = sys.modules.get("seqkernels.hardware")
    return hardware.THIS_MACHINE.isa or None if hardware else None


def gpu() -> dict[str, Any]:
    """The first GPU, its driver, and whether float32 products may be TF32; None where there is none."""
    if not torch.cuda.is_available():
        return {"gpu": None, "driver": None, "tf32": None}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(0),
        "driver": (output(query) or "").partition("\n")[0] or None,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


def seqkernels_version() -> str | None:
    """None where it takes no part in the run."""
    return getattr(sys.modules.get("seqkernels"), "__version__", None)


def revision() -> dict[str, Any]:
    """The git commit of these files and whether they (not the results) differ from it; None without git or a commit."""
    commit = git("rev-parse", "--verify", "--quiet", "HEAD")
    if commit is None or git("rev-parse", "--show-toplevel") != str(ROOT):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": git("status", "--porcelain", "--", ".", f":(exclude){RESULTS}") != ""}


def git(*arguments: str) -> str | None:
    return output(["git", *arguments])


def output(command: list[str]) -> str | None:
    """What a program prints; None where it is not there or fails."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def options_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def append(path: Path, *rows: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows)


def finite(value: Any) -> Any:
    """The value with None for every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[Row]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): `python -m benchmarks kernels` writes it."
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is no file of result rows: {error}.") from None


def key(row: Row) -> tuple:
    return tuple(row.get(name) for name in KEY)


def scaling_key(row: Row) -> tuple:
    return tuple(row.get(name) for name in ("axis", "value", "cell", "mode", "dtype"))


def step_key(row: Row) -> tuple:
    names = ("gpu", "cpu", "cell", "dtype", "H", "B", "directions", "pass", "path", "tile", "units")
    return tuple(row.get(name) for name in names)


def newest(rows: Iterable[Row], of: Callable[[Row], tuple] = key) -> list[Row]:
    """Of each case and contender the last row that was written."""
    last = {(of(row), row["contender"]): row for row in rows}
    return list(last.values())


@functools.cache
def differs(commit: str | None) -> bool:
    """Whether the library has changed since a commit, as far as git can say."""
    if commit is None:
        return True
    return git("diff", "--quiet", commit, "--", "csrc", "native_build", "seqkernels", "setup.py") is None


def cpu_rows(rows: list[Row]) -> list[Row]:
    """The comparison most people look for on CPUs: with as many threads as there are."""
    rows = [row for row in rows if row["device"] == "cpu"]
    return [row for row in rows if row["threads"] == max(row["threads"] for row in rows)]


def plotted_rows(rows: list[Row]) -> list[Row]:
    """Those in float32 of the CPU that most is known of."""
    rows = [row for row in cpu_rows(rows) if row["dtype"] == "float32"]
    cpus = [row["cpu"] for row in rows]
    return [row for row in rows if row["cpu"] == max(cpus, key=cpus.count)]


def gpu_rows(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["device"] != "cpu"]


T = TypeVar("T")


def ordered(names: Iterable[T], first: Iterable[T]) -> list[T]:
    """Without repetition; those in `first` in its order, then the others as they come."""
    names = list(dict.fromkeys(names))
    first = [name for name in first if name in names]
    return first + [name for name in names if name not in first]
