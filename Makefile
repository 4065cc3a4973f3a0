# Everything runs in .venv, which `make build` makes: PYTHON is the interpreter that it is made with (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.built
SOURCES := $(shell find csrc -type f)
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build train bench gpu-check test test-long sanitize check lint types format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

build: $(STAMP) ## the environment in .venv, with all that the tests need, and the C++ extension

# One stamp, written last: an interrupted build is done again. Nothing is fetched for what is installed already. pip
# would compile to bytecode on one core only; files of packages that are for another Python are no error. Ours are
# compiled, too: with PYTHONDONTWRITEBYTECODE, which containers set, every rank would do it again.
PIP := $(BIN)/python -m pip install --no-compile -c constraints.txt
$(STAMP): pyproject.toml setup.py constraints.txt Makefile $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "megapoly needs Python 3.10 or newer, found " + sys.version)'
	@date +%s > .build-start
	$(PYTHON) -m venv .venv
	$(PIP) setuptools wheel pybind11
	$(PIP) --no-build-isolation -e '.[dev]'
	$(PIP) --no-deps 'megatron-core; platform_system == "Linux" and python_version < "3.14"'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' .venv/lib megapoly kernels || true
	@echo "set-up took $$(( $$(date +%s) - $$(cat .build-start) )) s"; rm .build-start
	@touch $@

train: build ## the main job on a CPU: real text in 18 languages to a trained, resumed and sampled model
	$(BIN)/python examples/demo/run.py

bench: build ## a training step, the kernels and the data engine against peers, into benchmarks/results; a quarter of an hour, on a quiet machine
	$(BIN)/megapoly bench step --save benchmarks/results
	$(BIN)/megapoly bench kernels --save benchmarks/results
	$(BIN)/megapoly bench data --save benchmarks/results

# With PYTHON itself, whose PyTorch has CUDA: it builds in place, and fetches and installs nothing.
gpu-check: ## with a GPU: build, test, benchmark the kernels and train PolyLM-1.7B, into benchmarks/results; under 9 minutes
	$(PYTHON) benchmarks/gpu_check.py

# Two workers of one thread: half of the tests start processes and wait for them.
test: build ## the tests, some 15 minutes on 2 cores
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal -m "not long"

test-long: build ## every test, with the whole of the large matrices
	$(PYTEST)

# The tests run inside of the folder with the other build, so that the processes that they start find it, too. Leaks are
# not looked for: Python keeps what it has until it ends. GCC's libraries have to be there before Python.
SANITIZE := $(CURDIR)/build/sanitize
PRELOAD = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
sanitize: build ## the tests of the data engine with its C++ under AddressSanitizer and UBSan; needs GCC
	MEGAPOLY_SANITIZE=1 $(BIN)/python setup.py -q build --build-base $(SANITIZE) --build-lib $(SANITIZE)/lib
	cd $(SANITIZE)/lib && PYTHONPATH=$(SANITIZE)/lib LD_PRELOAD="$(PRELOAD)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 MEGAPOLY_SANITIZE=1 \
		$(abspath $(BIN))/python -m pytest -c $(CURDIR)/pyproject.toml -o pythonpath="build/sanitize/lib ." -m "not long" $(CURDIR)/tests/data

lint: build ## style; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: build ## static types
	$(BIN)/mypy

check: lint types test ## lint, types and tests: what CI runs

format: build ## rewrite the code in the project's style; the only target that edits
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what was built; runs/ stays
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis megapoly.egg-info .build-start
	find csrc megapoly kernels tests examples \( -name '__pycache__' -o -name '_index*.so' \) -prune -exec rm -rf {} +
