# make demo, make test, make simt, make bench, make lint, make clean: each from a clean clone, nothing set up before.
#
# PYTHON that already has torch >= 2.10 is used as it is; otherwise an environment is made in .venv with
# TORCH. `make TORCH=torch` takes the newest torch instead.
TORCH ?= torch==2.13.0
PYTHON ?= python3
override PYTHON := $(or $(shell command -v $(PYTHON)),$(PYTHON))
VENV := .venv
LINTERS := ruff==0.17.5 mypy==2.4.1 clang-format==23.1.5
# ccache and ninja are used where they are found.
# pip before 23.1, as in Debian 12, does not know the short form -C.
LAUNCHER := $(if $(shell command -v ccache),--config-settings=cmake.define.CMAKE_CXX_COMPILER_LAUNCHER=ccache)

has_torch = $(shell $(1) $(CURDIR)/build_tools/find_torch.py >/dev/null 2>&1 && echo yes)
ifeq ($(call has_torch,$(PYTHON)),yes)
  PY := $(PYTHON)
else
  PY := $(VENV)/bin/python
endif

SOURCES := $(shell find csrc include python build_tools CMakeLists.txt pyproject.toml -type f -not -name '*.so' -not -path '*/__pycache__/*')
INSTALLED := build/installed-$(shell echo $(PY) | cksum | cut -d' ' -f1)

.PHONY: demo test test-cpp simt bench lint clean install

demo: $(INSTALLED)
	$(PY) -m longctx demo

test: $(INSTALLED) test-cpp
	$(PY) -m pytest

bench: $(INSTALLED)
	$(PY) bench/run.py

install: $(INSTALLED)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q $(TORCH)

$(INSTALLED): $(SOURCES) | toolchain $(PY)
	$(PY) -m pip install -q scikit-build-core pybind11 cmake ninja
	$(PY) -m pip install -q --no-build-isolation $(LAUNCHER) '.[test]'
	@mkdir -p build && touch $@

.PHONY: toolchain
toolchain:
	@command -v c++ >/dev/null || { echo "longctx needs a C++17 compiler (Debian: apt-get install g++)"; exit 1; }
	@$(PYTHON) -c "import sysconfig, pathlib; assert pathlib.Path(sysconfig.get_path('include'), 'Python.h').is_file()" 2>/dev/null \
	  || { echo "longctx needs the Python headers (Debian: apt-get install python3-dev)"; exit 1; }

# GoogleTest comes from the system (Debian: libgtest-dev); without it only the Python tests run.
test-cpp: $(INSTALLED)
	@if [ -e /usr/include/gtest/gtest.h ]; then \
	  $(PY) -m cmake -S . -B build/cpp -G Ninja -DLONGCTX_TESTS=ON -DPython_EXECUTABLE=$(abspath $(PY)) >/dev/null && \
	  $(PY) -m cmake --build build/cpp --target longctx_tests && $(dir $(PY))ctest --test-dir build/cpp --output-on-failure; \
	else echo "C++ tests not run: no GoogleTest (Debian: apt-get install libgtest-dev)"; fi

# The CUDA kernels on the CPU, one fiber per CUDA thread, under AddressSanitizer and ThreadSanitizer
# (tests/simt). Needs no GPU and no nvcc, only the CUDA headers.
CUDA_HOME ?= /usr/local/cuda
SIMT_LIBRARY := build/simt/tests/simt/liblongctx_simt.so
simt: $(INSTALLED) | toolchain $(PY)
	@if [ "$$(uname -m)" != x86_64 ]; then echo "host SIMT not run: it switches stacks by x86-64 assembly"; \
	elif [ ! -e $(CUDA_HOME)/include/cuda_bf16.h ]; then echo "host SIMT not run: no CUDA headers in $(CUDA_HOME) (set CUDA_HOME)"; \
	elif [ ! -e /usr/include/gtest/gtest.h ]; then echo "host SIMT not run: no GoogleTest (Debian: apt-get install libgtest-dev)"; \
	else \
	  $(PY) -m pip install -q cmake ninja && \
	  $(PY) -m cmake -S . -B build/simt -G Ninja -DLONGCTX_SIMT=ON $(subst --config-settings=cmake.define.,-D,$(LAUNCHER)) \
	    -DLONGCTX_CUDA_INCLUDE=$(CUDA_HOME)/include -DPython_EXECUTABLE=$(abspath $(PY)) >/dev/null && \
	  $(PY) -m cmake --build build/simt --target longctx_simt simt_tests longctx_lanes_simt && \
	  $(dir $(PY))ctest --test-dir build/simt --output-on-failure -j2 && \
	  $(PY) -m pytest -q --simt $(SIMT_LIBRARY) && \
	  $(PY) -m pytest -q --simt $(SIMT_LIBRARY) --simt-mode random,random,1,sm_90 \
	    tests/test_attention.py tests/test_block_sparse_attention.py; \
	fi

# After the install: mypy reads the types of torch and transformers.
lint: $(INSTALLED)
	$(PY) -m pip install -q $(LINTERS)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(dir $(PY))clang-format --dry-run --Werror
	$(PY) -m mypy

clean:
	rm -rf build $(VENV) python/longctx/*.so
