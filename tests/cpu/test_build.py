"""What setup.py and native_build decide to build, as tables; and what they have built, which every torch can load."""

import ctypes
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import setuptools
import torch
from gpus import GPUS
from libraries import assert_hardened

import seqkernels
from seqkernels import hardware
from seqkernels.backends import cuda
from seqkernels.hardware import GPU

SETUP = Path(__file__).parents[2] / "setup.py"
CUDA = Path(seqkernels.__file__).with_name("_cuda.so")
needs_setup = pytest.mark.skipif(not SETUP.exists(), reason="setup.py is not beside the tests")
needs_library = pytest.mark.skipif(not CUDA.exists(), reason="this install has no CUDA kernels")


@pytest.fixture(scope="module")
def setup():
    spec = importlib.util.spec_from_file_location("setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_setup
@pytest.mark.parametrize(
    ("environment", "nvcc", "gpus", "parts"),
    [
        ({}, None, [], ["cpu"]),
        ({"SEQKERNELS_BUILD": "", "FORCE_CUDA": ""}, None, [90], ["cpu"]),
        ({}, "/opt/nvcc", [], ["cpu"]),
        ({"FORCE_CUDA": "0"}, "/opt/nvcc", [], ["cpu"]),
        ({}, "/opt/nvcc", [90], ["cpu", "cuda"]),
        ({"FORCE_CUDA": "1"}, "/opt/nvcc", [], ["cpu", "cuda"]),
        ({"FORCE_CUDA": "1"}, None, [], ["cpu", "cuda"]),  # which then ends with a sentence
        ({"SEQKERNELS_BUILD": "cpu", "FORCE_CUDA": "0"}, "/opt/nvcc", [90], ["cpu"]),
        ({"SEQKERNELS_BUILD": "cuda"}, "/opt/nvcc", [], ["cpu", "cuda"]),
        ({"SEQKERNELS_BUILD": "cuda"}, None, [], ["cpu", "cuda"]),  # the same
        ({"SEQKERNELS_BUILD": "cuda", "FORCE_CUDA": "1"}, "/opt/nvcc", [], ["cpu", "cuda"]),
        ({"SEQKERNELS_BUILD": "none"}, "/opt/nvcc", [90], []),
    ],
)
def test_which_parts_are_built(setup, environment, nvcc, gpus, parts):
    assert setup.parts_of(environment, nvcc, gpus) == parts


@needs_setup
def test_a_full_disk_is_named_where_a_build_failed(setup, tmp_path, monkeypatch):
    assert setup.full_disk(tmp_path, min_mb=0) == ""
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9 << 30, 8 << 30, 3 << 20))
    there, to_come = tmp_path, tmp_path / "to/come"
    said = f"only 3 MB are free for {there}; only 3 MB are free for {to_come}; "
    assert setup.full_disk(there, to_come) == said


@needs_setup
def test_what_is_left_out_unasked_is_said_in_a_line(setup):
    assert "no CUDA kernels, as there is no GPU here; FORCE_CUDA=1 pip install --no" in setup.left_out("/opt/nvcc")
    assert "as there is no nvcc here; after installing NVIDIA's CUDA toolkit, FORCE_CUDA=1" in setup.left_out(None)


@needs_setup
def test_a_build_without_cuda_removes_the_cuda_library_of_one_before(setup, tmp_path, monkeypatch):
    def build(libraries, directory, nvcc):
        for library in libraries:
            library.parent.mkdir(parents=True, exist_ok=True)
            library.write_text("built")
        return True

    package = tmp_path / "seqkernels"
    package.mkdir()
    (package / "_cuda.so").write_text("of a build before")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup.ninja, "build", build)
    monkeypatch.setattr(setup.libraries, "header_flags", str)
    options = {"ext_modules": [setup.NATIVE], "cmdclass": {"build_ext": setup.BuildNative}}
    setuptools.setup(
        name="seqkernels", packages=["seqkernels"], script_args=["-q", "build_ext", "--inplace"], **options
    )
    assert [path.name for path in package.iterdir()] == ["_C.abi3.so"]


DRIVER = """
static const int capabilities[][2] = {{9, 0}, {8, 6}};
extern "C" int cuInit(unsigned) { return FAILURE; }
extern "C" int cuDeviceGetCount(int* count) { *count = 2; return 0; }
extern "C" int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = capabilities[device][attribute - 75];
  return 0;
}
"""


@needs_setup
@pytest.mark.parametrize(("failure", "gpus"), [(0, [90, 86]), (100, [])], ids=["two GPUs", "no device"])
def test_the_driver_is_asked_for_gpus(setup, failure, gpus, tmp_path):
    library = tmp_path / "driver.so"
    options = ["-shared", "-fPIC", f"-DFAILURE={failure}", "-xc++", "-", "-o", str(library)]
    command = [*setup.toolchain.compiler().split(), *options]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    assert setup.toolchain.gpus_here(str(library)) == gpus
    assert setup.toolchain.gpus_here(str(tmp_path / "none.so")) == []


@needs_setup
def test_an_unknown_build_is_refused(setup):
    with pytest.raises(SystemExit, match="SEQKERNELS_BUILD=gpu is not known; it may be cpu, cuda or none"):
        setup.parts_of({"SEQKERNELS_BUILD": "gpu"}, None, [])
    for value in ("false", "no", "on", "2", " "):
        with pytest.raises(SystemExit, match=rf"FORCE_CUDA={value} is not known; it may be 1, .* or 0"):
            setup.parts_of({"FORCE_CUDA": value}, "/opt/nvcc", [90])
    for build in ("cpu", "none"):
        with pytest.raises(SystemExit, match=rf"FORCE_CUDA=1 asks .*SEQKERNELS_BUILD={build} for none: unset one"):
            setup.parts_of({"SEQKERNELS_BUILD": build, "FORCE_CUDA": "1"}, "/opt/nvcc", [90])


@needs_setup
def test_a_platform_that_the_compiled_part_is_not_for_is_refused_in_a_sentence(setup):
    setup.check_platform("linux", free_threaded=False)
    for platform in ("darwin", "win32"):
        with pytest.raises(SystemExit, match=rf"is for Linux, not for {platform}; SEQKERNELS_BUILD=none installs"):
            setup.check_platform(platform, free_threaded=False)
    with pytest.raises(SystemExit, match=r"is for Pythons with a GIL .* SEQKERNELS_BUILD=none installs"):
        setup.check_platform("linux", free_threaded=True)


def test_an_install_without_the_compiled_part_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqkernels._C", None)
    assert "SEQKERNELS_BUILD=none" in hardware._load_native()
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": 1}.get)
    assert "for Pythons with a GIL" in hardware._load_native()


def fake_nvcc(directory: Path, version: str = "13.0", capabilities: tuple[int, ...] = (75, 80, 90, 100)) -> Path:
    nvcc = directory / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    names = "\n".join(f"compute_{capability}" for capability in capabilities)
    nvcc.write_text(
        f"""#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88";;
  --list-gpu-arch) echo "{names}";;
  --dryrun) echo '#$ INCLUDES="-I/cuda/include"  ' >&2; echo '#$ LIBRARIES=  "-L/cuda/lib/stubs" "-L/cuda/lib"' >&2;;
esac
"""
    )
    nvcc.chmod(0o755)
    return nvcc


@needs_setup
def test_where_nvcc_is_looked_for(setup, tmp_path):
    home, other = (fake_nvcc(tmp_path / name) for name in ("home", "other"))
    path = f"/nowhere:{other.parent}"
    for environment, found in (
        ({}, None),
        ({"PATH": "/nowhere"}, None),
        ({"PATH": path}, other),
        ({"PATH": path, "CUDA_HOME": str(tmp_path / "home")}, home),
        ({"PATH": path, "CUDA_PATH": str(tmp_path / "home")}, home),
        ({"PATH": path, "CUDA_HOME": "/nowhere"}, None),  # what is named is taken, and nothing else
    ):
        assert setup.toolchain.find_nvcc(environment) == (found and str(found)), environment


@needs_setup
def test_what_an_nvcc_says_of_itself(setup, tmp_path):
    nvcc = str(fake_nvcc(tmp_path))
    assert setup.toolchain.examine(nvcc) == (
        nvcc,
        (13, 0),
        (75, 80, 90, 100),
        ("/cuda/include",),
        ("/cuda/lib/stubs", "/cuda/lib"),
    )


@needs_setup
def test_no_nvcc_one_too_old_and_one_that_is_broken_are_refused_in_a_sentence(setup, tmp_path):
    with pytest.raises(SystemExit, match=r"needs nvcc, which is neither at CUDA_HOME .* SEQKERNELS_BUILD=cpu"):
        setup.toolchain.examine(None)
    with pytest.raises(SystemExit, match=r"needs nvcc 12\.1 or newer, and .*nvcc is 12\.0; .*SEQKERNELS_BUILD=cpu"):
        setup.toolchain.examine(str(fake_nvcc(tmp_path, "12.0")))
    assert setup.toolchain.examine(str(fake_nvcc(tmp_path / "oldest", "12.1"))).version == (12, 1)
    for name, script, said in (("silent", "#!/bin/sh\nexit 1", "nothing"), ("lost", "#!/no/shell", "No such file")):
        broken = tmp_path / name
        broken.write_text(script)
        broken.chmod(0o755)
        with pytest.raises(SystemExit, match=rf"{name} does not say its version, but .*{said}.*SEQKERNELS_BUILD=cpu"):
            setup.toolchain.examine(str(broken))


CUDA_12, CUDA_13 = (50, 60, 70, 72, 75, 80, 86, 87, 89, 90), (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
TARGETS = [
    # what nvcc compiles for, TORCH_CUDA_ARCH_LIST, what is built, what of it a file that needs 8.0
    (CUDA_13, None, "sm_75 sm_80 sm_90a compute_80", "sm_80 sm_90a compute_80"),
    (CUDA_12, " ; ", "sm_70 sm_80 sm_90a compute_80", "sm_80 sm_90a compute_80"),
    ((80, 90, 100), None, "sm_80 sm_90a compute_80", "sm_80 sm_90a compute_80"),
    (CUDA_13, "8.0;9.0a+PTX", "sm_80 sm_90a compute_90a", "sm_80 sm_90a compute_90a"),
    (CUDA_13, "9.0", "sm_90", "sm_90"),
    (CUDA_13, "7.5 8.0 10.0f 12.0+PTX", "sm_75 sm_80 sm_100f sm_120 compute_120", "sm_80 sm_100f sm_120 compute_120"),
    (CUDA_13, "7.5+PTX", "sm_75 compute_75", "compute_80"),
    (CUDA_12, "7.0;7.0", "sm_70", "compute_80"),
]
GPU_TARGETS = [
    # the GPUs here, TORCH_CUDA_ARCH_LIST, what is built
    ([90, 90], None, "sm_90a"),
    ([86, 75], "", "sm_75 sm_86"),
    ([90], "8.0", "sm_80"),
    ([61, 80], None, "sm_75 sm_80 sm_90a compute_80"),  # none for the first
    ([130], None, "sm_75 sm_80 sm_90a compute_80"),  # newer than nvcc
]


@needs_setup
@pytest.mark.parametrize(("capabilities", "wanted", "targets", "from_80"), TARGETS)
def test_what_is_compiled_for(setup, capabilities, wanted, targets, from_80):
    nvcc = setup.toolchain.Nvcc("nvcc", (13, 0), capabilities, (), ())
    assert setup.cuda.targets_of(nvcc, wanted, []) == targets.split()
    assert setup.cuda.targets_from(80, targets.split()) == from_80.split()


@needs_setup
@pytest.mark.parametrize(("gpus", "wanted", "targets"), GPU_TARGETS)
def test_the_gpus_here_are_compiled_for(setup, gpus, wanted, targets):
    assert (
        setup.cuda.targets_of(setup.toolchain.Nvcc("nvcc", (13, 0), CUDA_13, (), ()), wanted, gpus) == targets.split()
    )


@needs_setup
@pytest.mark.parametrize("row", TARGETS, ids=lambda row: row[2])
def test_a_gpu_that_runs_some_kernels_runs_all_that_it_can(setup, row):
    """So that `select` need not know which file was compiled for what."""
    built = row[2].split()
    numbers = 70, 75, 80, 86, 90, 100, 103, 120
    for number, (source, lowest) in itertools.product(numbers, setup.cuda.CUDA_SOURCES.items()):
        gpu = GPU("", f"sm_{number}", 0, 0)
        able = number == 90 if source in setup.cuda.CUDA_OF_CLUSTERS else number >= lowest
        if able and any(cuda._runs(target, gpu) for target in built):
            assert any(cuda._runs(target, gpu) for target in setup.cuda.targets_for(source, built)), (number, source)


@needs_setup
@pytest.mark.parametrize("row", TARGETS, ids=lambda row: row[2])
def test_a_gpu_without_code_for_clusters_is_said_to_run_none(setup, row):
    """`occupancy` counts them: it is compiled for those GPUs that the cluster kernels are compiled for."""
    built = row[2].split()
    assert setup.cuda.targets_for("occupancy", built) == setup.cuda.targets_for("cluster", built)


@needs_setup
def test_kernels_of_clusters_have_no_ptx_beside_machine_code(setup):
    for targets, cluster, grid in (
        ("sm_75 sm_80 sm_90a compute_80", "sm_90a", "sm_90a"),
        ("sm_80 compute_80", "compute_90", "compute_90"),  # which the driver compiles, from 9.0 on
        ("sm_90 sm_100f compute_100f", "sm_90 sm_100f", "sm_90"),
        ("sm_90a sm_120", "sm_90a sm_120", "sm_90a"),
        ("sm_100f compute_100f", "sm_100f", "sm_100f compute_100f"),
    ):
        assert setup.cuda.targets_for("cluster", targets.split()) == cluster.split()
        assert setup.cuda.targets_for("persistent_grid", targets.split()) == grid.split()


@needs_setup
@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("Ampere", "Ampere is no compute capability like 8.0"),
        ("8.0;6.0", "6.0 is not to be had; the kernels need 7.0 or more"),
        ("7.0", r"7.0 is not to be had; .* nvcc 13.0 \(nvcc\) compiles for 7.5, 8.0"),
    ],
)
def test_architectures_that_cannot_be_are_refused_in_a_sentence(setup, wanted, said):
    with pytest.raises(SystemExit, match=said):
        setup.cuda.targets_of(setup.toolchain.Nvcc("nvcc", (13, 0), CUDA_13, (), ()), wanted, [])


@pytest.mark.parametrize("name", ["_C.abi3.so", "_cuda.so"])
@pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is not here")
def test_the_libraries_use_nothing_of_torch_but_its_stable_interface(name):
    library = CUDA.with_name(name)
    if not library.exists():
        pytest.skip(f"this install has no {name}")
    said = subprocess.run(["nm", "-DC", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    used = [line.split(None, 1) for line in said.splitlines()]
    stable = [symbol for _, symbol in used if symbol.startswith(("aoti_torch_", "torch_"))]
    # Those with a version are the system's. Python's are weak: C++ programs without it load the library as well.
    others = [s for kind, s in used if kind == "U" and "@" not in s and not s.startswith("std::")]
    assert stable
    assert sorted(set(others) - set(stable)) == []
    # So no thread of theirs can be joinable as it is destroyed, which ends a process by std::terminate and SIGABRT
    # (tests/cuda/exits.py). Those of the CUDA runtime in _cuda.so are pthread's, which do no such thing.
    assert not [symbol for _, symbol in used if symbol.startswith("std::") and "thread" in symbol]


@needs_library
def test_the_cuda_library_loads_where_torch_has_cuda_and_refuses_cpu_tensors():
    code = """if True:
        import torch
        from seqkernels.hardware import THIS_MACHINE
        if torch.version.cuda is None:
            assert THIS_MACHINE.cuda_missing == "this torch has no CUDA"
            raise SystemExit
        assert not THIS_MACHINE.cuda_missing, THIS_MACHINE.cuda_missing
        print(THIS_MACHINE.cuda_build)
        x, h_0 = torch.zeros(6, 4), torch.zeros(1, 2, 3)
        weights = [torch.zeros(9, 4), torch.zeros(9, 3)]
        try:
            torch.ops.seqkernels.cuda_forward("gru", x, weights, h_0, None, None, False, False, 0, 0, 0, 1)
        except NotImplementedError as error:
            assert "'seqkernels::cuda_forward' with arguments from the 'CPU' backend" in str(error), error
        else:
            raise AssertionError("CUDA kernels took CPU tensors")
    """
    environment = {key: value for key, value in os.environ.items() if key != "SEQKERNELS_EMULATOR"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    if torch.version.cuda:
        assert "targets=" in done.stdout


def test_gpus_run_what_was_built_for_them():
    runs = {
        name: [t for t in ("sm_75", "sm_80", "sm_86", "sm_90a", "sm_100f", "compute_80", "compute_90a")
               if not gpu.amd and cuda._runs(t, gpu)]
        for name, gpu in GPUS.items()
    }  # fmt: skip
    assert runs == {
        "NVIDIA A100-SXM4-80GB": ["sm_80", "compute_80"],
        "NVIDIA L4": ["sm_80", "sm_86", "compute_80"],
        "NVIDIA GeForce RTX 4060 Laptop GPU": ["sm_80", "sm_86", "compute_80"],
        "NVIDIA H200": ["sm_90a", "compute_80", "compute_90a"],
        "NVIDIA B200": ["sm_100f", "compute_80"],
        "AMD Instinct MI300X": [],
        "Tesla T4": ["sm_75"],
    }


@needs_setup
def test_paths_with_spaces_dollars_and_colons_are_built_in(setup, tmp_path, monkeypatch):
    odd = tmp_path / "we ird$x:y"
    (odd / "include").mkdir(parents=True)
    (odd / "include/answer.h").write_text("#define ANSWER 42\n")
    (odd / "one.cpp").write_text(
        '#include <answer.h>\nextern "C" __attribute__((visibility("default"))) const char* text() { return TEXT; }\n'
    )
    for module in (setup.libraries, setup.ninja):
        monkeypatch.setattr(module, "ROOT", odd)
        monkeypatch.setattr(module, "torch_directory", lambda: odd)
    monkeypatch.setenv("CXXFLAGS", """'-DTEXT="a $b"'""")
    monkeypatch.setenv("LDFLAGS", r"'-Wl,-rpath,$ORIGIN'")
    library = setup.libraries.Library([setup.libraries.Object("one.cpp", "one.o", setup.libraries.header_flags())], "")
    assert setup.ninja.build({odd / "out/lib.so": library}, odd / "objects")
    loaded = ctypes.CDLL(str(odd / "out/lib.so"))
    loaded.text.restype = ctypes.c_char_p
    assert loaded.text() == b"a $b"
    assert b"$ORIGIN" in (odd / "out/lib.so").read_bytes()


@needs_setup
@pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is not here")
def test_what_glibc_234_moved_into_libc_is_linked_by_its_older_name(setup, tmp_path):
    code = """
        #include <dlfcn.h>
        #include <pthread.h>
        #include <semaphore.h>
        static void* work(void* arg) { sem_post((sem_t*)arg); return dlsym(RTLD_DEFAULT, "puts"); }
        extern "C" int run() {
          sem_t semaphore;
          pthread_t thread;
          void* found = nullptr;
          return sem_init(&semaphore, 0, 0) + pthread_create(&thread, nullptr, work, &semaphore) +
                 sem_wait(&semaphore) + pthread_join(thread, &found) + (found == nullptr);
        }
    """
    library = tmp_path / "lib.so"
    flags = shlex.split(setup.libraries.older_glibc(tmp_path / "older"))
    options = ["-shared", "-fPIC", "-xc++", "-", "-xnone", "-o", str(library), *flags]
    command = [*setup.toolchain.compiler().split(), *options]
    subprocess.run(command, input=code, text=True, check=True)
    said = subprocess.run(["nm", "-D", library], check=True, capture_output=True, text=True).stdout
    versions = re.findall(r"U (?:dl|pthread|sem)\w+@GLIBC_2\.(\d+)", said)
    assert len(versions) == 6 and all(int(version) <= 28 for version in versions), said
    assert ctypes.CDLL(str(library)).run() == 0


@needs_setup
def test_environment_variables_that_are_no_command_lines_are_refused_in_a_sentence(setup, tmp_path, monkeypatch):
    for variable in ("CXX", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.setenv(variable, "'c++ -O2")
        with pytest.raises(SystemExit, match=rf"{variable}='c\+\+ -O2 is no part of a command line: no closing quot"):
            setup.ninja.build({}, tmp_path)
        monkeypatch.delenv(variable)
    monkeypatch.setenv("CXX", " ")
    assert setup.toolchain.compiler() in ("c++", "g++", "clang++")
    for jobs in ("0", "-1", "two"):
        monkeypatch.setenv("MAX_JOBS", jobs)
        with pytest.raises(SystemExit, match=f"MAX_JOBS={jobs} is no number of processes"):
            setup.ninja.build({}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
@pytest.mark.parametrize("library", ["_C.abi3.so", "_cuda.so"])
def test_the_library_is_hardened_and_names_no_place_of_its_build(library):
    path = Path(seqkernels.__file__).with_name(library)
    if not path.exists():
        pytest.skip(f"this install has no {library}")
    assert_hardened(path)
    code = path.read_bytes()
    assert b"__stack_chk_fail" in code
    assert os.fsencode(sysconfig.get_paths()["purelib"]) not in code
    assert os.fsencode(SETUP.parent) not in code
