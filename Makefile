# `make help` lists what there is. Written for GNU Make 3.81 (macOS) and a POSIX sh.
VENV ?= .venv
TORCH ?= cpu
CORPUS ?=
WORKDIR ?=
PYTEST_ARGS ?=
BIN := $(VENV)/bin
INSTALL := PYTHON="$(PYTHON)" sh tools/install.sh "$(VENV)" "$(TORCH)"
SOURCES := pyproject.toml constraints.txt tools/install.sh

.PHONY: help install quickstart test test-slow lint types format clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  TORCH=cpu|cuda   build of torch on Linux (default cpu)      PYTHON=/path/to/python3   interpreter of the environment"
	@echo "  CORPUS=path      your own text, for make quickstart         WORKDIR=path              where make quickstart writes"
	@echo "  PYTEST_ARGS=...  more options for pytest"

# A stamp per build of torch: asking for the other one installs again, asking twice does not.
$(VENV)/.installed-$(TORCH): $(SOURCES)
	@$(INSTALL)
	@rm -f "$(VENV)"/.installed-* "$(VENV)"/.dev-*
	@touch "$@"

$(VENV)/.dev-$(TORCH): $(VENV)/.installed-$(TORCH)
	@$(INSTALL) "[dev]"
	@touch "$@"

install: $(VENV)/.installed-$(TORCH) ## Make .venv and install the package with its tested versions

quickstart: install ## Corpus, tokenizer, shards, training, evaluation and a sample, in at most 10 minutes; again to resume
	@"$(BIN)/python" tools/quickstart.py $(if $(CORPUS),--corpus "$(CORPUS)") $(if $(WORKDIR),--workdir "$(WORKDIR)")

test: $(VENV)/.dev-$(TORCH) ## The tests that a CPU runs in minutes
	"$(BIN)/python" -m pytest -m "not slow and not gpu and not multi_gpu" --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

test-slow: $(VENV)/.dev-$(TORCH) ## The long ones, and those for a GPU where there is one
	"$(BIN)/python" -m pytest -m "slow or gpu or multi_gpu" $(PYTEST_ARGS)

lint: $(VENV)/.dev-$(TORCH) ## Style: ruff's rules and its format
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

types: $(VENV)/.dev-$(TORCH) ## Type checker
	"$(BIN)/mypy"

format: $(VENV)/.dev-$(TORCH) ## Let ruff mend what it can
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

clean: ## Remove the environment and the caches; runs/ stays
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
