# Everything runs in .venv, made from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint bench docs clean

demo: $(STAMP)
	$(BIN)/python examples/efficientnet_v2/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/python examples/benchmarks/kernels.py
	$(BIN)/python examples/benchmarks/step_time.py

docs: $(STAMP)
	$(BIN)/python -m pydoc -w brevitas_bp brevitas_bp.quant brevitas_bp.codec brevitas_bp.memory
	mkdir -p build/docs && mv brevitas_bp*.html build/docs/

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .hypothesis .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and pinned: an unpinned one may bring gigabytes of another build.
	$(BIN)/python -m pip install -q -c constraints.txt torch torchvision
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[cpu,test,lint]"
	touch $(STAMP)
