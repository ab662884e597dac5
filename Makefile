# Two commands do everything on a fresh machine, set-up included:
#
#   make quickstart   train the small model of configs/quickstart.yaml on this machine
#   make test         lint, types and the quick tests
#
# `make test-slow` runs the tests that take minutes, `make chaos` those that kill again and again what they run.
# On a machine with GPUs add EXTRA=gpu.
# Needs Python 3.11 to 3.13 with its venv module (another one: make PYTHON=python3.12 ...); everything else goes to .venv.

PYTHON ?= python3
EXTRA ?= cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := .venv/.installed-$(EXTRA)
INSTALLED_DEV := .venv/.installed-$(EXTRA)-dev

.DELETE_ON_ERROR:
.PHONY: help quickstart test test-slow chaos

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: $(INSTALLED)
	$(BIN)/rlsys train configs/quickstart.yaml --fresh

test: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow and not chaos and not gpu"

test-slow: $(INSTALLED_DEV)
	$(BIN)/pytest -m "slow and not gpu"

chaos: $(INSTALLED_DEV)
	$(BIN)/pytest -m "chaos and not gpu"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null || { \
	  echo "rlsys needs Python 3.11, 3.12 or 3.13, but \`$(PYTHON)\` is: $$($(PYTHON) --version 2>&1);" \
	    "name another one with make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv

# The stamps are the recipes' last lines: an install that broke off is done again.
$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "Installing rlsys and what it needs into .venv: some minutes and some gigabytes, once."
	@$(PIP) install --editable ".[$(EXTRA)]"
	@# vLLM's CPU build may bring torchvision and its kin in CUDA builds, which break transformers beside a CPU torch.
	@$(BIN)/python -c 'import importlib.util as u; u.find_spec("torchvision") and __import__("torchvision")' 2>/dev/null || { \
	  echo "Removing torchvision, torchaudio and torchcodec: they do not fit this torch, and nothing here needs them."; \
	  $(PIP) uninstall --yes torchvision torchaudio torchcodec; }
	@touch $@

# Without $(EXTRA), so that pip does not bring back what was removed above.
$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing what the checks need."
	@$(PIP) install --editable ".[dev]"
	@touch $@
