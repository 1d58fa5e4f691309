# `make lab` is the way in. Everything is installed into .venv by `setup`, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup lab test check

setup: $(STAMP)

# torch first and pinned: the CPU kernels and the published figures were made with it.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet -e '.[engine,test]'
	touch $(STAMP)

lab: setup
	$(BIN)/pdrelay lab --quick

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
