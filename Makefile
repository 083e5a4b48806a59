# `make demo` and `make test` set up .venv and run; `make help` lists the rest.
#
# Where the default package index has only GPU builds of torch and you want the CPU build, say where
# to take torch from:  make demo TORCH_INSTALL_ARGS="--index-url ADDRESS"
# PIP_ARGS goes to every pip command (a mirror, a proxy).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
PIP_ARGS ?=
TORCH_INSTALL_ARGS ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
PIP_INSTALL := $(PIP) install -c constraints.txt $(PIP_ARGS)
# The same demo everywhere, also on a machine with a single GPU.
ON_CPU := DS_ACCELERATOR=cpu
SHELL_SCRIPTS := .ci/run $(wildcard slurm/*.sh)

.PHONY: help demo demo-t5 test gpu-check drills check format clean

help: ## show this list
	@grep -E '^[.a-z0-9-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## */\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH_INSTALL_ARGS) torch
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

.venv: $(READY) ## set up the environment only

demo: $(READY) ## tune a prompt for a frozen 135M model: DeepSpeed ZeRO-3, 2 ranks, on the CPU
	$(ON_CPU) $(BIN)/deepspeed --num_gpus 2 -m softprompt_dist.train --recipe demo $(ARGS)

demo-t5: $(READY) ## the same for our own tiny T5
	$(ON_CPU) $(BIN)/deepspeed --num_gpus 2 -m softprompt_dist.train --recipe demo-t5 $(ARGS)

test: $(READY) ## run the whole test suite, but for what takes minutes and is tried in a shorter form
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

gpu-check: $(READY) ## on a machine with GPUs: every cell's numbers against the CPU's, freed memory, short runs
	$(BIN)/python -m pytest tests/gpu $(ARGS)

drills: $(READY) ## run all fault drills, the long ones too, and print the resilience table
	mkdir -p runs
	$(BIN)/python -m pytest -m drill --resilience-table=runs/resilience.md $(ARGS)

check: $(READY) ## lint, format, types, spelling, shell scripts; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/shellcheck --external-sources $(SHELL_SCRIPTS)

format: $(READY) ## let ruff sort imports and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
