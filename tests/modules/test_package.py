"""What `import seqkernels` costs and says of itself. Import directions are checked by `make lint`."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import seqkernels as sk

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def test_import_brings_in_neither_triton_nor_the_compiler():
    code = "import sys, seqkernels; print([m for m in ('triton', 'torch._dynamo', 'sympy') if m in sys.modules])"
    assert python("-c", code).strip() == "[]"


def test_python_m_seqkernels_says_what_this_install_has():
    said = python("-m", "seqkernels")
    for what in ("seqkernels", sk.__version__, "torch", "CPU kernels", "CUDA", "Triton", "SEQKERNELS_BACKEND"):
        assert what in said


def test_everything_public_has_a_docstring():
    for name in sk.__all__:
        assert inspect.getdoc(getattr(sk, name)), name
    for name, function in inspect.getmembers(sk.functional, inspect.isfunction):
        assert name.startswith("_") or inspect.getdoc(function), name


def test_a_torch_that_is_too_old_is_refused_in_a_sentence():
    code = "import torch; torch.__version__ = type(torch.__version__)('2.9.1'); import seqkernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: seqkernels needs torch 2.10 or newer, and this is 2.9.1: pip install -U torch" in done.stderr


@pytest.mark.skipif(not (ROOT / "CHANGELOG.md").exists(), reason="the checkout is not around the tests")
def test_citation_and_changelog_say_the_version():
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == sk.__version__
    assert re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == sk.__version__
