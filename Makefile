# Every target works on a fresh clone with nothing but Python >= 3.10: it makes the virtual environment it needs.

PYTHON ?= python3
VENV ?= .venv
OUT ?= benchmarks/results
CALL ?= 1
PEERS := $(patsubst tests/peers-%.txt,$(VENV)/peers/%.installed,$(wildcard tests/peers-*.txt))
# Python compiles the modules that are imported, a fifth of those that are installed, where it may keep the result.
PIP := $(VENV)/bin/python -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
OWNER ?= OWNER

.PHONY: demo test test-all compile bench faults gpu hub wheel lint clean

demo: $(VENV)/mae.installed
	$(VENV)/bin/python -m mae demo --overwrite

test test-all: $(VENV)/all.installed
	$(VENV)/bin/python -m pytest --numprocesses 2 $(if $(filter test,$@),-m "not slow")

# Every launch of the tests, for every chip, under the oldest and the newest Triton; goes on where it was stopped.
compile: $(VENV)/all.installed
	$(VENV)/bin/python tests/launches.py

bench: $(VENV)/bench.installed
	$(VENV)/bin/python -m pytest benchmarks/ --benchmark-only

faults: $(VENV)/all.installed
	$(VENV)/bin/python tests/faults.py

# What an older build left in build/lib would be packed too, modules that the sources have no more among it.
wheel: $(VENV)/bin/python
	rm -rf build/lib
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .

lint: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# In two calls, CALL=1 and CALL=2. Takes the packages of $(PYTHON) as they are when they suffice: a lent machine may have
# no network.
gpu:
	@if $(PYTHON) -c "import torch, triton, einops, pytest_benchmark, xdist" 2>/dev/null; then python=$(PYTHON); \
	else $(MAKE) $(VENV)/test.installed && python=$(VENV)/bin/python; fi; \
	$$python -m benchmarks.gpu $(CALL) --out $(OUT)

# The project that kernel-builder publishes as OWNER/mae-kernels on Hugging Face's Hub.
hub:
	rm -rf build/hub
	$(PYTHON) hub/make.py build/hub --owner $(OWNER)

$(VENV)/all.installed: setup.py constraints.txt $(wildcard tests/peers-*.txt)
	$(MAKE) --jobs=2 $(VENV)/dev.installed $(PEERS)
	touch $@

# Models of others that the tests try apply and convert on, the oldest Triton, and kernels: see tests/peers.py.
$(VENV)/peers/%.installed: tests/peers-%.txt | $(VENV)/bin/python
	$(PIP) --no-deps --upgrade --target $(VENV)/peers/$* --requirement $<
	touch $@

$(VENV)/%.installed: setup.py constraints.txt | $(VENV)/bin/python
	$(PIP) --constraint constraints.txt --editable '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .pytest_cache .ruff_cache .benchmarks *.egg-info
