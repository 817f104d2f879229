# Everything from a bare clone: each target sets up .venv first, once, and again when the dependencies change.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
# Written by scripts/setup when it has finished.
STAMP := $(VENV)/.lorikeet-installed
# Processes of the test suite. Each is one torch thread, so more than the cores only makes them wait.
JOBS ?= 2

.PHONY: help demo test test-slow check docs clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

demo: $(STAMP) ## one question to the base model and each adapter, side by side; serves until Ctrl-C (DEMO_ONCE=1: ends)
	@$(PY) -m lorikeet.cli demo

test: $(STAMP) ## run every test
	@echo "== tests: pytest with $(JOBS) processes"
	@$(PY) -m pytest -n $(JOBS)

test-slow: $(STAMP) ## run the tests that take minutes: long hostile requests, fuzzers, soaks
	@$(PY) -m pytest -m "slow and not gpu and not multi_gpu and not network"

check: $(STAMP) ## lint, format, types, import contracts, spelling, version
	@scripts/check

docs: $(STAMP) ## write the generated pages of docs/
	@$(PY) scripts/write_docs.py

clean: ## remove the environment and every cache
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt scripts/setup
	@scripts/setup $(VENV)
