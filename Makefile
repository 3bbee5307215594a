# Every target works on a fresh clone with nothing but Python >= 3.10: it makes the virtual environment it needs.

PYTHON ?= python3
VENV ?= .venv
OUT ?= benchmarks/results

.PHONY: demo test bench faults gpu lint clean

demo: $(VENV)/demo.installed
	$(VENV)/bin/python -m mae demo

test: $(VENV)/test.installed $(VENV)/peers.installed
	$(VENV)/bin/python -m pytest --numprocesses 2

bench: $(VENV)/bench.installed
	$(VENV)/bin/python -m pytest benchmarks/ --benchmark-only

faults: $(VENV)/test.installed
	$(VENV)/bin/python tests/faults.py

lint: $(VENV)/dev.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# Takes the packages of $(PYTHON) as they are when they suffice, so that a GPU machine needs no network.
gpu:
	@if $(PYTHON) -c "import torch, triton, einops, hypothesis, pytest_benchmark" 2>/dev/null; then python=$(PYTHON); \
	else $(MAKE) $(VENV)/test.installed && python=$(VENV)/bin/python; fi; \
	$$python -m benchmarks.gpu --out $(OUT)

$(VENV)/%.installed: setup.py constraints.txt
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

# Models of others that the tests try apply and convert on: see tests/peers.py.
$(VENV)/peers.installed: tests/peers-timm.txt tests/peers-transformers-4.txt $(VENV)/test.installed
	for peer in timm transformers-4; do \
		$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/peers/$$peer \
			--requirement tests/peers-$$peer.txt || exit 1; done
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .benchmarks *.egg-info
