"""Kernel benchmarks of `python -m benchmarks`: a case, its rows, and a package with a planted error."""

import json
import shutil
from pathlib import Path

from benchmarks import cases
from benchmarks.problems import PROBLEMS
from seqkernels import select

CASE = cases.Case("names", "GRU", "infer", "padded", "float32", 1, "cpu", PROBLEMS["names"])


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def plant(folder: Path, right: str, wrong: str, monkeypatch) -> Path:
    """A copy of the package in which one formula of the backend that runs is another."""
    shutil.copytree(Path(select.__file__).parent, folder / "seqkernels")
    source = folder / "seqkernels" / "backends" / "torch_eager.py"
    assert source.read_text().count(right) == 1
    source.write_text(source.read_text().replace(right, wrong))
    monkeypatch.setenv("SEQKERNELS_BACKEND", "torch_eager")
    return folder
