# `make` without a target lists the targets. PYTHON=... sets the interpreter of .venv.

PYTHON ?= python3
# Two test processes: most time is imports and compilation, which use one core.
PYTEST_ARGS ?= -n 2

VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml $(wildcard constraints/*.txt)
# Tests choose their own devices, so JAX settings of the shell must not reach them.
QUIET_ENV = env $(foreach name,$(filter JAX_% XLA_%,$(.VARIABLES)),-u $(name))

.PHONY: help quickstart install test test-most test-all lint format docs notebooks check-notebooks wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install into .venv and train sCT on real blood cells (minutes on two cores)"
	@echo "make install      install into .venv, with the tools for tests and linting"
	@echo "make test         run the quick tests (minutes); PYTEST_ARGS='-n 4 tests/data' replaces the default -n 2"
	@echo "make test-most    run quick and slow tests (within an hour)"
	@echo "make test-all     run all tests, fully compiled (hours)"
	@echo "make lint         check style and types"
	@echo "make format       format the code"
	@echo "make docs         build the documentation site, docs/_build/html/index.html"
	@echo "make notebooks    run the notebooks and store their outputs; NOTEBOOKS='03 04' chooses some of them"
	@echo "make check-notebooks   run the notebooks with small settings, without changing them"
	@echo "make wheel        build dist/*.whl"
	@echo "make clean        remove .venv, caches and built files (keeps runs/ and stores/)"

quickstart: $(VENV)/.cells
	@$(BIN)/python -m launch.train --config=configs/sct_sc.py:quickstart --workdir=runs/quickstart

install: $(VENV)/.test

test: $(VENV)/.test
	@$(QUIET_ENV) $(BIN)/python -m pytest -m "not slow and not slowest" $(PYTEST_ARGS)

test-most: $(VENV)/.test
	@$(QUIET_ENV) $(BIN)/python -m pytest -m "not slowest" $(PYTEST_ARGS)

test-all: $(VENV)/.test
	@$(QUIET_ENV) SCT_TESTS_COMPILE=full $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check . || { echo "error: these files are not formatted: run \`make format\`." >&2; \
		$(BIN)/ruff format --check . >&2; exit 1; }
	@$(BIN)/python -m mypy --no-error-summary

format: $(VENV)/.test
	@$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .

# -E reads every page anew: pages also show docstrings and options, whose changes Sphinx does not follow.
docs: $(VENV)/.docs
	@$(QUIET_ENV) JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -E -q -W --keep-going -j auto -d docs/_build/doctrees docs docs/_build/html
	@echo docs/_build/html/index.html

notebooks: $(VENV)/.test
	@$(QUIET_ENV) $(BIN)/python tools/run_notebooks.py $(NOTEBOOKS)

check-notebooks: $(VENV)/.test
	@$(QUIET_ENV) $(BIN)/python tools/run_notebooks.py --quick $(NOTEBOOKS)

wheel: $(VENV)/.test
	@log=$$($(BIN)/python -m build --wheel --no-isolation --outdir dist . 2>&1) || { echo "$$log" >&2; exit 1; }
	@ls dist/*.whl

clean:
	@rm -rf $(VENV) build dist docs/_build docs/api docs/tutorials .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@command -v "$(PYTHON)" > /dev/null || { \
		echo "error: $(PYTHON) was not found, but Python 3.11 or newer is required: name one, for example" \
		"\`make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)\`." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), but Python 3.11 or newer is required: name one, for example" \
		"\`make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)\`." >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

# Fails unless .venv has this folder installed under `sct`, the earlier name of the distribution.
define EARLIER
import json, os
from importlib.metadata import distribution
from urllib.parse import unquote, urlsplit
about = json.loads(distribution("sct").read_text("direct_url.json"))
assert about["dir_info"]["editable"] and os.path.samefile(unquote(urlsplit(about["url"]).path), ".")
endef
export EARLIER

# One stamp file per set of extras. Constraints are the tested versions for the Python of .venv, if any.
$(VENV)/.cells: EXTRAS := cells
$(VENV)/.test: EXTRAS := cells,test
$(VENV)/.docs: EXTRAS := cells,docs
$(VENV)/.cells $(VENV)/.test $(VENV)/.docs: $(VENV)/.python $(INPUTS)
	@echo "installing sct-jax[$(EXTRAS)] into $(VENV) (minutes the first time)"
	@! $(BIN)/python -P -c "$$EARLIER" 2> /dev/null || \
		$(BIN)/python -m pip uninstall -qq --disable-pip-version-check -y sct
	@versions=constraints/$$($(BIN)/python -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt; \
	[ ! -f $$versions ] || set -- -c $$versions; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[$(EXTRAS)]" "$$@"
	@touch $(VENV)/.cells $@
