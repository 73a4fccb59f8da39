"""`make gpu-check`, as far as that goes without a GPU: command lines parse, scripts run, each part has its time."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks

ROOT = Path(__file__).parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tests/cuda/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check, exits = load("gpu_check"), load("exits")
PARTS = [(which, part) for which in ("first", "second") for part in check.parts(which, Path("out"))]


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_command_fits_its_time_and_leaves_few_files(which):
    assert sum(part.seconds for part in check.parts(which, Path("out"))) <= check.LIMIT


@pytest.mark.parametrize(("which", "part"), PARTS, ids=[part.name for _, part in PARTS])
def test_every_command_line_parses(which, part):
    module, *rest = part.arguments
    if part.arguments[:2] == ["-m", "benchmarks"]:
        benchmarks.make_parser().parse_args(part.arguments[2:])
    elif module == "-m":
        collected = [sys.executable, "-m", "pytest", "--collect-only", *rest[1:], "tests/cuda/test_gpu.py"]
        assert subprocess.run(collected, cwd=ROOT, capture_output=True, check=False).returncode in (0, 5)
    else:
        found = [sys.executable, ROOT / module, *rest, "--help"]
        assert subprocess.run(found, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_a_part_ends_with_its_time_and_one_that_is_not_here_says_so(tmp_path):
    with open(tmp_path / "log", "w") as log:
        assert check.run(check.Part("sleeps", 1, ["-c", "import time; time.sleep(60)"]), log) == 124
        assert check.run(check.Part("fails", 60, ["-c", "raise SystemExit(3)"]), log) == 3
        assert check.run(check.Part("absent", 60, [], ("no-such-program",)), log) == 127
    assert "No such file or directory: 'no-such-program'" in (tmp_path / "log").read_text()


def test_exits_are_counted(capsys):
    assert exits.main(["--processes", "1", "--at-once", "1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "torch.nn: exit codes {0: 1}\nseqkernels: exit codes {0: 1}\n"
