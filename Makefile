# Every target sets up what it needs: a virtual environment in .venv with pinned dependencies.
#   make PYTHON=/path/to/python3   use another interpreter for a new .venv
#   make test PYTEST_ARGS="-k gate" JOBS=0   in one process (JOBS: auto, one per core)
#   make bench JSON=name           also write bench/results/name.json
#   make wheel HEAT_FAST_CUDA=1    with the CUDA kernels, into dist/cuda
#   make kernels KERNELS="--arch 90 --op masked_kl"     some of the GPU kernels
#   make bench-gpu PARTS="kernels paper"                some of kernels low_rank attribution paper
#   make bench-gpu PARTS=kernels PYTEST_ARGS="-k 1024"                 some of their rows
#   make bench-gpu PARTS=tiles                          search for faster tiles than the shipped

PYTHON ?= python3
PYTEST_ARGS ?=
JOBS ?= auto
JSON ?=
BASE ?=
ROUNDS ?= 5
# Where no GPU is to be seen the CUDA kernels could not run, and nvcc takes as long as all the rest.
export HEAT_FAST_CUDA ?= $(if $(wildcard /dev/nvidia[0-9]*),,0)
KERNELS ?= --write kernels/COMPILED.md
PARTS ?= kernels low_rank attribution paper

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint types format sanitize bench bench-smoke bench-compare agreement agreement-packages evaluations plots wheel kernels gpu bench-gpu docs screenshots notebook clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## Create .venv and install everything into it (the other targets do this too)

# torch is a step of its own: nothing that depends on it may choose another build.
$(STAMP): pyproject.toml setup.py constraints.txt heat_fast/_version.py $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*)
	@if [ ! -x $(BIN)/python ]; then \
	  command -v "$(PYTHON)" >/dev/null || { \
	    echo "make: there is no '$(PYTHON)' here. heat-fast needs Python 3.10 or newer: install it, or name one with 'make PYTHON=/path/to/python3'." >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). heat-fast needs Python 3.10 or newer: name one with 'make PYTHON=/path/to/python3'." >&2; exit 1; }; \
	  "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: '$(PYTHON)' cannot create virtual environments. Install its venv module (on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; }; \
	  echo "Creating $(VENV) with $$("$(PYTHON)" --version)"; \
	  "$(PYTHON)" -m venv $(VENV); \
	fi
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(VENV) holds $$($(BIN)/python --version 2>&1). heat-fast needs Python 3.10 or newer: remove $(VENV) and run make again." >&2; exit 1; }
	@$(BIN)/python -c 'import pip, sys; sys.exit(int(pip.__version__.split(".")[0]) < 23)' || $(PIP) install --upgrade pip
	@echo "Installing torch (the largest download)"
	@$(PIP) install --constraint constraints.txt torch
	@echo "Installing heat-fast and its development tools (compiles csrc/, about a minute)"
	@$(PIP) install --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@
	@echo "$(VENV) is ready: $$($(BIN)/python -c 'from importlib.metadata import version as v; print(*(f"{n} {v(n)}" for n in ("heat-fast", "torch", "transformers")), sep=", ")')"
	@$(BIN)/python -c 'from heat_fast import build_info as b; i = b(); print("compiled kernels: " + (i["instruction_set"] if i["native"] else "none, torch alone (" + i["reason"] + "). A C++ compiler and the Python headers are needed; then remove $@ and run make again."))'

demo: $(STAMP) ## Attribute an answer of the embedded model and print it
	@$(BIN)/heat-fast attribute

test: lint types ## Lint, types and tests
	@$(BIN)/pytest --quiet --durations=10 --benchmark-disable --numprocesses=$(JOBS) --dist=worksteal $(PYTEST_ARGS)

lint: $(STAMP) ## ruff: rules and formatting
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "Some files are not formatted: run 'make format'." >&2; exit 1; }
	@echo "ruff: clean"

types: $(STAMP) ## mypy --strict on the package
	@$(BIN)/mypy --strict heat_fast

format: $(STAMP) ## Rewrite the code in the project's format
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

sanitize: ## Run every compiled kernel under the address and undefined-behaviour sanitizers
	@$(MAKE) --no-print-directory --jobs=2 --file=csrc/tests/sanitize.mk

bench: $(STAMP) ## Run the benchmarks (JSON=name writes bench/results/name.json)
	@ls bench/test_*.py >/dev/null 2>&1 || { echo "bench/ holds no benchmark yet." >&2; exit 1; }
	@$(if $(JSON),mkdir -p bench/results)
	@$(BIN)/pytest bench --benchmark-only $(if $(JSON),--benchmark-json=bench/results/$(JSON).json) $(PYTEST_ARGS)

bench-smoke: $(STAMP) ## Run every benchmark once, small, to see that it runs
	@HEAT_FAST_BENCH=small $(BIN)/pytest bench --quiet --benchmark-only --benchmark-columns=median $(PYTEST_ARGS)

bench-compare: $(STAMP) ## Time this tree against an earlier revision, in turns (BASE=<rev>)
	@[ -n "$(BASE)" ] || { echo "make: name a revision: make bench-compare BASE=HEAD~1" >&2; exit 1; }
	@$(BIN)/python bench/compare.py $(BASE) --rounds $(ROUNDS)

agreement-packages: $(STAMP)
	@$(PIP) install -c constraints.txt "captum>=0.8" "context-cite>=0.0.4"

agreement: agreement-packages ## Compare baselines with captum and context-cite (installs both)
	@$(BIN)/pytest tests/test_baselines.py --quiet -k "captum or as_its_authors" $(PYTEST_ARGS)

evaluations: $(STAMP) ## Run the presets of heat-fast evaluate (writes bench/results/evaluation-*/)
	@$(BIN)/python bench/evaluations.py

plots: $(STAMP) ## Draw docs/images and write the tables of docs/performance.md from bench/results
	@$(BIN)/python bench/plots.py
	@$(BIN)/python bench/page.py
	@$(BIN)/python bench/gpu/tables.py

DIST = dist$(if $(filter 1,$(HEAT_FAST_CUDA)),/cuda)

# build/lib is packed as it lies, whatever an earlier build left there.
wheel: $(STAMP) ## Build the wheel and test it in an environment without the source tree
	@rm -rf build/lib* build/bdist* && mkdir -p $(DIST) && rm -f $(DIST)/*.whl
	@HEAT_FAST_NATIVE=1 $(PIP) wheel --no-deps --no-build-isolation --wheel-dir $(DIST) .
	@$(BIN)/python .ci/check_wheel.py $(DIST)/*.whl

kernels: $(STAMP) ## Compile the GPU kernels for every architecture, without a GPU
	@$(BIN)/python -m heat_fast.kernels.compile $(KERNELS)

gpu: $(STAMP) ## Run the GPU tests and the kernels' benchmarks on this machine's GPU
	@$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { \
	  echo "make: torch sees no CUDA device here; 'make test' runs the kernels in Triton's interpreter." >&2; exit 1; }
	@$(BIN)/pytest --quiet --durations=10 --numprocesses=8 --dist=worksteal tests/test_triton_*.py $(PYTEST_ARGS)
	@$(BIN)/pytest --quiet --durations=10 -m gpu tests --ignore-glob='tests/test_triton_*' $(PYTEST_ARGS)
	@HEAT_FAST_BENCH_SECONDS=240 $(MAKE) --no-print-directory bench-gpu PARTS=kernels
	@if compute-sanitizer --version >/dev/null 2>&1; then \
	  timeout 120 compute-sanitizer --tool racecheck --error-exitcode 1 \
	    $(BIN)/python -m pytest --quiet tests/test_triton_*.py -k "63 and not staged" \
	    || { echo "make: compute-sanitizer found a race, was refused the device or took over two minutes." >&2; exit 1; }; \
	else echo "compute-sanitizer is not installed: races were not looked for."; fi

# A row that is there is not measured again, and a run ends after about nine minutes: repeat it.
bench-gpu: $(STAMP) ## Time kernels and attributions on this GPU (writes bench/results/<gpu>/)
	@$(BIN)/pytest $(PARTS:%=bench/gpu/test_bench_%.py) --benchmark-only $(PYTEST_ARGS); \
	  outcome=$$?; $(BIN)/python bench/gpu/tables.py; exit $$outcome

docs: $(STAMP) ## Build the documentation into site/, warnings as errors
	@$(BIN)/python -c 'import mkdocs, material, mkdocstrings' 2>/dev/null || { \
	  echo "make: the documentation is built with Python 3.11 or newer; $(VENV) holds $$($(BIN)/python --version 2>&1)." >&2; exit 1; }
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html is ready; '$(BIN)/python -m http.server --directory site' serves it with its search"

screenshots: $(STAMP) ## Picture the report page into docs/images/ (needs chromium and its driver)
	@$(BIN)/python tests/screenshots.py

notebook: $(STAMP) ## Execute examples/explain.ipynb and keep its outputs
	@$(BIN)/python tests/notebook.py

clean: ## Remove caches and build output (.venv stays)
	@rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks .hypothesis
	@find heat_fast kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	@rm -rf $(VENV)
