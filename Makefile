# Every target does its own set-up, on a machine with nothing but python3, make and g++; a second call is instant.
# TORCH=2.14.1 (any version from 2.10 on) takes that torch, in an environment of its own.
DEFAULT_TORCH := 2.13.0
TORCH := $(DEFAULT_TORCH)
VENV := $(if $(filter-out $(DEFAULT_TORCH),$(TORCH)),build/venv-$(TORCH),.venv)
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
SOURCES := setup.py $(shell find build_tools csrc -type f -not -name '*.pyc')
# One sanitizer a run, both in `make nightly`: together they compile for as long as all else. UBSan's checks stop the test.
SANITIZERS = $(shell $(PYTHON) tests/sampling.py address undefined)
SANITIZE = $(addprefix -fsanitize=,$(SANITIZERS)) $(if $(filter undefined,$(SANITIZERS)),-fno-sanitize-recover=undefined) -g1 -O1
SANITIZED = $(shell grep -l 'mark.sanitized' tests/test_*.py)
RUNTIME_address := asan
RUNTIME_undefined := ubsan
preload = $(shell gcc -print-file-name=lib$(1).so)

CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c')

.PHONY: build demo docs test nightly pytest lint portable asan-build asan cuda bench gpu gpu-check gpu-bench gpu-tune upstream \
    clean

build: $(VENV)/built

demo: $(VENV)/built $(VENV)/demo
	$(PYTHON) -m qkernels demo

# The guide and the API reference as HTML, in build/docs.
docs: $(VENV)/built $(VENV)/docs
	$(PYTHON) docs/build.py

# What compiles runs side by side, each target's output in one piece; then the tests. pytest's closing line ends the output.
test:
	@$(MAKE) --no-print-directory -j 2 --output-sync=target \
	    lint portable cuda asan-build $(VENV)/built $(VENV)/dev $(VENV)/demo $(VENV)/docs $(VENV)/examples
	@$(MAKE) --no-print-directory asan
	@$(MAKE) --no-print-directory pytest

# All cases of all tests, every architecture and every check, of which `make test` takes a sample (tests/sampling.py).
nightly:
	@QKERNELS_TEST_SEED=all $(MAKE) --no-print-directory test MARKS='-m ""'

# glibc fills memory with 0xfe before it hands it out: what no kernel writes is -1.7e38 in an output, and NaN in fp16.
POISON = GLIBC_TUNABLES=glibc.malloc.perturb=1:glibc.malloc.tcache_count=0
# Two workers, a file to a worker, the files with long tests first (tests/conftest.py). One thread each: more would only
# be in each other's way; tests that need threads ask for them.
PYTEST = OMP_NUM_THREADS=1 $(POISON) $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

pytest: $(VENV)/built $(VENV)/dev $(VENV)/demo $(VENV)/docs $(VENV)/examples cuda
	$(PYTEST) $(MARKS) --durations=10

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(PYTHON) tests/headers.py

# The sources with the oldest and the newest torch, by clang and for aarch64: two of these checks in each run.
portable: $(VENV)/torch
	$(PYTHON) tests/portable.py

# The kernels' tests under AddressSanitizer or UndefinedBehaviorSanitizer, on a build of their own, in fp32 and bf16: the
# other types read and write memory as these do. --capture=sys lets the sanitizers' own text through. ASan looks for libstdc++'s
# throw when the process starts, before Python has loaded it.
asan-build: $(VENV)/installed
	QKERNELS_STRICT_BUILD=1 QKERNELS_CXXFLAGS="$(SANITIZE)" $(PYTHON) setup.py -q build -b build/asan --build-lib build/asan/lib

asan: asan-build $(VENV)/dev
	PYTHONPATH=build/asan/lib ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(foreach name,$(SANITIZERS),$(call preload,$(RUNTIME_$(name)))) $(call preload,stdc++)" \
	    $(PYTEST) --capture=sys -p no:cacheprovider \
	    -k "not (compile or export or opcheck or subprocess or triton or reference] or -reference- or torch.float16 or torch.float64)" \
	    $(SANITIZED)

# The CUDA library for one architecture, another one in the next run; for every one in `make nightly`. Needs nvcc. The tests
# look into the library; nothing here can run it.
cuda: $(VENV)/dev
	@if command -v nvcc > /dev/null; then \
	    $(PYTHON) tests/test_cuda_library.py; \
	else echo "no nvcc: the CUDA library is not compiled, its tests are skipped"; fi

bench: $(VENV)/built $(VENV)/bench
	$(PYTHON) -m qkernels bench

# On a machine with a GPU, with the torch that its own python3 has: no set-up, no network. MINUTES= scales a run (4.5 for
# gpu-check, 5.5 for gpu-bench, gpu is both, gpu-tune 9), OUT= is where its three files go.
GPU_RUN = $(or $(GPU_PYTHON),python3) bench/gpu/run.py $(if $(OUT),--out "$(OUT)") $(if $(MINUTES),--minutes $(MINUTES))

gpu-check:
	@$(GPU_RUN) check

gpu-bench:
	@$(GPU_RUN) bench

gpu:
	@$(GPU_RUN) check bench

# Prints the file of tiles that it measured: what later runs here read, and what gemm_configs.py may take over.
gpu-tune:
	@$(or $(GPU_PYTHON),python3) -m qkernels tune --minutes $(or $(MINUTES),9) --print

# The suites of torch.ao and of compressed-tensors with torch's kernels and with ours; not part of test, as it fetches
# them from the package indices. ONLY="fx pt2e" runs the files with these in their paths.
upstream: $(VENV)/built $(VENV)/dev
	$(PYTHON) tests/upstream/run.py $(ONLY)

clean:
	rm -rf build .venv *.egg-info qkernels/*.so

# torch comes first and by exactly its version: any other way pulls gigabytes of CUDA packages.
$(VENV)/torch:
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q torch==$(TORCH) 'setuptools>=77'
	touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/torch
	QKERNELS_BUILD=none $(PYTHON) -m pip install -q --no-build-isolation -e .
	touch $@

# In place and not through pip, which would compile every file again.
$(VENV)/built: $(SOURCES) | $(VENV)/installed
	QKERNELS_STRICT_BUILD=1 $(PYTHON) setup.py -q build_ext --inplace
	touch $@

# Not an extra: a torch built with CUDA asks for a triton of its own, but the offline compilation in the tests uses
# internals of this very version.
TRITON := 'triton==3.6.*'

# The extras of pyproject.toml, each when a target first needs it, one after the other.
$(VENV)/dev $(VENV)/demo $(VENV)/docs $(VENV)/examples $(VENV)/bench: $(VENV)/%: pyproject.toml | $(VENV)/installed
	flock $(VENV) $(PYTHON) -m pip install -q 'qkernels[$*]'
	$(if $(filter dev,$*),$(PYTHON) -m pip install -q --no-deps $(TRITON))
	touch $@
