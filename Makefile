# Everything runs in .venv, made from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-newest lint bench docs clean

# Under the allocator that training on a CPU should have.
demo: $(STAMP)
	$(BIN)/python -m brevitas_bp.run examples/efficientnet_v2/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# Under the newest torch there is (gigabytes): with every change to what torch keeps private.
NEWEST := .venv-newest
test-newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep -v -i '^torch\|^triton' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install -q -U -c $(NEWEST)/constraints.txt torch scikit-learn matplotlib rich scipy pytest \
		hypothesis expecttest setuptools -e ".[cpu]"
	$(NEWEST)/bin/python -m pytest -q tests/core tests/codec tests/backward tests/composition tests/kernels tests/quant

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright

# bitsandbytes and torchao are compared where they are installed: pip install -e ".[bench]"
# Compiling takes most of the time, so it comes last.
BENCH := $(BIN)/python examples/benchmarks
bench: $(STAMP)
	$(BENCH)/kernels.py --only widths
	$(BENCH)/kernels.py --threads 1 --only codecs libraries small --out runs/bench/one_thread.json
	$(BENCH)/step_time.py --model every
	$(BENCH)/step_parts.py
	$(BENCH)/memory.py
	$(BENCH)/step_time.py --compiled --model every --out runs/bench/step_time_compiled.json
	$(BENCH)/plots.py

# Configs are injectors, which pydoc cannot read: docs/quantizers.md lists them.
DOCUMENTED := brevitas_bp brevitas_bp.allocate brevitas_bp.plots brevitas_bp.backward brevitas_bp.backward.operations brevitas_bp.backward.registry brevitas_bp.backward.policy \
	brevitas_bp.backward.rewrites brevitas_bp.backward.seam brevitas_bp.backward.wrapper \
	brevitas_bp.codec brevitas_bp.codec.base brevitas_bp.codec.regions brevitas_bp.memory brevitas_bp.memory_tables brevitas_bp.models.efficientnet_v2 brevitas_bp.models.blocks brevitas_bp.models.stage_outputs \
	brevitas_bp.core.bit_width brevitas_bp.activations.few_bit brevitas_bp.activations.functions brevitas_bp.core.int_quant brevitas_bp.core.rounding \
	brevitas_bp.format.reference brevitas_bp.format.packing brevitas_bp.format.random \
	brevitas_bp.grad brevitas_bp.grad.wrapper brevitas_bp.core.householder brevitas_bp.core.rows brevitas_bp.core.zero_in_range brevitas_bp.allocate.attribution \
	brevitas_bp.core.nested_floor brevitas_bp.core.learned brevitas_bp.nn.learned brevitas_bp.nn.learned.learning brevitas_bp.nn.learned.optimizing brevitas_bp.nn.learned.penalties \
	brevitas_bp.nn.learned.export brevitas_bp.nn.learned.integers brevitas_bp.nn brevitas_bp.nn.auxiliary.run brevitas_bp.nn.auxiliary.residual brevitas_bp.nn.auxiliary.sign \
	brevitas_bp.nn.auxiliary.convert brevitas_bp.nn.auxiliary.indicator brevitas_bp.nn.auxiliary.resnets \
	brevitas_bp.codec.two_frequencies brevitas_bp.codec.pooled brevitas_bp.codec.windowed brevitas_bp.codec.projected brevitas_bp.codec.sparse brevitas_bp.codec.fallback \
	brevitas_bp.testing brevitas_bp.testing.codecs brevitas_bp.testing.rounding brevitas_bp.testing.unbiased brevitas_bp.testing.limits

docs: $(STAMP)
	mkdir -p build/docs
	cd build/docs && ../../$(BIN)/python -m pydoc -w $(DOCUMENTED)

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .hypothesis .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and pinned: an unpinned one may bring gigabytes of another build.
	$(BIN)/python -m pip install -q -c constraints.txt torch torchvision
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[cpu,allocator,test,lint]"
	touch $(STAMP)
