# make quickstart: from a bare clone to a trained text-to-video model. `make help` lists the rest.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base
STAMP := $(VENV)/.installed
# For example PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" for the small CPU build of torch.
PIP_FLAGS ?=
PYTEST_FLAGS ?=
# Files of tests go to this many processes side by side; tests of several ranks start processes of their own.
PYTEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help env quickstart test test-all lint format docs tiny_vae clean

help:  ## list the targets
	@grep -hE '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):.*## */\1|/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

env: $(STAMP)  ## make .venv with the versions of constraints.txt

INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_FLAGS) -c constraints.txt

# What training needs; the quickstart waits for no test tools.
$(BASE): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found; install one or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	@touch $@

$(STAMP): $(BASE)
	$(INSTALL) -e '.[dev]'
	@touch $@

quickstart: $(BASE)  ## train the shapes experiment, sample and score it (about 10 minutes on 2 cores)
	$(BIN)/sora train experiment=quickstart

test: $(STAMP)  ## the test suite within its budget
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile -m 'not slow and not gpu' $(PYTEST_FLAGS) tests

test-all: $(STAMP)  ## the long tests too
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_FLAGS) tests

lint: $(STAMP)  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write docs/config.md and docs/metrics.md again from the models
	$(BIN)/python -m sora_train.config.reference
	$(BIN)/python -m sora_train.metrics_reference

tiny_vae: $(STAMP)  ## train the video autoencoder that the package ships (about 40 minutes on a core)
	$(BIN)/sora train experiment=tiny_vae
	$(BIN)/sora train experiment=tiny_vae_short vae.path=runs/tiny_vae/vae
	$(BIN)/sora train experiment=tiny_vae_long vae.path=runs/tiny_vae_short/vae
	$(BIN)/sora train experiment=tiny_vae_long vae.path=runs/tiny_vae_long/vae run.dir=runs/tiny_vae_final

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis dist build
