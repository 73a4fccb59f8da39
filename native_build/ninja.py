"""The build: a build.ninja of all libraries, and its run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from native_build import ROOT
from native_build.libraries import Library
from native_build.toolchain import compiler, torch_directory, words_of

# With the designated initializers of C++20, which GCC and Clang take in C++17.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
LINK_FLAGS = "-Wl,-z,relro,-z,now -Wl,--no-as-needed"  # what the loader fills in is read-only from then on
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Wno-deprecated-gpu-targets"


def ninja() -> list[str]:
    # That of this Python first, whether or not its environment is active: another version compiles everything again.
    found = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    if not found:
        sys.exit("seqkernels is built by ninja, which is not to be found: pip install ninja")
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not re.fullmatch(r"[1-9]\d*", jobs):
        sys.exit(f"MAX_JOBS={jobs} is no number of processes: 1 or more; unset, ninja takes all cores")
    return [found, *(["-j", jobs] if jobs else [])]


def rule(name: str, command: str) -> list[str]:
    return [
        f"rule {name}",
        f"  command = {command} $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def ninja_path(path: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_text(text: str) -> str:
    return text.replace("$", "$$")


def build(libraries: dict[Path, Library], directory: Path, nvcc: str = "") -> bool:
    """Write `directory`/build.ninja for the libraries, by the files they become, and run it; whether that went well."""
    cxx, run_ninja = ninja_text(compiler()), ninja()
    cxx_flags, link_flags = (ninja_text(shlex.join(words_of(name))) for name in ("CXXFLAGS", "LDFLAGS"))
    torch_libraries = ninja_text(shlex.quote(f"-L{torch_directory()}/lib"))
    lines = [
        *rule("compile", f"{cxx} {FLAGS} {cxx_flags}"),
        *rule("compile_cuda", f"{ninja_text(shlex.quote(nvcc))} {CUDA_FLAGS}"),
        "rule link",
        f"  command = {cxx} -shared $in -o $out {LINK_FLAGS} {torch_libraries} $more {link_flags}",
    ]
    for target, library in libraries.items():
        for of in library.objects:
            lines += [f"build {of.name}: {of.rule} {ninja_path(ROOT / of.source)}", f"  more = {ninja_text(of.flags)}"]
        objects = " ".join(of.name for of in library.objects)
        lines += [f"build {ninja_path(target)}: link {objects}", f"  more = {ninja_text(library.flags)}"]
        target.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text("\n".join([*lines, ""]))
    return subprocess.run([*run_ninja, "-C", str(directory)]).returncode == 0
