.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install run test soak flat lint format bench gpu study clean

help: ## Explain the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with the newest suitable Python and install everything, tests' needs included

run: $(STAMP) ## Grow a small model on real text beside the full model for the same FLOPs: two to three minutes on two CPU cores
	$(BIN)/est-train -m experiment=quickstart +arm=doubling,full_same_flops

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

soak: $(STAMP) ## Kill and resume runs at 25 random moments and compare the bits: some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --wandb

flat: $(STAMP) ## Measure that memory, file handles and step time stay flat over 20,000 steps: some minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.flat

lint: $(STAMP) ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure this CPU against its goals: step times, memory, starting; about nine minutes on two cores
	$(BIN)/python -m est_cli.benchmark.goals

gpu: ## Measure a GPU: kernels against float64, steps, a trace, a table to paste; under 20 minutes; torch and numpy alone
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m est_cli.benchmark.gpu

study: $(STAMP) ## Train what docs/study.md lacks (hours; stop and start as you like) and rebuild it
	$(BIN)/python -m study

clean: ## Remove the virtual environment, caches and build products; runs in outputs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@python=""; without_venv=""; \
	for candidate in python3.13 python3.12 python3.11 python3 python; do \
	  $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || continue; \
	  if $$candidate -c 'import venv, ensurepip' 2>/dev/null; then python=$$candidate; break; fi; \
	  without_venv=$$candidate; \
	done; \
	if [ -z "$$python" ]; then \
	  if [ -n "$$without_venv" ]; then echo "error: $$without_venv has no venv module; install it (Debian: apt install python3-venv)" >&2; \
	  else echo "error: no Python >=3.11,<3.14 found; install python3.11, 3.12 or 3.13" >&2; fi; \
	  exit 1; \
	fi; \
	echo "installing into $(VENV) with $$($$python --version)"; \
	$$python -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade-strategy only-if-needed \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@
