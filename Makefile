# Everything a clone needs; `make` alone lists the targets. PYTHON=... chooses the interpreter of .venv.

PYTHON ?= python3
# Two tests at once: much of each is imports and compilation on one core.
PYTEST_ARGS ?= -n 2

VENV := .venv
BIN := $(VENV)/bin
INPUTS := pyproject.toml $(wildcard constraints/*.txt)
# Tests choose their own devices: what the shell says to JAX must not change them.
QUIET_ENV = env $(foreach name,$(filter JAX_% XLA_%,$(.VARIABLES)),-u $(name))

.PHONY: help quickstart install test test-most test-all lint format wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install into .venv and train sCT on real blood cells (minutes on two cores)"
	@echo "make install      install into .venv, with what the tests and linters need"
	@echo "make test         run the quick tests, two at once (minutes); PYTEST_ARGS='-n 4 tests/data' replaces -n 2"
	@echo "make test-most    run quick and slow tests (within an hour)"
	@echo "make test-all     run all tests, compiled as for a user (hours)"
	@echo "make lint         check style and types"
	@echo "make format       format the code"
	@echo "make wheel        build dist/*.whl"
	@echo "make clean        remove .venv, caches and built files (runs/ and stores/ stay)"

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

wheel: $(VENV)/.test
	@log=$$($(BIN)/python -m build --wheel --no-isolation --outdir dist . 2>&1) || { echo "$$log" >&2; exit 1; }
	@ls dist/*.whl

clean:
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@command -v "$(PYTHON)" > /dev/null || { \
		echo "error: there is no $(PYTHON), but Python 3.11 or newer is needed: name one, as in" \
		"\`make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)\`." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), but Python 3.11 or newer is needed: name one, as in" \
		"\`make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)\`." >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

# Whether .venv holds this folder under `sct`, the name of the distribution in earlier versions.
define EARLIER
import json, os
from importlib.metadata import distribution
from urllib.parse import unquote, urlsplit
about = json.loads(distribution("sct").read_text("direct_url.json"))
assert about["dir_info"]["editable"] and os.path.samefile(unquote(urlsplit(about["url"]).path), ".")
endef
export EARLIER

# A stamp per set of extras; the constraints are the tested versions of .venv's Python, where there are some.
$(VENV)/.cells: EXTRAS := cells
$(VENV)/.test: EXTRAS := cells,test
$(VENV)/.cells $(VENV)/.test: $(VENV)/.python $(INPUTS)
	@echo "installing sct-jax[$(EXTRAS)] into $(VENV) (minutes the first time)"
	@! $(BIN)/python -P -c "$$EARLIER" 2> /dev/null || \
		$(BIN)/python -m pip uninstall -qq --disable-pip-version-check -y sct
	@versions=constraints/$$($(BIN)/python -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt; \
	[ ! -f $$versions ] || set -- -c $$versions; \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[$(EXTRAS)]" "$$@"
	@touch $(VENV)/.cells $@
