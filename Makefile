# Two commands do everything on a machine with Python 3.11 or newer:
#   make quickstart   virtual environment, installation, the whole demonstration run, the report
#   make test         the same environment, one for vLLM, one for transformers 4, linters, types, tests
# Each piece is done once: the stamps' names hold a hash of what was installed from.

PYTHON ?= python3
VENV := .venv
VLLM_VENV := .venv-vllm
BIN := $(VENV)/bin
# Name an interpreter that already has vLLM, and no second environment is made.
PARETRON_VLLM_PYTHON ?= $(CURDIR)/$(VLLM_VENV)/bin/python
T4_VENV := .venv-transformers4
PARETRON_TRANSFORMERS4_PYTHON ?= $(CURDIR)/$(T4_VENV)/bin/python

hash = $(shell cat $(1) | cksum | tr ' ' '-')
RUN_STAMP := $(VENV)/.run-$(call hash,pyproject.toml constraints.txt)
DEV_STAMP := $(VENV)/.dev-$(call hash,pyproject.toml constraints.txt)
VLLM_STAMP := $(VLLM_VENV)/.done-$(call hash,constraints-vllm.txt)
T4_STAMP := $(T4_VENV)/.done-$(call hash,constraints-transformers4.txt)
# What has an environment of its own, unless an interpreter was named for it.
OTHERS := $(if $(findstring $(VLLM_VENV),$(PARETRON_VLLM_PYTHON)),$(VLLM_STAMP)) \
  $(if $(findstring $(T4_VENV),$(PARETRON_TRANSFORMERS4_PYTHON)),$(T4_STAMP))

# Two at a time, each test file in one process; PYTEST_ARGS= runs them one after the other.
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile

PIP_QUIET := --quiet --disable-pip-version-check --no-input

.DELETE_ON_ERROR:
.PHONY: quickstart test install install-dev lint types clean

quickstart: install
	$(BIN)/paretron run recipes/quickstart.yaml

test: export PARETRON_VLLM_PYTHON := $(PARETRON_VLLM_PYTHON)
test: export PARETRON_TRANSFORMERS4_PYTHON := $(PARETRON_TRANSFORMERS4_PYTHON)
# Side by side, the threads of one would wait for those of the other.
test: export OMP_NUM_THREADS ?= 1
test: install-dev $(OTHERS) lint types
	$(BIN)/pytest $(PYTEST_ARGS)

install: $(RUN_STAMP)
install-dev: $(DEV_STAMP)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV_STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(T4_VENV) build dist runs *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is absent or older than 3.11: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): | $(BIN)/python
	@echo "Installing Paretron into $(VENV) (a minute or two, once)"
	$(BIN)/python -m pip install $(PIP_QUIET) -c constraints.txt -e '.[onnx]'
	@rm -rf paretron.egg-info  # it would shadow the installed entry points
	@rm -f $(VENV)/.run-*
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "Installing the tools for development into $(VENV)"
	$(BIN)/python -m pip install $(PIP_QUIET) -c constraints.txt -e '.[onnx,gguf,quantize,triton,eval,data,lora,tensorboard,dev]'
	@rm -rf paretron.egg-info
	@rm -f $(VENV)/.dev-*
	@touch $@

$(VLLM_STAMP): | $(BIN)/python
	@echo "Installing vLLM into $(VLLM_VENV) (a few minutes, once)"
	$(BIN)/python -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install $(PIP_QUIET) --no-deps -r constraints-vllm.txt
	@rm -f $(VLLM_VENV)/.done-*
	@touch $@

$(T4_STAMP): | $(BIN)/python
	@echo "Installing transformers 4 into $(T4_VENV) (seconds, once)"
	$(BIN)/python -m venv $(T4_VENV)
	$(T4_VENV)/bin/python -m pip install $(PIP_QUIET) --no-deps -r constraints-transformers4.txt
	@rm -f $(T4_VENV)/.done-*
	@touch $@
