# `make train` and `make test` do everything on a machine with Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
export PYTHONUNBUFFERED := 1
# Threads of small networks meet often.  With the default they spin while they wait, and one busy neighbour on the machine
# then slows training tenfold; a short spin costs nothing on a quiet machine.
export GOMP_SPINCOUNT ?= 3000

.DEFAULT_GOAL := help
BOUNDS ?= lowest
.PHONY: help train test test-all test-env wheel lock lint types check clean

help:
	@echo "make train     install what is missing, then run the main job (arguments: make train ARGS='seed=1')"
	@echo "make test      install what is missing, then run the tests (under 5 minutes on 2 cores)"
	@echo "make test-all  the long tests too"
	@echo "make test-env  the tests in a fresh environment, BOUNDS=lowest or newest; PYTHON=python3.13 takes another Python"
	@echo "make wheel     build the package into dist/;   make lock   renew requirements.txt from pyproject.toml"
	@echo "make lint      ruff;   make types  mypy;   make check  both"
	@echo "make clean     remove the environment and caches; runs are kept"

# The marker is the last thing written.  Without it the environment is unfinished and is built anew: a half-copied
# package can look installed.  With it but older than the pins, pip brings the environment up to date.
$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v == (3, 11) else "Python 3.11 is needed, found %d.%d; set PYTHON=/path/to/python3.11" % v)'
	@if [ ! -e $@ ]; then $(PYTHON) -m venv --clear $(VENV); fi
	@rm -f $@
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --quiet --requirement requirements.txt
	@$(PY) -c 'import torch, torchvision, pytorch_lightning, captum, wandb' || { echo "the environment is broken; run: make clean"; exit 1; }
	@touch $@

train: $(READY)
	$(PY) train.py $(ARGS)

test: $(READY)
	$(PY) -m pytest $(ARGS)

test-all: $(READY)
	$(PY) -m pytest -m '' $(ARGS)

# The dependencies at the lower bounds of pyproject.toml, or as new as they allow; what `make` installs is left alone.
test-env:
	$(PYTHON) -m venv --clear .venv-$(BOUNDS)
	$(PYTHON) .ci/bounds.py $(BOUNDS) > .venv-$(BOUNDS)/wanted.txt
	.venv-$(BOUNDS)/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet -r .venv-$(BOUNDS)/wanted.txt
	.venv-$(BOUNDS)/bin/python -m pytest $(ARGS)

wheel: $(READY)
	rm -rf build dist
	$(PY) -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir dist .

lock:
	$(PYTHON) .ci/lock.py > requirements.new
	mv requirements.new requirements.txt

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	@mkdir -p .types && ln -sfn .. .types/glassarmor
	$(VENV)/bin/mypy

check: lint types

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest build dist .types .pytest_cache .mypy_cache .ruff_cache .hypothesis
