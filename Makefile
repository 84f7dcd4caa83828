# Everything here sets itself up: `make serve` and `make test` work in a fresh clone with Python 3.11 or
# newer, make and a package index.

PYTHON ?= python3
MODEL ?= smollm2
PORT ?= 8000
ARGS ?=
PYTEST_ARGS ?=
PIP_ARGS ?=
SEEDS ?= 1000
# How often every fault must meet requests in every state, in `make simulate`.
LEAST ?= 50
# Which part of the suite `make test-matrix` runs: arguments for pytest.
MATRIX_TESTS ?= -m "not slow"

VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
SOURCES := jaxserve kv scheduler metrics pallas_kernels
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-fast test-slow test-connectors test-accuracy simulate test-matrix check format clean

help:  ## Say what can be made.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP)  ## Make .venv with jaxserve, its dependencies and the development tools.

$(SETUP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer, or say which: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: jaxserve needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); say which: make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "setup: installing jaxserve and its tools into $(VENV) (about 1.5 GB; a few minutes the first time)"
	@$(BIN)/python -m pip install $(PIP_ARGS) --editable '.[dev]'
	@$(BIN)/python -m pip install $(PIP_ARGS) --no-deps --only-binary=:all: 'nixl>=1.5' 'nixl-cu13>=1.5' >$(VENV)/nixl.log 2>&1 \
		|| echo "setup: no nixl wheel for this platform: all works but KV transfer between servers (see $(VENV)/nixl.log)"
	@touch $@

serve: setup  ## Serve MODEL (default smollm2) on PORT (default 8000); more flags with ARGS="...".
	@exec $(BIN)/jaxserve serve $(MODEL) --port $(PORT) $(ARGS)

test: setup  ## Run the fast tests, the tests with real processes, and the notebooks.
	$(BIN)/python -m pytest -m "not slow" --nbmake tests $(wildcard notebooks/*.ipynb) $(PYTEST_ARGS)

test-fast: setup  ## Run the tests that start no processes.
	$(BIN)/python -m pytest -m "not slow and not e2e" $(PYTEST_ARGS)

test-slow: setup  ## Run the slow tests.
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-connectors: setup  ## Run the tests of prefill and decode servers against servers that a script starts.
	PYTHON=$(BIN)/python HOST_TIER=SimpleCPUOffloadConnector tests/e2e/run_multi_connector_edge_case_test.sh $(PYTEST_ARGS)
	PYTHON=$(BIN)/python HOST_TIER=OffloadingConnector tests/e2e/run_multi_connector_edge_case_test.sh $(PYTEST_ARGS)

test-accuracy: setup  ## Compare the score of a prefill and decode pair with that of one server.
	PYTHON=$(BIN)/python tests/e2e/run_accuracy_test.sh

simulate: setup  ## Run SEEDS simulated clusters of 2,000 events under faults, and say what met what.
	$(BIN)/jaxserve simulate --seeds $(SEEDS) --events 2000 --least $(LEAST)

test-matrix:  ## Run the suite (or MATRIX_TESTS) on Python 3.12 and 3.13 with the newest JAX, and on JAX 0.11.2.
	@PIP_ARGS='$(PIP_ARGS)' $(PYTHON) scripts/matrix.py -- $(MATRIX_TESTS) $(PYTEST_ARGS)

check: setup  ## Check format, lint, types and the import ladder.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: setup  ## Format the code and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environments and everything that was built.
	rm -rf .venv .venv3* build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
