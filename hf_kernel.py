"""python hf_kernel.py [DIRECTORY] writes build/hf-kernel, or another directory: this package as a kernel for Hugging
Face's `kernels` (0.17), loaded from there by `get_local_kernel(Path("build/hf-kernel"), backend="cpu")`.

It holds what their kernel-builder compiles (build.toml, csrc, and the Python part in torch-ext), and a build for the
CPU of this machine's kind, which any torch from 2.10 on loads: the objects of setup.py's build, but for the two files
that name the operators' namespace. That has a hash of the sources, so that versions, and an installed seqkernels, stand
side by side in one process. CUDA kernels are not in it.
"""

import hashlib
import json
import platform
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import setup
from native_build import ROOT, libraries, ninja

BUILD_TOML = """\
[general]
name = "seqkernels"
version = 1
edition = 5
license = "MIT"
backends = ["cpu"]

[torch]
src = [{torch_sources}]

[torch.stable-abi]
cpu = "2.10"

[kernel.host]
backend = "cpu"
depends = ["torch"]
src = [{host_sources}]
"""
BUILD_TOML_KERNELS = """
[kernel.{name}]
backend = "cpu"
depends = ["torch"]
src = [{sources}]
cxx-flags = [{flags}]
"""
OPS = """\
import torch

from . import {name}  # registers the operators

ops = torch.ops.{name}


def add_op_namespace_prefix(name: str) -> str:
    return f"{name}::{{name}}"
"""


def python_files() -> dict[Path, str]:
    """The package by its paths in a kernel. That is imported by another name, so that imports in it are made relative.
    What `python -m seqkernels` runs stays out: there is no such name to call it by."""
    files = {}
    for path in sorted((ROOT / "seqkernels").rglob("*.py")):
        where = path.relative_to(ROOT / "seqkernels")
        if where.parts[0] in ("__main__.py", "_ops.py", "commands"):
            continue
        here = "." * len(where.parts)
        text = re.sub(r"^( *from) seqkernels\.", rf"\1 {here}", path.read_text(), flags=re.MULTILINE)
        files[where] = re.sub(r"^( *from) seqkernels import", rf"\1 {here} import", text, flags=re.MULTILINE)
    return files


def unique_name(python: dict[Path, str]) -> str:
    """As kernel-builder names what it builds: _<kernel>_<backend>_<hash of the source>."""
    found = hashlib.sha256("".join(python.values()).encode())
    for path in [*sorted((ROOT / "native_build").glob("*.py")), *sorted((ROOT / "csrc").rglob("*.*"))]:
        found.update(path.read_bytes())
    return f"_seqkernels_cpu_{found.hexdigest()[:7]}"


def write_sources(target: Path, python: dict[Path, str]) -> None:
    """What kernel-builder compiles. It gives flags to files: one that is compiled several times has a name for each."""

    def words(found: list[str]) -> str:
        return ", ".join(f'"{word}"' for word in found)

    shutil.copytree(ROOT / "csrc", target / "csrc")
    objects = libraries.cpu_library("").objects
    headers, instanced = setup.headers(), [f"csrc/cpu/{source}.cpp" for source in libraries.OF_EACH_SET]
    with_torch = [of.source for of in objects if libraries.STABLE in of.flags]
    without = [of.source for of in objects if of.source not in (*with_torch, *instanced)]
    text = BUILD_TOML.format(torch_sources=words(with_torch + headers), host_sources=words(without + headers))
    for name, flags in libraries.INSTRUCTION_SETS.items():
        instances = [f"csrc/cpu/{source}_{name}.cpp" for source in libraries.OF_EACH_SET]
        for source, instance in zip(libraries.OF_EACH_SET, instances, strict=True):
            (target / instance).write_text(f'#define SEQKERNELS_ISA {name}\n#include "{source}.cpp"\n')
        sources, of_compiler = words([*instances, *instanced, *headers]), words(["-O3", *flags.split()])
        text += BUILD_TOML_KERNELS.format(name=name, sources=sources, flags=of_compiler)
    (target / "build.toml").write_text(text)
    write_python(target / "torch-ext/seqkernels", python)  # _ops.py comes from kernel-builder


def write_python(directory: Path, python: dict[Path, str]) -> None:
    for where, text in python.items():
        (directory / where).parent.mkdir(parents=True, exist_ok=True)
        (directory / where).write_text(text)


def write_build(target: Path, python: dict[Path, str]) -> None:
    """What kernel-builder would make of the sources here."""
    name = unique_name(python)
    variant = target / f"build/torch-stable-abi210-cpu-{platform.machine()}-linux"
    write_python(variant, python)
    (variant / "_ops.py").write_text(OPS.format(name=name))
    metadata = {
        "name": "seqkernels",
        "id": name,
        "version": 1,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    # What setup.py has built is linked as it is (`make hf-kernel` builds before), but for what names the namespace.
    built = ROOT / f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    whole = libraries.cpu_library(f"{libraries.header_flags()} -DTORCH_EXTENSION_NAME={name}")
    taken = [of for of in whole.objects if libraries.STABLE not in of.flags and (built / of.name).exists()]
    flags = shlex.join(str(built / of.name) for of in taken)
    library = libraries.Library([of for of in whole.objects if of not in taken], f"{flags} {whole.flags}")
    if not ninja.build({variant / f"{name}.abi3.so": library}, ROOT / "build/hf-kernel-objects"):
        sys.exit("compiling the kernel failed, see above")


if __name__ == "__main__":
    setup.check_platform(sys.platform, bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
    target = Path(sys.argv[1] if sys.argv[1:] else ROOT / "build/hf-kernel").resolve()
    shutil.rmtree(target, ignore_errors=True)
    python = python_files()
    write_sources(target, python)
    write_build(target, python)
    print(target)
