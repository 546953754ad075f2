# Two commands: `make demo` (the main job) and `make test`. Each sets up a virtual environment of its own on first use.

PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13,$(shell command -v python$(version))) python3)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-eval
	$(BIN)/jrt demo --output demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m mypy
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --hypothesis-profile=ci

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "jrt needs Python 3.11 to 3.13; name one with make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-eval: $(BIN)/python pyproject.toml setup.py constraints.txt lm-eval-harness/pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-eval
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,train,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
