# Two commands are enough: `make demo` and `make test`. Both build .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# On machines without a GPU this keeps pip from fetching gigabytes of CUDA: set TORCH= to choose yourself.
TORCH ?= torch==2.13.0

.PHONY: demo test test-slow check format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   train on the built-in silver set, run MD, write a report (about 4 minutes on 2 cores)"
	@echo "make test   run the test suite"
	@echo "make check  format, lint, types, import contracts"
	@echo "make test-slow  the long physics checks"

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(BIN)/.installed
	$(BIN)/gnnmd demo

test: $(BIN)/.installed
	$(BIN)/python -m pytest

test-slow: $(BIN)/.installed
	$(BIN)/python -m pytest -m slow

check: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BIN)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) dist build
