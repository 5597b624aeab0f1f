# Everything runs from the virtual environment .venv, which is made on first use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
INPUTS ?= 100000
SEED ?= 1
SOURCES := protos server worker deploy tests tools benchmarks

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast simulate fuzz soak lint format types imports sentences protos protos-check docs docs-check bench gpu-check check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install everything that constraints.txt pins

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "codistill needs Python 3.11 or newer; give one with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time this takes minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,worker,ray]' --group dev
	@touch $(STAMP)

demo: $(STAMP) ## three students learn digits, each alone and then together: the table, and a report
	@$(BIN)/codistill compare examples/digits.yaml --methods independent,kdcl

test: $(STAMP) ## all tests
	@tools/test-requirements.sh
	@$(BIN)/python -m pytest -m 'not system and not browser' -n 2 --dist loadfile
	@$(BIN)/python -m pytest -m 'system or browser' -n 2 --dist loadscope --no-loadscope-reorder

test-fast: $(STAMP) ## the tests that start no processes and no browser
	@$(BIN)/python -m pytest -m 'not system and not browser'

simulate: $(STAMP) ## 10,000 seeds of the simulated cluster: every fault, over a virtual clock
	@$(BIN)/python tests/simulation/replay.py --seeds 10000

fuzz: $(STAMP) ## INPUTS=100000 inputs from SEED=1 to a real server with a healthy run beside them
	@PYTHONPATH=tests $(BIN)/python -m fuzz.campaign --inputs $(INPUTS) --seed $(SEED)

soak: $(STAMP) ## 15 minutes of random faults every few seconds: flat memory, and the bits of an undisturbed run
	@$(BIN)/python tests/soak/soak.py --minutes 15

lint: $(STAMP) ## ruff, and buf for the proto: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/buf lint protos
	@$(BIN)/buf format --diff --exit-code protos

format: $(STAMP) ## let ruff and buf format, and fix what they can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/buf format --write protos

types: $(STAMP) ## pyright, strict on the source
	@$(BIN)/pyright

imports: $(STAMP) ## who may import whom
	@$(BIN)/lint-imports

sentences: $(STAMP) ## sentences of at most 25 words, and no phrase that has to be read twice
	@$(BIN)/python tools/check_sentences.py

protos: $(STAMP) ## regenerate the gRPC stubs
	@$(BIN)/python tools/make_protos.py

protos-check: $(STAMP) ## compare the checked-in stubs with regenerated ones
	@$(BIN)/python tools/make_protos.py --check

docs: $(STAMP) ## regenerate the pages that are made from the code
	@$(BIN)/python tools/make_docs.py

docs-check: $(STAMP) ## compare the generated documentation with regenerated pages
	@$(BIN)/python tools/make_docs.py --check

bench: $(STAMP) ## round trips against gloo and Ray, and what a step costs
	@$(BIN)/python benchmarks/exchange.py
	@$(BIN)/python benchmarks/step.py

gpu-check: $(STAMP) ## eight minutes on one GPU: its numbers, faults, methods, errors and images/s; nothing without a GPU
	@$(BIN)/python benchmarks/gpu_check.py

check: lint types imports sentences protos-check docs-check ## all checks that are not tests

clean: ## remove the environments and caches; runs/ stays
	@rm -rf $(VENV) .venv-protos .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
