# Every target does its own set-up, on a machine with nothing but python3, make and g++; a second call is instant.
# TORCH=2.14.1 (any version from 2.10 on) takes that torch, in an environment of its own.
DEFAULT_TORCH := 2.13.0
TORCH := $(DEFAULT_TORCH)
VENV := $(if $(filter-out $(DEFAULT_TORCH),$(TORCH)),build/venv-$(TORCH),.venv)
BIN := $(VENV)/bin
PYTHON := $(BIN)/python
SOURCES := setup.py $(shell find csrc -type f)
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -g1 -O1
SANITIZED := $(wildcard $(patsubst %,tests/test_%.py,\
    fake_quantize follow_range foreach_fake_quantize override statistics quantize codebook stochastic straight_through \
    relu_fake_quantize silu_mul_quantize rms_norm_quantize int8_gemm int8_conv2d int4_gemm packing))
preload = $(shell gcc -print-file-name=lib$(1).so)

CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c')

.PHONY: build demo test pytest lint portable asan cuda bench gpu gpu-check gpu-bench gpu-tune upstream clean

build: $(VENV)/built

demo: $(VENV)/built $(VENV)/demo
	$(PYTHON) -m qkernels demo

# pytest runs last: its closing line ends the output.
test: lint portable asan
	@$(MAKE) --no-print-directory pytest

# Two workers, a file to a worker; threads of their own would only be in each other's way, but where a test asks for them.
pytest: $(VENV)/built $(VENV)/dev $(VENV)/demo cuda
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --durations=10

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy
	$(PYTHON) tests/headers.py

# The sources with the oldest torch, by clang and for aarch64: half a minute of CPU for each compiler, after a change.
portable: $(VENV)/torch
	$(PYTHON) tests/portable.py

# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, on a build of their own, in fp32 and bf16: the
# other types walk memory as these do. --capture=sys lets the sanitizers' own text through.
asan: $(VENV)/dev
	QKERNELS_STRICT_BUILD=1 QKERNELS_CXXFLAGS="$(SANITIZE)" $(PYTHON) setup.py -q build -b build/asan --build-lib build/asan/lib
	OMP_NUM_THREADS=1 PYTHONPATH=build/asan/lib ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(call preload,asan) $(call preload,ubsan)" \
	    $(BIN)/pytest -q -n 2 --dist loadfile --capture=sys -p no:cacheprovider \
	    -k "not (compile or export or opcheck or subprocess or triton or reference] or -reference- or torch.float16 or torch.float64)" \
	    $(SANITIZED)

# The CUDA library for every architecture, where there is nvcc: the tests look into it, nothing here can run it.
cuda: $(VENV)/built
	@if command -v nvcc > /dev/null; then \
	    QKERNELS_BUILD=cuda QKERNELS_STRICT_BUILD=1 $(PYTHON) setup.py -q build_ext --build-lib build/cuda; \
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

# Prints the file of tiles that it measured: what later runs here read, and what configs.py may take over.
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

# The extras of pyproject.toml, each when a target first needs it.
$(VENV)/dev $(VENV)/demo $(VENV)/bench: $(VENV)/%: pyproject.toml | $(VENV)/installed
	$(PYTHON) -m pip install -q 'qkernels[$*]'
	$(if $(filter dev,$*),$(PYTHON) -m pip install -q --no-deps $(TRITON))
	touch $@
