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
.PHONY: help install test lint format quickstart clean gpu-build gpu-test gpu-bench gpu-check

help:
	@echo "make quickstart   train, evaluate and draw a small TensorMask (OPTS=\"KEY VALUE ...\")"
	@echo "make test         run the tests, except the slow ones (PYTEST_ARGS=\"-k name\")"
	@echo "make lint         check style, formatting and types"
	@echo "make format       correct style and formatting"
	@echo "make install      make $(VENV); the others do it if it is missing"
	@echo "make gpu-check    build, test and measure the CUDA kernels: gpu-build, gpu-test, gpu-bench"
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

# Without OPTS, results beyond the usual spread of a full run are an error.
quickstart: EXPECTED = TEST.EXPECTED_RESULTS "[['bbox', 'AP', 38.3, 3.0], ['segm', 'AP', 31.8, 3.0]]"
quickstart: install
	$(VENV)/bin/tensormask train --config-file quickstart $(or $(OPTS),$(EXPECTED))

# On a machine with a GPU, nvcc and PyTorch: its own $(PYTHON), no $(VENV), no network, no pytest.
gpu-build:
	FORCE_CUDA=1 CUDA_HOME=$${CUDA_HOME:-/usr/local/cuda} timeout 540 $(PYTHON) -m tensormask.commands.build_ops

# Without the caching allocator, memcheck detects accesses beyond a tensor.
gpu-test:
	timeout 260 $(PYTHON) tests/layers/test_swap_align2nat_cuda.py
	@if command -v compute-sanitizer >/dev/null; then \
		echo "compute-sanitizer --tool memcheck"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 260 \
			compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \
			$(PYTHON) tests/layers/test_swap_align2nat_cuda.py --small; \
	else echo "compute-sanitizer is not available: no memcheck"; fi

# A table that fails or takes too long does not prevent the others.
gpu-bench:
	@status=0; \
	bench() { \
		echo "benchmark.py $$*"; name=$$1; shift; \
		timeout $$limit $(PYTHON) dev/benchmark.py $$name --device cuda "$$@" || status=1; \
	}; \
	limit=120; bench op --json op_float32.json; \
	limit=40; for dtype in float16 bfloat16; do \
		bench op --dtypes $$dtype --without-reference --json op_$$dtype.json; \
	done; \
	$(PYTHON) -c "import torchvision, fvcore, yacs, pycocotools" || \
		{ echo "without these packages the models are not measured" >&2; exit 1; }; \
	limit=110; for dtype in tf32 bfloat16; do \
		bench inference --size 800 1344 --dtype $$dtype --json inference_$$dtype.json \
			MODEL.CHANNELS_LAST True; \
	done; \
	bench train --batch 2 --dtype bfloat16 --json train_cuda.json MODEL.CHANNELS_LAST True; \
	exit $$status

# One at a time, also with make -j.
gpu-check:
	$(MAKE) gpu-build
	$(MAKE) gpu-test
	$(MAKE) gpu-bench

clean:
	rm -rf build dist *.egg-info op_*.json inference_*.json train_cuda.json .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
