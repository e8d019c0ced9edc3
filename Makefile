# Python that makes .venv: 3.11 or newer.
PYTHON ?= python3
# More options for the quickstart (KEY VALUE pairs) and for pytest.
OPTS ?=
PYTEST_ARGS ?=

VENV := .venv
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install test lint format quickstart clean

help:
	@echo "make quickstart   train, evaluate and draw a small TensorMask (OPTS=\"KEY VALUE ...\")"
	@echo "make test         run the tests (PYTEST_ARGS=\"-k name\")"
	@echo "make lint         check style and formatting"
	@echo "make format       mend style and formatting"
	@echo "make install      make $(VENV), once; the others do it when it is missing"
	@echo "make clean        remove caches and build folders; $(VENV), output/ and datasets/ stay"
	@echo "Each stands alone. PYTHON=python3.x chooses the interpreter of $(VENV) (3.11 or newer)."

install: $(INSTALLED)

# A $(VENV) without a working pip is the rest of an interrupted or moved one: made anew.
$(INSTALLED): requirements.txt setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there: set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"$(PYTHON) is Python {v[0]}.{v[1]}, TensorMask needs 3.11 or newer: set PYTHON=...")'
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

test: install
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

quickstart: install
	$(VENV)/bin/python tools/train_net.py --config-file configs/quickstart.yaml $(OPTS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
