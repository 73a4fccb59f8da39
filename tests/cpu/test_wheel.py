"""The wheel that SEQKERNELS_WHEEL names, as `make wheel` makes it: what is in it, and how its libraries are linked."""

import os
import re
import shutil
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from libraries import assert_hardened

import seqkernels

WHEEL = Path(os.environ.get("SEQKERNELS_WHEEL", ""))
pytestmark = pytest.mark.skipif(WHEEL.suffix != ".whl", reason="SEQKERNELS_WHEEL names no wheel; make wheel does")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(WHEEL).extractall(directory)
    return directory


def test_its_name_is_for_every_python_from_310_on_and_many_linuxes():
    assert re.fullmatch(
        rf"seqkernels-{re.escape(seqkernels.__version__)}-cp310-abi3-(manylinux\w+\.?)+\.whl", WHEEL.name
    )


def test_it_holds_the_package_and_nothing_else(unpacked):
    files = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    assert {path.parts[0] for path in files} == {"seqkernels", f"seqkernels-{seqkernels.__version__}.dist-info"}
    assert not [path for path in files if "test" in path.as_posix().lower() or path.suffix in (".cu", ".cpp", ".h")]
    source = Path(seqkernels.__file__).parent
    modules = {path.relative_to(source.parent) for path in source.rglob("*.py")}
    assert modules | {Path("seqkernels/py.typed"), Path("seqkernels/_C.abi3.so")} <= files
    assert [path.name for path in files if path.name == "LICENSE"] == ["LICENSE"]


def test_pip_refuses_an_older_python_or_torch(unpacked):
    """By these two lines, with a sentence of its own."""
    metadata = message_from_bytes(next(unpacked.glob("*.dist-info/METADATA")).read_bytes())
    assert metadata["Requires-Python"] == ">=3.10"
    assert "torch>=2.10" in metadata.get_all("Requires-Dist")


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_its_libraries_are_stripped_and_hardened_and_bring_no_library_of_torch(unpacked):
    libraries = list(unpacked.rglob("*.so*"))
    assert {path.name for path in libraries} - {"_cuda.so"} == {"_C.abi3.so"}
    for library in libraries:
        said = assert_hardened(library)
        assert not re.search(r"\.symtab|\.debug_", said), f"{library.name} is not stripped"
        assert not re.search(r"RPATH|RUNPATH", said), f"{library.name} looks for libraries in a place of its build"
        assert "libpython" not in said and "libcudart" not in said
