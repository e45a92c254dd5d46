# `make demo` and `make test` do all their own set-up; a second call starts at once.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo paper test test-slow test-all test-cluster test-browser torture lint format docs bench bench-gpu clean
.DEFAULT_GOAL := help

# DATA: a folder of train/ and val/, each with a folder per class; without it the digits. OUT: the folder of the runs. ARGS: further words.
DATA ?=
ARGS ?=
OUT ?= paper
paper: setup
	$(BIN)/mae-scale paper --out $(OUT) $(if $(DATA),--data $(DATA)) $(ARGS)

help:
	@echo "make demo    the whole story on this machine: data, pre-training, pictures, MLflow (about 5 minutes)"
	@echo "make paper   the paper's findings in small, on the digits or DATA=folder: docs/paper.md (about two hours, goes on where it stopped)"
	@echo "make test    every promise, in its quickest form       make lint   ruff, format, imports (layers, no circle), types"
	@echo "make test-all   make test, the slow tests, the pages in a browser, jobs on a real Slurm, and 12 random kills"
	@echo "make test-browser   the report's page and MLflow's in this machine's Chromium (apt-get install chromium; about 2 minutes)"
	@echo "make test-cluster   jobs on a real Slurm of two nodes, started here (as root; apt installs it; about 6 minutes)"
	@echo "make torture N=200   kill a real training N times at random instants, compare the whole curve"
	@echo "make docs    the documentation, as pages to be opened from the disk: site/index.html"
	@echo "make bench   our steps and loader beside their peers, the engine, the stall of a save"
	@echo "make bench-gpu STAGE=truth|speed|profile|data   what a GPU machine has to say, without make setup or a network"
	@echo "make setup   only the set-up: .venv from requirements.lock"

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock setup.py setup.sh
	@./setup.sh $(VENV)
	@touch $@

demo: setup
	$(BIN)/mae-scale demo --out demo

# Files of tests are shared out to two processes: many tests wait for a timeout, a signal or a server.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest tests --ignore=tests/cluster --ignore=tests/browser --numprocesses=$(WORKERS) --dist=loadfile
test: setup
	$(PYTEST) -m "not slow and not alone"
	$(PYTEST) -m "not slow and alone" --numprocesses=0

test-slow: setup
	$(PYTEST) -m "slow and not alone"
	$(PYTEST) -m "slow and alone" --numprocesses=0

test-all: test test-slow test-browser test-cluster
	$(MAKE) torture N=12

test-cluster: setup
	$(BIN)/python -m pytest tests/cluster

# Playwright drives the machine's own Chromium. Where either is missing the tests say so and are skipped.
PLAYWRIGHT = playwright==1.65.2 greenlet==3.5.6
test-browser: setup
	@test "$$($(BIN)/pip freeze | grep -cxF $(PLAYWRIGHT:%=-e %))" = $(words $(PLAYWRIGHT)) \
		|| $(BIN)/pip --disable-pip-version-check --quiet install $(PLAYWRIGHT) \
		|| echo "test-browser: cannot install $(PLAYWRIGHT), so its tests are skipped"
	$(BIN)/python -m pytest tests/browser -rs

N ?= 100
SEED ?= 0
torture: setup
	$(BIN)/python -m tests.faults.torture --kills $(N) --seed $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html"

bench: setup
	$(BIN)/python bench/step.py
	$(BIN)/python bench/engine.py --rounds 2
	$(BIN)/python bench/mask_tokens.py --rounds 1
	$(BIN)/python bench/loader.py
	$(BIN)/python bench/dense.py --rounds 2
	$(BIN)/python bench/reads.py
	$(BIN)/python bench/checkpoint_stall.py

PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
CARRIED ?= .gpu
bench-gpu:
	PYTHON=$(PYTHON) bench/gpu.sh "$(STAGE)" "$(CARRIED)"

clean:
	rm -rf $(VENV) demo site
