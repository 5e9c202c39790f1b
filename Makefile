# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes: most of a test is Python, which uses one core. Threads that wait leave theirs to the other process.
WORKERS ?= 2
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS)
NOT_HERE := not slow and not gpu and not interpreter
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) -q tests
SANITIZED := build/sanitize/lib
PRELOAD = $(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libstdc++.so)

.DEFAULT_GOAL := help
.PHONY: help demo test test-full check bench wheel gpu clean build native sanitize format
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | awk -F ':.*## +' '{ printf "make %-10s %s\n", $$1, $$2 }'

demo: native  ## train a character language model on torch and on seqkern, side by side
	$(BIN)/seqkern demo

test: native $(VENV)/dev.stamp  ## the tests and the examples in docstrings
	$(PYTEST) -q -m "$(NOT_HERE)" --doctest-modules python/seqkern tests
	$(INTERPRETED) -m "interpreter and not slow"

test-full: native $(VENV)/dev.stamp  ## the same with the slow ones
	$(PYTEST) -q -m "not gpu and not interpreter" --doctest-modules python/seqkern tests
	$(INTERPRETED) -m interpreter

check: native $(VENV)/dev.stamp  ## format, lint, types, structure, and the compiled part under sanitizers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	@find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/python -m pytest -q tests/test_structure.py
	$(MAKE) sanitize

bench: native $(VENV)/dev.stamp  ## time every row against its peers; renew the tables and pictures
	for suite in rnn attention transformer sdpa-sweep; do $(BIN)/seqkern bench $$suite --rows all || exit 1; done
	$(BIN)/python benchmarks/publish.py

wheel: $(VENV)/dev.stamp  ## dist/*.whl for this Python
	rm -rf build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

gpu: $(VENV)/dev.stamp  ## tests and benchmarks on the GPU of this machine; STAGES="rnn tune" for some
	PYTHON="$(abspath $(BIN))/python" benchmarks/gpu.sh $(STAGES)

build: $(VENV)/run.stamp  ## compile what changed under csrc; fails where it cannot
	SEQKERN_BUILD=$${SEQKERN_BUILD:-cpu} $(BIN)/python setup.py -q build_ext --inplace

sanitize: $(VENV)/dev.stamp  ## the tests of the compiled part under AddressSanitizer and UBSan
	@rm -rf $(SANITIZED)
	SEQKERN_BUILD=cpu SEQKERN_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED) \
	  $(PYTEST) -q -m "native and $(NOT_HERE)" -p no:cacheprovider tests

format: $(VENV)/dev.stamp  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs -r $(BIN)/clang-format -i

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info python/*.egg-info python/seqkern/_native*.so python/seqkern/_build.json
	rm -f $(VENV)/*.stamp

# As `build`, but a machine without a compiler goes on without compiled kernels.
native: $(VENV)/run.stamp
	@$(BIN)/python setup.py -q build_ext --inplace

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "seqkern needs Python 3.10 or newer, $(PYTHON) is older or missing; make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: requirements/run.txt setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -r requirements/run.txt
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt $(VENV)/run.stamp
	$(BIN)/python -m pip install -q -r requirements/dev.txt
	@touch $@
