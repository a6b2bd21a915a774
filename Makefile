# Two commands do everything on a fresh machine: `make encode` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
MINUTES ?= 10

.PHONY: encode test test-slow chaos lint clean

encode: .venv/installed  ## encode 1,146 tiles of photographs and show where to look
	$(BIN)/nfscale encode pipelines/photos.yaml

test: .venv/installed  ## the tests that CI runs
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/installed  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

chaos: .venv/installed  ## kill, fill and cut off parts of a Ray cluster for MINUTES, with faults drawn by SEED
	$(BIN)/python -m tests.chaos.run --seed $(SEED) --minutes $(MINUTES) --json chaos-$(SEED).json

lint: .venv/linted  ## style, formatting, types of the public surface
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:  ## remove what the other targets made, but no runs
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# constraints.txt pins what was tested; without it pip may fetch gigabytes of another torch build.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nfscale needs Python 3.11 or newer; try make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

.venv/linted: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
