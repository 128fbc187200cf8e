# make quickstart: from a bare clone to a trained text-to-video model. `make help` lists the rest.
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/.base
STAMP := $(VENV)/.installed
# For example PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu" for the small CPU build of torch.
PIP_FLAGS ?=
# The interpreter of .venv; by default the first of 3.11 or later that is found.
PYTHON ?=
export PIP_FLAGS PYTHON
# Where an environment forbids compiled files, each process would compile torch anew: seconds, hundreds of times.
export PYTHONDONTWRITEBYTECODE :=
PYTEST_FLAGS ?=
# For example MUTANTS_FLAGS="--only draws,data".
MUTANTS_FLAGS ?=
# Files of tests go to this many processes side by side; tests of several ranks start processes of their own.
PYTEST_WORKERS ?= 2
# One that dies ends the session with the name of its test: what it had left is given to nobody.
PYTEST_APART = -n $(PYTEST_WORKERS) --dist loadfile --max-worker-restart=0

.DEFAULT_GOAL := help
.PHONY: help env quickstart test test-all test-slurm test-serve mutants lint format docs house tiny_vae clean

help:  ## list the targets
	@grep -hE '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z_-]+):.*## */\1|/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

env: $(STAMP)  ## make .venv with the versions of constraints.txt

# What training needs; the quickstart waits for no test tools.
$(BASE): pyproject.toml constraints.txt docker/install.sh
	@docker/install.sh python $(VENV)
	@touch $@

$(STAMP): $(BASE)
	@docker/install.sh python $(VENV) dev
	@touch $@

quickstart: $(BASE)  ## train the shapes experiment, sample and score it (about 10 minutes on 2 cores)
	$(BIN)/sora train experiment=quickstart

test: $(STAMP)  ## the test suite within its budget
	$(BIN)/python -m pytest $(PYTEST_APART) -m 'not slow and not gpu' $(PYTEST_FLAGS) tests

test-all: $(STAMP)  ## the long tests too
	$(BIN)/python -m pytest $(PYTEST_APART) $(PYTEST_FLAGS) tests

test-slurm: $(STAMP)  ## the tests on a real SLURM of two nodes, started here (docker/install.sh slurm brings it)
	$(BIN)/python -m pytest -s $(PYTEST_FLAGS) tests/integration/slurm

test-serve: $(STAMP)  ## all tests of sora serve: PostgreSQL, a browser, both clients of OpenAI, load and kills
	$(BIN)/python -m pytest $(PYTEST_FLAGS) tests/serve
	$(BIN)/sora bench serve load
	$(BIN)/sora bench serve load --postgres
	$(BIN)/sora bench serve chaos
	$(BIN)/sora bench serve chaos --postgres

mutants: $(STAMP)  ## small breaks of the code, each tried against the tests nearest to it (about half an hour on 2 cores)
	$(BIN)/python tests/mutants/mutate.py $(MUTANTS_FLAGS)

lint: $(STAMP)  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write docs/config.md and docs/metrics.md again from the models
	$(BIN)/python -m sora_train.config.reference
	$(BIN)/python -m sora_train.monitoring.metrics_reference

house: $(STAMP)  ## draw the rooms of sora_train/ and their imports again: docs/images/house.svg
	$(BIN)/python tests/house_picture.py docs/images/house.svg

tiny_vae: $(STAMP)  ## train the video autoencoder that the package ships (about 40 minutes on a core)
	$(BIN)/sora train experiment=tiny_vae
	$(BIN)/sora train experiment=tiny_vae_short vae.path=runs/tiny_vae/vae
	$(BIN)/sora train experiment=tiny_vae_long vae.path=runs/tiny_vae_short/vae
	$(BIN)/sora train experiment=tiny_vae_long vae.path=runs/tiny_vae_long/vae run.dir=runs/tiny_vae_final

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis dist build
