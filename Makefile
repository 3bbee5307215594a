# Every target works on a fresh clone with nothing but Python >= 3.10: it makes the virtual environment it needs.

PYTHON ?= python3
VENV ?= .venv
OUT ?= benchmarks/results
CALL ?= 1
OWNER ?= OWNER

.PHONY: demo test test-all compile bench faults gpu hub wheel lint clean

demo: $(VENV)/mae.installed
	$(VENV)/bin/python -m mae demo --overwrite

test test-all: $(VENV)/test.installed $(VENV)/peers.installed
	$(VENV)/bin/python -m pytest --numprocesses 2 $(if $(filter test,$@),-m "not slow")

# Every launch of the tests, for every chip, under the oldest and the newest Triton; goes on where it was stopped.
compile: $(VENV)/test.installed $(VENV)/peers.installed
	$(VENV)/bin/python tests/launches.py

bench: $(VENV)/bench.installed
	$(VENV)/bin/python -m pytest benchmarks/ --benchmark-only

faults: $(VENV)/test.installed $(VENV)/peers.installed
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

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.installed: setup.py constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

# Models of others that the tests try apply and convert on, the oldest Triton, and kernels: see tests/peers.py.
$(VENV)/peers.installed: $(wildcard tests/peers-*.txt) $(VENV)/test.installed
	for peer in kernels timm transformers-4 triton-3.6; do \
		$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/peers/$$peer \
			--requirement tests/peers-$$peer.txt || exit 1; done
	touch $@

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .pytest_cache .ruff_cache .benchmarks *.egg-info
