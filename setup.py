"""Builds the compiled parts, seqkernels/_C.abi3.so for the CPU and seqkernels/_cuda.so for NVIDIA GPUs; everything else
about the package stands in pyproject.toml.

SEQKERNELS_BUILD=cpu builds the first, =cuda both, on any machine with an nvcc; =none makes a pure Python package. Unset
means cuda where there are an nvcc and a GPU, or with FORCE_CUDA=1, and else cpu. tests/emulator/build.py builds the
CUDA kernels for the CPU with what stands here.

nvcc is that of CUDA_HOME or CUDA_PATH, or else of PATH. TORCH_CUDA_ARCH_LIST, in torch's syntax ("8.0;9.0a+PTX"), names
what it compiles for; unset means the GPUs here, or else what targets_of says. CXX, CXXFLAGS, LDFLAGS and MAX_JOBS mean
what they always mean. The libraries stand on LibTorch's stable ABI: torch's headers are needed to build, but the result
runs with every torch from 2.10 on, so nothing depends on which torch, with or without CUDA, that is.
"""

import ctypes
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# pip runs this before it reads requires-python in pyproject.toml, and without build isolation takes any setuptools.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"seqkernels needs Python 3.10 or newer, and this is {sys.version.split()[0]}")
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"seqkernels is built by setuptools 77 or newer, and this is {setuptools.__version__}: "
        'pip install "setuptools>=77"'
    )
if "develop" in sys.argv:  # pip since 21.3 asks for no such command
    sys.exit("seqkernels is installed with -e by pip 21.3 or newer: pip install -U pip")

ROOT = Path(__file__).parent.resolve()

# Run-time dispatch (csrc/cpu/isa.cpp) tests for just these flags.
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
    # GCC 12 warns about its own AVX-512 header; Clang knows only the first of these.
    INSTRUCTION_SETS["avx512"] += " -Wno-uninitialized -Wno-maybe-uninitialized -Wno-unknown-warning-option"

FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
LINK_FLAGS = "-Wl,-z,relro,-z,now -Wl,--no-as-needed"  # what the loader fills in is read-only from then on
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Wno-deprecated-gpu-targets"


def words_of(variable: str) -> list[str]:
    """The words of an environment variable, by the shell's rules; ends with a sentence where these do not hold."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        sys.exit(f"{variable}={text} is no part of a command line: {str(error).lower()}")


def compiler() -> str:
    wanted = shlex.join(words_of("CXX"))
    for candidate in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(candidate)[0]):
            return candidate
    sys.exit(
        f"seqkernels needs a C++17 compiler, and {wanted or 'none of c++, g++, clang++'} is not to be found; install "
        "one, or set SEQKERNELS_BUILD=none for the pure Python package"
    )


def ninja() -> list[str]:
    # That of this Python first, whether or not its environment is active: another version builds all anew.
    found = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    if not found:
        sys.exit("seqkernels is built by ninja, which is not to be found: pip install ninja")
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not re.fullmatch(r"[1-9]\d*", jobs):
        sys.exit(f"MAX_JOBS={jobs} is no number of processes: 1 or more; unset, ninja takes all cores")
    return [found, *(["-j", jobs] if jobs else [])]


def torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None:
        sys.exit("seqkernels is built against torch, which is not installed here: pip install torch")
    return Path(spec.origin).parent


# ---- what to build


def parts_of(environment: Mapping[str, str], nvcc: str | None, gpus: list[int]) -> list[str]:
    """The names of the parts that SEQKERNELS_BUILD and FORCE_CUDA ask for; `nvcc` is the one that was found."""
    build, force = environment.get("SEQKERNELS_BUILD", ""), environment.get("FORCE_CUDA") or "0"
    if force not in ("0", "1"):
        sys.exit(f"FORCE_CUDA={force} is not known; it may be 1, to build the CUDA kernels in any case, or 0")
    if force == "1" and build in ("cpu", "none"):
        sys.exit(f"FORCE_CUDA=1 asks for the CUDA kernels, and SEQKERNELS_BUILD={build} for none: unset one of them")
    parts = {
        "": ["cpu", "cuda"] if force == "1" or (nvcc and gpus) else ["cpu"],
        "cpu": ["cpu"],
        "cuda": ["cpu", "cuda"],
        "none": [],
    }
    if build in parts:
        return parts[build]
    sys.exit(
        f"SEQKERNELS_BUILD={build} is not known; it may be cpu, cuda or none (pure Python); unset, it is cuda where "
        "there are an nvcc and a GPU, and else cpu"
    )


def left_out(nvcc: str | None) -> str:
    """What a build for the CPU says where nobody asked for one."""
    missing, first = ("GPU", "") if nvcc else ("nvcc", "after installing NVIDIA's CUDA toolkit, ")
    return (
        f"seqkernels: no CUDA kernels, as there is no {missing} here; {first}"
        "FORCE_CUDA=1 pip install --no-build-isolation -e . builds them"
    )


def gpus_here(driver: str = "libcuda.so.1") -> list[int]:
    """The compute capabilities of this machine's NVIDIA GPUs, 90 for 9.0, as their driver says."""
    try:
        cuda = ctypes.CDLL(driver)
    except OSError:
        return []
    count, major, minor, found = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), []
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for device in range(count.value):
        for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
            cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        found.append(10 * major.value + minor.value)
    return found


def check_platform(platform: str, free_threaded: bool) -> None:
    """End with a sentence where the compiled parts do not run."""
    if platform != "linux":
        sys.exit(
            f"seqkernels' compiled part is for Linux, not for {platform}; SEQKERNELS_BUILD=none installs the pure "
            "Python package"
        )
    if free_threaded:
        sys.exit(
            "seqkernels' compiled part is for Pythons with a GIL (its stable ABI, abi3, does not load without); "
            "SEQKERNELS_BUILD=none installs the pure Python package"
        )


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else environment.get("PATH", ""))


class Nvcc(NamedTuple):
    """A compiler for GPUs."""

    path: str
    version: tuple[int, int]
    capabilities: tuple[int, ...]  # that it compiles for: 75 is 7.5
    includes: tuple[str, ...]  # directories of CUDA's headers and libraries
    libraries: tuple[str, ...]


WITHOUT_CUDA = "SEQKERNELS_BUILD=cpu, with FORCE_CUDA unset, builds the CPU kernels alone"
OLDEST_NVCC = (12, 1)  # the first whose PTX (8.1) has st.async, by which the blocks of a cluster push


def examine(path: str | None) -> Nvcc:
    """Facts about the nvcc at `path`; ends with a sentence where there is none, or one that is too old."""
    if not path:
        sys.exit(
            "FORCE_CUDA=1 or SEQKERNELS_BUILD=cuda needs nvcc, which is neither at CUDA_HOME or CUDA_PATH nor on the "
            f"PATH; install NVIDIA's CUDA toolkit; {WITHOUT_CUDA}"
        )

    def run(*arguments: str) -> str:
        try:
            done = subprocess.run([path, *arguments], capture_output=True, text=True)
        except OSError as error:
            return str(error)
        return done.stdout + done.stderr

    def directories(found: re.Match | None, option: str) -> tuple[str, ...]:
        return tuple(w.removeprefix(option) for w in shlex.split(found[1] if found else "") if w.startswith(option))

    another = f"name another by CUDA_HOME; {WITHOUT_CUDA}"
    said = run("--version").strip()
    found = re.search(r"release (\d+)\.(\d+)", said)
    if not found:
        sys.exit(f"{path} does not say its version, but {said or 'nothing'}; {another}")
    version = int(found[1]), int(found[2])
    if version < OLDEST_NVCC:
        sys.exit(f"seqkernels needs nvcc {dotted(OLDEST_NVCC)} or newer, and {path} is {dotted(version)}; {another}")
    capabilities = sorted({int(number) for number in re.findall(r"compute_(\d+)", run("--list-gpu-arch"))})
    steps = run("--dryrun", "-x", "cu", "/dev/null")
    includes, libraries = (re.search(rf"{what}=(.*)", steps) for what in (" INCLUDES", " LIBRARIES"))
    return Nvcc(
        path,
        version,
        tuple(capabilities),
        directories(includes, "-I"),
        directories(libraries, "-L"),
    )


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# The lowest compute capability that a file's kernels can be compiled for.
CUDA_SOURCES = {
    "stepwise": 70,
    "pack_weights": 80,
    "single_cta": 80,
    "occupancy": 90,
    "cluster": 90,
    "persistent_grid": 90,
}
# Their paths are for 9.0 alone (has_path() in csrc/cuda/config.h): beside machine code for it PTX would never run, and
# takes a third of the compiler's time.
CUDA_FOR_90 = ("cluster", "persistent_grid")
# Those that are one launch are compiled for each cell and dtype, so that ninja uses all cores; the clusters, which take
# longest, for each pass as well (csrc/cuda/instances.h).
CUDA_PASSES = {"_forward": " -DSEQKERNELS_PASS=ForwardArgs", "_backward": " -DSEQKERNELS_PASS=BackwardArgs"}
CUDA_INSTANCED = {"single_cta": {"": ""}, "cluster": CUDA_PASSES, "persistent_grid": {"": ""}}
CELLS = re.search(r"enum class Cell {(.*?)}", (ROOT / "csrc/cells.h").read_text())[1].replace(",", "").split()
CUDA_DTYPES = {
    name: f"-DSEQKERNELS_SCALAR_NAME={scalar} -DSEQKERNELS_TF32={tf32}"
    for name, scalar, tf32 in (
        ("float32", "float32", "false"),
        ("tf32", "float32", "true"),
        ("bfloat16", "bfloat16", "false"),
        ("float16", "float16", "false"),
    )
}
CUDA_HOST_SOURCES = ("ops", "context", "sweep_host", "stepwise_host", "weight_grads", "plan")


def targets_of(nvcc: Nvcc, wanted: str | None, gpus: list[int]) -> list[str]:
    """What to compile for: machine code for sm_*, and PTX, which newer GPUs' drivers compile, for compute_*.

    `wanted` is TORCH_CUDA_ARCH_LIST. The default is the GPUs here; where there are none, or some that nvcc does not
    know, it is A100 with its relatives, H100, and PTX for all that comes after them, and, for the kernels that can, the
    oldest GPU that nvcc knows."""
    names = (wanted or "").replace(";", " ").split()
    if not names and gpus and all(gpu >= min(CUDA_SOURCES.values()) and gpu in nvcc.capabilities for gpu in gpus):
        return [f"sm_{gpu}a" if gpu == 90 else f"sm_{gpu}" for gpu in sorted(set(gpus))]
    if not names:
        oldest = [capability for capability in nvcc.capabilities if 70 <= capability < 80][:1]
        return [*(f"sm_{capability}" for capability in oldest), "sm_80", "sm_90a", "compute_80"]
    targets, ptx = [], []
    for name in names:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not found:
            sys.exit(f"TORCH_CUDA_ARCH_LIST={wanted}: {name} is no compute capability like 8.0, 9.0a or 8.0+PTX")
        capability = int(found[1] + found[2])
        if capability < min(CUDA_SOURCES.values()) or capability not in nvcc.capabilities:
            known = [dotted(divmod(one, 10)) for one in nvcc.capabilities]
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST={wanted}: {name} is not to be had; the kernels need 7.0 or more, and nvcc "
                f"{dotted(nvcc.version)} ({nvcc.path}) compiles for {', '.join(known)}"
            )
        targets.append(f"sm_{capability}{found[3]}")
        if found[4]:
            ptx.append(f"compute_{capability}{found[3]}")
    return list(dict.fromkeys(targets + ptx))


def targets_from(lowest: int, targets: list[str]) -> list[str]:
    """Those of `targets` that a file can be compiled for which needs `lowest`, so that every GPU from there on that the
    others have code for has that file's as well."""
    able = []
    for target in targets:
        kind, number = re.match(r"(sm|compute)_(\d+)", target).groups()
        if int(number) >= lowest:
            able.append(target)
        elif kind == "compute":
            able.append(f"compute_{lowest}")
    return list(dict.fromkeys(able)) or [f"compute_{lowest}"]


def targets_for(source: str, targets: list[str]) -> list[str]:
    """Those of `targets` that a file of CUDA_SOURCES is compiled for."""
    able = targets_from(CUDA_SOURCES[source], targets)
    for_90 = [target for target in able if target.startswith("sm_90")] if source in CUDA_FOR_90 else []
    return for_90 or able


# ---- how to build it

STABLE = "-DTORCH_TARGET_VERSION=0x020a000000000000"


class Object(NamedTuple):
    source: str
    name: str
    flags: str
    rule: str = "compile"


class Library(NamedTuple):
    objects: list[Object]
    flags: str = "-ltorch_cpu"


def header_flags() -> str:
    """Flags for what includes torch's headers: where these and Python's are; names of files that do not tell where the
    build was; and a guarded stack, which costs kernels time."""
    torch = torch_directory()
    headers = shlex.join(["-isystem", f"{torch}/include", "-isystem", sysconfig.get_paths()["include"]])
    names = shlex.join(f"-ffile-prefix-map={there}={name}" for there, name in ((ROOT, "seqkernels"), (torch, "torch")))
    return f"{headers} {names} -fstack-protector-strong"


def cpu_library(includes: str) -> Library:
    objects = [
        Object("csrc/python.cpp", "python.o", f"{includes} {STABLE} -DPy_LIMITED_API=0x030a0000"),
        Object("csrc/cpu/ops.cpp", "ops.o", f"{includes} {STABLE}"),
        Object("csrc/cpu/isa.cpp", "isa.o", ""),
        Object("csrc/cpu/schedule.cpp", "schedule.o", ""),
        Object("csrc/cuda/plan.cpp", "cuda_plan.o", ""),
        Object("csrc/older_systems.cpp", "older_systems.o", ""),
    ]
    for name, flags in INSTRUCTION_SETS.items():
        objects.append(Object("csrc/cpu/kernels.cpp", f"kernels_{name}.o", f"-DSEQKERNELS_ISA={name} {flags}"))
    return Library(objects)


class Instance(NamedTuple):
    """A translation unit of the CUDA kernels: a file, or its part for one cell and dtype (TF32 is one), or one pass."""

    source: str
    name: str
    flags: str


def cuda_instances() -> list[Instance]:
    """Those that take longest come first."""
    instances = [
        Instance(
            source,
            f"{source}{of_pass}_{cell}_{dtype}",
            f"-DSEQKERNELS_CELL_NAME={cell} {dtype_flags}{pass_flags}",
        )
        for dtype, dtype_flags in CUDA_DTYPES.items()
        for cell in reversed(CELLS)
        for source, passes in CUDA_INSTANCED.items()
        for of_pass, pass_flags in passes.items()
    ]
    return instances + [Instance(source, source, "") for source in CUDA_SOURCES if source not in CUDA_INSTANCED]


def cuda_library(includes: str, nvcc: Nvcc, targets: list[str], system: str) -> Library:
    """Built against any torch, but loaded by one with CUDA only. `system`: flags of the system's libraries."""
    includes += "".join(f" -isystem {shlex.quote(directory)}" for directory in nvcc.includes)
    objects = []
    for of in cuda_instances():
        own_targets = targets_for(of.source, targets)
        codes = " ".join(f"-gencode arch={t.replace('sm_', 'compute_')},code={t}" for t in own_targets)
        objects.append(Object(f"csrc/cuda/{of.source}.cu", f"cuda_{of.name}.o", f"{of.flags} {codes}", "compile_cuda"))
    objects.append(Object("csrc/cuda/dispatch.cpp", "cuda_dispatch.o", ""))
    objects.append(Object("csrc/older_systems.cpp", "cuda_older_systems.o", ""))
    built = f"""-DSEQKERNELS_CUDA_BUILD='"{dotted(nvcc.version)} {" ".join(targets)}"'"""
    for name in CUDA_HOST_SOURCES:
        objects.append(
            Object(f"csrc/cuda/{name}.cpp", f"cuda_{name}_host.o", f"-DUSE_CUDA {includes} {STABLE} {built}")
        )
    # The runtime's names stay inside, so that they are never another version's that torch has loaded.
    directories = shlex.join(f"-L{directory}" for directory in nvcc.libraries)
    return Library(objects, f"{directories} -lcudart_static -Wl,--exclude-libs,ALL {system} -ltorch -ltorch_cpu -lc10")


# The libraries whose functions glibc 2.34 moved into libc, and how these functions begin.
MOVED_INTO_LIBC = {"libdl.so.2": "dl", "libpthread.so.0": "pthread_|sem_", "librt.so.1": "shm_"}


def older_glibc(directory: Path) -> str:
    """Flags to link libdl, libpthread and librt so that the result loads from glibc 2.28 on, not only from this one on.

    The CUDA runtime calls them. A glibc from 2.34 on has their functions in libc twice, by a new version and by that of
    before, and the linker takes the new one; so it gets stand-ins for the libraries of before, made in `directory`.
    No program may run there: nvcc's load what they need from where they run."""

    def run(*command: str, **options: str) -> str:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **options).stdout

    directory.mkdir(parents=True, exist_ok=True)
    cxx, libraries = shlex.split(compiler()), []
    symbols = run("nm", "-D", run(*cxx, "-print-file-name=libc.so.6").strip())
    found = re.findall(r" (\w+)(@@?)(GLIBC_[\d.]+)$", symbols, re.MULTILINE)
    moved = {name for name, mark, version in found if (mark, version) == ("@@", "GLIBC_2.34")}
    for library, beginnings in MOVED_INTO_LIBC.items():
        old = {name: v for name, mark, v in found if mark == "@" and name in moved and re.match(beginnings, name)}
        if not old:
            continue
        versions = directory / f"{library}.map"
        names = {version: [name for name in old if old[name] == version] for version in old.values()}
        versions.write_text("".join(f"{version} {{ {'; '.join(own)}; }};\n" for version, own in names.items()))
        assembly = "".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in old)
        assembly += '.section .note.GNU-stack, "", %progbits\n'
        options = f"-shared -nostdlib -Wl,-soname,{library} -x assembler -".split()
        libraries.append(str(directory / library))
        run(*cxx, *options, f"-Wl,--version-script,{versions}", "-o", libraries[-1], input=assembly)
    return f"{shlex.join(libraries)} -lpthread -ldl -lrt"


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


def full_disk(*directories: Path, least_mb: int = 50) -> str:
    """What may be why a build failed where hardly any room is left; "" where there is."""
    said = ""
    for directory in directories:
        there = next(one for one in (directory, *directory.parents) if one.exists())
        free = shutil.disk_usage(there).free >> 20
        said += f"only {free} MB are free for {directory}; " if free < least_mb else ""
    return said


class BuildNative(build_ext):
    """Builds all libraries by one build.ninja."""

    def get_ext_filename(self, name: str) -> str:
        # No Python module: torch loads it.
        path = name.replace(".", os.sep)
        return f"{path}.so" if path.endswith("_cuda") else super().get_ext_filename(name)

    def run(self) -> None:
        super().run()
        if self.inplace and CUDA not in self.extensions:
            (ROOT / "seqkernels/_cuda.so").unlink(missing_ok=True)  # that of a build before, of other sources perhaps

    def build_extensions(self) -> None:
        directory = Path(self.build_temp).resolve()
        if self.editable_mode:  # whose own is thrown away; objects in a directory that stays are compiled once
            directory = ROOT / f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        remedy = f"{WITHOUT_CUDA}; " if CUDA in self.extensions else ""
        try:
            failed = "" if build(self.libraries_in(directory), directory, NVCC or "") else "compiling failed, see above"
        except (OSError, subprocess.CalledProcessError) as error:
            failed = f"the build ended: {error}"
        if failed:
            compilers = Path(os.environ.get("TMPDIR") or "/tmp")  # where they write what is not to stay
            sys.exit(
                f"seqkernels: {failed}; {full_disk(directory, compilers)}{remedy}SEQKERNELS_BUILD=none installs the "
                "pure Python package"
            )

    def libraries_in(self, directory: Path) -> dict[Path, Library]:
        """What is to be built, by the files that it becomes; one line says what."""
        native, cuda = (Path(self.get_ext_fullpath(extension.name)).resolve() for extension in (NATIVE, CUDA))
        libraries = {native: cpu_library(header_flags())}
        if CUDA in self.extensions:
            nvcc = examine(NVCC)
            targets = targets_of(nvcc, os.environ.get("TORCH_CUDA_ARCH_LIST"), gpus_here())
            print(
                f"seqkernels: CUDA kernels for {', '.join(targets)} by nvcc {dotted(nvcc.version)} ({nvcc.path})",
                flush=True,
            )
            libraries[cuda] = cuda_library(header_flags(), nvcc, targets, older_glibc(directory / "older_glibc"))
        else:
            cuda.unlink(missing_ok=True)  # that of a build before would be taken along
            if not os.environ.get("SEQKERNELS_BUILD"):
                print(left_out(NVCC), flush=True)
        return libraries


def headers() -> list[str]:
    return [str(header.relative_to(ROOT)) for header in sorted((ROOT / "csrc").rglob("*.*h"))]


NATIVE = Extension(
    "seqkernels._C",
    sources=[
        "csrc/python.cpp",
        "csrc/older_systems.cpp",
        "csrc/cuda/plan.cpp",
        *(f"csrc/cpu/{name}.cpp" for name in ("ops", "isa", "schedule", "kernels")),
    ],
    depends=headers(),
    py_limited_api=True,
)
CUDA = Extension(
    "seqkernels._cuda",
    sources=[
        "csrc/older_systems.cpp",
        *(f"csrc/cuda/{name}.cpp" for name in (*CUDA_HOST_SOURCES, "dispatch")),
        *(f"csrc/cuda/{name}.cu" for name in CUDA_SOURCES),
    ],
    depends=headers(),
)
NVCC = find_nvcc(os.environ)

if __name__ == "__main__":
    parts = parts_of(os.environ, NVCC, gpus_here())
    if parts:
        check_platform(sys.platform, bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
    setup(
        ext_modules=[{"cpu": NATIVE, "cuda": CUDA}[part] for part in parts],
        cmdclass={"build_ext": BuildNative},
        # What pip puts into an isolated build, when it asks; a pure Python build needs no torch.
        setup_requires=["torch>=2.10", "ninja"] if parts and "setuptools.build_meta" in sys.modules else [],
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if parts else {},
    )
