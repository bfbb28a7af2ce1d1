# `make demo` and `make test` each create .venv, install into it and run. They need Python 3.11 and make, nothing else.

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS := 2

# The first Python 3.11 by its usual names; another one: make PYTHON=/path/to/python3.11 demo
IS_3_11 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
PYTHON := $(shell for name in python3.11 python3 python; do \
	$$name -c "$(IS_3_11)" 2>/dev/null && echo $$name && break; done)

export PATH := $(BIN):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help demo test lint structure format lab tiny
.DEFAULT_GOAL := help

help:
	@echo "make demo    pictures from the embedded model, by notebooks/00_quickstart.ipynb"
	@echo "make test    lint and tests"
	@echo "make lint    ruff on code and notebooks, notebooks without outputs"
	@echo "make structure  lines, import cycles, words and other measurements of the package"
	@echo "make format  what make lint asks for, done"
	@echo "make lab     JupyterLab in notebooks/"
	@echo "make tiny    train the embedded model again from nothing; goes on where it stopped"

$(STAMP): pyproject.toml
	$(if $(PYTHON),,$(error Python 3.11 was not found. Install it, or say where it is: make PYTHON=/path/to/python3.11))
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@mkdir -p outputs/demo
	papermill --kernel python3 --cwd . -f configs/inference/tiny.yaml \
		notebooks/00_quickstart.ipynb outputs/demo/00_quickstart.ipynb
	@echo "Pictures: outputs/demo/*.png   Notebook with its outputs: outputs/demo/00_quickstart.ipynb"

test: lint
	python -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP)
	ruff check .
	ruff format --check .
	nbstripout --verify --keep-id notebooks/*.ipynb

structure: $(STAMP)
	python tests/structure.py

format: $(STAMP)
	ruff check --fix .
	ruff format .
	nbstripout --keep-id notebooks/*.ipynb

lab: $(STAMP)
	jupyter lab notebooks

tiny: $(STAMP)
	pixart-nb tiny
