# Python that makes .venv: 3.11 or newer.
PYTHON ?= python3
# More options for the quickstart (KEY VALUE pairs) and for pytest.
OPTS ?=
PYTEST_ARGS ?=

VENV := .venv
INSTALLED := $(VENV)/.installed
# On Linux a compilation that fails is an error; TENSORMASK_WITHOUT_EXT=1 installs without it.
MUST_COMPILE := $(if $(filter Linux,$(shell uname)),TENSORMASK_WITH_EXT=1)

.DEFAULT_GOAL := help
.PHONY: help install test lint format docs quickstart clean gpu-prepare gpu-build gpu-test gpu-bench gpu-check

help:
	@echo "make quickstart   train, evaluate and draw a small TensorMask (OPTS=\"KEY VALUE ...\")"
	@echo "make test         run the tests, except the slow ones (PYTEST_ARGS=\"-k name\")"
	@echo "make lint         check style, formatting and types"
	@echo "make format       correct style and formatting"
	@echo "make docs         build the documents as a site in site/; dead links are errors"
	@echo "make install      make $(VENV); the others do it if it is missing"
	@echo "make gpu-prepare  make what gpu-check needs on a machine without network (.gpu/, the CUDA library)"
	@echo "make gpu-check    test and measure on a GPU, in minutes: gpu-test, gpu-bench"
	@echo "make clean        remove caches and build folders; $(VENV), output/ and datasets/ stay"
	@echo "PYTHON=python3.x chooses the interpreter of $(VENV) (3.11 or newer)."

install: $(INSTALLED)

# A $(VENV) without a working pip was interrupted or moved: it is made again.
$(INSTALLED): requirements.txt setup.py pyproject.toml tensormask/layers/build.py $(wildcard csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not available: set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"$(PYTHON) is Python {v[0]}.{v[1]}, TensorMask needs 3.11 or newer: set PYTHON=...")'
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	$(MUST_COMPILE) $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# One thread per process: more are slower for tensors as small as those of the tests.
test: install
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 -m "not slow" $(PYTEST_ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Needs no network. Its search needs a server: $(VENV)/bin/python -m http.server -d site
docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Without OPTS, results beyond the usual spread of a full run are an error.
quickstart: EXPECTED = TEST.EXPECTED_RESULTS "[['bbox', 'AP', 52.0, 4.0], ['segm', 'AP', 49.0, 4.0]]"
quickstart: install
	$(VENV)/bin/tensormask train --config-file quickstart $(or $(OPTS),$(EXPECTED))

# With network, on any machine: what the others need on a machine with a GPU and without network.
gpu-prepare: install
	PY=$(VENV)/bin/python bash dev/gpu/prepare.sh

# On a machine with a GPU and PyTorch: its own $(PYTHON), no $(VENV), no network, no pytest.
gpu-build:
	FORCE_CUDA=1 CUDA_HOME=$${CUDA_HOME:-/usr/local/cuda} timeout 540 $(PYTHON) -m tensormask.commands.build_ops

gpu-test:
	PY=$(PYTHON) bash dev/gpu/check.sh 1

gpu-bench:
	PY=$(PYTHON) bash dev/gpu/check.sh 2

# One at a time, also with make -j.
gpu-check:
	$(MAKE) gpu-test
	$(MAKE) gpu-bench

clean:
	rm -rf build dist site *.egg-info .gpu .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
