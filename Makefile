# Two commands: `make repro` runs the whole pipeline, `make test` checks the code. Both set up .venv first if needed.
SHELL := /bin/bash
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help repro test test-slow setup lock wheel-test plots-page clean
help:
	@echo "make repro       set up .venv, then run every stage that is not up to date (dvc repro)"
	@echo "make test        set up .venv, then lint, type check and run the fast tests"
	@echo "make test-slow   run the slow tests: pipeline, wheel, browser, several processes, interpreter"
	@echo "make setup       only set up .venv from requirements.lock"
	@echo "make lock        write requirements.lock anew from pyproject.toml"
	@echo "make wheel-test  build the wheel, install it into an empty environment, and use it there (needs the package index)"
	@echo "make plots-page  write .dvc/plots/page.html anew, in which dvc plots works without a network (needs npm)"
	@echo "make clean       remove .venv and tool caches (results stay)"

repro: setup
	@echo "== dvc repro: running the stages that are not up to date"
	@dvc repro

test: setup
	@echo "== ruff: lint and format"
	@ruff check . && ruff format --check .
	@echo "== mypy: types"
	@mypy
	@echo "== pytest, on all cores"
	@OMP_NUM_THREADS=1 pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: setup
	@echo "== pytest, slow tests, on all cores"
	@OMP_NUM_THREADS=1 pytest -n auto --dist loadfile --no-loadscope-reorder -m slow

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@python=$$(for name in python3.11 python3.12 python3.13 python3; do \
	  if $$name -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; \
	  then command -v $$name; break; fi; done); \
	if [ -z "$$python" ]; then \
	  echo "error: no Python 3.11, 3.12 or 3.13 with venv found on PATH; install one (Debian: python3 and python3-venv)" >&2; \
	  exit 1; fi; \
	echo "== setting up $(VENV) with $$($$python --version) from requirements.lock"; \
	rm -rf $(VENV) && "$$python" -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock || \
	  { echo "error: installing requirements.lock failed; pip's message above says why (is the network there?)" >&2; exit 1; }
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable . || \
	  { echo "error: installing kvcompress itself failed; pip's message above says why" >&2; exit 1; }
	@touch $(READY)

lock:
	@scratch=$$(mktemp -d) && python3 -m venv $$scratch && \
	  $$scratch/bin/pip install --quiet torch==2.13.0 '.[pipeline,dev]' && \
	  { echo "# Made by 'make lock': what the pipeline and its tests were run with."; \
	    $$scratch/bin/pip freeze --exclude kvcompress | sed -E 's/^torch==([0-9.]+).*/torch==\1/'; } > requirements.lock; \
	  rm -rf $$scratch build; head -1 requirements.lock

wheel-test: setup
	@python -m tests.project.wheel_trial

plots-page:
	@scratch=$$(mktemp -d) && npm install --silent --no-audit --no-fund --ignore-scripts --prefix $$scratch \
	  vega@5.33.1 vega-lite@5.23.0 vega-embed@6.29.0 && python3 .dvc/plots/bundle.py $$scratch; rm -rf $$scratch

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
