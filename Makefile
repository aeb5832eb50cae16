# make demo    from a fresh clone: fine-tunes on real text, stock and with fastft, and prints what was gained
# make test    from a fresh clone: everything but the slow tests; `make test-all` has those too
#
# VENV (.venv) and PYTHON (python3) say where and with what it is installed, WORKERS (2) how many processes test, each
# with one thread and about a GB. `make demo EPOCHS=1 ROWS=2000 DROPOUT=0`.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS)
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.PHONY: demo test test-all bench install native wheel build lint format clean

# BATCH_SIZE=16 on make's command line becomes --batch-size 16.
OPTIONS := ROWS EPOCHS BATCH_SIZE MAX_LENGTH LEARNING_RATE DROPOUT SEED OUTPUT
option = $(if $(findstring command,$(origin $(1))),--$(shell echo $(1) | tr A-Z_ a-z-) $($(1)))

demo: native
	$(BIN)/python -m benchmarks.demo $(foreach name,$(OPTIONS),$(call option,$(name)))

test: native lint
	$(PYTEST) -m "not slow"

test-all: native lint
	$(PYTEST)

bench: native
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.step

install: $(VENV)/.installed

# torch first: the build looks for its headers in this environment. Editable, so that tests and benchmarks run this checkout.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# Incremental: seconds when little has changed.
native: install
	$(BIN)/python setup.py --quiet develop_native

wheel build: install
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info fastft/libfastft.so* fastft/_build.json*
