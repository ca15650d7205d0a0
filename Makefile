# `make test` and `make bench` need python3 (with venv and headers) and g++, and do the rest.
#   make VENV=~/my-env test          an environment of your own; its torch is used when it is >= 2.11
#   make TORCH=torch TORCH_INDEX=    the newest torch from pip's own index

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Instruction sets as ATEN_CPU_CAPABILITY names them, and the floors that depend on them.
ISAS ?= avx512 avx2 default
FLOORS := tests/test_cells.py tests/test_scan.py

PY := $(VENV)/bin/python
# As many processes as there are cores: tests take one thread unless they are about threads.
PYTEST := $(VENV)/bin/pytest -n auto --dist worksteal
# The instruction set that runs here.
ISA = $(PY) -c 'import fused_rnn._C as c; print(c.isa())'
SANITIZED := build/sanitized
LIBRARY := import sys; del sys.path[0]; import fused_rnn._C as c; print("testing", c.__file__)
export FUSED_RNN_STRICT := 1
# Where nvcc is found. One architecture, and what any later GPU compiles at first use.
export TORCH_CUDA_ARCH_LIST ?= 8.0+PTX
# Executes the CUDA kernels on the host.
export FUSED_RNN_EMULATOR := 1

.PHONY: help test native isa emulated sanitize lint bench build clean

help:
	@echo "make test      all tests: native, isa (avx2, baseline), emulated, sanitize, lint"
	@echo "make native    the whole suite on this machine's best instruction set"
	@echo "make isa       cell and scan tests on each of: $(ISAS), but the native set"
	@echo "make emulated  module tests over the CUDA kernels, executed on the host"
	@echo "make sanitize  cell and scan tests under AddressSanitizer and UBSan (g++)"
	@echo "make lint      ruff, clang-format, mypy, includes, symbols"
	@echo "make bench     fused_rnn against torch.nn; BENCH='--help' lists what it can do"
	@echo "make build     the library, in place"

test:
	$(MAKE) native
	$(MAKE) isa ISAS="avx2 default"
	$(MAKE) emulated
	$(MAKE) sanitize
	$(MAKE) lint

native: build
	$(PYTEST)

isa: build
	best=$$($(ISA)); \
	for isa in $(ISAS); do \
	  if [ $$isa = $$best ]; then echo "$$isa: the native set, see make native"; continue; fi; \
	  echo "ATEN_CPU_CAPABILITY=$$isa"; \
	  ATEN_CPU_CAPABILITY=$$isa $(PYTEST) -m "not slow" $(FLOORS) || exit 1; \
	done

# Not what is no matter of kernels (the emulated ops have no fakes), nor what hangs on the host's
# matrix product (its threads, its rounding over hundreds of rows). Storage types are test_stepwise's,
# and the rest would take long.
NOT_EMULATED = compile or export or any_number_of_threads or long_sequences or float64 or float16 \
  or recomputing or nobias or any_shape
emulated: build
	$(PYTEST) --emulated -m "not slow" -k "not ($(NOT_EMULATED))" tests/test_modules.py \
	  tests/test_beyond_torch.py tests/test_controls.py tests/test_regularisers.py

# Of the kernels those of one instruction set are built and instrumented, which is the one that is run.
# Python itself is not, so both run-time libraries must be there before it starts.
# Leaks are not looked for: the interpreter keeps much until the end. A report goes to the process's
# own stderr, which pytest would otherwise capture and lose with the process. Two of the four types
# are left out, for time: float64 takes the ways of float32, float16 its panels and the rounding of bfloat16.
sanitize: build
	isa=$$($(ISA)) && export FUSED_RNN_SANITIZE=$$isa FUSED_RNN_ISAS=$$isa FUSED_RNN_TYPES=bfloat16 \
	  && FUSED_RNN_CUDA=0 FUSED_RNN_EMULATOR=0 $(PY) setup.py -q build --force --build-lib $(SANITIZED) \
	  && nm build/*-sanitize/csrc/cpu/kernels_$${isa}_bfloat16.o | grep -q __asan_report
	export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)"; \
	export PYTHONPATH=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1; \
	$(PY) -c '$(LIBRARY)' | grep $(SANITIZED) \
	  && $(PYTEST) --capture=sys -m "not slow" -k "not float64 and not float16" $(FLOORS)

lint: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/mypy
	$(PY) tools/check_includes.py
	$(PY) tools/check_symbols.py build/*-release

bench: build
	$(PY) -m fused_rnn.bench $(BENCH)

build: $(VENV)/.installed
	$(PY) setup.py -q build_ext --inplace

# Editable, so that no second copy of the package can be tested by mistake;
# what a user installs is tested by tests/test_packaging.py.
$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/.torch
	$(PY) -m pip install -q setuptools wheel pybind11 ninja --upgrade
	$(PY) -m pip install -q --no-build-isolation -e '.[test,bench,dev]'
	touch $@

# The index has torch without CUDA. Where it is out of reach, pip looks once and takes what it has.
$(VENV)/.torch:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import sys, torch; sys.exit(torch.torch_version.TorchVersion(torch.__version__) < "2.11")' 2> /dev/null \
	  || $(PY) -m pip install -q --retries 0 '$(TORCH)' $(addprefix --extra-index-url ,$(TORCH_INDEX))
	touch $@

clean:
	rm -rf build dist *.egg-info fused_rnn/_C.*.so
