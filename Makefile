# Each target does all its own set-up: a virtual environment in this folder, made once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a test worker: two workers with two threads each would fight for the cores. A worker goes on
# with the tests that stand together in a file, which share what they have trained.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow test-cuda lint format check docs clean

$(VENV)/base.stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("cctool needs Python 3.10 or newer; name one: make PYTHON=python3.12") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/base.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: $(VENV)/base.stamp
	bash docs/demo.sh $(BIN)/cctool demo

test: $(VENV)/dev.stamp
	$(PYTEST) -n 2 --dist worksteal

test-slow: $(VENV)/dev.stamp
	$(PYTEST) -m slow

# For a machine that has a GPU; under eight minutes. `test` runs the same tests on a pretended device.
test-cuda: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/on_gpu.py

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test

clean:
	rm -rf $(VENV) demo build dist
