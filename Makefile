# Everything runs in .venv, made from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-newest lint bench docs linkcheck dist clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# Under the allocator that training on a CPU should have.
demo: $(STAMP)  ## train a small EfficientNetV2 in nine ways, in three minutes
	$(BIN)/python -m brevitas_bp.run examples/efficientnet_v2/demo.py

test: $(STAMP)  ## all tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-fast: $(STAMP)  ## all tests but the slow ones
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

# Under the newest torch there is (gigabytes): with every change to what torch keeps private.
NEWEST := .venv-newest
test-newest:  ## the main tests under the newest torch, in an environment of its own
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep -v -i '^torch\|^triton' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install -q -U -c $(NEWEST)/constraints.txt torch scikit-learn matplotlib rich scipy pytest \
		hypothesis expecttest setuptools -e ".[cpu]"
	$(NEWEST)/bin/python -m pytest -q tests/core tests/codec tests/backward tests/composition tests/kernels tests/quant

lint: $(STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pyright -p tests/typing

# bitsandbytes and torchao are compared where they are installed: pip install -e ".[bench]"
# Compiling takes most of the time, so it comes last.
BENCH := $(BIN)/python examples/benchmarks
bench: $(STAMP)  ## all benchmarks, into runs/bench
	$(BENCH)/kernels.py --only widths
	$(BENCH)/kernels.py --threads 1 --only codecs libraries small --out runs/bench/one_thread.json
	$(BENCH)/step_time.py --model every
	$(BENCH)/step_parts.py
	$(BENCH)/memory.py
	$(BENCH)/step_time.py --compiled --model every --out runs/bench/step_time_compiled.json
	$(BENCH)/plots.py

# Without network. Broken links, unknown names and unreachable pages are warnings, and warnings are errors.
SPHINX := $(BIN)/python -m sphinx -W --keep-going -n -q
docs: $(DOCS_STAMP)  ## the documentation site, into build/docs
	$(SPHINX) -b html -d build/doctrees docs build/docs
	@echo "open build/docs/index.html"

linkcheck: $(DOCS_STAMP)  ## the external links of the site (needs network)
	$(SPHINX) -b linkcheck -d build/doctrees docs build/linkcheck

dist: $(STAMP)  ## wheel and sdist, into dist
	$(BIN)/python -c "from hatchling.build import build_sdist, build_wheel; import os; \
		os.makedirs('dist', exist_ok=True); print(build_sdist('dist'), build_wheel('dist'))"

clean:  ## removes all that these targets made
	rm -rf $(VENV) build dist runs .pytest_cache .hypothesis .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and pinned: an unpinned one may bring gigabytes of another build.
	$(BIN)/python -m pip install -q -c constraints.txt torch torchvision
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[cpu,allocator,test,lint]"
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $(DOCS_STAMP)
