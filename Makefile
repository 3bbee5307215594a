# Every target works on a fresh clone with nothing but Python >= 3.10: it makes the virtual environment it needs.

PYTHON ?= python3
VENV ?= .venv
OUT ?= benchmarks/results

.PHONY: demo test bench gpu lint clean

demo: $(VENV)/demo.installed
	$(VENV)/bin/python -m mae demo

test: $(VENV)/test.installed
	$(VENV)/bin/python -m pytest

bench: $(VENV)/bench.installed
	$(VENV)/bin/python -m pytest benchmarks/ --benchmark-only

lint: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Takes the packages of $(PYTHON) as they are when they suffice, so that a GPU machine needs no network.
gpu:
	@$(PYTHON) -c "import torch, triton, einops, pytest_benchmark, mae" 2>/dev/null || $(MAKE) $(VENV)/bench.installed
	@python=$(PYTHON); [ ! -e $(VENV)/bench.installed ] || python=$(VENV)/bin/python; \
	$$python -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu: PyTorch sees no GPU on this machine')" \
	&& mkdir -p $(OUT) \
	&& $$python -m pytest benchmarks/ --benchmark-only --size full --benchmark-json=$(OUT)/gpu.json

$(VENV)/%.installed: setup.py constraints.txt
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .benchmarks *.egg-info
