# `make demo` and `make test` each create .venv, install into it and run. They need Python 3.10 to 3.12 and make.
# Another interpreter: make PYTHON=/path/to/python3.12 VENV=.venv-3.12 demo

VENV ?= .venv
BIN := $(CURDIR)/$(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
PYTEST := python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The first supported Python by its usual names; 3.11 is the version that most tests ran with.
IS_SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.10 python3 python; do \
	$$name -c "$(IS_SUPPORTED)" 2>/dev/null && echo $$name && break; done)

export PATH := $(BIN):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help demo test test-fast test-long lint format lab docs structure tiny ascend-audit
.DEFAULT_GOAL := help

help:
	@echo "make demo       images from the bundled model, by notebooks/00_quickstart.ipynb"
	@echo "make test       lint and tests, notebooks included, without the few that make test-long runs"
	@echo "make test-fast  tests without notebooks, browsers and other slow parts"
	@echo "make test-long  tests that train or draw until a result shows"
	@echo "make lint       ruff on code and notebooks; notebooks are stored without outputs"
	@echo "make format     apply what make lint asks for"
	@echo "make lab        JupyterLab in notebooks/"
	@echo "make docs       API reference in docs/api/"
	@echo "make ascend-audit  operators that a step dispatches on Ascend, counted on this machine"
	@echo "make structure  size and structure of the package, and its limits"
	@echo "make tiny       train the bundled model again from nothing; resumes where it stopped"

$(STAMP): pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.10 to 3.12 was not found. Install it, or name it: make PYTHON=/path/to/python3.11))
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@mkdir -p outputs/demo
	papermill --kernel python3 --cwd . -f configs/inference/tiny.yaml \
		notebooks/00_quickstart.ipynb outputs/demo/00_quickstart.ipynb
	@echo "Images: outputs/demo/*.png   Notebook with its outputs: outputs/demo/00_quickstart.ipynb"

test: lint
	$(PYTEST) -m "not long"

test-fast: $(STAMP)
	$(PYTEST) -m "not notebook and not slow and not long"

test-long: $(STAMP)
	$(PYTEST) -m long

lint: $(STAMP)
	ruff check .
	ruff format --check .
	nbstripout --verify --keep-id notebooks/*.ipynb

format: $(STAMP)
	ruff check --fix .
	ruff format .
	nbstripout --keep-id notebooks/*.ipynb

lab: $(STAMP)
	jupyter lab notebooks

docs: $(STAMP)
	python docs/build_api.py

ascend-audit: $(STAMP)
	python -m benchmarks.ascend_audit

structure: $(STAMP)
	python tests/structure.py

tiny: $(STAMP)
	pixart-nb tiny
